//! What a proxy wants to know of one type of resources: all there are, or what it asks for by name or address.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use prost_types::Any;

use super::server::{Snapshot, TYPES};
use crate::proto::discovery::Resource;
use crate::proto::workload::{Address, NetworkAddress, address};
use crate::xds::resources::ip;

/// How addresses are found by other names than their own.
#[derive(Debug, Default)]
pub struct Index {
    /// `network/ip` to the resource; workloads before services.
    aliases: HashMap<String, String>,
    /// The same by resource.
    names: HashMap<String, Vec<String>>,
    /// The workloads of a service.
    members: HashMap<String, Vec<String>>,
    /// The workloads of a node.
    nodes: HashMap<String, Vec<String>>,
}

impl Index {
    /// Of all addresses.
    pub fn new(addresses: &BTreeMap<String, Address>) -> Self {
        let mut index = Self::default();
        let workloads = addresses
            .iter()
            .filter_map(|(name, address)| match &address.r#type {
                Some(address::Type::Workload(workload)) => Some((name, workload)),
                _ => None,
            });
        for (name, workload) in workloads {
            for bytes in &workload.addresses {
                index.alias(&workload.network, bytes, None, name);
            }
            for service in workload.services.keys() {
                let members = index.members.entry(service.clone()).or_default();
                members.push(name.clone());
            }
            let node = index.nodes.entry(workload.node.clone()).or_default();
            node.push(name.clone());
        }
        for (name, address) in addresses {
            if let Some(address::Type::Service(service)) = &address.r#type {
                for NetworkAddress {
                    network,
                    address,
                    length,
                } in &service.addresses
                {
                    index.alias(network, address, *length, name);
                }
            }
        }
        index
    }

    fn alias(&mut self, network: &str, address: &[u8], length: Option<u32>, name: &str) {
        let Ok(ip) = ip(address) else { return };
        let full = if ip.is_ipv4() { 32 } else { 128 };
        let alias = match length.filter(|length| *length != full) {
            None => format!("{network}/{ip}"),
            Some(length) => format!("{network}/{ip}/{length}"),
        };
        let names = self.names.entry(name.to_string()).or_default();
        names.push(alias.clone());
        self.aliases
            .entry(alias)
            .or_insert_with(|| name.to_string());
    }

    /// The range that an address is in, if the address is not known by itself.
    fn around(&self, network: &str, ip: IpAddr) -> Option<&String> {
        let longest = if ip.is_ipv4() { 31 } else { 127 };
        (0..=longest).rev().find_map(|length| {
            let range = ipnet::IpNet::new(ip, length).ok()?.trunc();
            self.aliases
                .get(&format!("{network}/{}/{length}", range.addr()))
        })
    }
}

/// What changed for a proxy.
#[derive(Debug, Default)]
pub struct Update {
    pub resources: Vec<Resource>,
    pub removed: Vec<String>,
}

/// One proxy's interest in one type.
#[derive(Debug)]
pub struct Subscription {
    /// What it holds: name to version.
    held: BTreeMap<String, String>,
    /// What it asked for, if it does not want everything.
    demand: Option<BTreeSet<String>>,
    /// What it asked for and was told to be missing.
    missing: BTreeSet<String>,
}

impl Subscription {
    /// Of a proxy's first request of the type.
    pub fn new(
        held: BTreeMap<String, String>,
        subscribed: &[String],
        unsubscribed: &[String],
    ) -> Self {
        let all = |names: &[String]| names.iter().any(|name| name == "*");
        let everything = subscribed.is_empty() || all(subscribed) && !all(unsubscribed);
        Self {
            held,
            demand: (!everything).then(BTreeSet::new),
            missing: BTreeSet::new(),
        }
    }

    /// Notes what the proxy wants from now on and what no more.
    pub fn change(&mut self, subscribed: &[String], unsubscribed: &[String]) {
        let Some(demand) = &mut self.demand else {
            return;
        };
        let named = |names: &[String]| -> Vec<String> {
            let named = names.iter().filter(|name| *name != "*");
            named.cloned().collect()
        };
        demand.extend(named(subscribed));
        for name in named(unsubscribed) {
            demand.remove(&name);
            self.missing.remove(&name);
        }
    }

    /// What the proxy lacks, and all of what it has just asked for; it holds that from then on.
    pub fn update(
        &mut self,
        snapshot: &Snapshot,
        index: usize,
        node: &str,
        asked: &[String],
    ) -> Update {
        let current = &snapshot.types[index];
        let mut update = Update::default();
        let mut forced = BTreeSet::new();
        let wanted = self.demand.as_ref().map(|demand| {
            let mut wanted: BTreeSet<&str> = BTreeSet::new();
            for key in demand {
                let found = snapshot.find(index, key);
                if found.is_empty() {
                    let new = self.missing.insert(key.clone());
                    if (new || asked.contains(key)) && !self.held.contains_key(key) {
                        update.removed.push(key.clone());
                    }
                } else {
                    self.missing.remove(key);
                }
                if asked.contains(key) {
                    forced.extend(found.iter().copied());
                }
                wanted.extend(found);
            }
            let nearby = snapshot.index.nodes.get(node);
            wanted.extend(nearby.into_iter().flatten().map(String::as_str));
            wanted
        });
        let is_wanted = |name: &str| wanted.as_ref().is_none_or(|wanted| wanted.contains(name));
        let gone = |name: &&String| !current.contains_key(*name);
        update
            .removed
            .extend(self.held.keys().filter(gone).cloned());
        self.held.retain(|name, _| current.contains_key(name));
        for (name, encoded) in current.iter().filter(|(name, _)| is_wanted(name)) {
            let known = self.held.get(name) == Some(&encoded.version);
            if known && !forced.contains(name.as_str()) {
                continue;
            }
            let any = Any {
                type_url: TYPES[index].to_string(),
                value: encoded.value.clone(),
            };
            let aliases = snapshot.index.names.get(name);
            update.resources.push(Resource {
                version: encoded.version.clone(),
                resource: Some(any),
                name: name.clone(),
                // Only who asks for single resources knows them by other names.
                aliases: aliases
                    .filter(|_| wanted.is_some())
                    .cloned()
                    .unwrap_or_default(),
            });
            self.held.insert(name.clone(), encoded.version.clone());
        }
        update
    }
}

