//! The outbound decision: where a captured flow goes, and how.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use hbone::Identity;
use thiserror::Error;

use super::balance::{Chooser, Purpose, Resolved, pick};
use super::service::{BalanceMode, IpFamilies, Service};
use super::snapshot::{Address, Mesh, ServiceEntry};
use super::workload::{GatewayAddress, GatewayDestination, Protocol, Workload};
use crate::config::HBONE_PORT;

/// How a flow is carried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RouteKind {
    /// In a tunnel to the workload or its waypoint.
    Hbone,
    /// As it is, to a workload outside the mesh.
    Tcp,
    /// As it is, to an address that the mesh does not know.
    Passthrough,
}

/// Where a flow goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    pub kind: RouteKind,
    /// What is dialled.
    pub connect: SocketAddr,
    /// What the CONNECT asks for; HBONE only.
    pub authority: Option<String>,
    /// Any one of these must be proven by the peer; HBONE only.
    pub expected: Vec<Identity>,
    /// The workload or waypoint that is dialled.
    pub workload: Option<Arc<Workload>>,
    /// The service that was meant.
    pub service: Option<Arc<Service>>,
    /// What is behind the gateway that is dialled, on another network.
    pub beyond: Option<Beyond>,
}

/// Whom a second tunnel, inside the one to a gateway, is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Beyond {
    /// Any one of these must be proven.
    pub expected: Vec<Identity>,
    /// A waypoint, which balances each flow by itself, rather than one of many endpoints.
    pub is_waypoint: bool,
}

/// Why a flow goes nowhere.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum RouteError {
    #[error("no healthy upstream: {0}")]
    NoHealthyUpstream(SocketAddr),
    #[error("unknown waypoint: {0}")]
    UnknownWaypoint(Unknown),
    #[error("unknown network gateway: {0}")]
    UnknownGateway(Unknown),
    #[error("no valid routing destination for workload: Workload{{{0}}}")]
    NoDestination(String),
    /// The hostname has to be resolved first.
    #[error("no ip addresses were resolved for workload: {uid}")]
    NotResolved { uid: Arc<str>, hostname: Arc<str> },
    #[error("no ip addresses were resolved for workload: {0}")]
    Unresolvable(Arc<str>),
    #[error(
        "ip addresses were resolved for workload {0}, but valid dns response had no A/AAAA records"
    )]
    NoRecords(Arc<str>),
    #[error("no service for target address: {0}")]
    NoService(SocketAddr),
    #[error(
        "service {service} names no identities (subject_alt_names), so nobody on network {network:?} can prove to be it"
    )]
    NobodyExpected { service: String, network: String },
}

/// What a reference to a waypoint or gateway led to.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{text}")]
pub struct Unknown {
    text: String,
    /// The resource name of what nothing is known of.
    pub key: Option<String>,
}

impl RouteError {
    /// The resource that the decision lacked, if it lacked one.
    pub fn missing(&self) -> Option<&str> {
        match self {
            Self::UnknownWaypoint(unknown) | Self::UnknownGateway(unknown) => {
                unknown.key.as_deref()
            }
            _ => None,
        }
    }

    fn no_destination(workload: &Workload) -> Self {
        let protocol = match workload.protocol {
            Protocol::Hbone => "HBONE",
            Protocol::Tcp => "TCP",
        };
        Self::NoDestination(format!(
            "{} with uid {} ({protocol})",
            workload.name, workload.uid
        ))
    }
}

/// A workload chosen to take a flow.
struct Upstream<'a> {
    workload: &'a Arc<Workload>,
    port: u16,
    ip: Option<IpAddr>,
    service: Option<&'a Arc<Service>>,
}

