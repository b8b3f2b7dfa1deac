//! The mesh as the configuration dump shows it.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::service::{BalanceMode, Endpoint, HealthPolicy, IpFamilies, Scope, Visibility};
use super::snapshot::{Mesh, ServiceEntry};
use super::workload::{
    GatewayAddress, HealthStatus, NetworkMode, Ports, Protocol, TunnelProtocol, Workload,
};
use crate::policy::Policy;
use crate::policy::model::{self, Action, Match, StringMatch};

/// All workloads, sorted by uid.
pub fn workloads(mesh: &Mesh) -> Value {
    let sorted: BTreeMap<_, _> = mesh
        .workloads()
        .map(|known| (known.uid.clone(), workload(known)))
        .collect();
    sorted.into_values().collect()
}

/// All services, sorted by hostname.
pub fn services(mesh: &Mesh) -> Value {
    let key = |entry: &ServiceEntry| {
        (
            entry.service.hostname.clone(),
            entry.service.namespace.clone(),
        )
    };
    let sorted: BTreeMap<_, _> = mesh
        .services()
        .map(|entry| (key(entry), service(entry)))
        .collect();
    sorted.into_values().collect()
}

/// All policies, sorted by resource name.
pub fn policies(mesh: &Mesh) -> Value {
    let sorted: BTreeMap<_, _> = mesh
        .policies()
        .map(|known| (known.key.clone(), policy(known)))
        .collect();
    sorted.into_values().collect()
}

/// The endpoints that wait for their service.
pub fn staged_services(mesh: &Mesh) -> Value {
    let mut staged: BTreeMap<String, Map<String, Value>> = BTreeMap::new();
    for (key, known) in mesh.staged() {
        staged
            .entry(key.to_string())
            .or_default()
            .insert(known.workload_uid.to_string(), endpoint(known));
    }
    json!(staged)
}

/// Inserts a text unless it is empty.
fn put(object: &mut Map<String, Value>, key: &str, text: &str) {
    if !text.is_empty() {
        object.insert(key.to_string(), text.into());
    }
}

fn gateway(address: &GatewayAddress) -> Value {
    json!({ "destination": address.destination.to_string(), "hboneMtlsPort": address.hbone_mtls_port })
}

fn ports(ports: &Ports) -> Value {
    ports
        .iter()
        .map(|(service, target)| (service.to_string(), json!(target)))
        .collect::<Map<_, _>>()
        .into()
}

fn status(status: HealthStatus) -> &'static str {
    match status {
        HealthStatus::Healthy => "Healthy",
        HealthStatus::Unhealthy => "Unhealthy",
    }
}

fn endpoint(endpoint: &Endpoint) -> Value {
    json!({ "workloadUid": endpoint.workload_uid, "port": ports(&endpoint.ports), "status": status(endpoint.status) })
}

fn workload(known: &Workload) -> Value {
    let mut object = Map::new();
    let ips = known
        .addresses
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>();
    object.insert("workloadIps".into(), json!(ips));
    for (key, address) in [
        ("waypoint", &known.waypoint),
        ("networkGateway", &known.network_gateway),
    ] {
        if let Some(address) = address {
            object.insert(key.into(), gateway(address));
        }
    }
    let protocol = if known.protocol == Protocol::Hbone {
        "HBONE"
    } else {
        "TCP"
    };
    object.insert("protocol".into(), protocol.into());
    let host = known.network_mode == NetworkMode::HostNetwork;
    object.insert(
        "networkMode".into(),
        if host { "HostNetwork" } else { "Standard" }.into(),
    );
    put(&mut object, "uid", &known.uid);
    object.insert("name".into(), json!(known.name));
    object.insert("namespace".into(), json!(known.namespace));
    for (key, text) in [
        ("trustDomain", known.identity.trust_domain()),
        ("serviceAccount", known.identity.service_account()),
        ("network", &known.network),
        ("workloadName", &known.workload_name),
        ("workloadType", known.workload_type.as_str()),
        ("canonicalName", &known.canonical_name),
        ("canonicalRevision", &known.canonical_revision),
        ("hostname", &known.hostname),
        ("node", &known.node),
    ] {
        put(&mut object, key, text);
    }
    if known.native_tunnel {
        object.insert("nativeTunnel".into(), true.into());
    }
    if let Some(tunnel) = &known.application_tunnel {
        let protocol = if tunnel.protocol == TunnelProtocol::Proxy {
            "PROXY"
        } else {
            "NONE"
        };
        object.insert(
            "applicationTunnel".into(),
            json!({ "protocol": protocol, "port": tunnel.port }),
        );
    }
    if !known.authorization_policies.is_empty() {
        object.insert(
            "authorizationPolicies".into(),
            json!(known.authorization_policies),
        );
    }
    object.insert("status".into(), status(known.status).into());
    object.insert("clusterId".into(), json!(known.cluster_id));
    let locality = &known.locality;
    if [&locality.region, &locality.zone, &locality.subzone]
        .iter()
        .any(|part| !part.is_empty())
    {
        let locality = json!({ "region": locality.region, "zone": locality.zone, "subzone": locality.subzone });
        object.insert("locality".into(), locality);
    }
    if !known.services.is_empty() {
        let services: Vec<_> = known.services.keys().map(ToString::to_string).collect();
        object.insert("services".into(), json!(services));
    }
    object.insert("capacity".into(), known.capacity.into());
    object.into()
}

