//! SPIFFE identities: who a workload is.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use thiserror::Error;

/// `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`; cheap to clone.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Identity {
    text: Arc<str>,
    trust_domain_end: u32,
    namespace_end: u32,
}

/// A text that is no SPIFFE identity of a workload.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("invalid spiffe identity: {0}")]
pub struct IdentityError(pub String);

const SCHEME: &str = "spiffe://";

impl Identity {
    /// An identity of its three parts.
    pub fn new(trust_domain: &str, namespace: &str, service_account: &str) -> Self {
        let text = format!("{SCHEME}{trust_domain}/ns/{namespace}/sa/{service_account}");
        let trust_domain_end = SCHEME.len() + trust_domain.len();
        let namespace_end = trust_domain_end + "/ns/".len() + namespace.len();
        Self {
            text: text.into(),
            trust_domain_end: trust_domain_end as u32,
            namespace_end: namespace_end as u32,
        }
    }

    /// The trust domain.
    pub fn trust_domain(&self) -> &str {
        &self.text[SCHEME.len()..self.trust_domain_end as usize]
    }

    /// The Kubernetes namespace.
    pub fn namespace(&self) -> &str {
        &self.text[self.trust_domain_end as usize + "/ns/".len()..self.namespace_end as usize]
    }

    /// The Kubernetes service account.
    pub fn service_account(&self) -> &str {
        &self.text[self.namespace_end as usize + "/sa/".len()..]
    }

    /// The identity as policies name it, without the scheme.
    pub fn principal(&self) -> &str {
        &self.text[SCHEME.len()..]
    }

    /// The whole URI.
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

impl FromStr for Identity {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let invalid = || IdentityError(text.to_string());
        let rest = text.strip_prefix(SCHEME).ok_or_else(invalid)?;
        let parts: Vec<&str> = rest.split('/').collect();
        match parts[..] {
            [trust_domain, "ns", namespace, "sa", service_account] => {
                Ok(Self::new(trust_domain, namespace, service_account))
            }
            _ => Err(invalid()),
        }
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_survives_its_text() {
        let identity = Identity::new("cluster.local", "default", "curl");
        let text = "spiffe://cluster.local/ns/default/sa/curl";
        assert_eq!(identity.to_string(), text);
        assert_eq!(text.parse::<Identity>(), Ok(identity.clone()));
        assert_eq!(identity.trust_domain(), "cluster.local");
        assert_eq!(identity.namespace(), "default");
        assert_eq!(identity.service_account(), "curl");
        assert_eq!(identity.principal(), "cluster.local/ns/default/sa/curl");
    }

    #[test]
    fn other_shapes_are_refused() {
        for text in [
            "",
            "spiffe://",
            "spiffe://td/ns/a/sa/b/",
            "spiffe://td/ns/a/sa",
            "spiffe://td/sa/a/ns/b",
            "https://td/ns/a/sa/b",
            "spiffe://td/ns/a/sa/b/c",
        ] {
            assert!(text.parse::<Identity>().is_err(), "{text}");
        }
    }
}
