//! The configuration dump, key by key.

use std::sync::Arc;

use super::*;
use crate::mesh::service::{CidrAddress, LoadBalancer, Service, WeightedWaypoint};
use crate::mesh::store::{AddressResource as Resource, Store};
use crate::mesh::testing::{key, mesh, pod, service, serving};
use crate::mesh::workload::{ApplicationTunnel, GatewayDestination, NetworkAddress, WorkloadType};
use crate::policy::model::ServiceAccount;

/// What the dump shows of a pod after a change to its record; `Null` for keys it leaves out.
fn shown(change: impl Fn(&mut Workload), key: &str) -> Value {
    let mut workload = pod("b", "web", "10.0.0.9");
    change(&mut workload);
    workloads(&mesh(vec![Resource::Workload(workload)]))[0][key].take()
}

/// What the dump shows of a service after a change to its record.
fn shown_service(change: impl Fn(&mut Service), key: &str) -> Value {
    let mut web = service("b", "web", "10.96.0.1");
    change(&mut web);
    services(&mesh(vec![Resource::Service(web)]))[0][key].take()
}

fn waypoint() -> GatewayAddress {
    GatewayAddress {
        destination: GatewayDestination::Hostname(key("b", "waypoint")),
        hbone_mtls_port: 15008,
    }
}

fn by_address() -> GatewayAddress {
    GatewayAddress {
        destination: GatewayDestination::Address(NetworkAddress {
            network: "far".into(),
            address: "10.1.0.1".parse().unwrap(),
        }),
        hbone_mtls_port: 15009,
    }
}

#[test]
fn empty_things_are_left_out_and_the_rest_is_named_as_agreed() {
    let web = service("b", "web", "10.96.0.1");
    let mesh = mesh(vec![
        Resource::Service(web.clone()),
        Resource::Workload(serving(pod("b", "web", "10.0.0.9"), &web)),
    ]);
    assert_eq!(
        workloads(&mesh),
        json!([{
            "workloadIps": ["10.0.0.9"], "protocol": "HBONE", "networkMode": "Standard",
            "uid": "Kubernetes//Pod/b/web", "name": "web", "namespace": "b", "trustDomain": "cluster.local",
            "serviceAccount": "web", "workloadName": "web", "workloadType": "deployment",
            "canonicalName": "web", "canonicalRevision": "v1", "node": "n1", "status": "Healthy",
            "clusterId": "Kubernetes", "services": ["b/web.b.svc.cluster.local"], "capacity": 1
        }])
    );
    assert_eq!(
        services(&mesh),
        json!([{
            "name": "web", "namespace": "b", "hostname": "web.b.svc.cluster.local", "vips": ["/10.96.0.1"],
            "ports": { "80": 8080 },
            "endpoints": { "Kubernetes//Pod/b/web": {
                "workloadUid": "Kubernetes//Pod/b/web", "port": { "80": 8080 }, "status": "Healthy"
            } },
            "subjectAltNames": [], "canonical": false, "visibility": "Public"
        }])
    );
    assert_eq!(staged_services(&mesh), json!({}));
}

