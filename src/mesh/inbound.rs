//! The inbound decision: what a CONNECT to a local workload means.

use std::net::IpAddr;
use std::sync::Arc;

use hbone::Authority;

use super::service::Service;
use super::snapshot::Mesh;
use super::workload::{GatewayDestination, NamespacedHostname, Ports, Workload};
use crate::config::ILLEGAL_PORTS;

/// Where an accepted CONNECT goes; the address is always the workload's own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InboundTarget {
    pub connect_port: u16,
    pub service: Option<Arc<Service>>,
}

/// Why a CONNECT is refused before policy is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InboundRefusal {
    /// The HTTP status.
    pub status: u16,
    pub text: String,
}

fn refuse<T>(status: u16, text: String) -> Result<T, InboundRefusal> {
    Err(InboundRefusal { status, text })
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
    ) -> Result<InboundTarget, InboundRefusal> {
        let (port, named) = match authority {
            Authority::Addr(address) => {
                let ip = address.ip().to_canonical();
                if ip != local_ip
                    && local.application_tunnel.is_none()
                    && !self.fronts(local, ip, local_ip)
                {
                    return refuse(400, format!("ip mismatch: {local_ip} != {ip}"));
                }
                (address.port(), None)
            }
            Authority::Host(hostname, port) => {
                let Some(service) = self.best_by_hostname(hostname, Some(&local.namespace), None)
                else {
                    return refuse(
                        503,
                        format!("no service or workload for hostname: {hostname}"),
                    );
                };
                let endpoint = self
                    .service_entry(&service.key())
                    .and_then(|entry| entry.endpoints.get(&local.uid));
                let mapped = |ports: &Ports| ports.get(port).copied().filter(|target| *target > 0);
                let target = endpoint
                    .and_then(|endpoint| mapped(&endpoint.ports))
                    .or_else(|| mapped(&service.ports));
                let Some(target) = target else {
                    return refuse(
                        503,
                        format!(
                            "requested service {hostname}:{port} found, but cannot resolve port"
                        ),
                    );
                };
                (target, Some(service.clone()))
            }
        };
        let connect_port = local
            .application_tunnel
            .and_then(|tunnel| tunnel.port)
            .unwrap_or(port);
        if ILLEGAL_PORTS.contains(&port) || ILLEGAL_PORTS.contains(&connect_port) {
            return refuse(503, "attempted recursive call to ourselves".to_string());
        }
        let service = named.or_else(|| self.inbound_service(local, connect_port, forwarded_host));
        Ok(InboundTarget {
            connect_port,
            service,
        })
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
        let waypoint = match self.workload_by_ip(network, &ip) {
            Some(workload) => workload.waypoint.as_ref(),
            None => self
                .service_by_vip(network, &ip, None)
                .and_then(|service| service.waypoint.as_ref()),
        };
        let serves = |key: &NamespacedHostname| {
            self.service_entry(key)
                .is_some_and(|entry| entry.endpoints.get(&local.uid).is_some())
        };
        match waypoint.map(|waypoint| &waypoint.destination) {
            None => false,
            Some(GatewayDestination::Hostname(name)) => {
                serves(name)
                    || self
                        .workload_by_hostname(name)
                        .is_some_and(|owner| owner.addresses.contains(&local_ip))
            }
            Some(GatewayDestination::Address(address)) => {
                let service = self.service_by_vip(&address.network, &address.address, None);
                service.is_some_and(|service| serves(&service.key()))
                    || self
                        .workload_by_ip(&address.network, &address.address)
                        .is_some_and(|owner| owner.addresses.contains(&local_ip))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::store::AddressResource as Resource;
    use crate::mesh::testing::{mesh, pod, service, serving};
    use crate::mesh::workload::{
        ApplicationTunnel, GatewayAddress, NetworkAddress, TunnelProtocol,
    };

    fn told(mesh: &Mesh, local: &Workload, authority: &str, host: Option<&str>) -> String {
        let ip = local.addresses[0];
        match mesh.inbound_target(local, &authority.parse().unwrap(), ip, host) {
            Ok(target) => {
                let service = target
                    .service
                    .map(|service| service.name.to_string())
                    .unwrap_or_default();
                format!("{} {service}", target.connect_port)
            }
            Err(refusal) => format!("{} {}", refusal.status, refusal.text),
        }
    }

    #[test]
    fn a_connect_reaches_the_pod_it_arrived_at_and_nothing_else() {
        let web = service("b", "web", "10.96.0.1");
        let mut other = service("b", "other", "10.96.0.2");
        other.ports = [(9, 8080)].into();
        let local = serving(serving(pod("b", "web", "10.0.0.9"), &other), &web);
        let mesh = mesh(vec![
            Resource::Workload(local.clone()),
            Resource::Workload(pod("b", "neighbour", "10.0.0.10")),
            Resource::Service(web),
            Resource::Service(other),
        ]);
        let cases = [
            ("10.0.0.9:8080", Some("web.b.svc.cluster.local"), "8080 web"),
            (
                "10.0.0.9:8080",
                Some("invented.b.svc.cluster.local"),
                "8080 other",
            ),
            ("10.0.0.9:8080", None, "8080 other"),
            ("10.0.0.9:7", None, "7 "),
            ("[::ffff:10.0.0.9]:7", None, "7 "),
            ("web.b.svc.cluster.local:80", None, "8080 web"),
            (
                "web.b.svc.cluster.local:81",
                None,
                "503 requested service web.b.svc.cluster.local:81 found, but cannot resolve port",
            ),
            (
                "unknown:80",
                None,
                "503 no service or workload for hostname: unknown",
            ),
            (
                "10.0.0.10:80",
                None,
                "400 ip mismatch: 10.0.0.9 != 10.0.0.10",
            ),
            (
                "127.0.0.1:80",
                None,
                "400 ip mismatch: 10.0.0.9 != 127.0.0.1",
            ),
            (
                "10.0.0.9:15001",
                None,
                "503 attempted recursive call to ourselves",
            ),
            (
                "10.0.0.9:15006",
                None,
                "503 attempted recursive call to ourselves",
            ),
            (
                "10.0.0.9:15008",
                None,
                "503 attempted recursive call to ourselves",
            ),
        ];
        for (authority, host, expected) in cases {
            assert_eq!(
                told(&mesh, &local, authority, host),
                expected,
                "{authority}"
            );
        }
    }

    #[test]
    fn an_application_tunnel_takes_any_address_on_its_own_port() {
        let mut local = pod("b", "gw", "10.0.0.9");
        local.application_tunnel = Some(ApplicationTunnel {
            protocol: TunnelProtocol::None,
            port: Some(15088),
        });
        let mesh = mesh(vec![Resource::Workload(local.clone())]);
        assert_eq!(told(&mesh, &local, "10.0.0.77:80", None), "15088 ");
    }

    #[test]
    fn a_waypoint_may_be_asked_for_what_it_fronts() {
        let local = pod("b", "waypoint", "10.0.0.20");
        let mut web = service("b", "web", "10.96.0.1");
        let mut app = pod("b", "app", "10.0.0.9");
        let waypoint = GatewayAddress {
            destination: GatewayDestination::Address(NetworkAddress {
                network: "".into(),
                address: "10.0.0.20".parse().unwrap(),
            }),
            hbone_mtls_port: 15008,
        };
        web.waypoint = Some(waypoint.clone());
        app.waypoint = Some(waypoint);
        let mesh = mesh(vec![
            Resource::Workload(local.clone()),
            Resource::Workload(app),
            Resource::Service(web),
        ]);
        assert_eq!(told(&mesh, &local, "10.96.0.1:80", None), "80 ");
        assert_eq!(told(&mesh, &local, "10.0.0.9:80", None), "80 ");
        assert!(told(&mesh, &local, "10.0.0.10:80", None).starts_with("400 "));
    }
}
