//! Address resources of the control plane, turned into workloads and services.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use hbone::Identity;
use ipnet::IpNet;

use super::names::Names;
use crate::mesh::service::{
    BalanceMode, CidrAddress, HealthPolicy, IpFamilies, LoadBalancer, Scope, Service, Visibility,
    WeightedWaypoint,
};
use crate::mesh::store::AddressResource;
use crate::mesh::workload::{
    ApplicationTunnel, GatewayAddress, GatewayDestination, HealthStatus, NamespacedHostname,
    NetworkAddress, NetworkMode, Ports, Protocol, TunnelProtocol, Workload, WorkloadType,
};
use crate::proto::workload as proto;

/// Turns a resource into its model.
///
/// # Errors
/// Which field cannot be used, and why.
pub fn address(resource: proto::Address, names: &mut Names) -> Result<AddressResource, String> {
    match resource.r#type {
        Some(proto::address::Type::Workload(record)) => {
            workload(record, names).map(AddressResource::Workload)
        }
        Some(proto::address::Type::Service(record)) => {
            service(record, names).map(AddressResource::Service)
        }
        None => Err("unknown address type".to_string()),
    }
}

/// Turns a workload into its model.
///
/// # Errors
/// Which field cannot be used, and why.
pub fn workload(record: proto::Workload, names: &mut Names) -> Result<Workload, String> {
    if record.uid.is_empty() {
        return Err("uid: must not be empty".to_string());
    }
    let or = |value: String, default: &str| {
        if value.is_empty() {
            default.to_string()
        } else {
            value
        }
    };
    let trust_domain = or(record.trust_domain, "cluster.local");
    let service_account = or(record.service_account, "default");
    let protocol = match record.tunnel_protocol {
        0 => Protocol::Tcp,
        1 => Protocol::Hbone,
        2 => return Err("tunnel_protocol: LEGACY_ISTIO_MTLS is not supported".to_string()),
        other => return Err(unknown("tunnel_protocol", other)),
    };
    let addresses = record
        .addresses
        .iter()
        .map(|bytes| ip(bytes).map_err(|error| format!("addresses: {error}")));
    let mut services = Vec::with_capacity(record.services.len());
    for (key, list) in record.services {
        let (namespace, hostname) = key
            .split_once('/')
            .ok_or_else(|| format!("services: {key} is not of the form namespace/hostname"))?;
        let name = NamespacedHostname {
            namespace: names.text(namespace),
            hostname: names.text(hostname),
        };
        services.push((name, ports(list.ports)?));
    }
    Ok(Workload {
        identity: names.identity(Identity::new(
            &trust_domain,
            &record.namespace,
            &service_account,
        )),
        addresses: addresses.collect::<Result<_, _>>()?,
        uid: record.uid.into(),
        name: record.name.into(),
        namespace: names.text(&record.namespace),
        network: names.text(&record.network),
        // Mostly empty, else its own.
        hostname: names.text(&record.hostname),
        node: names.text(&record.node),
        cluster_id: names.text(&or(record.cluster_id, "Kubernetes")),
        protocol,
        network_mode: match record.network_mode {
            0 => NetworkMode::Standard,
            1 => NetworkMode::HostNetwork,
            other => return Err(unknown("network_mode", other)),
        },
        status: match record.status {
            0 => HealthStatus::Healthy,
            1 => HealthStatus::Unhealthy,
            other => return Err(unknown("status", other)),
        },
        workload_type: match record.workload_type {
            0 => WorkloadType::Deployment,
            1 => WorkloadType::CronJob,
            2 => WorkloadType::Pod,
            3 => WorkloadType::Job,
            other => return Err(unknown("workload_type", other)),
        },
        workload_name: names.text(&record.workload_name),
        canonical_name: names.text(&record.canonical_name),
        canonical_revision: names.text(&record.canonical_revision),
        locality: names.locality(&record.locality.unwrap_or_default()),
        waypoint: record
            .waypoint
            .map(|record| gateway(record).map(Box::new))
            .transpose()
            .map_err(|error| format!("waypoint: {error}"))?,
        network_gateway: record
            .network_gateway
            .map(|record| gateway(record).map(Box::new))
            .transpose()
            .map_err(|error| format!("network_gateway: {error}"))?,
        application_tunnel: match record.application_tunnel {
            None => None,
            Some(tunnel) => Some(ApplicationTunnel {
                protocol: match tunnel.protocol {
                    0 => TunnelProtocol::None,
                    1 => TunnelProtocol::Proxy,
                    other => return Err(unknown("application_tunnel.protocol", other)),
                },
                port: Some(port("application_tunnel.port", tunnel.port)?).filter(|port| *port != 0),
            }),
        },
        native_tunnel: record.native_tunnel,
        authorization_policies: record
            .authorization_policies
            .iter()
            .map(|key| names.text(key))
            .collect(),
        services: services.into_iter().collect(),
        capacity: record.capacity.unwrap_or(1),
    })
}

