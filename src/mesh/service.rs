//! Services: names and virtual addresses in front of workloads.

use std::sync::Arc;

use ipnet::IpNet;

use super::workload::{GatewayAddress, HealthStatus, NamespacedHostname, NetworkAddress, Ports};

/// Something two workloads may have in common, for ranking endpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    Network,
    Region,
    Zone,
    Subzone,
    Node,
    Cluster,
}

/// What a service does with its endpoint ranking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BalanceMode {
    /// Every endpoint alike.
    Standard,
    /// Only endpoints that match every preference.
    Strict,
    /// The best-ranked endpoints there are.
    Failover,
    /// No balancing: flows go where they were addressed.
    Passthrough,
}

/// Which endpoints count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HealthPolicy {
    OnlyHealthy,
    AllowAll,
}

/// How a service picks among its endpoints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadBalancer {
    pub routing_preferences: Vec<Scope>,
    pub mode: BalanceMode,
    pub health_policy: HealthPolicy,
}

/// The address families a service answers with; none given is automatic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IpFamilies {
    Dual,
    Ipv4,
    Ipv6,
}

/// Who may see a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Visibility {
    Public,
    /// Only clients of the service's own namespace.
    Namespace,
}

/// A range of addresses on a network that belong to a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CidrAddress {
    pub network: Arc<str>,
    pub cidr: IpNet,
}

/// A waypoint that takes its share of a service's flows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightedWaypoint {
    pub destination: GatewayAddress,
    pub weight: u32,
}

/// One service record of the control plane (its endpoints live beside it, in the mesh).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    pub name: Arc<str>,
    pub namespace: Arc<str>,
    pub hostname: Arc<str>,
    pub vips: Vec<NetworkAddress>,
    pub cidr_vips: Vec<CidrAddress>,
    pub ports: Ports,
    /// Further identities that its endpoints may present, as written; may hold invalid ones.
    pub subject_alt_names: Vec<Arc<str>>,
    pub waypoint: Option<Box<GatewayAddress>>,
    pub weighted_waypoints: Vec<WeightedWaypoint>,
    pub load_balancer: Option<LoadBalancer>,
    pub ip_families: Option<IpFamilies>,
    pub canonical: bool,
    pub visibility: Visibility,
}

impl Service {
    /// The key that workloads and references name it by.
    pub fn key(&self) -> NamespacedHostname {
        NamespacedHostname {
            namespace: self.namespace.clone(),
            hostname: self.hostname.clone(),
        }
    }
}

/// A workload's part in a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    pub workload_uid: Arc<str>,
    pub ports: Ports,
    pub status: HealthStatus,
    /// Its weight among the service's endpoints.
    pub capacity: u32,
}
