//! Which address belongs to what in a lab, and who gets the next one.
//!
//! The IPv6 plan is the IPv4 plan over again, with the same numbers for nodes, pods and services.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::IpNet;
use thiserror::Error;
use xxhash_rust::xxh64::xxh64;

use super::family::{Addresses, Family, IpFamily};

const CONTROL_PORT: u16 = 15012;
const API_PORT: u16 = 6443;
/// The most nodes of a lab.
pub const MOST_NODES: u8 = 32;

/// Where a node's number would stand, for what is on the bridge between the nodes.
const BRIDGE: u8 = 255;
const FIRST_NODE: u8 = 10;
const FIRST_POD: u8 = 2;
/// Services have the places 256 to 65279: 10.96.1.0 to 10.96.254.255, fd42:10:96::100 to fd42:10:96::feff.
const FIRST_SERVICE: u16 = 256;
const SERVICES: u16 = 254 * 256;
const DNS_PLACE: u16 = 10;

/// Why there is no address.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum AddressError {
    #[error("node {0} has no free pod address left")]
    NodeFull(usize),
    #[error("service {service}: clusterIP {address} is not an IP address")]
    NotAnAddress { service: String, address: String },
    #[error(
        "service {service}: clusterIP {address} is no {families} address; take it out, or start the lab with \
         another --ip-family"
    )]
    OtherFamily {
        service: String,
        address: IpAddr,
        families: String,
    },
    #[error(
        "service {service}: ipFamilies {asked:?} has none of this lab's; change it, or start the lab with another \
         --ip-family"
    )]
    NoFamily { service: String, asked: Vec<String> },
    #[error("services {one} and {other} ask for the same clusterIP {address}")]
    Taken {
        one: String,
        other: String,
        address: IpAddr,
    },
}

/// Host `host` of network `network`: 10.42.NETWORK.HOST, fd42:10:42:NETWORK::HOST.
fn place(family: Family, network: u8, host: u8) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(10, 42, network, host).into(),
        Family::V6 => {
            Ipv6Addr::new(0xfd42, 0x10, 0x42, network.into(), 0, 0, 0, host.into()).into()
        }
    }
}

/// The place of a service or of the DNS server.
fn service_place(family: Family, place: u16) -> IpAddr {
    match family {
        Family::V4 => {
            let [high, low] = place.to_be_bytes();
            Ipv4Addr::new(10, 96, high, low).into()
        }
        Family::V6 => Ipv6Addr::new(0xfd42, 0x10, 0x96, 0, 0, 0, 0, place).into(),
    }
}

/// A network of nodes or pods.
fn network(family: Family, network: u8) -> IpNet {
    on_network(place(family, network, 0))
}

/// An address of the bridge with the length of its network's prefix.
pub fn on_network(address: IpAddr) -> IpNet {
    IpNet::new_assert(address, if address.is_ipv6() { 64 } else { 24 })
}

/// Where a lab's control plane listens.
pub fn control_plane(lab: IpFamily) -> SocketAddr {
    SocketAddr::new(control(lab.first()), CONTROL_PORT)
}

/// Where the API server listens.
pub fn api_server(lab: IpFamily) -> SocketAddr {
    SocketAddr::new(control(lab.first()), API_PORT)
}

/// The control plane and the DNS server behind `dns`, on the bridge between the nodes.
pub fn control(family: Family) -> IpAddr {
    place(family, BRIDGE, 1)
}

/// The DNS server in every pod's `resolv.conf`.
pub fn dns(family: Family) -> IpAddr {
    service_place(family, DNS_PLACE)
}

/// A node's address on the bridge.
pub fn node(family: Family, index: usize) -> IpAddr {
    place(family, BRIDGE, FIRST_NODE.saturating_add(index as u8))
}

/// The addresses of a node's pods.
pub fn pods_of(family: Family, node: usize) -> IpNet {
    network(family, node as u8)
}

/// The node as its pods see it.
pub fn gateway(family: Family, node: usize) -> IpAddr {
    place(family, node as u8, 1)
}

/// A pod's address.
pub fn pod(family: Family, node: usize, number: PodNumber) -> IpAddr {
    place(family, node as u8, number.0)
}

/// Which of its node's pods a pod is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PodNumber(u8);

impl PodNumber {
    /// The node's interface towards the pod.
    pub fn interface(self) -> String {
        format!("pod{}", self.0)
    }
}

/// Gives out the numbers of pods; one that was given back is used again last.
#[derive(Debug, Default)]
pub struct PodNumbers {
    next: BTreeMap<usize, u8>,
    used: BTreeSet<(usize, PodNumber)>,
}