impl Upstream<'_> {
    /// Where it is reached: its address, or one that its hostname resolves to, of the family asked for if there is one.
    fn ip(&self, target: SocketAddr, chooser: Chooser<'_>) -> Result<IpAddr, RouteError> {
        let workload = self.workload;
        if let Some(ip) = self.ip {
            return Ok(ip);
        }
        if workload.hostname.is_empty() {
            return Err(RouteError::no_destination(workload));
        }
        let uid = workload.uid.clone();
        let addresses = match chooser.resolved(&workload.hostname) {
            Resolved::To(addresses) => addresses,
            Resolved::Failed => return Err(RouteError::Unresolvable(uid)),
            Resolved::NotYet => {
                let hostname = workload.hostname.clone();
                return Err(RouteError::NotResolved { uid, hostname });
            }
        };
        let wanted = |ip: &&IpAddr| ip.is_ipv4() == target.is_ipv4();
        let of_family: Vec<_> = addresses.iter().filter(wanted).collect();
        let candidates = match of_family.is_empty() {
            true => addresses.iter().collect(),
            false => of_family,
        };
        match candidates.len() as u64 {
            0 => Err(RouteError::NoRecords(uid)),
            count => Ok(*candidates[chooser.random(count) as usize]),
        }
    }

    /// Whom the peer may prove to be: the workload itself, or what its service names.
    fn expected(&self) -> Vec<Identity> {
        let named = self
            .service
            .into_iter()
            .flat_map(|service| &service.subject_alt_names);
        let mut expected: Vec<Identity> = named.filter_map(|name| name.parse().ok()).collect();
        if !expected.contains(&self.workload.identity) {
            expected.push(self.workload.identity.clone());
        }
        expected
    }
}

/// Decides where the flow of a local workload from `client` to `target` goes.
///
/// # Errors
/// When the mesh knows the target, but nothing there can take the flow.
pub fn decide(
    mesh: &Mesh,
    source: &Workload,
    client: SocketAddr,
    target: SocketAddr,
    chooser: Chooser<'_>,
) -> Result<Route, RouteError> {
    let (network, namespace) = (&*source.network, Some(&*source.namespace));
    let found = mesh.lookup(network, &target.ip(), namespace);
    let addressed = found.and_then(Address::service);
    if let Some(service) = addressed
        && let Some(waypoint) = service_waypoint(service, chooser)
    {
        return to_waypoint(mesh, source, waypoint, target, Some(service), chooser);
    }
    let upstream = found.and_then(|found| find(mesh, source, found, target, chooser));
    let Some(upstream) = upstream else {
        return match addressed {
            Some(service) if !is_passthrough(service) => Err(RouteError::NoHealthyUpstream(target)),
            _ => Ok(Route {
                kind: RouteKind::Passthrough,
                connect: target,
                authority: None,
                expected: Vec::new(),
                workload: None,
                service: None,
                beyond: None,
            }),
        };
    };
    if upstream.workload.network != source.network {
        return to_gateway(mesh, source, &upstream, false, addressed, target, chooser);
    }
    if addressed.is_none()
        && let Some(waypoint) = &upstream.workload.waypoint
        && !is_waypoint(mesh, source, waypoint, client.ip())
    {
        return to_waypoint(mesh, source, waypoint, target, upstream.service, chooser);
    }
    let ip = upstream.ip(target, chooser)?;
    let service = upstream.service.cloned();
    let workload = Some(upstream.workload.clone());
    Ok(match upstream.workload.protocol {
        Protocol::Hbone => Route {
            kind: RouteKind::Hbone,
            connect: SocketAddr::new(ip, HBONE_PORT),
            authority: Some(SocketAddr::new(ip, upstream.port).to_string()),
            expected: upstream.expected(),
            workload,
            service,
            beyond: None,
        },
        Protocol::Tcp => Route {
            kind: RouteKind::Tcp,
            connect: SocketAddr::new(ip, upstream.port),
            authority: None,
            expected: Vec::new(),
            workload,
            service,
            beyond: None,
        },
    })
}

/// The waypoint that takes a service's flows, by weight if there are several.
fn service_waypoint<'a>(service: &'a Service, chooser: Chooser<'_>) -> Option<&'a GatewayAddress> {
    let total: u64 = service
        .weighted_waypoints
        .iter()
        .map(|waypoint| u64::from(waypoint.weight))
        .sum();
    if total == 0 {
        return service.waypoint.as_deref();
    }
    let mut left = chooser.random(total);
    let chosen = service.weighted_waypoints.iter().find(|waypoint| {
        let weight = u64::from(waypoint.weight);
        let chosen = left < weight;
        left = left.saturating_sub(weight);
        chosen
    });
    chosen.map(|waypoint| &waypoint.destination)
}