impl Snapshot {
    /// The resources that a key means: one of that name or address, and if it is a service, its workloads.
    fn find<'a>(&'a self, index: usize, key: &'a str) -> Vec<&'a str> {
        let current = &self.types[index];
        let name = match current.contains_key(key) {
            true => Some(key),
            false => self.index.aliases.get(key).map(String::as_str),
        };
        let around = || {
            let (network, ip) = key.split_once('/')?;
            let found = self.index.around(network, ip.parse().ok()?)?;
            Some(found.as_str())
        };
        let Some(name) = name.or_else(around) else {
            return Vec::new();
        };
        let members = self.index.members.get(name).into_iter().flatten();
        std::iter::once(name)
            .chain(members.map(String::as_str))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::translate::Resources;

    fn snapshot() -> Snapshot {
        let workload = |uid: &str, node: &str, last: u8| {
            let record = crate::proto::workload::Workload {
                uid: uid.into(),
                node: node.into(),
                addresses: vec![vec![10, 0, 0, last]],
                services: [("b/web".to_string(), Default::default())].into(),
                ..Default::default()
            };
            let address = Address {
                r#type: Some(address::Type::Workload(record)),
            };
            (uid.to_string(), address)
        };
        let at = |address: [u8; 4], length| NetworkAddress {
            network: String::new(),
            address: address.to_vec(),
            length,
        };
        let service = crate::proto::workload::Service {
            addresses: vec![at([10, 96, 0, 1], None), at([10, 5, 0, 0], Some(16))],
            ..Default::default()
        };
        let service = Address {
            r#type: Some(address::Type::Service(service)),
        };
        let addresses = [
            workload("near", "n1", 1),
            workload("far", "n2", 2),
            ("b/web".to_string(), service),
        ];
        let resources = Resources {
            addresses: addresses.into(),
            ..Resources::default()
        };
        Snapshot::new(1, &resources, &Default::default())
    }

    fn names(update: &Update) -> (Vec<&str>, Vec<&str>) {
        let resources = update.resources.iter().map(|resource| &*resource.name);
        let removed = update.removed.iter().map(String::as_str);
        (resources.collect(), removed.collect())
    }

    fn nothing() -> Subscription {
        let all = ["*".to_string()];
        Subscription::new(BTreeMap::new(), &all, &all)
    }

    #[test]
    fn who_asks_for_nothing_gets_the_workloads_of_its_node() {
        let mut subscription = nothing();
        let update = subscription.update(&snapshot(), 0, "n1", &[]);
        assert_eq!(names(&update), (vec!["near"], vec![]));
        assert_eq!(update.resources[0].aliases, ["/10.0.0.1"]);
        let again = subscription.update(&snapshot(), 0, "n1", &[]);
        assert_eq!(names(&again), (vec![], vec![]));
    }

    #[test]
    fn what_is_asked_for_comes_by_name_by_address_and_by_range() {
        let whole = vec!["b/web", "far", "near"];
        for key in ["b/web", "/10.96.0.1", "/10.5.7.7"] {
            let mut subscription = nothing();
            let asked = [key.to_string()];
            subscription.change(&asked, &[]);
            let update = subscription.update(&snapshot(), 0, "n3", &asked);
            assert_eq!(names(&update), (whole.clone(), vec![]), "{key}");
            // Asked again it comes again, since somebody waits for it.
            let update = subscription.update(&snapshot(), 0, "n3", &asked);
            assert_eq!(names(&update), (whole.clone(), vec![]), "{key}");
        }
        let mut subscription = nothing();
        let asked = ["/10.0.0.2".to_string()];
        subscription.change(&asked, &[]);
        let update = subscription.update(&snapshot(), 0, "n3", &asked);
        assert_eq!(names(&update), (vec!["far"], vec![]));
    }

    #[test]
    fn what_is_not_there_is_told_as_removed() {
        let mut subscription = nothing();
        let asked = ["/10.9.9.9".to_string(), "b/none".to_string()];
        subscription.change(&asked, &[]);
        let update = subscription.update(&snapshot(), 0, "n3", &asked);
        assert_eq!(names(&update), (vec![], vec!["/10.9.9.9", "b/none"]));
        let again = subscription.update(&snapshot(), 0, "n3", &[]);
        assert_eq!(names(&again), (vec![], vec![]));
    }

    #[test]
    fn who_wants_everything_gets_it_without_other_names() {
        let mut subscription = Subscription::new(BTreeMap::new(), &[], &[]);
        let update = subscription.update(&snapshot(), 0, "n1", &[]);
        assert_eq!(names(&update), (vec!["b/web", "far", "near"], vec![]));
        assert!(update.resources.iter().all(|one| one.aliases.is_empty()));
    }
}
