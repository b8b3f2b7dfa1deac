use super::*;
use crate::mesh::service::{BalanceMode, CidrAddress, LoadBalancer, Visibility};
use crate::mesh::store::AddressResource as Resource;
use crate::mesh::testing::{mesh, pod, service, serving};

fn settings() -> Settings {
    Settings {
        domain: "cluster.local".into(),
        search: None,
        preferred_namespace: None,
        ipv6: true,
    }
}

fn world() -> Arc<Mesh> {
    let web = service("b", "web", "10.96.0.1");
    let mut headless = service("b", "db", "10.96.0.2");
    headless.vips.clear();
    let mut wildcard = service("b", "wild", "10.96.0.3");
    wildcard.hostname = "*.example.com".into();
    let mut hidden = service("b", "hidden", "10.96.0.4");
    hidden.visibility = Visibility::Namespace;
    let mut external = service("b", "ext", "10.96.0.5");
    external.hostname = "ext.example.org".into();
    external.vips.clear();
    let mut dual = service("a", "dual", "10.96.0.6");
    let mut v6 = dual.vips[0].clone();
    v6.address = "fd00::6".parse().unwrap();
    dual.vips.push(v6);
    let mut sick = serving(pod("b", "sick", "10.0.0.8"), &headless);
    sick.status = HealthStatus::Unhealthy;
    let db = serving(pod("b", "db", "10.0.0.9"), &headless);
    let services = [web, headless, wildcard, hidden, external, dual].map(Resource::Service);
    mesh(
        services
            .into_iter()
            .chain([sick, db].map(Resource::Workload))
            .collect(),
    )
}

/// What a client in namespace `a` is told, in short.
fn told(name: &str, v6: bool) -> String {
    match resolve(
        &world(),
        &settings(),
        &pod("a", "curl", "10.0.0.1"),
        name,
        v6,
    ) {
        Resolution::Forward => "forward".to_string(),
        Resolution::Known { alias, addresses } => {
            let addresses: Vec<_> = addresses.iter().map(ToString::to_string).collect();
            format!("{}[{}]", alias.unwrap_or_default(), addresses.join(","))
        }
    }
}

#[test]
fn names_resolve_in_every_form_a_client_may_use() {
    let cases = [
        ("web.b.svc.cluster.local", "[10.96.0.1]"),
        ("web.b", "[10.96.0.1]"),
        ("web.b.svc", "[10.96.0.1]"),
        ("web", "forward"),
        ("dual", "[10.96.0.6]"),
        ("web.b.a.svc.cluster.local", "web.b[10.96.0.1]"),
        ("web.b.svc.svc.cluster.local", "web.b.svc[10.96.0.1]"),
        ("web.b.cluster.local", "web.b[10.96.0.1]"),
        ("db.b.svc.cluster.local", "[10.0.0.9]"),
        ("any.example.com", "[10.96.0.3]"),
        ("deep.any.example.com", "[10.96.0.3]"),
        ("example.com", "forward"),
        ("any.example.com.a.svc.cluster.local", "[10.96.0.3]"),
        ("ext.example.org", "forward"),
        ("hidden.b.svc.cluster.local", "forward"),
        ("nothing.b.svc.cluster.local", "forward"),
        ("www.example.net", "forward"),
    ];
    for (name, expected) in cases {
        assert_eq!(told(name, false), expected, "{name}");
    }
}

#[test]
fn a_family_that_is_not_there_is_empty_not_unknown() {
    assert_eq!(told("web.b", true), "[]");
    assert_eq!(told("dual.a", true), "[fd00::6]");
    let without = Settings {
        ipv6: false,
        ..settings()
    };
    let client = pod("a", "curl", "10.0.0.1");
    let resolved = resolve(&world(), &without, &client, "dual.a", true);
    assert_eq!(
        resolved,
        Resolution::Known {
            alias: None,
            addresses: vec![]
        }
    );
}

/// A service of some namespace that is known by a name outside the cluster.
fn external(namespace: &str, hostname: &str, vip: &str) -> Service {
    let mut external = service(namespace, "ext", vip);
    external.hostname = hostname.into();
    external
}

/// The IPv4 addresses that a client in namespace `a` is told in a mesh of these; none when it is forwarded.
fn addresses_in(
    resources: Vec<Resource>,
    name: &str,
    preferred: Option<&str>,
) -> Option<Vec<String>> {
    let settings = Settings {
        preferred_namespace: preferred.map(str::to_string),
        ..settings()
    };
    let client = pod("a", "curl", "10.0.0.1");
    match resolve(&mesh(resources), &settings, &client, name, false) {
        Resolution::Forward => None,
        Resolution::Known { addresses, .. } => {
            let mut told: Vec<_> = addresses.iter().map(ToString::to_string).collect();
            told.sort();
            Some(told)
        }
    }
}

#[test]
fn of_services_with_one_name_the_closest_to_the_client_wins() {
    let of = |namespace: &str, last: u8| {
        external(namespace, "api.example.com", &format!("240.0.0.{last}"))
    };
    let told = |services: Vec<Service>, preferred| {
        let resources = services.into_iter().map(Resource::Service).collect();
        addresses_in(resources, "api.example.com", preferred).unwrap()
    };
    let canonical = || Service {
        canonical: true,
        ..of("c", 3)
    };
    assert_eq!(told(vec![of("b", 2), of("d", 4)], None), ["240.0.0.2"]);
    assert_eq!(told(vec![of("b", 2), of("d", 4)], Some("d")), ["240.0.0.4"]);
    assert_eq!(
        told(vec![of("b", 2), canonical(), of("d", 4)], Some("d")),
        ["240.0.0.3"]
    );
    assert_eq!(
        told(vec![canonical(), of("a", 1)], Some("d")),
        ["240.0.0.1"]
    );
    let hidden = Service {
        visibility: Visibility::Namespace,
        ..canonical()
    };
    assert_eq!(told(vec![hidden, of("b", 2)], None), ["240.0.0.2"]);
}

