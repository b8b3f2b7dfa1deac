//! A service's endpoints: by workload, and by number so that one can be picked without walking them.

use std::sync::Arc;

use super::service::Endpoint;

/// A persistent set of endpoints; a clone is cheap.
#[derive(Clone, Debug, Default)]
pub struct Endpoints {
    list: imbl::Vector<Endpoint>,
    positions: imbl::HashMap<Arc<str>, usize>,
    /// No endpoint ever weighed more.
    heaviest: u32,
}

impl Endpoints {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// A weight that no endpoint exceeds.
    pub fn heaviest(&self) -> u32 {
        self.heaviest
    }

    /// The endpoint at a position below `len`, in no particular order.
    pub fn at(&self, position: usize) -> Option<&Endpoint> {
        self.list.get(position)
    }

    /// A workload's endpoint.
    pub fn get(&self, workload_uid: &str) -> Option<&Endpoint> {
        self.list.get(*self.positions.get(workload_uid)?)
    }

    /// All of them, in no particular order.
    pub fn iter(&self) -> impl Iterator<Item = &Endpoint> {
        self.list.iter()
    }

    /// Adds an endpoint or replaces its workload's former one.
    pub fn insert(&mut self, endpoint: Endpoint) {
        self.heaviest = self.heaviest.max(endpoint.capacity);
        match self.positions.get(&endpoint.workload_uid) {
            Some(position) => {
                self.list.set(*position, endpoint);
            }
            None => {
                self.positions
                    .insert(endpoint.workload_uid.clone(), self.list.len());
                self.list.push_back(endpoint);
            }
        }
    }

    /// Removes a workload's endpoint.
    pub fn remove(&mut self, workload_uid: &str) {
        let Some(position) = self.positions.remove(workload_uid) else {
            return;
        };
        let Some(last) = self.list.pop_back() else {
            return;
        };
        if position < self.list.len() {
            self.positions.insert(last.workload_uid.clone(), position);
            self.list.set(position, last);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::workload::HealthStatus;

    #[test]
    fn removal_keeps_the_others_findable() {
        let endpoint = |uid: &str| Endpoint {
            workload_uid: uid.into(),
            ports: Default::default(),
            status: HealthStatus::Healthy,
            capacity: 1,
        };
        let mut endpoints = Endpoints::default();
        for uid in ["a", "b", "c", "d", "b"] {
            endpoints.insert(endpoint(uid));
        }
        endpoints.remove("a");
        endpoints.remove("missing");
        endpoints.remove("d");
        let mut left: Vec<_> = endpoints
            .iter()
            .map(|endpoint| endpoint.workload_uid.to_string())
            .collect();
        left.sort();
        assert_eq!(left, ["b", "c"]);
        assert!(left.iter().all(|uid| {
            endpoints
                .get(uid)
                .is_some_and(|found| *found.workload_uid == **uid)
        }));
        assert_eq!((endpoints.get("a"), endpoints.at(2)), (None, None));
    }
}
