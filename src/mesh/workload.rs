//! Workloads: what runs behind an address, and where it may be reached.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use hbone::{Baggage, Identity};

use super::few::{Few, SmallMap};

/// An address on a named network; the empty name is the default network.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NetworkAddress {
    pub network: Arc<str>,
    pub address: IpAddr,
}

impl fmt::Display for NetworkAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.address)
    }
}

/// A hostname within a Kubernetes namespace.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NamespacedHostname {
    pub namespace: Arc<str>,
    pub hostname: Arc<str>,
}

impl fmt::Display for NamespacedHostname {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.hostname)
    }
}

/// What a gateway reference points at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GatewayDestination {
    Address(NetworkAddress),
    Hostname(NamespacedHostname),
}

impl fmt::Display for GatewayDestination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Hostname(hostname) => hostname.fmt(f),
        }
    }
}

/// A waypoint or network gateway and its HBONE port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GatewayAddress {
    pub destination: GatewayDestination,
    pub hbone_mtls_port: u16,
}

/// How a workload is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    Tcp,
    Hbone,
}

/// Whether a workload's addresses are its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NetworkMode {
    Standard,
    HostNetwork,
}

/// Whether a workload takes traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HealthStatus {
    Healthy,
    Unhealthy,
}

/// The kind of object that made the workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WorkloadType {
    Deployment,
    CronJob,
    Pod,
    Job,
}

impl WorkloadType {
    /// The lower-case name, as in `k8s.<type>.name` and the configuration dump.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Deployment => "deployment",
            Self::CronJob => "cronjob",
            Self::Pod => "pod",
            Self::Job => "job",
        }
    }
}

/// How the last hop to an application is wrapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TunnelProtocol {
    None,
    Proxy,
}

/// The last hop to an application that wants something other than its traffic as it came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ApplicationTunnel {
    pub protocol: TunnelProtocol,
    pub port: Option<u16>,
}

/// Where a workload runs; empty parts are unknown.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Locality {
    pub region: Arc<str>,
    pub zone: Arc<str>,
    pub subzone: Arc<str>,
}

/// A service's ports as service port to target port; target 0 is a named port that an endpoint resolves.
pub type Ports = SmallMap<u16, u16>;

/// One workload record of the control plane.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    pub uid: Arc<str>,
    pub name: Arc<str>,
    pub namespace: Arc<str>,
    /// `spiffe://trust domain/ns/namespace/sa/service account`, made once.
    pub identity: Identity,
    pub addresses: Few<IpAddr>,
    pub network: Arc<str>,
    pub hostname: Arc<str>,
    pub node: Arc<str>,
    pub cluster_id: Arc<str>,
    pub protocol: Protocol,
    pub network_mode: NetworkMode,
    pub status: HealthStatus,
    pub workload_type: WorkloadType,
    pub workload_name: Arc<str>,
    pub canonical_name: Arc<str>,
    pub canonical_revision: Arc<str>,
    pub locality: Arc<Locality>,
    pub waypoint: Option<Box<GatewayAddress>>,
    pub network_gateway: Option<Box<GatewayAddress>>,
    pub application_tunnel: Option<ApplicationTunnel>,
    pub native_tunnel: bool,
    /// Selector policies by resource name, `namespace/name`.
    pub authorization_policies: Vec<Arc<str>>,
    /// The services it is an endpoint of, with its own port mapping.
    pub services: SmallMap<NamespacedHostname, Ports>,
    /// Its weight among a service's endpoints.
    pub capacity: u32,
}

impl Workload {
    /// A workload of which nothing is known but who it is.
    pub fn of(identity: Identity) -> Self {
        let nothing: Arc<str> = "".into();
        Self {
            uid: nothing.clone(),
            name: nothing.clone(),
            namespace: identity.namespace().into(),
            identity,
            addresses: Few::None,
            network: nothing.clone(),
            hostname: nothing.clone(),
            node: nothing.clone(),
            cluster_id: nothing.clone(),
            protocol: Protocol::Hbone,
            network_mode: NetworkMode::Standard,
            status: HealthStatus::Healthy,
            workload_type: WorkloadType::Pod,
            workload_name: nothing.clone(),
            canonical_name: nothing.clone(),
            canonical_revision: nothing,
            locality: Arc::default(),
            waypoint: None,
            network_gateway: None,
            application_tunnel: None,
            native_tunnel: false,
            authorization_policies: Vec::new(),
            services: SmallMap::default(),
            capacity: 1,
        }
    }

    /// A workload as a peer tells of it that proved to be `identity`; for telemetry.
    pub fn as_told(identity: Identity, told: Baggage) -> Self {
        let text = |value: Option<String>| Arc::from(value.unwrap_or_default());
        let workload_name: Arc<str> = text(told.workload_name);
        Self {
            name: workload_name.clone(),
            workload_name,
            namespace: told
                .namespace
                .map_or_else(|| identity.namespace().into(), Arc::from),
            cluster_id: text(told.cluster),
            canonical_name: text(told.service_name),
            canonical_revision: text(told.revision),
            locality: Arc::new(Locality {
                region: text(told.region),
                zone: text(told.zone),
                subzone: "".into(),
            }),
            ..Self::of(identity)
        }
    }

    /// What the workload says of itself in a `baggage` header.
    pub fn baggage(&self) -> Baggage {
        let text = |value: &Arc<str>| (!value.is_empty()).then(|| value.to_string());
        Baggage {
            cluster: text(&self.cluster_id),
            namespace: text(&self.namespace),
            workload_type: Some(self.workload_type.as_str().to_string()),
            workload_name: text(&self.workload_name),
            service_name: text(&self.canonical_name),
            revision: text(&self.canonical_revision),
            region: text(&self.locality.region),
            zone: text(&self.locality.zone),
        }
    }
}
