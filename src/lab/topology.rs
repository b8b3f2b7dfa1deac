//! The lab's network: a bridge, nodes on it, pods behind the nodes. Everything is routed, nothing leads outside.

use std::fs::DirBuilder;
use std::io::{Error, ErrorKind, Result};
use std::net::Ipv4Addr;
use std::path::PathBuf;

use super::addresses;
use super::links::Links;
use super::namespaces::{Etc, Namespaces, set};
use super::state::StateDir;

/// The bridge between the nodes.
pub const BRIDGE: &str = "wbr0";

/// A machine of the lab.
#[derive(Clone, Debug)]
pub struct Node {
    pub name: String,
    pub index: usize,
    pub address: Ipv4Addr,
    pub namespaces: Namespaces,
    /// Where the node keeps its files.
    pub folder: PathBuf,
}

/// Builds the bridge in the namespace of the calling thread, and the nodes.
///
/// # Errors
/// The step that failed, with the remedy where one is known.
pub fn build(dir: &StateDir, nodes: u8) -> Result<Vec<Node>> {
    let mut links = Links::open()?;
    links.up("lo")?;
    links
        .bridge(BRIDGE)
        .map_err(|e| missing_in_kernel(&e, "bridge"))?;
    links.address(BRIDGE, addresses::on_bridge(addresses::CONTROL))?;
    links.address("lo", addresses::host(addresses::DNS_SERVICE))?;
    // Only there when the bridge filter is loaded, and then of no use here.
    let _ = set("net/bridge/bridge-nf-call-iptables", "0");
    let count = usize::from(nodes);
    (0..count)
        .map(|index| node(dir, &mut links, index, count))
        .collect()
}

fn node(dir: &StateDir, links: &mut Links, index: usize, count: usize) -> Result<Node> {
    let name = format!("node-{index}");
    let folder = dir.folder(format!("nodes/{name}"))?;
    let address = addresses::node(index);
    let names = [(address.to_string(), name.clone())];
    let etc = Etc::resolver(&addresses::CONTROL.to_string(), "", &names);
    let namespaces = Namespaces::create(&folder, &etc)?;
    namespaces.forward()?;
    links
        .veth(&name, "eth0", namespaces.network())
        .map_err(|e| missing_in_kernel(&e, "veth"))?;
    links.join_bridge(&name, BRIDGE)?;
    links.route_via(addresses::pods_of(index), address)?;
    namespaces.run(|| {
        let mut links = Links::open()?;
        links.address("eth0", addresses::on_bridge(address))?;
        links.up("eth0")?;
        links.route_via(addresses::host(addresses::DNS_SERVICE), addresses::CONTROL)?;
        for other in (0..count).filter(|other| *other != index) {
            links.route_via(addresses::pods_of(other), addresses::node(other))?;
        }
        Ok(())
    })?;
    Ok(Node {
        name,
        index,
        address,
        namespaces,
        folder,
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
        address: Ipv4Addr,
        etc: &Etc,
    ) -> Result<Namespaces> {
        DirBuilder::new().recursive(true).create(folder)?;
        let pod = Namespaces::create(folder, etc)?;
        let interface = pod_interface(address);
        let gateway = addresses::gateway(self.index);
        self.namespaces.run(|| {
            let mut links = Links::open()?;
            links.veth(&interface, "eth0", pod.network())?;
            links.address(&interface, addresses::host(gateway))?;
            links.route_on(addresses::host(address), &interface)
        })?;
        pod.run(|| {
            let mut links = Links::open()?;
            links.address("eth0", addresses::host(address))?;
            links.up("eth0")?;
            links.route_on(addresses::host(gateway), "eth0")?;
            links.route_via(ipnet::Ipv4Net::default(), gateway)
        })?;
        Ok(pod)
    }

    /// Cuts a pod off; its namespaces go when their last process has gone.
    pub fn remove_pod(&self, address: Ipv4Addr) -> Result<()> {
        let interface = pod_interface(address);
        self.namespaces.run(|| Links::open()?.remove(&interface))
    }
}

fn pod_interface(address: Ipv4Addr) -> String {
    format!("pod{}", address.octets()[3])
}

fn missing_in_kernel(reason: &Error, module: &str) -> Error {
    let text = if reason.kind() == ErrorKind::Unsupported {
        format!("this kernel has no {module} interfaces; load them with: sudo modprobe {module}")
    } else {
        format!("making the {module}: {reason}")
    };
    Error::new(reason.kind(), text)
}
