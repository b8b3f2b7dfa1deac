//! What follows from the services: names for the DNS server and targets for the nodes' rules.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use serde_json::Value;

use super::addresses::{AddressError, ServiceWish, cluster_addresses};
use super::cluster::Cluster;
use super::family::{Addresses, Family, IpFamily};
use super::manifest::Object;
use super::pod::Pod;
use super::service_rules::ServicePort;
use super::wire::ServiceStatus;

const DOMAIN: &str = "svc.cluster.local";

/// `namespace/name`.
pub fn name(service: &Object) -> String {
    format!("{}/{}", service.key.namespace, service.key.name)
}

/// What a service says about its addresses.
pub fn wish(service: &Object) -> ServiceWish<'_> {
    let spec = &service.value["spec"];
    let texts = |field: &str| -> Vec<&str> {
        let list = spec[field].as_array().into_iter().flatten();
        list.filter_map(Value::as_str).collect()
    };
    let mut addresses = texts("clusterIPs");
    if addresses.is_empty() {
        addresses.extend(spec["clusterIP"].as_str());
    }
    ServiceWish {
        service: name(service),
        addresses,
        families: texts("ipFamilies"),
        policy: spec["ipFamilyPolicy"].as_str(),
    }
}

/// The cluster addresses of all services among some objects, by `namespace/name`.
///
/// # Errors
/// The first service whose wish cannot be granted.
pub fn addresses(
    lab: IpFamily,
    objects: &[Object],
) -> Result<BTreeMap<String, Addresses>, AddressError> {
    let wishes: Vec<ServiceWish> = objects
        .iter()
        .filter(|o| o.key.kind == "Service" && o.text("/spec/type") != Some("ExternalName"))
        .map(wish)
        .collect();
    cluster_addresses(lab, &wishes)
}

/// Every service's name with its cluster address, or the ready pods of one that has none.
pub fn names(cluster: &Cluster) -> BTreeMap<String, Vec<IpAddr>> {
    of(cluster)
        .map(|service| {
            let addresses = match cluster.addresses.get(&name(service)) {
                Some(addresses) => addresses.iter().collect(),
                None => {
                    let families = wish(service).families(cluster.families);
                    let families = families.unwrap_or_default();
                    let wanted = |address: &IpAddr| families.contains(&Family::of(*address));
                    let pods = ready_pods(cluster, service);
                    pods.flat_map(|pod| pod.addresses.iter())
                        .filter(wanted)
                        .collect()
                }
            };
            let host = format!("{}.{}.{DOMAIN}", service.key.name, service.key.namespace);
            (host, addresses)
        })
        .collect()
}

/// Every port of every service with a cluster address, and the ready pods behind it.
pub fn ports(cluster: &Cluster) -> Vec<ServicePort> {
    let mut ports = Vec::new();
    for service in of(cluster) {
        let Some(addresses) = cluster.addresses.get(&name(service)) else {
            continue;
        };
        for port in tcp_ports(service) {
            let Some(number) = number(&port["port"]) else {
                continue;
            };
            for address in addresses.iter() {
                let endpoint = |pod: &Pod| {
                    let own = pod.addresses.get(Family::of(address))?;
                    Some(SocketAddr::new(own, target(port, &pod.plan.object)?))
                };
                let endpoints: Vec<_> = ready_pods(cluster, service).filter_map(endpoint).collect();
                if !endpoints.is_empty() {
                    ports.push(ServicePort {
                        address,
                        port: number,
                        endpoints,
                    });
                }
            }
        }
    }
    ports
}

/// What `warren lab status` shows of the services.
pub fn status(cluster: &Cluster) -> Vec<ServiceStatus> {
    of(cluster)
        .map(|service| ServiceStatus {
            namespace: service.key.namespace.clone(),
            name: service.key.name.clone(),
            addresses: cluster.addresses.get(&name(service)).cloned(),
            ports: tcp_ports(service)
                .filter_map(|p| number(&p["port"]))
                .collect(),
        })
        .collect()
}

fn of(cluster: &Cluster) -> impl Iterator<Item = &Object> {
    cluster.objects.iter().filter(|o| o.key.kind == "Service")
}

fn ready_pods<'a>(cluster: &'a Cluster, service: &'a Object) -> impl Iterator<Item = &'a Pod> {
    let selector = service.value["spec"]["selector"].as_object();
    cluster.pods.values().filter(move |pod| {
        pod.is_ready()
            && pod.plan.namespace == service.key.namespace
            && selector.is_some_and(|s| selects(s, &pod.plan.object["metadata"]["labels"]))
    })
}

fn selects(selector: &serde_json::Map<String, Value>, labels: &Value) -> bool {
    !selector.is_empty()
        && selector
            .iter()
            .all(|(name, value)| labels.get(name) == Some(value))
}

fn tcp_ports(service: &Object) -> impl Iterator<Item = &Value> {
    let ports = service.value["spec"]["ports"].as_array();
    let is_tcp = |port: &&Value| port["protocol"].as_str().is_none_or(|p| p == "TCP");
    ports.into_iter().flatten().filter(is_tcp)
}

/// The pod's port behind a port of a service; a name is looked up among its containers' ports.
fn target(port: &Value, pod: &Value) -> Option<u16> {
    match &port["targetPort"] {
        Value::Null => number(&port["port"]),
        Value::String(name) => pod["spec"]["containers"]
            .as_array()?
            .iter()
            .flat_map(|container| container["ports"].as_array().into_iter().flatten())
            .find(|p| p["name"] == name.as_str())
            .and_then(|p| number(&p["containerPort"])),
        target => number(target),
    }
}

fn number(value: &Value) -> Option<u16> {
    value.as_u64().and_then(|n| u16::try_from(n).ok())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_target_port_is_a_number_a_name_or_the_port_itself() {
        let pod =
            json!({"spec": {"containers": [{"ports": [{"name": "http", "containerPort": 8080}]}]}});
        assert_eq!(target(&json!({"port": 80}), &pod), Some(80));
        assert_eq!(
            target(&json!({"port": 80, "targetPort": 9080}), &pod),
            Some(9080)
        );
        assert_eq!(
            target(&json!({"port": 80, "targetPort": "http"}), &pod),
            Some(8080)
        );
        assert_eq!(target(&json!({"port": 80, "targetPort": "no"}), &pod), None);
    }

    #[test]
    fn an_empty_selector_selects_nothing() {
        let labels = json!({"app": "a", "version": "v1"});
        let selector = |value: Value| value.as_object().cloned().unwrap();
        assert!(selects(&selector(json!({"app": "a"})), &labels));
        assert!(!selects(&selector(json!({"app": "b"})), &labels));
        assert!(!selects(&selector(json!({})), &labels));
    }
}
