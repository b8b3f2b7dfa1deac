//! Services.

use std::net::IpAddr;

use super::Settings;
use crate::control::kubernetes::{PortReference, Service, ServicePort};
use crate::control::manifests::Objects;
use crate::proto::workload as proto;

const DISTRIBUTION: &str = "networking.istio.io/traffic-distribution";

// Values of the wire's enumerations.
const REGION: i32 = 1;
const ZONE: i32 = 2;
const SUBZONE: i32 = 3;
const NODE: i32 = 4;
const NETWORK: i32 = 6;
const STRICT: i32 = 1;
const FAILOVER: i32 = 2;
const ALLOW_ALL: i32 = 1;

/// The hostname of a service.
pub fn hostname(service: &Service, settings: &Settings) -> String {
    format!(
        "{}.{}.svc.{}",
        service.metadata.name, service.metadata.namespace, settings.cluster_domain
    )
}

/// A service's record; none for one that only names another host.
pub fn service(
    service: &Service,
    objects: &Objects,
    settings: &Settings,
) -> Option<proto::Service> {
    let spec = &service.spec;
    if spec.r#type == "ExternalName" {
        return None;
    }
    let ips = if spec.cluster_ips.is_empty() {
        std::slice::from_ref(&spec.cluster_ip)
    } else {
        &spec.cluster_ips[..]
    };
    let addresses = ips
        .iter()
        .filter_map(|ip| ip.parse().ok())
        .map(|ip: IpAddr| proto::NetworkAddress {
            network: settings.network.clone(),
            address: octets(ip),
            length: None,
        });
    let families: Vec<_> = spec.ip_families.iter().map(String::as_str).collect();
    Some(proto::Service {
        name: service.metadata.name.clone(),
        namespace: service.metadata.namespace.clone(),
        hostname: hostname(service, settings),
        addresses: addresses.collect(),
        ports: spec
            .ports
            .iter()
            .filter(|port| is_tcp(port))
            .map(port)
            .collect(),
        load_balancing: load_balancing(service, objects),
        ip_families: match families[..] {
            ["IPv4"] => 1,
            ["IPv6"] => 2,
            [_, _, ..] => 3,
            _ => 0,
        },
        canonical: true,
        ..Default::default()
    })
}

/// Whether a port carries TCP, which is all that the mesh carries.
pub fn is_tcp(port: &ServicePort) -> bool {
    port.protocol.is_empty() || port.protocol == "TCP"
}

/// An address as its bytes.
pub fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

fn port(port: &ServicePort) -> proto::Port {
    let target = match &port.target_port {
        None => port.port,
        Some(PortReference::Number(number)) => *number,
        Some(PortReference::Name(_)) => 0,
    };
    proto::Port {
        service_port: port.port.into(),
        target_port: target.into(),
        app_protocol: app_protocol(port),
    }
}

fn app_protocol(port: &ServicePort) -> i32 {
    let named = port.name.split('-').next().unwrap_or_default();
    let protocol = port
        .app_protocol
        .as_deref()
        .unwrap_or(named)
        .to_ascii_lowercase();
    match &*protocol {
        "http" | "kubernetes.io/ws" => 1,
        "http2" | "kubernetes.io/h2c" => 2,
        "grpc" | "grpc-web" => 3,
        "tcp" | "mongo" | "redis" | "mysql" => 4,
        "tls" | "https" | "kubernetes.io/wss" => 5,
        _ => 0,
    }
}

fn load_balancing(service: &Service, objects: &Objects) -> Option<proto::LoadBalancing> {
    let spec = &service.spec;
    let namespace = objects.namespaces.get(&service.metadata.namespace);
    let annotated =
        |annotations: &crate::control::kubernetes::Texts| annotations.get(DISTRIBUTION).cloned();
    let distribution = Some(spec.traffic_distribution.clone())
        .filter(|text| !text.is_empty())
        .or_else(|| annotated(&service.metadata.annotations))
        .or_else(|| annotated(&namespace?.metadata.annotations))
        .unwrap_or_default()
        .to_ascii_lowercase();
    let (mode, routing_preference) = match (&*spec.internal_traffic_policy, &*distribution) {
        ("Local", _) => (STRICT, vec![NODE]),
        (_, "prefersamezone" | "preferclose") => (FAILOVER, vec![NETWORK, REGION, ZONE]),
        (_, "prefersamenode") => (FAILOVER, vec![NETWORK, REGION, ZONE, SUBZONE, NODE]),
        _ => (0, vec![]),
    };
    let health_policy = if spec.publish_not_ready_addresses {
        ALLOW_ALL
    } else {
        0
    };
    (mode != 0 || health_policy != 0).then_some(proto::LoadBalancing {
        routing_preference,
        mode,
        health_policy,
    })
}

#[cfg(test)]
mod tests {
    use super::super::tests_support::{read, settings};
    use super::*;

    fn translated(spec: &str) -> Option<proto::Service> {
        let objects = read(&format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: web, namespace: a}}\nspec: {{{spec}}}\n"
        ));
        service(
            objects.services.values().next().unwrap(),
            &objects,
            &settings(),
        )
    }

    #[test]
    fn addresses_ports_and_families() {
        let web = translated("clusterIPs: [10.96.0.1, 'fd00::1'], ipFamilies: [IPv4, IPv6], ports: [{port: 80, targetPort: 8080, name: http-x}, {port: 81, targetPort: named}, {port: 53, protocol: UDP}, {port: 82}]").unwrap();
        assert_eq!(web.hostname, "web.a.svc.cluster.local");
        assert_eq!(web.addresses.len(), 2);
        assert_eq!(
            (web.addresses[0].address.clone(), web.ip_families),
            (vec![10, 96, 0, 1], 3)
        );
        let ports: Vec<_> = web
            .ports
            .iter()
            .map(|p| (p.service_port, p.target_port, p.app_protocol))
            .collect();
        assert_eq!(ports, [(80, 8080, 1), (81, 0, 0), (82, 82, 0)]);
        assert!(web.canonical);
        assert!(
            translated("clusterIP: None, ports: [{port: 80}]")
                .unwrap()
                .addresses
                .is_empty()
        );
        assert!(translated("type: ExternalName").is_none());
    }

    #[test]
    fn distribution_becomes_load_balancing() {
        let balancing = |spec: &str| {
            translated(spec)
                .unwrap()
                .load_balancing
                .map(|lb| (lb.mode, lb.routing_preference, lb.health_policy))
        };
        assert_eq!(balancing("ports: []"), None);
        assert_eq!(
            balancing("internalTrafficPolicy: Local"),
            Some((1, vec![4], 0))
        );
        assert_eq!(
            balancing("trafficDistribution: PreferClose"),
            Some((2, vec![6, 1, 2], 0))
        );
        assert_eq!(
            balancing("trafficDistribution: PreferSameNode"),
            Some((2, vec![6, 1, 2, 3, 4], 0))
        );
        assert_eq!(
            balancing("publishNotReadyAddresses: true"),
            Some((0, vec![], 1))
        );
    }
}
