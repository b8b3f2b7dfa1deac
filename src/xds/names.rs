//! Texts that many resources share, such as namespaces and clusters, kept once.

use std::collections::HashSet;
use std::sync::Arc;

use hbone::Identity;

use crate::mesh::workload::Locality;
use crate::proto::workload as proto;

/// So many are remembered at most; forgetting them costs copies, never correctness.
const LIMIT: usize = 1 << 16;

/// The texts met so far.
#[derive(Debug, Default)]
pub struct Names {
    texts: HashSet<Arc<str>>,
    identities: HashSet<Identity>,
    localities: HashSet<Arc<Locality>>,
}

impl Names {
    /// The text, shared with whoever had it before.
    pub fn text(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.texts.get(text) {
            return known.clone();
        }
        if self.texts.len() >= LIMIT {
            self.texts = HashSet::new();
        }
        let new: Arc<str> = text.into();
        self.texts.insert(new.clone());
        new
    }

    /// The identity, shared in the same way.
    pub fn identity(&mut self, identity: Identity) -> Identity {
        if let Some(known) = self.identities.get(&identity) {
            return known.clone();
        }
        if self.identities.len() >= LIMIT {
            self.identities = HashSet::new();
        }
        self.identities.insert(identity.clone());
        identity
    }

    /// The locality, shared in the same way.
    pub fn locality(&mut self, record: &proto::Locality) -> Arc<Locality> {
        let locality = Locality {
            region: self.text(&record.region),
            zone: self.text(&record.zone),
            subzone: self.text(&record.subzone),
        };
        if let Some(known) = self.localities.get(&locality) {
            return known.clone();
        }
        if self.localities.len() >= LIMIT {
            self.localities = HashSet::new();
        }
        let new = Arc::new(locality);
        self.localities.insert(new.clone());
        new
    }
}

/// The resource names under which a control plane may have the service of a hostname: its namespace is part of the name
/// of a Kubernetes service, else it is taken to be the client's own.
pub fn keys(hostname: &str, client: &str, domain: &str) -> Vec<String> {
    let kubernetes = hostname
        .strip_suffix(domain)
        .and_then(|rest| rest.strip_suffix(".svc."));
    match kubernetes.map(|rest| rest.split('.').collect::<Vec<_>>()) {
        Some(labels) => match labels[..] {
            [_, namespace] => vec![format!("{namespace}/{hostname}")],
            // Some search domain's attempt.
            _ => Vec::new(),
        },
        None => vec![format!("{client}/{hostname}")],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_equal_is_kept_once() {
        let mut names = Names::default();
        assert!(Arc::ptr_eq(&names.text("a"), &names.text("a")));
        assert!(!Arc::ptr_eq(&names.text("a"), &names.text("b")));
        let new = || Identity::new("td", "a", "b");
        let (first, second) = (names.identity(new()), names.identity(new()));
        assert_eq!(first.as_str().as_ptr(), second.as_str().as_ptr());
    }

    #[test]
    fn a_hostname_tells_the_namespace_of_a_kubernetes_service() {
        let keys = |hostname| super::keys(hostname, "a", "cluster.local");
        assert_eq!(
            keys("web.b.svc.cluster.local"),
            ["b/web.b.svc.cluster.local"]
        );
        assert_eq!(keys("example.com"), ["a/example.com"]);
        assert!(keys("example.com.a.svc.cluster.local").is_empty());
    }
}
