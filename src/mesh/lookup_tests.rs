//! Which of several workloads or services answers a lookup.

use std::net::IpAddr;

use crate::mesh::service::{CidrAddress, Service, Visibility};
use crate::mesh::store::{AddressResource as Resource, Store};
use crate::mesh::testing::{key, mesh, pod, service};

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// A service all of whose kind share one address and one hostname.
fn shared(namespace: &str, traits: &str) -> Service {
    let mut shared = service(namespace, "web", "10.96.0.1");
    shared.hostname = "web.example".into();
    shared.canonical = traits.contains("canonical");
    if traits.contains("private") {
        shared.visibility = Visibility::Namespace;
    }
    shared
}

#[test]
fn among_equals_ones_own_then_the_last_canonical_then_the_preferred_then_the_first_answers() {
    type Case<'a> = (&'a [(&'a str, &'a str)], Option<&'a str>, &'a str);
    let cases: &[Case] = &[
        (&[("a", ""), ("b", "")], None, "a"),
        (&[("a", ""), ("b", "")], Some("z"), "a"),
        (&[("a", ""), ("b", "")], Some("b"), "b"),
        (&[("a", "canonical"), ("b", "")], Some("b"), "b"),
        (&[("a", ""), ("b", "canonical")], Some("z"), "b"),
        (&[("a", "canonical"), ("b", "canonical")], Some("z"), "b"),
        (&[("a", ""), ("b", "canonical"), ("c", "")], None, "b"),
        (&[("a", "private"), ("b", "")], Some("z"), "b"),
        (&[("a", ""), ("b", "canonical private")], Some("z"), "a"),
        (&[("a", ""), ("b", "canonical private")], None, "b"),
        (&[("a", "private"), ("b", "")], Some("a"), "a"),
        (&[("a", "private")], Some("z"), "none"),
    ];
    for (services, client, winner) in cases {
        let resources = services
            .iter()
            .map(|(namespace, traits)| Resource::Service(shared(namespace, traits)));
        let mesh = mesh(resources.collect());
        let namespace = |found: Option<&std::sync::Arc<Service>>| {
            found.map_or("none".to_string(), |found| found.namespace.to_string())
        };
        let by_vip = namespace(mesh.service_by_vip("", &ip("10.96.0.1"), *client));
        let by_name = namespace(mesh.best_by_hostname("web.example", *client, None));
        assert_eq!(by_vip, *winner, "{services:?} for {client:?}");
        assert_eq!(by_name, *winner, "{services:?} for {client:?}");
    }
}

#[test]
fn a_preferred_namespace_ranks_after_canonical_ones() {
    let preferring = |services: &[(&str, &str)], preferred| {
        let resources = services
            .iter()
            .map(|(namespace, traits)| Resource::Service(shared(namespace, traits)));
        let mesh = mesh(resources.collect());
        let found = mesh.best_by_hostname("web.example", Some("z"), Some(preferred));
        found.map(|found| found.namespace.to_string()).unwrap()
    };
    assert_eq!(preferring(&[("a", ""), ("b", "")], "b"), "b");
    assert_eq!(preferring(&[("a", "canonical"), ("b", "")], "b"), "a");
    assert_eq!(preferring(&[("a", ""), ("b", "private")], "b"), "a");
}

#[test]
fn a_range_serves_those_who_may_not_see_the_exact_address() {
    let mut wide = service("b", "wide", "10.96.9.9");
    wide.vips.clear();
    wide.cidr_vips = vec![CidrAddress {
        network: "".into(),
        cidr: "10.96.0.0/16".parse().unwrap(),
    }];
    let resources = [shared("a", "private"), wide].map(Resource::Service);
    let mesh = mesh(resources.to_vec());
    let seen = |network: &str, client| {
        mesh.service_by_vip(network, &ip("10.96.0.1"), Some(client))
            .map(|found| found.namespace.to_string())
    };
    assert_eq!(seen("", "a").as_deref(), Some("a"));
    assert_eq!(seen("", "z").as_deref(), Some("b"));
    assert_eq!(seen("far", "z"), None);
}

#[test]
fn a_private_range_is_not_there_for_others_and_ones_own_beats_a_longer_prefix() {
    let ranged = |namespace: &str, cidr: &str| {
        let mut ranged = service(namespace, "range", "10.96.9.9");
        ranged.vips.clear();
        ranged.cidr_vips = vec![CidrAddress {
            network: "".into(),
            cidr: cidr.parse().unwrap(),
        }];
        ranged
    };
    let mut private = ranged("c", "10.97.1.0/28");
    private.visibility = Visibility::Namespace;
    let services = [
        ranged("a", "10.97.0.0/16"),
        ranged("b", "10.97.1.0/24"),
        private,
    ];
    let mesh = mesh(services.map(Resource::Service).to_vec());
    for (client, winner) in [("a", "a"), ("b", "b"), ("c", "c"), ("z", "b")] {
        let found = mesh.service_by_vip("", &ip("10.97.1.1"), Some(client));
        assert_eq!(&*found.unwrap().namespace, winner, "for {client}");
    }
}

#[test]
fn two_services_of_one_namespace_may_share_an_address() {
    let mut other = service("a", "other", "10.96.0.1");
    other.ports = [(81, 81)].into();
    let mut store = Store::new("");
    let resources = [service("a", "web", "10.96.0.1"), other];
    store.apply_addresses(resources.map(Resource::Service).to_vec(), &[]);
    store.apply_addresses(vec![], &[key("a", "web").to_string()]);
    let mesh = store.snapshot();
    let left = mesh.service_by_vip("", &ip("10.96.0.1"), Some("a"));
    assert_eq!(&*left.unwrap().name, "other");
}

#[test]
fn the_same_address_on_another_network_is_another_address() {
    let mut far_pod = pod("b", "far", "10.0.0.1");
    far_pod.network = "far".into();
    let mut far_service = service("b", "far", "10.96.0.1");
    far_service.vips[0].network = "far".into();
    let mesh = mesh(vec![
        Resource::Workload(pod("a", "near", "10.0.0.1")),
        Resource::Workload(far_pod),
        Resource::Service(service("a", "near", "10.96.0.1")),
        Resource::Service(far_service),
    ]);
    for (network, name) in [("", "near"), ("far", "far")] {
        let workload = mesh.workload_by_ip(network, &ip("10.0.0.1")).unwrap();
        let service = mesh.service_by_vip(network, &ip("10.96.0.1"), None);
        assert_eq!(&*workload.name, name);
        assert_eq!(&*service.unwrap().name, name);
    }
}

#[test]
fn a_workload_is_found_by_hostname_only_within_its_namespace() {
    let mut named = pod("a", "x", "10.0.0.1");
    named.hostname = "web.a.svc.cluster.local".into();
    let mesh = mesh(vec![Resource::Workload(named)]);
    let found = mesh.workload_by_hostname(&key("a", "web")).unwrap();
    assert_eq!(&*found.name, "x");
    let mut elsewhere = key("a", "web");
    elsewhere.namespace = "b".into();
    assert!(mesh.workload_by_hostname(&elsewhere).is_none());
}
