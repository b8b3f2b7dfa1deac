//! What updates do to the mesh, rule by rule.

use super::AddressResource as Resource;
use super::*;
use crate::mesh::service::Visibility;
use crate::mesh::testing::{key, pod, service, serving};
use crate::mesh::workload::HealthStatus;
use crate::policy::model::{Action, Policy};

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn endpoints(mesh: &Mesh, namespace: &str, name: &str) -> usize {
    mesh.service_entry(&key(namespace, name))
        .map_or(0, |entry| entry.endpoints.len())
}

#[test]
fn endpoints_wait_for_their_service_and_survive_its_replacement() {
    let mut store = Store::new("n1");
    let web = service("b", "web", "10.96.0.1");
    store.apply_addresses(
        vec![Resource::Workload(serving(
            pod("b", "w1", "10.0.0.1"),
            &web,
        ))],
        &[],
    );
    assert_eq!(store.snapshot().staged().count(), 1);
    store.apply_addresses(vec![Resource::Service(web.clone())], &[]);
    let mesh = store.snapshot();
    assert_eq!(
        (mesh.staged().count(), endpoints(&mesh, "b", "web")),
        (0, 1)
    );
    let moved = service("b", "web", "10.96.0.2");
    store.apply_addresses(vec![Resource::Service(moved)], &[]);
    let mesh = store.snapshot();
    assert_eq!(endpoints(&mesh, "b", "web"), 1);
    assert!(mesh.service_by_vip("", &ip("10.96.0.1"), None).is_none());
    assert!(mesh.service_by_vip("", &ip("10.96.0.2"), None).is_some());
    store.apply_addresses(vec![], &["Kubernetes//Pod/b/w1".to_string()]);
    assert_eq!(endpoints(&store.snapshot(), "b", "web"), 0);
}

#[test]
fn a_removed_service_leaves_nothing_and_gets_its_endpoints_back() {
    let mut store = Store::new("n1");
    let web = service("b", "web", "10.96.0.1");
    store.apply_addresses(
        vec![
            Resource::Service(web.clone()),
            Resource::Workload(serving(pod("b", "w1", "10.0.0.1"), &web)),
        ],
        &[],
    );
    store.apply_addresses(vec![], &["b/web.b.svc.cluster.local".to_string()]);
    let mesh = store.snapshot();
    assert!(mesh.service_by_vip("", &ip("10.96.0.1"), None).is_none());
    assert!(
        mesh.best_by_hostname("web.b.svc.cluster.local", None, None)
            .is_none()
    );
    store.apply_addresses(vec![Resource::Service(web)], &[]);
    assert_eq!(endpoints(&store.snapshot(), "b", "web"), 1);
}

#[test]
fn an_address_belongs_to_pods_then_hbone_then_the_latest() {
    let named = |uid: &str, protocol| {
        let mut workload = pod("a", uid, "10.0.0.1");
        workload.uid = uid.into();
        workload.protocol = protocol;
        Resource::Workload(workload)
    };
    let cases = [
        (
            vec![
                named("x", Protocol::Hbone),
                named("k//Pod/a/p", Protocol::Tcp),
            ],
            "k//Pod/a/p",
        ),
        (
            vec![named("x", Protocol::Hbone), named("y", Protocol::Tcp)],
            "x",
        ),
        (
            vec![named("x", Protocol::Tcp), named("y", Protocol::Tcp)],
            "y",
        ),
        (
            vec![
                named("x", Protocol::Tcp),
                named("y", Protocol::Tcp),
                named("x", Protocol::Tcp),
            ],
            "x",
        ),
    ];
    for (resources, winner) in cases {
        let mut store = Store::new("n1");
        store.apply_addresses(resources, &[]);
        let mesh = store.snapshot();
        assert_eq!(
            &*mesh.workload_by_ip("", &ip("10.0.0.1")).unwrap().uid,
            winner
        );
        assert!(mesh.workload_by_ip("other", &ip("10.0.0.1")).is_none());
    }
}