fn to_waypoint(
    mesh: &Mesh,
    source: &Workload,
    waypoint: &GatewayAddress,
    target: SocketAddr,
    service: Option<&Arc<Service>>,
    chooser: Chooser<'_>,
) -> Result<Route, RouteError> {
    let upstream = resolve(mesh, source, waypoint, Role::Waypoint, target, chooser)?;
    if upstream.workload.network != source.network {
        return to_gateway(mesh, source, &upstream, true, service, target, chooser);
    }
    let ip = upstream.ip(target, chooser)?;
    Ok(Route {
        kind: RouteKind::Hbone,
        connect: SocketAddr::new(ip, upstream.port),
        authority: Some(target.to_string()),
        expected: upstream.expected(),
        workload: Some(upstream.workload.clone()),
        service: service.cloned(),
        beyond: None,
    })
}

/// Towards what was chosen on another network, through that network's gateway: a tunnel in a tunnel, both of which ask
/// for the service by name, since addresses mean nothing over there.
fn to_gateway(
    mesh: &Mesh,
    source: &Workload,
    chosen: &Upstream<'_>,
    is_waypoint: bool,
    service: Option<&Arc<Service>>,
    target: SocketAddr,
    chooser: Chooser<'_>,
) -> Result<Route, RouteError> {
    let service = service.ok_or(RouteError::NoService(target))?;
    let gateway = chosen.workload.network_gateway.as_ref();
    let gateway = gateway.ok_or_else(|| RouteError::no_destination(chosen.workload))?;
    let named = chosen.service.map(|service| &service.subject_alt_names);
    let expected: Vec<Identity> = named
        .into_iter()
        .flatten()
        .filter_map(|name| name.parse().ok())
        .collect();
    if expected.is_empty() {
        return Err(RouteError::NobodyExpected {
            service: chosen.service.unwrap_or(service).hostname.to_string(),
            network: chosen.workload.network.to_string(),
        });
    }
    let upstream = resolve(mesh, source, gateway, Role::Gateway, target, chooser)?;
    let ip = upstream.ip(target, chooser)?;
    Ok(Route {
        kind: RouteKind::Hbone,
        connect: SocketAddr::new(ip, upstream.port),
        authority: Some(format!("{}:{}", service.hostname, target.port())),
        expected: upstream.expected(),
        workload: Some(upstream.workload.clone()),
        service: Some(service.clone()),
        beyond: Some(Beyond {
            expected,
            is_waypoint,
        }),
    })
}

fn is_passthrough(service: &Service) -> bool {
    service
        .load_balancer
        .as_ref()
        .is_some_and(|balancer| balancer.mode == BalanceMode::Passthrough)
}

/// Who takes a flow to what is at `target`: an endpoint of the service, or the workload itself.
fn find<'a>(
    mesh: &'a Mesh,
    source: &Workload,
    found: Address<'a>,
    target: SocketAddr,
    chooser: Chooser<'_>,
) -> Option<Upstream<'a>> {
    match found {
        Address::Service(service) if is_passthrough(service) => None,
        Address::Service(service) => {
            let entry = mesh.service_entry(&service.key())?;
            let (port, ip) = (target.port(), target.ip());
            balanced(mesh, entry, source, port, ip, Purpose::Serve, chooser)
        }
        Address::Workload(workload) => Some(Upstream {
            workload,
            port: target.port(),
            ip: Some(target.ip()),
            service: None,
        }),
    }
}

fn balanced<'a>(
    mesh: &'a Mesh,
    entry: &'a ServiceEntry,
    source: &Workload,
    port: u16,
    original: IpAddr,
    purpose: Purpose,
    chooser: Chooser<'_>,
) -> Option<Upstream<'a>> {
    let (endpoint, workload) = pick(mesh, entry, source, port, purpose, chooser)?;
    let tunnelled = || {
        workload
            .application_tunnel
            .and_then(|tunnel| tunnel.port)
            .map(|_| port)
    };
    let mapped =
        |ports: &super::workload::Ports| ports.get(&port).copied().filter(|target| *target > 0);
    let target = mapped(&endpoint.ports)
        .or_else(|| mapped(&entry.service.ports))
        .or_else(tunnelled)?;
    let ip = address_of(workload, &entry.service, original);
    Some(Upstream {
        workload,
        port: target,
        ip,
        service: Some(&entry.service),
    })
}