#[test]
fn every_key_of_a_workload_has_its_form() {
    type Change = fn(&mut Workload);
    let cases: [(&str, Change, Value); 27] = [
        (
            "workloadIps",
            |w| w.addresses = Default::default(),
            json!([]),
        ),
        (
            "workloadIps",
            |w| w.addresses.push("fd00::1".parse().unwrap()),
            json!(["10.0.0.9", "fd00::1"]),
        ),
        (
            "waypoint",
            |w| w.waypoint = Some(Box::new(waypoint())),
            json!({ "destination": "b/waypoint.b.svc.cluster.local", "hboneMtlsPort": 15008 }),
        ),
        (
            "networkGateway",
            |w| w.network_gateway = Some(Box::new(by_address())),
            json!({ "destination": "far/10.1.0.1", "hboneMtlsPort": 15009 }),
        ),
        ("networkGateway", |_| (), Value::Null),
        ("protocol", |w| w.protocol = Protocol::Tcp, json!("TCP")),
        (
            "networkMode",
            |w| w.network_mode = NetworkMode::HostNetwork,
            json!("HostNetwork"),
        ),
        ("name", |w| w.name = "".into(), json!("")),
        ("network", |w| w.network = "far".into(), json!("far")),
        ("workloadName", |w| w.workload_name = "".into(), Value::Null),
        (
            "canonicalName",
            |w| w.canonical_name = "".into(),
            Value::Null,
        ),
        (
            "canonicalRevision",
            |w| w.canonical_revision = "".into(),
            Value::Null,
        ),
        ("node", |w| w.node = "".into(), Value::Null),
        ("hostname", |w| w.hostname = "h".into(), json!("h")),
        (
            "workloadType",
            |w| w.workload_type = WorkloadType::CronJob,
            json!("cronjob"),
        ),
        (
            "workloadType",
            |w| w.workload_type = WorkloadType::Pod,
            json!("pod"),
        ),
        (
            "workloadType",
            |w| w.workload_type = WorkloadType::Job,
            json!("job"),
        ),
        ("nativeTunnel", |w| w.native_tunnel = true, json!(true)),
        (
            "applicationTunnel",
            |w| {
                w.application_tunnel = Some(ApplicationTunnel {
                    protocol: TunnelProtocol::Proxy,
                    port: Some(15088),
                })
            },
            json!({ "protocol": "PROXY", "port": 15088 }),
        ),
        (
            "applicationTunnel",
            |w| {
                w.application_tunnel = Some(ApplicationTunnel {
                    protocol: TunnelProtocol::None,
                    port: None,
                })
            },
            json!({ "protocol": "NONE", "port": null }),
        ),
        (
            "authorizationPolicies",
            |w| w.authorization_policies = vec!["b/z".into(), "b/a".into()],
            json!(["b/z", "b/a"]),
        ),
        (
            "status",
            |w| w.status = HealthStatus::Unhealthy,
            json!("Unhealthy"),
        ),
        ("clusterId", |w| w.cluster_id = "".into(), json!("")),
        ("locality", |w| w.locality = Default::default(), Value::Null),
        (
            "locality",
            |w| Arc::make_mut(&mut w.locality).zone = "z".into(),
            json!({ "region": "", "zone": "z", "subzone": "" }),
        ),
        ("services", |w| w.services.clear(), Value::Null),
        ("capacity", |w| w.capacity = 0, json!(0)),
    ];
    for (key, change, expected) in cases {
        assert_eq!(shown(change, key), expected, "{key}");
    }
}

#[test]
fn what_is_not_so_is_left_out_rather_than_null() {
    let mesh = mesh(vec![
        Resource::Workload(pod("b", "web", "10.0.0.9")),
        Resource::Service(service("b", "web", "10.96.0.1")),
    ]);
    for shown in [workloads(&mesh), services(&mesh)] {
        assert!(!shown.to_string().contains("null"), "{shown}");
    }
    assert!(workloads(&mesh)[0].get("nativeTunnel").is_none());
}