#[test]
fn a_host_network_workload_does_not_own_its_address() {
    let mut store = Store::new("n1");
    let mut workload = pod("a", "x", "10.0.0.1");
    workload.network_mode = NetworkMode::HostNetwork;
    store.apply_addresses(vec![Resource::Workload(workload)], &[]);
    assert!(
        store
            .snapshot()
            .workload_by_ip("", &ip("10.0.0.1"))
            .is_none()
    );
}

#[test]
fn only_this_nodes_workloads_are_local_and_want_certificates() {
    let mut store = Store::new("n1");
    let mut elsewhere = pod("a", "far", "10.0.0.2");
    elsewhere.node = "n2".into();
    let mut plain = pod("a", "plain", "10.0.0.3");
    plain.protocol = Protocol::Tcp;
    let near = pod("a", "near", "10.0.0.1");
    let resources = [elsewhere, plain, near.clone()]
        .map(Resource::Workload)
        .to_vec();
    let changes = store.apply_addresses(resources, &[]);
    assert_eq!(
        changes,
        Changes {
            wanted: vec![near.identity.clone()],
            unwanted: vec![]
        }
    );
    let mesh = store.snapshot();
    assert!(mesh.local_workload("a", "near", "near").is_some());
    assert!(mesh.local_workload("a", "plain", "plain").is_some());
    assert!(mesh.local_workload("a", "far", "far").is_none());
    assert!(mesh.local_workload("a", "near", "other").is_none());
    let again = store.apply_addresses(vec![Resource::Workload(near.clone())], &[]);
    assert!(again.unwanted.is_empty());
    let changes = store.apply_addresses(vec![], &[near.uid.to_string()]);
    assert_eq!(changes.unwanted, [near.identity]);
}

#[test]
fn services_with_one_address_are_told_apart_by_namespace_canon_and_visibility() {
    let mut a = service("a", "web", "10.96.0.1");
    let mut b = service("b", "web", "10.96.0.1");
    let c = service("c", "web", "10.96.0.1");
    b.canonical = true;
    a.visibility = Visibility::Namespace;
    let mut store = Store::new("");
    store.apply_addresses([a, b, c].map(Resource::Service).to_vec(), &[]);
    let mesh = store.snapshot();
    let seen = |client| {
        mesh.service_by_vip("", &ip("10.96.0.1"), client)
            .map(|s| s.namespace.to_string())
    };
    assert_eq!(seen(Some("a")).as_deref(), Some("a"));
    assert_eq!(seen(Some("c")).as_deref(), Some("c"));
    assert_eq!(seen(Some("d")).as_deref(), Some("b"));
    assert_eq!(seen(None).as_deref(), Some("b"));
}

#[test]
fn a_range_serves_what_no_exact_address_does() {
    let mut wide = service("a", "wide", "10.96.0.1");
    wide.vips.clear();
    let cidr = |text: &str| crate::mesh::service::CidrAddress {
        network: "".into(),
        cidr: text.parse().unwrap(),
    };
    wide.cidr_vips = vec![cidr("10.97.0.0/16")];
    let mut narrow = wide.clone();
    narrow.hostname = "narrow".into();
    narrow.cidr_vips = vec![cidr("10.97.1.0/24")];
    let mut store = Store::new("");
    store.apply_addresses([narrow, wide].map(Resource::Service).to_vec(), &[]);
    let mesh = store.snapshot();
    let at = |text| {
        mesh.service_by_vip("", &ip(text), None)
            .map(|s| s.hostname.to_string())
    };
    assert_eq!(at("10.97.1.9").as_deref(), Some("narrow"));
    assert_eq!(at("10.97.2.9").as_deref(), Some("wide.a.svc.cluster.local"));
    assert_eq!(at("10.98.0.1"), None);
}

