//! Which address belongs to what in a lab, and who gets the next one.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use thiserror::Error;
use xxhash_rust::xxh64::xxh64;

/// The control plane and the DNS server behind `DNS_SERVICE`, on the bridge between the nodes.
pub const CONTROL: Ipv4Addr = Ipv4Addr::new(10, 42, 255, 1);
/// The DNS server in every pod's `resolv.conf`.
pub const DNS_SERVICE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
/// Where the control plane listens.
pub const CONTROL_PORT: u16 = 15012;
/// The most nodes of a lab.
pub const MOST_NODES: u8 = 32;

const FIRST_NODE: u8 = 10;
const FIRST_POD: u8 = 2;

/// Why there is no address.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum AddressError {
    #[error("node {0} has no free pod address left")]
    NodeFull(usize),
    #[error("service {service}: clusterIP {address} is not an IPv4 address")]
    NotAnAddress { service: String, address: String },
    #[error("services {one} and {other} ask for the same clusterIP {address}")]
    Taken {
        one: String,
        other: String,
        address: Ipv4Addr,
    },
}

/// The network of the bridge, with the length of its prefix.
pub fn on_bridge(address: Ipv4Addr) -> Ipv4Net {
    Ipv4Net::new_assert(address, 24)
}

/// Exactly one address.
pub fn host(address: Ipv4Addr) -> Ipv4Net {
    Ipv4Net::new_assert(address, 32)
}

/// A node's address on the bridge.
pub fn node(index: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 42, 255, FIRST_NODE.saturating_add(index as u8))
}

/// The addresses of a node's pods.
pub fn pods_of(node: usize) -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(10, 42, node as u8, 0), 24)
}

/// The node as its pods see it.
pub fn gateway(node: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 42, node as u8, 1)
}

/// Gives out pod addresses; one that was given back is used again last.
#[derive(Debug, Default)]
pub struct PodAddresses {
    next: BTreeMap<usize, u8>,
    used: BTreeSet<Ipv4Addr>,
}

impl PodAddresses {
    pub fn take(&mut self, node: usize) -> Result<Ipv4Addr, AddressError> {
        let next = self.next.entry(node).or_insert(FIRST_POD);
        for _ in FIRST_POD..=254 {
            let address = Ipv4Addr::new(10, 42, node as u8, *next);
            *next = if *next == 254 { FIRST_POD } else { *next + 1 };
            if self.used.insert(address) {
                return Ok(address);
            }
        }
        Err(AddressError::NodeFull(node))
    }

    pub fn give_back(&mut self, address: Ipv4Addr) {
        self.used.remove(&address);
    }
}

/// Cluster addresses of services by `namespace/name`. `asked` is what `spec.clusterIP` says, if anything.
///
/// # Errors
/// The first service whose wish cannot be granted.
pub fn cluster_addresses<'a>(
    services: impl Iterator<Item = (String, Option<&'a str>)>,
) -> Result<BTreeMap<String, Ipv4Addr>, AddressError> {
    let mut owners: BTreeMap<Ipv4Addr, String> = BTreeMap::new();
    owners.insert(DNS_SERVICE, "kube-system/kube-dns".to_owned());
    let mut open = Vec::new();
    for (service, asked) in services {
        match asked {
            None | Some("") => open.push(service),
            Some("None") => {}
            Some(text) => {
                let Ok(address) = text.parse() else {
                    return Err(AddressError::NotAnAddress {
                        service,
                        address: text.to_owned(),
                    });
                };
                if let Some(other) = owners.insert(address, service.clone()) {
                    return Err(AddressError::Taken {
                        one: service,
                        other,
                        address,
                    });
                }
            }
        }
    }
    for service in open {
        // 10.96.1.0 to 10.96.254.255, from a place that the name gives.
        let range = 254 * 256;
        let start = (xxh64(service.as_bytes(), 0) % range) as u32;
        let address = (0..range as u32)
            .map(|step| 256 + (start + step) % range as u32)
            .map(|offset| Ipv4Addr::from_bits(Ipv4Addr::new(10, 96, 0, 0).to_bits() + offset))
            .find(|address| !owners.contains_key(address));
        if let Some(address) = address {
            owners.insert(address, service);
        }
    }
    owners.remove(&DNS_SERVICE);
    Ok(owners
        .into_iter()
        .map(|(address, service)| (service, address))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pod_addresses_are_given_in_order_and_reused_last() {
        let mut addresses = PodAddresses::default();
        let first = addresses.take(1).unwrap();
        assert_eq!(first, Ipv4Addr::new(10, 42, 1, 2));
        addresses.give_back(first);
        assert_eq!(addresses.take(1).unwrap(), Ipv4Addr::new(10, 42, 1, 3));
        for _ in 0..252 {
            addresses.take(1).unwrap();
        }
        assert_eq!(addresses.take(1), Err(AddressError::NodeFull(1)));
    }

    #[test]
    fn services_get_the_address_they_ask_for_or_a_stable_one() {
        let services = || {
            [
                ("a/x".to_owned(), None),
                ("a/y".to_owned(), Some("10.96.7.7")),
                ("a/headless".to_owned(), Some("None")),
            ]
            .into_iter()
        };
        let given = cluster_addresses(services()).unwrap();
        assert_eq!(given["a/y"], Ipv4Addr::new(10, 96, 7, 7));
        assert_eq!(given.len(), 2);
        assert_eq!(given, cluster_addresses(services()).unwrap());
        let twice = [
            ("a/x".to_owned(), Some("10.96.7.7")),
            ("a/y".to_owned(), Some("10.96.7.7")),
        ];
        assert!(cluster_addresses(twice.into_iter()).is_err());
    }
}