#[test]
fn every_key_of_a_service_has_its_form() {
    type Change = fn(&mut Service);
    let balancer = |mode, health_policy, routing_preferences: &[Scope]| LoadBalancer {
        routing_preferences: routing_preferences.to_vec(),
        mode,
        health_policy,
    };
    let cases: [(&str, Change, Value); 12] = [
        (
            "vips",
            |s| s.vips[0].network = "far".into(),
            json!(["far/10.96.0.1"]),
        ),
        ("vips", |s| s.vips.clear(), json!([])),
        (
            "cidrVips",
            |s| {
                s.cidr_vips = vec![CidrAddress {
                    network: "far".into(),
                    cidr: "10.97.0.0/16".parse().unwrap(),
                }]
            },
            json!([{ "network": "far", "cidr": "10.97.0.0/16" }]),
        ),
        ("ports", |s| s.ports.clear(), json!({})),
        (
            "subjectAltNames",
            |s| s.subject_alt_names = vec!["spiffe://t/ns/a/sa/b".into()],
            json!(["spiffe://t/ns/a/sa/b"]),
        ),
        (
            "waypoint",
            |s| s.waypoint = Some(Box::new(by_address())),
            json!({ "destination": "far/10.1.0.1", "hboneMtlsPort": 15009 }),
        ),
        (
            "weightedWaypoints",
            |s| {
                s.weighted_waypoints = vec![WeightedWaypoint {
                    destination: by_address(),
                    weight: 7,
                }]
            },
            json!([{ "destination": { "destination": "far/10.1.0.1", "hboneMtlsPort": 15009 }, "weight": 7 }]),
        ),
        (
            "ipFamilies",
            |s| s.ip_families = Some(IpFamilies::Dual),
            json!("Dual"),
        ),
        (
            "ipFamilies",
            |s| s.ip_families = Some(IpFamilies::Ipv4),
            json!("IPv4"),
        ),
        (
            "ipFamilies",
            |s| s.ip_families = Some(IpFamilies::Ipv6),
            json!("IPv6"),
        ),
        ("canonical", |s| s.canonical = true, json!(true)),
        (
            "visibility",
            |s| s.visibility = Visibility::Namespace,
            json!("Namespace"),
        ),
    ];
    for (key, change, expected) in cases {
        assert_eq!(shown_service(change, key), expected, "{key}");
    }
    use {BalanceMode as Mode, HealthPolicy as Health, Scope::*};
    let cases = [
        (
            balancer(
                Mode::Failover,
                Health::AllowAll,
                &[Network, Region, Zone, Subzone, Node, Cluster],
            ),
            json!({
                "routingPreferences": ["Network", "Region", "Zone", "Subzone", "Node", "Cluster"],
                "mode": "Failover", "healthPolicy": "AllowAll"
            }),
        ),
        (
            balancer(Mode::Strict, Health::OnlyHealthy, &[]),
            json!({ "routingPreferences": [], "mode": "Strict", "healthPolicy": "OnlyHealthy" }),
        ),
        (
            balancer(Mode::Standard, Health::OnlyHealthy, &[]),
            json!({ "routingPreferences": [], "mode": "Standard", "healthPolicy": "OnlyHealthy" }),
        ),
        (
            balancer(Mode::Passthrough, Health::OnlyHealthy, &[]),
            json!({ "routingPreferences": [], "mode": "Passthrough", "healthPolicy": "OnlyHealthy" }),
        ),
    ];
    for (balancer, expected) in cases {
        let shown = shown_service(|s| s.load_balancer = Some(balancer.clone()), "loadBalancer");
        assert_eq!(shown, expected);
    }
}

#[test]
fn the_sick_are_endpoints_only_where_health_does_not_count() {
    let mut web = service("b", "web", "10.96.0.1");
    let mut sick = serving(pod("b", "sick", "10.0.0.2"), &web);
    sick.status = HealthStatus::Unhealthy;
    let well = serving(pod("b", "well", "10.0.0.3"), &web);
    let mut store = Store::new("n1");
    store.apply_addresses(
        vec![
            Resource::Service(web.clone()),
            Resource::Workload(sick),
            Resource::Workload(well),
        ],
        &[],
    );
    let endpoints = |store: &Store| -> Vec<String> {
        let shown = services(&store.snapshot());
        let endpoints = shown[0]["endpoints"].as_object().unwrap();
        endpoints.keys().cloned().collect()
    };
    assert_eq!(endpoints(&store), ["Kubernetes//Pod/b/well"]);
    web.load_balancer = Some(LoadBalancer {
        routing_preferences: vec![],
        mode: BalanceMode::Standard,
        health_policy: HealthPolicy::AllowAll,
    });
    store.apply_addresses(vec![Resource::Service(web)], &[]);
    assert_eq!(
        endpoints(&store),
        ["Kubernetes//Pod/b/sick", "Kubernetes//Pod/b/well"]
    );
}