#[test]
fn a_policy_moves_between_scopes_and_goes() {
    let policy = |scope| Policy {
        key: "a/p".into(),
        name: "p".into(),
        namespace: "a".into(),
        scope,
        action: Action::Allow,
        rules: vec![],
        dry_run: false,
    };
    let mut store = Store::new("");
    let found =
        |store: &Store, namespace: &str| store.snapshot().policies_for_namespace(namespace).count();
    store.apply_policies(vec![policy(Scope::Global)], &[]);
    assert_eq!((found(&store, ""), found(&store, "a")), (1, 0));
    store.apply_policies(vec![policy(Scope::Namespace)], &[]);
    assert_eq!((found(&store, ""), found(&store, "a")), (0, 1));
    store.apply_policies(vec![policy(Scope::WorkloadSelector)], &[]);
    assert_eq!((found(&store, ""), found(&store, "a")), (0, 0));
    assert!(store.snapshot().policy("a/p").is_some());
    store.apply_policies(vec![], &["a/p".to_string()]);
    assert!(store.snapshot().policy("a/p").is_none());
}

#[test]
fn a_snapshot_does_not_change() {
    let mut store = Store::new("");
    store.apply_addresses(vec![Resource::Workload(pod("a", "x", "10.0.0.1"))], &[]);
    let before = store.snapshot();
    let mut sick = pod("a", "x", "10.0.0.2");
    sick.status = HealthStatus::Unhealthy;
    store.apply_addresses(vec![Resource::Workload(sick)], &[]);
    assert!(before.workload_by_ip("", &ip("10.0.0.1")).is_some());
    assert!(
        store
            .snapshot()
            .workload_by_ip("", &ip("10.0.0.1"))
            .is_none()
    );
}

#[test]
fn certificates_follow_identities_not_merely_service_accounts() {
    let mut store = Store::new("n1");
    let old = pod("a", "x", "10.0.0.1");
    let mut renamed = old.clone();
    renamed.identity = Identity::new("other.domain", "a", "x");
    store.apply_addresses(vec![Resource::Workload(old.clone())], &[]);
    let changes = store.apply_addresses(vec![Resource::Workload(renamed.clone())], &[]);
    assert_eq!(
        changes,
        Changes {
            wanted: vec![renamed.identity],
            unwanted: vec![old.identity]
        }
    );
}

#[test]
fn an_identity_superseded_within_one_response_is_never_wanted() {
    let mut store = Store::new("n1");
    let first = pod("a", "x", "10.0.0.1");
    let mut second = first.clone();
    second.node = "n2".into();
    let both = [first.clone(), second].map(Resource::Workload).to_vec();
    let changes = store.apply_addresses(both, &[]);
    assert_eq!(changes.wanted, []);
    assert_eq!(changes.unwanted, [first.identity]);
}

#[test]
fn an_identity_is_named_once_and_kept_while_another_pod_here_has_it() {
    let twin = |name: &str, ip: &str| {
        let mut twin = pod("a", name, ip);
        twin.identity = Identity::new("cluster.local", "a", "shared");
        twin
    };
    let (one, two) = (twin("one", "10.0.0.1"), twin("two", "10.0.0.2"));
    let mut store = Store::new("n1");
    let resources = [one.clone(), two.clone()].map(Resource::Workload).to_vec();
    let changes = store.apply_addresses(resources, &[]);
    assert_eq!(changes.wanted, std::slice::from_ref(&one.identity));
    let changes = store.apply_addresses(vec![], &[one.uid.to_string()]);
    assert_eq!(changes.unwanted, []);
    let changes = store.apply_addresses(vec![], &[two.uid.to_string()]);
    assert_eq!(changes.unwanted, std::slice::from_ref(&one.identity));
    let resources = [one.clone(), two.clone()].map(Resource::Workload).to_vec();
    store.apply_addresses(resources, &[]);
    let both = [one.uid.to_string(), two.uid.to_string()];
    assert_eq!(
        store.apply_addresses(vec![], &both).unwanted,
        [one.identity]
    );
}

