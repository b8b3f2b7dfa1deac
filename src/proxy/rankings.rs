//! The rankings of endpoints that a pod's flows need again and again.

use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

use crate::mesh::balance::{Purpose, Ranking, RankingOf};
use crate::mesh::endpoints::Endpoints;
use crate::mesh::workload::Locality;
use crate::mesh::{NamespacedHostname, Service, Workload};

/// So many are kept.
const KEPT: usize = 64;
/// Below this a service's endpoints are looked through as quickly as its ranking is found.
const FEW: usize = 32;

/// What is known, by service, port and purpose.
#[derive(Default)]
pub struct Rankings(HashMap<(NamespacedHostname, u16, Purpose), Known>);

struct Known {
    service: Arc<Service>,
    endpoints: Endpoints,
    client: Client,
    ranking: Rc<Ranking>,
}

/// What of the client a ranking depends on.
#[derive(PartialEq, Eq)]
struct Client {
    network: Arc<str>,
    node: Arc<str>,
    cluster: Arc<str>,
    locality: Arc<Locality>,
}

impl Client {
    fn of(workload: &Workload) -> Self {
        Self {
            network: workload.network.clone(),
            node: workload.node.clone(),
            cluster: workload.cluster_id.clone(),
            locality: workload.locality.clone(),
        }
    }
}

impl Rankings {
    /// The ranking, computed if it is not known or something that it depends on has changed.
    pub fn get(&mut self, of: RankingOf<'_>, compute: &dyn Fn() -> Ranking) -> Rc<Ranking> {
        let entry = of.entry;
        if entry.endpoints.len() < FEW {
            return Rc::new(compute());
        }
        let (key, client) = (
            (entry.service.key(), of.port, of.purpose),
            Client::of(of.client),
        );
        if let Some(known) = self.0.get(&key)
            && known.endpoints.is(&entry.endpoints)
            && Arc::ptr_eq(&known.service, &entry.service)
            && known.client == client
        {
            return known.ranking.clone();
        }
        if self.0.len() >= KEPT {
            self.0.clear();
        }
        let ranking = Rc::new(compute());
        let known = Known {
            service: entry.service.clone(),
            endpoints: entry.endpoints.clone(),
            client,
            ranking: ranking.clone(),
        };
        self.0.insert(key, known);
        ranking
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::mesh::Store;
    use crate::mesh::store::AddressResource as Resource;
    use crate::mesh::testing::{pod, service, serving};

    #[test]
    fn a_ranking_is_computed_again_only_when_something_has_changed() {
        let mut store = Store::new("");
        let web = service("b", "web", "10.96.0.1");
        let member = |number: usize| {
            let ip = format!("10.0.1.{number}");
            Resource::Workload(serving(pod("b", &format!("web-{number}"), &ip), &web))
        };
        store.apply_addresses((0..FEW).map(member).collect(), &[]);
        store.apply_addresses(vec![Resource::Service(web.clone())], &[]);
        let computed = Cell::new(0);
        let mut rankings = Rankings::default();
        let mut get = |store: &Store, client: &Workload, port| {
            let mesh = store.snapshot();
            let of = RankingOf {
                entry: mesh.service_entry(&web.key()).unwrap(),
                client,
                port,
                purpose: Purpose::Serve,
            };
            rankings.get(of, &|| {
                computed.set(computed.get() + 1);
                Ranking::default()
            });
            computed.get()
        };
        let client = pod("a", "client", "10.0.0.1");
        assert_eq!(get(&store, &client, 80), 1);
        assert_eq!(get(&store, &client, 80), 1);
        store.apply_addresses(vec![Resource::Workload(pod("a", "x", "10.0.0.7"))], &[]);
        assert_eq!(
            get(&store, &client, 80),
            1,
            "nothing of the service changed"
        );
        assert_eq!(get(&store, &client, 81), 2);
        store.apply_addresses(vec![member(FEW)], &[]);
        assert_eq!(get(&store, &client, 80), 3);
        let mut moved = client.clone();
        moved.node = "elsewhere".into();
        assert_eq!(get(&store, &moved, 80), 4);
        store.apply_addresses(vec![Resource::Service(web.clone())], &[]);
        assert_eq!(get(&store, &moved, 80), 5);
    }
}