#[test]
fn lists_are_sorted_by_uid_hostname_and_key() {
    let mut store = Store::new("n1");
    let mut resources = Vec::new();
    for (namespace, name) in [("c", "m"), ("a", "z"), ("b", "a")] {
        resources.push(Resource::Workload(pod(namespace, name, "10.0.0.1")));
        resources.push(Resource::Service(service(namespace, name, "10.96.0.1")));
    }
    store.apply_addresses(resources, &[]);
    let policies_of = |key: &str, name: &str| Policy {
        key: key.into(),
        name: name.into(),
        namespace: "a".into(),
        scope: model::Scope::Namespace,
        action: Action::Allow,
        rules: vec![],
        dry_run: false,
    };
    let unsorted = vec![
        policies_of("c/1", "x"),
        policies_of("a/2", "z"),
        policies_of("b/3", "y"),
    ];
    store.apply_policies(unsorted, &[]);
    let mesh = store.snapshot();
    let column = |shown: Value, key: &str| -> Vec<String> {
        let rows = shown.as_array().unwrap();
        rows.iter()
            .map(|row| row[key].as_str().unwrap().to_string())
            .collect()
    };
    assert_eq!(
        column(workloads(&mesh), "uid"),
        [
            "Kubernetes//Pod/a/z",
            "Kubernetes//Pod/b/a",
            "Kubernetes//Pod/c/m"
        ]
    );
    assert_eq!(column(services(&mesh), "name"), ["a", "m", "z"]);
    assert_eq!(column(policies(&mesh), "name"), ["z", "y", "x"]);
}

#[test]
fn endpoints_without_a_service_are_staged_by_service_and_uid() {
    let web = service("b", "web", "10.96.0.1");
    let mesh = mesh(vec![Resource::Workload(serving(
        pod("b", "w", "10.0.0.2"),
        &web,
    ))]);
    assert_eq!(
        staged_services(&mesh),
        json!({ "b/web.b.svc.cluster.local": { "Kubernetes//Pod/b/w": {
            "workloadUid": "Kubernetes//Pod/b/w", "port": { "80": 8080 }, "status": "Healthy"
        } } })
    );
}

#[test]
fn a_policy_shows_only_what_it_says() {
    let text = |text: &str| -> Arc<str> { text.into() };
    let nets = |net: &str| vec![net.parse().unwrap()];
    let account = |namespace: &str| ServiceAccount {
        namespace: namespace.into(),
        service_account: "sa".into(),
    };
    let full = Match {
        namespaces: vec![
            StringMatch::Exact(text("a")),
            StringMatch::Prefix(text("b")),
        ],
        not_namespaces: vec![StringMatch::Suffix(text("c"))],
        service_accounts: vec![account("d")],
        not_service_accounts: vec![account("e")],
        principals: vec![StringMatch::Presence],
        not_principals: vec![StringMatch::Exact(text("f"))],
        source_ips: nets("10.0.0.0/8"),
        not_source_ips: nets("10.0.0.1/32"),
        destination_ips: nets("fd00::/8"),
        not_destination_ips: nets("fd00::1/128"),
        destination_ports: vec![80, 443],
        not_destination_ports: vec![22],
        unreadable: false,
    };
    let mut store = Store::new("");
    let policy = Policy {
        key: "b/deny".into(),
        name: "deny".into(),
        namespace: "b".into(),
        scope: model::Scope::WorkloadSelector,
        action: Action::Deny,
        rules: vec![vec![vec![full, Match::default()], vec![]]],
        dry_run: true,
    };
    store.apply_policies(vec![policy], &[]);
    assert_eq!(
        policies(&store.snapshot()),
        json!([{
            "name": "deny", "namespace": "b", "scope": "WorkloadSelector", "action": "Deny", "dryRun": true,
            "rules": [[[{
                "namespaces": [{ "Exact": "a" }, { "Prefix": "b" }], "notNamespaces": [{ "Suffix": "c" }],
                "serviceAccounts": [{ "namespace": "d", "serviceAccount": "sa" }],
                "notServiceAccounts": [{ "namespace": "e", "serviceAccount": "sa" }],
                "principals": [{ "Presence": [] }], "notPrincipals": [{ "Exact": "f" }],
                "sourceIps": ["10.0.0.0/8"], "notSourceIps": ["10.0.0.1/32"],
                "destinationIps": ["fd00::/8"], "notDestinationIps": ["fd00::1/128"],
                "destinationPorts": [80, 443], "notDestinationPorts": [22]
            }, {}], []]]
        }])
    );
}
