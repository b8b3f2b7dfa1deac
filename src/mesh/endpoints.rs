//! A service's endpoints: by workload, and by number so that one can be picked without walking them.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::service::Endpoint;

/// A set of endpoints; a clone is cheap, and a change after it copies the set.
#[derive(Clone, Debug, Default)]
pub struct Endpoints(Arc<Set>);

#[derive(Clone, Debug, Default)]
struct Set {
    list: Vec<Endpoint>,
    positions: HashMap<Arc<str>, u32>,
    /// How many endpoints have each weight.
    weights: BTreeMap<u32, usize>,
}

impl Endpoints {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.list.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.list.is_empty()
    }

    /// The largest weight of an endpoint; zero without endpoints.
    pub fn heaviest(&self) -> u32 {
        let last = self.0.weights.last_key_value();
        last.map_or(0, |(weight, _)| *weight)
    }

    /// Whether all have the same weight.
    pub fn are_alike(&self) -> bool {
        self.0.weights.len() <= 1
    }

    /// Whether it is the very same set.
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// The endpoint at a position below `len`, in no particular order.
    pub fn at(&self, position: usize) -> Option<&Endpoint> {
        self.0.list.get(position)
    }

    /// A workload's endpoint.
    pub fn get(&self, workload_uid: &str) -> Option<&Endpoint> {
        self.0
            .list
            .get(*self.0.positions.get(workload_uid)? as usize)
    }

    /// All of them, in no particular order.
    pub fn iter(&self) -> impl Iterator<Item = &Endpoint> {
        self.0.list.iter()
    }

    /// Adds an endpoint or replaces its workload's former one.
    pub fn insert(&mut self, endpoint: Endpoint) {
        let set = Arc::make_mut(&mut self.0);
        *set.weights.entry(endpoint.capacity).or_default() += 1;
        match set.positions.get(&endpoint.workload_uid) {
            Some(position) => {
                let former = &mut set.list[*position as usize];
                let former = std::mem::replace(former, endpoint);
                set.unweigh(former.capacity);
            }
            None => {
                let position = set.list.len() as u32;
                set.positions
                    .insert(endpoint.workload_uid.clone(), position);
                set.list.push(endpoint);
            }
        }
    }

    /// Removes a workload's endpoint.
    pub fn remove(&mut self, workload_uid: &str) {
        if !self.0.positions.contains_key(workload_uid) {
            return;
        }
        let set = Arc::make_mut(&mut self.0);
        if let Some(position) = set.positions.remove(workload_uid) {
            let removed = set.list.swap_remove(position as usize);
            if let Some(moved) = set.list.get(position as usize) {
                set.positions.insert(moved.workload_uid.clone(), position);
            }
            set.unweigh(removed.capacity);
        }
    }
}

impl Set {
    fn unweigh(&mut self, weight: u32) {
        if let Some(count) = self.weights.get_mut(&weight) {
            *count -= 1;
            if *count == 0 {
                self.weights.remove(&weight);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::workload::HealthStatus;

    #[test]
    fn the_heaviest_weight_is_that_of_an_endpoint_there_is() {
        let endpoint = |uid: &str, capacity| Endpoint {
            workload_uid: uid.into(),
            ports: Default::default(),
            status: HealthStatus::Healthy,
            capacity,
        };
        let mut endpoints = Endpoints::default();
        let mut heaviest = Vec::new();
        for (uid, capacity) in [("a", 1), ("b", 100), ("c", 100), ("b", 2)] {
            endpoints.insert(endpoint(uid, capacity));
            heaviest.push(endpoints.heaviest());
        }
        for uid in ["c", "b", "a"] {
            endpoints.remove(uid);
            heaviest.push(endpoints.heaviest());
        }
        assert_eq!(heaviest, [1, 100, 100, 100, 2, 1, 0]);
    }

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
