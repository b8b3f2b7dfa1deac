//! The lab's network: a bridge, nodes on it, pods behind the nodes. Everything is routed, nothing leads outside.

use std::fs::DirBuilder;
use std::io::{Error, ErrorKind, Result};
use std::net::IpAddr;
use std::path::PathBuf;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::addresses::{self, PodNumber};
use super::family::{Addresses, Family, IpFamily};
use super::links::Links;
use super::namespaces::{Etc, Namespaces, allow_ipv6, set};
use super::state::StateDir;

/// The bridge between the nodes.
pub const BRIDGE: &str = "wbr0";

/// A machine of the lab.
#[derive(Clone, Debug)]
pub struct Node {
    pub name: String,
    pub index: usize,
    pub addresses: Addresses,
    pub namespaces: Namespaces,
    /// Where the node keeps its files.
    pub folder: PathBuf,
    families: IpFamily,
}

/// Builds the bridge in the namespace of the calling thread, and the nodes.
///
/// # Errors
/// The step that failed, with the remedy where one is known.
pub fn build(dir: &StateDir, nodes: u8, families: IpFamily) -> Result<Vec<Node>> {
    if families.has_ipv6() {
        allow_ipv6()?;
    }
    let mut links = Links::open()?;
    links.up("lo")?;
    links
        .bridge(BRIDGE)
        .map_err(|e| missing_in_kernel(&e, "bridge"))?;
    for family in families.families() {
        let control = addresses::control(*family);
        links.address(BRIDGE, addresses::on_network(control))?;
        links.address("lo", addresses::dns(*family).into())?;
    }
    for filter in ["iptables", "ip6tables"] {
        // Only there when the bridge filter is loaded, and then of no use here.
        let _ = set(&format!("net/bridge/bridge-nf-call-{filter}"), "0");
    }
    let count = usize::from(nodes);
    (0..count)
        .map(|index| node(dir, &mut links, index, count, families))
        .collect()
}

fn node(
    dir: &StateDir,
    links: &mut Links,
    index: usize,
    count: usize,
    families: IpFamily,
) -> Result<Node> {
    let name = format!("node-{index}");
    let folder = dir.folder(format!("nodes/{name}"))?;
    let own = Addresses::of(families, |family| addresses::node(family, index));
    let servers = Addresses::of(families, addresses::control);
    let etc = Etc::resolver(&servers, "", &name, &own);
    let namespaces = Namespaces::create(&folder, &etc, families)?;
    namespaces.forward(families)?;
    links
        .veth(&name, "eth0", namespaces.network())
        .map_err(|e| missing_in_kernel(&e, "veth"))?;
    links.join_bridge(&name, BRIDGE)?;
    namespaces.run(|| {
        let mut links = Links::open()?;
        for address in own.iter() {
            links.address("eth0", addresses::on_network(address))?;
        }
        links.up("eth0")?;
        for &family in families.families() {
            links.route_via(addresses::dns(family).into(), addresses::control(family))?;
            for other in (0..count).filter(|other| *other != index) {
                let via = addresses::node(family, other);
                links.route_via(addresses::pods_of(family, other), via)?;
            }
        }
        Ok(())
    })?;
    for address in own.iter() {
        links.route_via(addresses::pods_of(Family::of(address), index), address)?;
    }
    Ok(Node {
        name,
        index,
        addresses: own,
        namespaces,
        folder,
        families,
    })
}

impl Node {
    /// Makes a pod's namespaces and connects them to this node.
    ///
    /// # Errors
    /// The step that failed.
    pub fn pod(
        &self,
        folder: &std::path::Path,
        number: PodNumber,
        search: &str,
        name: &str,
    ) -> Result<Namespaces> {
        DirBuilder::new().recursive(true).create(folder)?;
        let own = self.pod_addresses(number);
        let servers = Addresses::of(self.families, addresses::dns);
        let etc = Etc::resolver(&servers, search, name, &own);
        let pod = Namespaces::create(folder, &etc, self.families)?;
        let interface = number.interface();
        let gateway = |address| addresses::gateway(Family::of(address), self.index);
        self.namespaces.run(|| {
            let mut links = Links::open()?;
            links.veth(&interface, "eth0", pod.network())?;
            for address in own.iter() {
                links.address(&interface, gateway(address).into())?;
                links.route_on(address.into(), &interface)?;
            }
            Ok(())
        })?;
        pod.run(|| {
            let mut links = Links::open()?;
            links.up("eth0")?;
            for address in own.iter() {
                links.address("eth0", address.into())?;
                links.route_on(gateway(address).into(), "eth0")?;
                links.route_via(everything(address), gateway(address))?;
            }
            Ok(())
        })?;
        Ok(pod)
    }

    /// The addresses of a pod of this node.
    pub fn pod_addresses(&self, number: PodNumber) -> Addresses {
        let address = |family| addresses::pod(family, self.index, number);
        Addresses::of(self.families, address)
    }

    /// Cuts a pod off; its namespaces go when their last process has gone.
    pub fn remove_pod(&self, number: PodNumber) -> Result<()> {
        let interface = number.interface();
        self.namespaces.run(|| Links::open()?.remove(&interface))
    }
}

/// Every address of the family of one.
fn everything(address: IpAddr) -> IpNet {
    match address {
        IpAddr::V4(_) => Ipv4Net::default().into(),
        IpAddr::V6(_) => Ipv6Net::default().into(),
    }
}

fn missing_in_kernel(reason: &Error, module: &str) -> Error {
    let text = if reason.kind() == ErrorKind::Unsupported {
        format!("this kernel has no {module} interfaces; load them with: sudo modprobe {module}")
    } else {
        format!("making the {module}: {reason}")
    };
    Error::new(reason.kind(), text)
}