/// Turns a service into its model.
///
/// # Errors
/// Which field cannot be used, and why.
pub fn service(record: proto::Service, names: &mut Names) -> Result<Service, String> {
    let (mut vips, mut cidr_vips) = (Vec::new(), Vec::new());
    for entry in record.addresses {
        let address = ip(&entry.address).map_err(|error| format!("addresses: {error}"))?;
        let full = if address.is_ipv4() { 32 } else { 128 };
        let network: Arc<str> = entry.network.into();
        match entry.length.filter(|length| *length != full) {
            None => vips.push(NetworkAddress { network, address }),
            Some(length) => {
                let cidr = u8::try_from(length)
                    .ok()
                    .and_then(|length| IpNet::new(address, length).ok());
                let cidr =
                    cidr.ok_or_else(|| format!("addresses: {address}/{length} is no range"))?;
                cidr_vips.push(CidrAddress {
                    network,
                    cidr: cidr.trunc(),
                });
            }
        }
    }
    let mut weighted_waypoints = Vec::new();
    for weighted in record.weighted_waypoints {
        let destination = weighted
            .destination
            .ok_or("weighted_waypoints: destination is missing")?;
        let destination =
            gateway(destination).map_err(|error| format!("weighted_waypoints: {error}"))?;
        weighted_waypoints.push(WeightedWaypoint {
            destination,
            weight: weighted.weight,
        });
    }
    Ok(Service {
        name: names.text(&record.name),
        namespace: names.text(&record.namespace),
        hostname: names.text(&record.hostname),
        vips,
        cidr_vips,
        ports: ports(record.ports)?,
        subject_alt_names: record
            .subject_alt_names
            .into_iter()
            .map(Arc::from)
            .collect(),
        waypoint: record
            .waypoint
            .map(|record| gateway(record).map(Box::new))
            .transpose()
            .map_err(|error| format!("waypoint: {error}"))?,
        weighted_waypoints,
        load_balancer: record.load_balancing.map(load_balancer).transpose()?,
        ip_families: match record.ip_families {
            0 => None,
            1 => Some(IpFamilies::Ipv4),
            2 => Some(IpFamilies::Ipv6),
            3 => Some(IpFamilies::Dual),
            other => return Err(unknown("ip_families", other)),
        },
        canonical: record.canonical,
        visibility: if record.visibility == 1 {
            Visibility::Namespace
        } else {
            Visibility::Public
        },
    })
}

fn load_balancer(record: proto::LoadBalancing) -> Result<LoadBalancer, String> {
    let scope = |value: &i32| match value {
        1 => Ok(Scope::Region),
        2 => Ok(Scope::Zone),
        3 => Ok(Scope::Subzone),
        4 => Ok(Scope::Node),
        5 => Ok(Scope::Cluster),
        6 => Ok(Scope::Network),
        other => Err(unknown("load_balancing.routing_preference", *other)),
    };
    Ok(LoadBalancer {
        routing_preferences: record
            .routing_preference
            .iter()
            .map(scope)
            .collect::<Result<_, _>>()?,
        mode: match record.mode {
            0 => BalanceMode::Standard,
            1 => BalanceMode::Strict,
            2 => BalanceMode::Failover,
            3 => BalanceMode::Passthrough,
            other => return Err(unknown("load_balancing.mode", other)),
        },
        health_policy: match record.health_policy {
            0 => HealthPolicy::OnlyHealthy,
            1 => HealthPolicy::AllowAll,
            other => return Err(unknown("load_balancing.health_policy", other)),
        },
    })
}

fn gateway(record: proto::GatewayAddress) -> Result<GatewayAddress, String> {
    let destination = match record.destination {
        Some(proto::gateway_address::Destination::Hostname(name)) => {
            GatewayDestination::Hostname(NamespacedHostname {
                namespace: name.namespace.into(),
                hostname: name.hostname.into(),
            })
        }
        Some(proto::gateway_address::Destination::Address(address)) => {
            GatewayDestination::Address(NetworkAddress {
                network: address.network.into(),
                address: ip(&address.address)?,
            })
        }
        None => return Err("nonempty gateway address is missing address".to_string()),
    };
    Ok(GatewayAddress {
        destination,
        hbone_mtls_port: port("hbone_mtls_port", record.hbone_mtls_port)?,
    })
}

fn port(field: &str, value: u32) -> Result<u16, String> {
    u16::try_from(value).map_err(|_| format!("{field} {value} is not a port number"))
}

fn ports(list: Vec<proto::Port>) -> Result<Ports, String> {
    list.into_iter()
        .map(|item| {
            let service = port("ports: service_port", item.service_port)?;
            Ok((service, port("ports: target_port", item.target_port)?))
        })
        .collect::<Result<Vec<_>, _>>()
        .map(|ports| ports.into_iter().collect())
}

/// An address from its 4 or 16 bytes.
pub fn ip(bytes: &[u8]) -> Result<IpAddr, String> {
    if let Ok(octets) = <[u8; 4]>::try_from(bytes) {
        return Ok(Ipv4Addr::from(octets).into());
    }
    match <[u8; 16]>::try_from(bytes) {
        Ok(octets) => Ok(Ipv6Addr::from(octets).into()),
        Err(_) => Err(format!(
            "failed to parse address, had {} bytes",
            bytes.len()
        )),
    }
}