#[test]
fn the_closest_wildcard_wins_and_the_exact_name_before_it() {
    let services = || {
        [
            external("b", "*.example.com", "240.0.0.1"),
            external("c", "*.eu.example.com", "240.0.0.2"),
            external("d", "www.eu.example.com", "240.0.0.3"),
            external("e", "*.test", "240.0.0.4"),
        ]
        .map(Resource::Service)
        .to_vec()
    };
    let cases = [
        ("www.eu.example.com", Some("240.0.0.3")),
        ("api.eu.example.com", Some("240.0.0.2")),
        ("eu.example.com", Some("240.0.0.1")),
        ("example.com", None),
        ("a.b.c.test", Some("240.0.0.4")),
        ("test", None),
        ("", None),
    ];
    for (name, expected) in cases {
        let told = addresses_in(services(), name, None);
        let expected = expected.map(|address| vec![address.to_string()]);
        assert_eq!(told, expected, "{name}");
    }
}

#[test]
fn families_that_a_service_does_not_serve_are_empty() {
    let mut both = service("a", "web", "10.96.0.1");
    let mut six = both.vips[0].clone();
    six.address = "fd00::1".parse().unwrap();
    both.vips.push(six);
    let cases = [
        (None, true, true),
        (Some(IpFamilies::Dual), true, true),
        (Some(IpFamilies::Ipv4), true, false),
        (Some(IpFamilies::Ipv6), false, true),
    ];
    let client = pod("a", "curl", "10.0.0.1");
    for (families, four, six) in cases {
        both.ip_families = families;
        let mesh = mesh(vec![Resource::Service(both.clone())]);
        for (v6, served) in [(false, four), (true, six)] {
            match resolve(&mesh, &settings(), &client, "web", v6) {
                Resolution::Known { addresses, .. } => {
                    assert_eq!(addresses.len(), usize::from(served), "{families:?} {v6}");
                }
                Resolution::Forward => panic!("{families:?} {v6} is forwarded"),
            }
        }
    }
}

#[test]
fn only_addresses_of_the_clients_network_are_told() {
    let mut web = service("a", "web", "10.96.0.1");
    let mut elsewhere = web.vips[0].clone();
    elsewhere.network = "other".into();
    elsewhere.address = "10.97.0.1".parse().unwrap();
    web.vips.push(elsewhere.clone());
    let told = |service: &Service| {
        addresses_in(vec![Resource::Service(service.clone())], "web", None).unwrap()
    };
    assert_eq!(told(&web), ["10.96.0.1"]);
    web.vips = vec![elsewhere];
    assert!(told(&web).is_empty());
}

#[test]
fn a_headless_services_endpoints_are_told_by_health() {
    let mut db = service("a", "db", "10.96.0.1");
    db.vips.clear();
    let told = |db: &Service| {
        let mut sick = serving(pod("a", "db-0", "10.0.0.8"), db);
        sick.status = HealthStatus::Unhealthy;
        let well = serving(pod("a", "db-1", "10.0.0.9"), db);
        let resources = vec![
            Resource::Service(db.clone()),
            Resource::Workload(sick),
            Resource::Workload(well),
        ];
        addresses_in(resources, "db", None).unwrap()
    };
    assert_eq!(told(&db), ["10.0.0.9"]);
    db.load_balancer = Some(LoadBalancer {
        routing_preferences: vec![],
        mode: BalanceMode::Standard,
        health_policy: HealthPolicy::AllowAll,
    });
    assert_eq!(told(&db), ["10.0.0.8", "10.0.0.9"]);
}

#[test]
fn services_of_ranges_only_and_names_of_workloads_are_not_ours_to_answer() {
    let mut range = external("a", "range.example.com", "10.96.0.1");
    range.vips.clear();
    range.cidr_vips.push(CidrAddress {
        network: "".into(),
        cidr: "10.98.0.0/16".parse().unwrap(),
    });
    let mut replica = pod("a", "db-0", "10.0.0.8");
    replica.hostname = "db-0.db.a.svc.cluster.local".into();
    let resources = || {
        vec![
            Resource::Service(range.clone()),
            Resource::Workload(replica.clone()),
        ]
    };
    for name in ["range.example.com", "db-0.db.a.svc.cluster.local"] {
        assert_eq!(addresses_in(resources(), name, None), None, "{name}");
    }
}

#[test]
fn a_client_may_have_search_domains_of_its_own() {
    let settings = Settings {
        search: Some(vec!["corp.example".into()]),
        ..settings()
    };
    let client = pod("a", "curl", "10.0.0.1");
    let told = |name| match resolve(&world(), &settings, &client, name, false) {
        Resolution::Forward => "forward".to_string(),
        Resolution::Known { alias, .. } => alias.unwrap_or_default(),
    };
    assert_eq!(told("web.b.corp.example"), "web.b");
    assert_eq!(
        told("web.b.svc.cluster.local.corp.example"),
        "web.b.svc.cluster.local"
    );
    assert_eq!(told("web.b.elsewhere.example"), "forward");
}
