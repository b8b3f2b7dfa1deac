//! The inbound decision: what a CONNECT to a local workload means.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use hbone::Authority;

use super::service::Service;
use super::snapshot::{Address, Mesh};
use super::workload::{
    GatewayAddress, GatewayDestination, NamespacedHostname, NetworkAddress, Ports, TunnelProtocol,
    Workload,
};

/// Where an accepted CONNECT goes; the address is always the workload's own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InboundTarget {
    pub connect_port: u16,
    pub service: Option<Arc<Service>>,
    /// The destination for a PROXY protocol header; only when the application wants one.
    pub announced: Option<SocketAddr>,
}

/// What is wrong with a CONNECT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The address asked for is not served here.
    WrongAddress,
    /// It asks for one of Warren's own ports.
    Loop,
    UnknownHost,
    UnknownPort,
    /// The service has no address to announce to the application.
    NoAddress,
}

/// Why a CONNECT is refused before policy is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InboundRefusal {
    /// The HTTP status.
    pub status: u16,
    pub fault: Fault,
    pub text: String,
}

fn refuse<T>(status: u16, fault: Fault, text: String) -> Result<T, InboundRefusal> {
    Err(InboundRefusal {
        status,
        fault,
        text,
    })
}

impl Mesh {
    /// Where a CONNECT that arrived at `local_ip` for the local workload goes.
    ///
    /// # Errors
    /// When the authority is not of this workload, names nothing it serves, or one of Warren's own ports.
    pub fn inbound_target(
        &self,
        local: &Workload,
        authority: &Authority,
        local_ip: IpAddr,
        forwarded_host: Option<&str>,
        illegal_ports: &[u16],
    ) -> Result<InboundTarget, InboundRefusal> {
        let local_ip = local_ip.to_canonical();
        let announces = local
            .application_tunnel
            .is_some_and(|tunnel| tunnel.protocol == TunnelProtocol::Proxy);
        let (port, named) = match authority {
            Authority::Addr(address) => {
                let ip = address.ip().to_canonical();
                if ip != local_ip
                    && local.application_tunnel.is_none()
                    && !self.fronts(local, ip, local_ip)
                {
                    return refuse(
                        400,
                        Fault::WrongAddress,
                        format!("ip mismatch: {local_ip} != {ip}"),
                    );
                }
                (address.port(), None)
            }
            Authority::Host(hostname, port) => {
                let (service, target) = self.named_target(local, hostname, *port)?;
                (target, Some(service))
            }
        };
        let connect_port = local
            .application_tunnel
            .and_then(|tunnel| tunnel.port)
            .unwrap_or(port);
        if illegal_ports.contains(&port) || illegal_ports.contains(&connect_port) {
            return refuse(
                503,
                Fault::Loop,
                "attempted recursive call to ourselves".to_string(),
            );
        }
        let announced = match (authority, named) {
            _ if !announces => None,
            (Authority::Addr(address), _) => Some(hbone::canonical(*address)),
            (Authority::Host(hostname, port), service) => {
                let vip = service.and_then(|service| announced_vip(service, &local.network));
                match vip {
                    Some(ip) => Some(SocketAddr::new(ip, *port)),
                    None => {
                        return refuse(
                            503,
                            Fault::NoAddress,
                            format!("requested service {hostname} found, but has no IP addresses"),
                        );
                    }
                }
            }
        };
        let service = named
            .cloned()
            .or_else(|| self.inbound_service(local, connect_port, forwarded_host));
        Ok(InboundTarget {
            connect_port,
            service,
            announced,
        })
    }

    /// The service that a hostname means to the local workload, and the workload's port for the service's port.
    fn named_target(
        &self,
        local: &Workload,
        hostname: &str,
        port: u16,
    ) -> Result<(&Arc<Service>, u16), InboundRefusal> {
        let Some(service) = self.best_by_hostname(hostname, Some(&local.namespace), None) else {
            return refuse(
                503,
                Fault::UnknownHost,
                format!("no service or workload for hostname: {hostname}"),
            );
        };
        let endpoint = self
            .service_entry(&service.key())
            .and_then(|entry| entry.endpoints.get(&local.uid));
        let mapped = |ports: &Ports| ports.get(&port).copied().filter(|target| *target > 0);
        match endpoint
            .and_then(|endpoint| mapped(&endpoint.ports))
            .or_else(|| mapped(&service.ports))
        {
            Some(target) => Ok((service, target)),
            None => refuse(
                503,
                Fault::UnknownPort,
                format!("requested service {hostname}:{port} found, but cannot resolve port"),
            ),
        }
    }

    /// The service that a flow to a port of the local workload was meant for, as far as it can be told.
    ///
    /// The client's word (`forwarded_host`) only chooses among the services that the workload is part of.
    pub fn inbound_service(
        &self,
        local: &Workload,
        port: u16,
        forwarded_host: Option<&str>,
    ) -> Option<Arc<Service>> {
        let own = || {
            local
                .services
                .iter()
                .filter_map(|(key, ports)| Some((self.service(key)?, ports)))
        };
        if let Some(hostname) = forwarded_host
            && let Some((service, _)) = own().find(|(service, _)| &*service.hostname == hostname)
        {
            return Some(service.clone());
        }
        let serves = |(service, ports): &(&Arc<Service>, &Ports)| {
            ports.values().any(|target| *target == port)
                || service.ports.values().any(|target| *target == port)
        };
        own().find(serves).map(|(service, _)| service.clone())
    }

    /// Whether the local workload is a waypoint of what is at `ip`, so that it may be asked for it.
    fn fronts(&self, local: &Workload, ip: IpAddr, local_ip: IpAddr) -> bool {
        let network = &*local.network;
        let service = match self.lookup(network, &ip, None) {
            Some(Address::Service(service)) => service,
            Some(Address::Workload(workload)) => {
                let waypoint = workload.waypoint.as_ref();
                return waypoint.is_some_and(|waypoint| self.is_at(local, local_ip, waypoint));
            }
            None => return false,
        };
        let weighted = service
            .weighted_waypoints
            .iter()
            .filter(|waypoint| waypoint.weight > 0)
            .map(|waypoint| &waypoint.destination);
        let mut waypoints = weighted.chain(service.waypoint.as_deref());
        waypoints.any(|waypoint| self.is_at(local, local_ip, waypoint))
    }

    /// Whether a waypoint reference means the local workload, or a service that it is part of.
    fn is_at(&self, local: &Workload, local_ip: IpAddr, waypoint: &GatewayAddress) -> bool {
        let serves = |key: &NamespacedHostname| {
            self.service_entry(key)
                .is_some_and(|entry| entry.endpoints.get(&local.uid).is_some())
        };
        let (service, workload) = match &waypoint.destination {
            GatewayDestination::Hostname(name) => {
                (self.service(name), self.workload_by_hostname(name))
            }
            GatewayDestination::Address(address) => (
                self.service_by_vip(&address.network, &address.address, None),
                self.workload_by_ip(&address.network, &address.address),
            ),
        };
        service.is_some_and(|service| serves(&service.key()))
            || workload.is_some_and(|owner| owner.addresses.contains(&local_ip))
    }
}

/// The virtual address that stands for a service: on the network if it can be, then IPv4, then the first.
fn announced_vip(service: &Service, network: &str) -> Option<IpAddr> {
    let rank = |vip: &&NetworkAddress| (*vip.network != *network, vip.address.is_ipv6());
    service.vips.iter().min_by_key(rank).map(|vip| vip.address)
}

#[cfg(test)]
#[path = "inbound_tests.rs"]
mod tests;