fn unknown(field: &str, value: i32) -> String {
    format!("{field}: unknown value {value}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> proto::Workload {
        proto::Workload {
            uid: "Kubernetes//Pod/ns/p".into(),
            name: "p".into(),
            namespace: "ns".into(),
            addresses: vec![vec![10, 0, 0, 1]],
            ..Default::default()
        }
    }

    fn read(record: proto::Workload) -> Result<Workload, String> {
        let resource = proto::Address {
            r#type: Some(proto::address::Type::Workload(record)),
        };
        match address(resource, &mut Names::default())? {
            AddressResource::Workload(workload) => Ok(workload),
            AddressResource::Service(_) => panic!("a workload became a service"),
        }
    }

    #[test]
    fn ports_that_are_none_are_refused() {
        let mut wrong = record();
        let list = |port| proto::PortList {
            ports: vec![proto::Port {
                service_port: port,
                target_port: 80,
                ..Default::default()
            }],
        };
        wrong.services = [("ns/host".to_string(), list(65_536))].into();
        let expected = "ports: service_port 65536 is not a port number";
        assert_eq!(read(wrong.clone()).unwrap_err(), expected);
        wrong.services = [("ns/host".to_string(), list(65_535))].into();
        assert!(read(wrong).is_ok());
        let mut tunnelled = record();
        tunnelled.application_tunnel = Some(proto::ApplicationTunnel {
            protocol: 1,
            port: 65_616,
        });
        let expected = "application_tunnel.port 65616 is not a port number";
        assert_eq!(read(tunnelled).unwrap_err(), expected);
        let mut fronted = record();
        fronted.waypoint = Some(proto::GatewayAddress {
            destination: Some(proto::gateway_address::Destination::Hostname(
                Default::default(),
            )),
            hbone_mtls_port: 80_000,
        });
        let expected = "waypoint: hbone_mtls_port 80000 is not a port number";
        assert_eq!(read(fronted).unwrap_err(), expected);
    }

    #[test]
    fn what_is_left_out_has_its_default() {
        let workload = read(record()).unwrap();
        assert_eq!(
            workload.identity.to_string(),
            "spiffe://cluster.local/ns/ns/sa/default"
        );
        assert_eq!(
            (&*workload.cluster_id, workload.capacity),
            ("Kubernetes", 1)
        );
        assert_eq!(workload.protocol, Protocol::Tcp);
    }

    #[test]
    fn unusable_workloads_are_refused_by_field() {
        type Change = fn(&mut proto::Workload);
        let cases: [(Change, &str); 8] = [
            (|w| w.uid.clear(), "uid: must not be empty"),
            (
                |w| w.addresses = vec![vec![1, 2, 3]],
                "addresses: failed to parse address, had 3 bytes",
            ),
            (
                |w| w.tunnel_protocol = 2,
                "tunnel_protocol: LEGACY_ISTIO_MTLS is not supported",
            ),
            (
                |w| w.tunnel_protocol = 9,
                "tunnel_protocol: unknown value 9",
            ),
            (|w| w.status = 7, "status: unknown value 7"),
            (
                |w| w.waypoint = Some(Default::default()),
                "waypoint: nonempty gateway address is missing address",
            ),
            (
                |w| w.services = [("nohost".to_string(), Default::default())].into(),
                "services: nohost is not of the form namespace/hostname",
            ),
            (|w| w.network_mode = -1, "network_mode: unknown value -1"),
        ];
        for (change, expected) in cases {
            let mut record = record();
            change(&mut record);
            assert_eq!(read(record).unwrap_err(), expected);
        }
        assert_eq!(
            address(proto::Address { r#type: None }, &mut Names::default()).unwrap_err(),
            "unknown address type"
        );
    }

    #[test]
    fn a_services_addresses_are_single_ones_or_ranges() {
        let entry = |length| proto::NetworkAddress {
            network: "n".into(),
            address: vec![10, 96, 1, 7],
            length,
        };
        let read = |length| {
            let record = proto::Service {
                addresses: vec![entry(length)],
                visibility: 77,
                ..Default::default()
            };
            service(record, &mut Names::default())
        };
        assert_eq!(read(None).unwrap().vips[0].to_string(), "n/10.96.1.7");
        assert_eq!(read(Some(32)).unwrap().vips.len(), 1);
        assert_eq!(
            read(Some(16)).unwrap().cidr_vips[0].cidr.to_string(),
            "10.96.0.0/16"
        );
        assert_eq!(
            read(Some(33)).unwrap_err(),
            "addresses: 10.96.1.7/33 is no range"
        );
        assert_eq!(read(None).unwrap().visibility, Visibility::Public);
    }

    #[test]
    fn unspecified_preferences_are_refused() {
        let balancing = proto::LoadBalancing {
            routing_preference: vec![0],
            ..Default::default()
        };
        let record = proto::Service {
            load_balancing: Some(balancing),
            ..Default::default()
        };
        assert_eq!(
            service(record, &mut Names::default()).unwrap_err(),
            "load_balancing.routing_preference: unknown value 0"
        );
    }
}