impl PodNumbers {
    pub fn take(&mut self, node: usize) -> Result<PodNumber, AddressError> {
        let next = self.next.entry(node).or_insert(FIRST_POD);
        for _ in FIRST_POD..=254 {
            let number = PodNumber(*next);
            *next = if *next == 254 { FIRST_POD } else { *next + 1 };
            if self.used.insert((node, number)) {
                return Ok(number);
            }
        }
        Err(AddressError::NodeFull(node))
    }

    pub fn give_back(&mut self, node: usize, number: PodNumber) {
        self.used.remove(&(node, number));
    }
}

/// What a service says about its addresses.
#[derive(Clone, Debug, Default)]
pub struct ServiceWish<'a> {
    /// `namespace/name`.
    pub service: String,
    /// `spec.clusterIPs`, or `spec.clusterIP`.
    pub addresses: Vec<&'a str>,
    /// `spec.ipFamilies`.
    pub families: Vec<&'a str>,
    /// `spec.ipFamilyPolicy`.
    pub policy: Option<&'a str>,
}

impl ServiceWish<'_> {
    /// The families of the service in a lab, in the order in which it names them; all of the lab's unless it wants
    /// one.
    ///
    /// # Errors
    /// When the lab has none of those it names.
    pub fn families(&self, lab: IpFamily) -> Result<Vec<Family>, AddressError> {
        let single = match self.policy {
            Some(policy) => policy == "SingleStack",
            None => self.families.len() == 1,
        };
        let known = |name: &&str| {
            let mut families = lab.families().iter().copied();
            families.find(|family| family.to_string() == **name)
        };
        let mut families: Vec<Family> = self.families.iter().filter_map(known).collect();
        if families.is_empty() && !self.families.is_empty() {
            return Err(AddressError::NoFamily {
                service: self.service.clone(),
                asked: self.families.iter().map(ToString::to_string).collect(),
            });
        }
        if families.is_empty() || !single {
            families.extend(lab.families());
        }
        let mut seen = BTreeSet::new();
        families.retain(|family| seen.insert(*family));
        if single {
            families.truncate(1);
        }
        Ok(families)
    }
}

/// Cluster addresses of services by `namespace/name`; none for those that want none.
///
/// # Errors
/// The first service whose wish cannot be granted.
pub fn cluster_addresses(
    lab: IpFamily,
    wishes: &[ServiceWish],
) -> Result<BTreeMap<String, Addresses>, AddressError> {
    let mut owners: BTreeMap<IpAddr, &str> = lab
        .families()
        .iter()
        .map(|family| (dns(*family), "kube-system/kube-dns"))
        .collect();
    let mut granted: BTreeMap<&str, Vec<IpAddr>> = BTreeMap::new();
    let mut given = BTreeMap::new();
    let with_address = |wish: &&ServiceWish| !wish.addresses.contains(&"None");
    for wish in wishes.iter().filter(with_address) {
        let families = wish.families(lab)?;
        let texts = wish.addresses.iter().filter(|text| !text.is_empty());
        for text in texts {
            let address = asked(wish, text, &families)?;
            if let Some(other) = owners.insert(address, &wish.service) {
                return Err(AddressError::Taken {
                    one: wish.service.clone(),
                    other: other.to_owned(),
                    address,
                });
            }
            granted.entry(&wish.service).or_default().push(address);
        }
    }
    for wish in wishes.iter().filter(with_address) {
        let families = wish.families(lab)?;
        let granted = granted.get(&*wish.service).map_or(&[][..], Vec::as_slice);
        // From a place that the name gives, so that it is the same in every run.
        let start = (xxh64(wish.service.as_bytes(), 0) % u64::from(SERVICES)) as u16;
        let free = (0..SERVICES)
            .map(|step| {
                FIRST_SERVICE + ((u32::from(start) + u32::from(step)) % u32::from(SERVICES)) as u16
            })
            .find(|place| {
                let taken = |family| owners.contains_key(&service_place(family, *place));
                !families.iter().any(|family| taken(*family))
            });
        let Some(free) = free else { continue };
        let addresses = Addresses::of_some(&families, |family| {
            let own = granted.iter().find(|own| Family::of(**own) == family);
            own.copied().unwrap_or_else(|| service_place(family, free))
        });
        if let Some(addresses) = addresses {
            owners.extend(addresses.iter().map(|address| (address, &*wish.service)));
            given.insert(wish.service.clone(), addresses);
        }
    }
    Ok(given)
}