fn service(entry: &ServiceEntry) -> Value {
    let known = &entry.service;
    let mut object = Map::new();
    object.insert("name".into(), json!(known.name));
    object.insert("namespace".into(), json!(known.namespace));
    object.insert("hostname".into(), json!(known.hostname));
    let vips: Vec<_> = known.vips.iter().map(ToString::to_string).collect();
    object.insert("vips".into(), json!(vips));
    if !known.cidr_vips.is_empty() {
        let ranges = known
            .cidr_vips
            .iter()
            .map(|range| json!({ "network": range.network, "cidr": range.cidr }));
        object.insert("cidrVips".into(), ranges.collect());
    }
    object.insert("ports".into(), ports(&known.ports));
    let counted = |candidate: &&Endpoint| {
        let any = known
            .load_balancer
            .as_ref()
            .is_some_and(|lb| lb.health_policy == HealthPolicy::AllowAll);
        any || candidate.status == HealthStatus::Healthy
    };
    let endpoints = entry.endpoints.iter().filter(counted);
    let endpoints: BTreeMap<_, _> = endpoints
        .map(|known| (known.workload_uid.to_string(), endpoint(known)))
        .collect();
    object.insert("endpoints".into(), json!(endpoints));
    object.insert("subjectAltNames".into(), json!(known.subject_alt_names));
    if let Some(waypoint) = &known.waypoint {
        object.insert("waypoint".into(), gateway(waypoint));
    }
    if !known.weighted_waypoints.is_empty() {
        let weighted = known.weighted_waypoints.iter();
        let weighted = weighted.map(
            |known| json!({ "destination": gateway(&known.destination), "weight": known.weight }),
        );
        object.insert("weightedWaypoints".into(), weighted.collect());
    }
    if let Some(balancer) = &known.load_balancer {
        let scope = |scope: &Scope| match scope {
            Scope::Network => "Network",
            Scope::Region => "Region",
            Scope::Zone => "Zone",
            Scope::Subzone => "Subzone",
            Scope::Node => "Node",
            Scope::Cluster => "Cluster",
        };
        let mode = match balancer.mode {
            BalanceMode::Standard => "Standard",
            BalanceMode::Strict => "Strict",
            BalanceMode::Failover => "Failover",
            BalanceMode::Passthrough => "Passthrough",
        };
        let health = match balancer.health_policy {
            HealthPolicy::OnlyHealthy => "OnlyHealthy",
            HealthPolicy::AllowAll => "AllowAll",
        };
        let preferences: Vec<_> = balancer.routing_preferences.iter().map(scope).collect();
        let balancer =
            json!({ "routingPreferences": preferences, "mode": mode, "healthPolicy": health });
        object.insert("loadBalancer".into(), balancer);
    }
    if let Some(families) = known.ip_families {
        let families = match families {
            IpFamilies::Dual => "Dual",
            IpFamilies::Ipv4 => "IPv4",
            IpFamilies::Ipv6 => "IPv6",
        };
        object.insert("ipFamilies".into(), families.into());
    }
    object.insert("canonical".into(), known.canonical.into());
    let public = known.visibility == Visibility::Public;
    object.insert(
        "visibility".into(),
        if public { "Public" } else { "Namespace" }.into(),
    );
    object.into()
}

fn policy(known: &Policy) -> Value {
    let scope = match known.scope {
        model::Scope::Global => "Global",
        model::Scope::Namespace => "Namespace",
        model::Scope::WorkloadSelector => "WorkloadSelector",
    };
    let rules: Vec<Vec<Vec<Value>>> = known
        .rules
        .iter()
        .map(|rule| {
            rule.iter()
                .map(|clause| clause.iter().map(part).collect())
                .collect()
        })
        .collect();
    json!({
        "name": known.name,
        "namespace": known.namespace,
        "scope": scope,
        "action": if known.action == Action::Allow { "Allow" } else { "Deny" },
        "rules": rules,
        "dryRun": known.dry_run,
    })
}

fn part(known: &Match) -> Value {
    let text = |wanted: &StringMatch| match wanted {
        StringMatch::Exact(text) => json!({ "Exact": text }),
        StringMatch::Prefix(text) => json!({ "Prefix": text }),
        StringMatch::Suffix(text) => json!({ "Suffix": text }),
        StringMatch::Presence => json!({ "Presence": [] }),
    };
    let account = |known: &model::ServiceAccount| json!({ "namespace": known.namespace, "serviceAccount": known.service_account });
    let mut object = Map::new();
    let mut list = |key: &str, entries: Vec<Value>| {
        if !entries.is_empty() {
            object.insert(key.to_string(), entries.into());
        }
    };
    list("namespaces", known.namespaces.iter().map(text).collect());
    list(
        "notNamespaces",
        known.not_namespaces.iter().map(text).collect(),
    );
    list(
        "serviceAccounts",
        known.service_accounts.iter().map(account).collect(),
    );
    list(
        "notServiceAccounts",
        known.not_service_accounts.iter().map(account).collect(),
    );
    list("principals", known.principals.iter().map(text).collect());
    list(
        "notPrincipals",
        known.not_principals.iter().map(text).collect(),
    );
    list(
        "sourceIps",
        known.source_ips.iter().map(|net| json!(net)).collect(),
    );
    list(
        "notSourceIps",
        known.not_source_ips.iter().map(|net| json!(net)).collect(),
    );
    list(
        "destinationIps",
        known.destination_ips.iter().map(|net| json!(net)).collect(),
    );
    list(
        "notDestinationIps",
        known
            .not_destination_ips
            .iter()
            .map(|net| json!(net))
            .collect(),
    );
    list(
        "destinationPorts",
        known
            .destination_ports
            .iter()
            .map(|port| json!(port))
            .collect(),
    );
    list(
        "notDestinationPorts",
        known
            .not_destination_ports
            .iter()
            .map(|port| json!(port))
            .collect(),
    );
    object.into()
}

#[cfg(test)]
#[path = "dump_tests.rs"]
mod tests;