/// The address of a workload that fits what the client asked for best.
fn address_of(workload: &Workload, service: &Service, original: IpAddr) -> Option<IpAddr> {
    if workload.addresses.contains(&original) {
        return Some(original);
    }
    let allowed = |ip: &&IpAddr| match service.ip_families {
        None | Some(IpFamilies::Dual) => true,
        Some(IpFamilies::Ipv4) => ip.is_ipv4(),
        Some(IpFamilies::Ipv6) => ip.is_ipv6(),
    };
    let mut addresses = workload.addresses.iter().filter(allowed);
    let first = addresses.clone().next();
    addresses
        .find(|ip| ip.is_ipv4() == original.is_ipv4())
        .or(first)
        .copied()
}

const NOT_FOUND: &str = "not found";

/// What a reference is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Waypoint,
    /// The way into another network.
    Gateway,
}

impl Role {
    /// The error that what a reference means cannot be dialled.
    fn unknown(self, reference: &GatewayAddress, why: &str) -> RouteError {
        let name: &dyn fmt::Display = match &reference.destination {
            GatewayDestination::Address(address) => address,
            GatewayDestination::Hostname(name) => &name.hostname,
        };
        let unknown = |kind| Unknown {
            text: format!("{kind} {name} {why}"),
            key: (why == NOT_FOUND).then(|| reference.destination.to_string()),
        };
        match self {
            Self::Waypoint => RouteError::UnknownWaypoint(unknown("waypoint")),
            Self::Gateway => RouteError::UnknownGateway(unknown("network gateway")),
        }
    }
}

/// Turns a reference into a workload and the port to dial.
fn resolve<'a>(
    mesh: &'a Mesh,
    source: &Workload,
    reference: &GatewayAddress,
    role: Role,
    target: SocketAddr,
    chooser: Chooser<'_>,
) -> Result<Upstream<'a>, RouteError> {
    let port = reference.hbone_mtls_port;
    let purpose = match role {
        Role::Waypoint => Purpose::Waypoint,
        Role::Gateway => Purpose::Serve,
    };
    let original = match &reference.destination {
        GatewayDestination::Address(address) => address.address,
        GatewayDestination::Hostname(_) => target.ip(),
    };
    let found = referred(mesh, reference);
    let service = found.and_then(Address::service);
    if let Some(entry) = service.and_then(|service| mesh.service_entry(&service.key())) {
        return balanced(mesh, entry, source, port, original, purpose, chooser)
            .ok_or_else(|| role.unknown(reference, "has no healthy endpoint"));
    }
    let workload = found.and_then(Address::workload);
    let workload = workload.ok_or_else(|| role.unknown(reference, NOT_FOUND))?;
    let fitting = workload.addresses.iter().find(|ip| **ip == original);
    let same_family = || {
        workload
            .addresses
            .iter()
            .find(|ip| ip.is_ipv4() == original.is_ipv4())
    };
    let ip = fitting
        .or_else(same_family)
        .or(workload.addresses.first())
        .copied();
    Ok(Upstream {
        workload,
        port,
        ip,
        service: None,
    })
}

/// Whether the flow comes from the very waypoint that it would be sent to.
fn is_waypoint(mesh: &Mesh, source: &Workload, waypoint: &GatewayAddress, client: IpAddr) -> bool {
    let is_source = |workload: &Workload| {
        workload.identity == source.identity && workload.addresses.contains(&client)
    };
    match referred(mesh, waypoint) {
        Some(Address::Service(service)) => {
            let owner = mesh.workload_by_ip(&source.network, &client);
            let entry = mesh.service_entry(&service.key());
            let serves = |owner: &Workload| {
                entry.is_some_and(|entry| entry.endpoints.get(&owner.uid).is_some())
            };
            owner.is_some_and(|owner| is_source(owner) && serves(owner))
        }
        Some(Address::Workload(workload)) => is_source(workload),
        None => false,
    }
}

/// What a reference names.
fn referred<'a>(mesh: &'a Mesh, reference: &GatewayAddress) -> Option<Address<'a>> {
    match &reference.destination {
        GatewayDestination::Address(address) => {
            mesh.lookup(&address.network, &address.address, None)
        }
        GatewayDestination::Hostname(name) => {
            let workload = || mesh.workload_by_hostname(name).map(Address::Workload);
            mesh.service(name).map(Address::Service).or_else(workload)
        }
    }
}

#[cfg(test)]
#[path = "route_tests.rs"]
mod tests;