/// An address that a service asks for.
fn asked(wish: &ServiceWish, text: &str, families: &[Family]) -> Result<IpAddr, AddressError> {
    let Ok(address) = text.parse() else {
        return Err(AddressError::NotAnAddress {
            service: wish.service.clone(),
            address: text.to_owned(),
        });
    };
    if !families.contains(&Family::of(address)) {
        let names: Vec<String> = families.iter().map(ToString::to_string).collect();
        return Err(AddressError::OtherFamily {
            service: wish.service.clone(),
            address,
            families: names.join(" or "),
        });
    }
    Ok(address)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wish<'a>(service: &str, addresses: &[&'a str]) -> ServiceWish<'a> {
        ServiceWish {
            service: service.to_owned(),
            addresses: addresses.to_vec(),
            ..ServiceWish::default()
        }
    }

    #[test]
    fn both_plans_count_alike() {
        let text = |address: IpAddr| address.to_string();
        assert_eq!(text(control(Family::V4)), "10.42.255.1");
        assert_eq!(text(control(Family::V6)), "fd42:10:42:ff::1");
        assert_eq!(text(dns(Family::V4)), "10.96.0.10");
        assert_eq!(text(dns(Family::V6)), "fd42:10:96::a");
        assert_eq!(text(node(Family::V6, 1)), "fd42:10:42:ff::b");
        assert_eq!(text(gateway(Family::V6, 1)), "fd42:10:42:1::1");
        assert_eq!(pods_of(Family::V4, 1).to_string(), "10.42.1.0/24");
        assert_eq!(pods_of(Family::V6, 1).to_string(), "fd42:10:42:1::/64");
        for family in [Family::V4, Family::V6] {
            let pod = pod(family, 3, PodNumber(200));
            assert!(pods_of(family, 3).contains(&pod), "{pod}");
            assert!(!on_network(control(family)).contains(&pod), "{pod}");
        }
    }

    #[test]
    fn pod_numbers_are_given_in_order_and_reused_last() {
        let mut numbers = PodNumbers::default();
        let first = numbers.take(1).unwrap();
        assert_eq!(first, PodNumber(2));
        assert_eq!(numbers.take(0).unwrap(), first);
        numbers.give_back(1, first);
        assert_eq!(numbers.take(1).unwrap(), PodNumber(3));
        for _ in 0..252 {
            numbers.take(1).unwrap();
        }
        assert_eq!(numbers.take(1), Err(AddressError::NodeFull(1)));
    }

    #[test]
    fn services_get_the_addresses_they_ask_for_or_stable_ones() {
        let wishes = [
            wish("a/x", &[]),
            wish("a/y", &["10.96.7.7"]),
            wish("a/headless", &["None"]),
        ];
        let given = cluster_addresses(IpFamily::Ipv4, &wishes).unwrap();
        assert_eq!(given["a/y"].to_string(), "10.96.7.7");
        assert_eq!(given.len(), 2);
        assert_eq!(given, cluster_addresses(IpFamily::Ipv4, &wishes).unwrap());
        let both = cluster_addresses(IpFamily::Dual, &wishes).unwrap();
        assert_eq!(both["a/y"].first(), given["a/y"].first());
        for name in ["a/x", "a/y"] {
            let v6 = both[name].get(Family::V6).unwrap();
            assert!(v6.to_string().starts_with("fd42:10:96::"), "{v6}");
        }
    }

    #[test]
    fn a_service_in_a_lab_of_two_families_may_want_one() {
        let mut only = wish("a/only", &[]);
        only.families = vec!["IPv6"];
        let families = |wish: &ServiceWish, lab| wish.families(lab).map_err(|e| e.to_string());
        assert_eq!(families(&only, IpFamily::Dual), Ok(vec![Family::V6]));
        let given = cluster_addresses(IpFamily::Dual, &[only.clone()]).unwrap();
        assert_eq!(given["a/only"].get(Family::V4), None);
        let error = families(&only, IpFamily::Ipv4).unwrap_err();
        assert!(error.contains("service a/only: ipFamilies [\"IPv6\"]"));
        only.policy = Some("PreferDualStack");
        let both = Ok(vec![Family::V6, Family::V4]);
        assert_eq!(families(&only, IpFamily::Dual), both);
        only.policy = None;
        only.families = vec!["IPv6", "IPv4"];
        assert_eq!(families(&only, IpFamily::Dual), both);
        only.families.clear();
        only.policy = Some("SingleStack");
        assert_eq!(families(&only, IpFamily::Dual), Ok(vec![Family::V4]));
    }

    #[test]
    fn wishes_that_cannot_be_granted_are_told() {
        let error =
            |lab, wishes: &[ServiceWish]| cluster_addresses(lab, wishes).unwrap_err().to_string();
        let twice = [wish("a/x", &["10.96.7.7"]), wish("a/y", &["10.96.7.7"])];
        assert_eq!(
            error(IpFamily::Dual, &twice),
            "services a/y and a/x ask for the same clusterIP 10.96.7.7"
        );
        assert!(error(IpFamily::Ipv6, &twice).contains("clusterIP 10.96.7.7 is no IPv6 address"));
        assert_eq!(
            error(IpFamily::Dual, &[wish("a/x", &["nonsense"])]),
            "service a/x: clusterIP nonsense is not an IP address"
        );
        assert!(error(IpFamily::Ipv6, &[wish("a/x", &["fd42:10:96::a"])]).contains("kube-dns"));
    }
}