#[test]
fn another_nodes_pod_does_not_touch_this_nodes_certificates() {
    let mut elsewhere = pod("a", "far", "10.0.0.2");
    elsewhere.node = "n2".into();
    elsewhere.identity = Identity::new("other.domain", "a", "x");
    let mut store = Store::new("n1");
    let resources = [pod("a", "x", "10.0.0.1"), elsewhere.clone()];
    store.apply_addresses(resources.map(Resource::Workload).to_vec(), &[]);
    let changes = store.apply_addresses(vec![], &[elsewhere.uid.to_string()]);
    assert_eq!(changes, Changes::default());
}

#[test]
fn of_equal_ranges_the_service_that_came_first_serves() {
    let ranged = |namespace: &str, canonical| {
        let mut service = service(namespace, "wide", "10.96.0.1");
        service.vips.clear();
        service.canonical = canonical;
        service.cidr_vips = vec![crate::mesh::service::CidrAddress {
            network: "".into(),
            cidr: "10.97.0.0/16".parse().unwrap(),
        }];
        service
    };
    let cases = [
        (vec![ranged("a", false), ranged("b", false)], None, "a"),
        (vec![ranged("a", false), ranged("b", true)], None, "b"),
        (vec![ranged("a", true), ranged("b", false)], Some("b"), "b"),
    ];
    for (services, client, winner) in cases {
        let mut store = Store::new("");
        store.apply_addresses(services.into_iter().map(Resource::Service).collect(), &[]);
        let mesh = store.snapshot();
        let found = mesh.service_by_vip("", &ip("10.97.1.1"), client).unwrap();
        assert_eq!(&*found.namespace, winner);
    }
}

#[test]
fn the_order_within_a_response_does_not_matter_to_endpoints() {
    let web = service("b", "web", "10.96.0.1");
    let workload = Resource::Workload(serving(pod("b", "w1", "10.0.0.1"), &web));
    let web = Resource::Service(web);
    let orders = [
        vec![workload.clone(), web.clone()],
        vec![web.clone(), workload.clone()],
    ];
    for resources in orders {
        let mut store = Store::new("n1");
        store.apply_addresses(resources, &[]);
        let mesh = store.snapshot();
        assert_eq!(endpoints(&mesh, "b", "web"), 1);
        assert_eq!(mesh.staged().count(), 0);
    }
}

#[test]
fn what_a_response_removes_and_sends_again_is_there() {
    let mut store = Store::new("n1");
    let web = service("b", "web", "10.96.0.1");
    let records = vec![
        Resource::Workload(serving(pod("b", "w1", "10.0.0.1"), &web)),
        Resource::Service(web),
    ];
    store.apply_addresses(records.clone(), &[]);
    let removals = [
        "Kubernetes//Pod/b/w1".to_string(),
        key("b", "web").to_string(),
    ];
    let changes = store.apply_addresses(records, &removals);
    let mesh = store.snapshot();
    assert_eq!(endpoints(&mesh, "b", "web"), 1);
    assert!(mesh.workload_by_ip("", &ip("10.0.0.1")).is_some());
    assert_eq!(changes.unwanted, []);
}

#[test]
fn a_changed_workload_leaves_nothing_of_its_former_self() {
    let mut store = Store::new("n1");
    let (web, api) = (
        service("b", "web", "10.96.0.1"),
        service("b", "api", "10.96.0.2"),
    );
    let mut first = serving(pod("b", "w1", "10.0.0.1"), &web);
    first.hostname = "w1.example".into();
    let second = serving(pod("b", "w1", "10.0.0.2"), &api);
    let resources = vec![
        Resource::Service(web),
        Resource::Service(api),
        Resource::Workload(first),
    ];
    store.apply_addresses(resources, &[]);
    let mut stale = second.clone();
    stale.node = "n2".into();
    store.apply_addresses(vec![Resource::Workload(stale)], &[]);
    let mesh = store.snapshot();
    assert_eq!(endpoints(&mesh, "b", "web"), 0);
    assert_eq!(endpoints(&mesh, "b", "api"), 1);
    assert!(mesh.workload_by_ip("", &ip("10.0.0.1")).is_none());
    assert!(mesh.workload_by_ip("", &ip("10.0.0.2")).is_some());
    assert!(mesh.local_workload("b", "w1", "w1").is_none());
    let hostname = NamespacedHostname {
        namespace: "b".into(),
        hostname: "w1.example".into(),
    };
    assert!(mesh.workload_by_hostname(&hostname).is_none());
}

#[test]
fn unhealthy_endpoints_are_kept_with_their_status() {
    let mut store = Store::new("n1");
    let web = service("b", "web", "10.96.0.1");
    let mut sick = serving(pod("b", "w1", "10.0.0.1"), &web);
    sick.status = HealthStatus::Unhealthy;
    let resources = vec![Resource::Service(web), Resource::Workload(sick.clone())];
    store.apply_addresses(resources, &[]);
    let status = |store: &Store| {
        let mesh = store.snapshot();
        let entry = mesh.service_entry(&key("b", "web")).unwrap();
        entry.endpoints.get("Kubernetes//Pod/b/w1").unwrap().status
    };
    assert_eq!(status(&store), HealthStatus::Unhealthy);
    sick.status = HealthStatus::Healthy;
    store.apply_addresses(vec![Resource::Workload(sick)], &[]);
    assert_eq!(status(&store), HealthStatus::Healthy);
}

#[test]
fn without_a_node_name_every_workload_is_local() {
    let mut store = Store::new("");
    let mut far = pod("a", "far", "10.0.0.1");
    far.node = "n9".into();
    let changes = store.apply_addresses(vec![Resource::Workload(far.clone())], &[]);
    assert_eq!(changes.wanted, [far.identity]);
    let mesh = store.snapshot();
    assert!(mesh.local_workload("a", "far", "far").is_some());
}

#[test]
fn a_plain_workload_with_its_own_tunnel_wants_a_certificate() {
    let mut store = Store::new("n1");
    let mut native = pod("a", "x", "10.0.0.1");
    (native.protocol, native.native_tunnel) = (Protocol::Tcp, true);
    let changes = store.apply_addresses(vec![Resource::Workload(native.clone())], &[]);
    assert_eq!(changes.wanted, [native.identity]);
}

#[test]
fn a_removal_means_a_workload_then_a_service_and_otherwise_nothing() {
    let mut odd = pod("a", "odd", "10.0.0.1");
    odd.uid = key("a", "web").to_string().into();
    let records = vec![
        Resource::Workload(odd),
        Resource::Service(service("a", "web", "10.96.0.1")),
    ];
    let name = key("a", "web").to_string();
    let cases: [(&[&str], usize, usize); 5] = [
        (&[&name], 0, 1),
        (&[&name, &name], 0, 0),
        (&["b/web.a.svc.cluster.local"], 1, 1),
        (&["web.a.svc.cluster.local"], 1, 1),
        (&["k//Pod/a/unknown", "", "/"], 1, 1),
    ];
    for (removals, workloads, services) in cases {
        let mut store = Store::new("n1");
        store.apply_addresses(records.clone(), &[]);
        let removals: Vec<_> = removals.iter().map(|name| name.to_string()).collect();
        store.apply_addresses(vec![], &removals);
        let mesh = store.snapshot();
        assert_eq!(
            (mesh.workloads().count(), mesh.services().count()),
            (workloads, services),
            "{removals:?}"
        );
    }
}

#[test]
fn a_policy_is_known_by_its_resource_name_alone() {
    let policy = Policy {
        key: "istio-system/given".into(),
        name: "own".into(),
        namespace: "a".into(),
        scope: Scope::Namespace,
        action: Action::Deny,
        rules: vec![],
        dry_run: false,
    };
    let mut store = Store::new("");
    store.apply_policies(vec![policy], &["a/own".to_string()]);
    let mesh = store.snapshot();
    assert!(mesh.policy("istio-system/given").is_some());
    assert!(mesh.policy("a/own").is_none());
    assert_eq!(mesh.policies_for_namespace("a").count(), 1);
    assert_eq!(mesh.policies_for_namespace("istio-system").count(), 0);
}
