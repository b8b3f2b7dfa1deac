use super::*;
use crate::mesh::service::Service;
use crate::mesh::store::AddressResource as Resource;
use crate::mesh::testing::{key, mesh, pod, service, serving};

/// Picks many times with evenly spread randomness; gives how often each pod was picked.
fn picks(service: Service, pods: Vec<Workload>, port: u16) -> Vec<(String, usize)> {
    let client = pod("a", "client", "10.0.0.1");
    let pods = pods
        .into_iter()
        .map(|pod| Resource::Workload(serving(pod, &service)));
    let mesh = mesh(pods.chain([Resource::Service(service.clone())]).collect());
    let entry = mesh
        .service_entry(&key(&service.namespace, &service.name))
        .unwrap();
    let mut state = 1u64;
    let mut random = |bound: u64| {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (state >> 33) % bound
    };
    let mut counts = std::collections::BTreeMap::new();
    for _ in 0..1000 {
        if let Some((_, workload)) = pick(&mesh, entry, &client, port, Purpose::Serve, &mut random)
        {
            *counts.entry(workload.name.to_string()).or_default() += 1;
        }
    }
    counts.into_iter().collect()
}

fn names(picks: Vec<(String, usize)>) -> Vec<String> {
    picks.into_iter().map(|(name, _)| name).collect()
}

#[test]
fn endpoints_share_by_capacity() {
    let mut heavy = pod("b", "heavy", "10.0.0.2");
    heavy.capacity = 3;
    let picked = picks(
        service("b", "web", "10.96.0.1"),
        vec![heavy, pod("b", "light", "10.0.0.3")],
        80,
    );
    let heavy = picked[0].1;
    assert!((700..800).contains(&heavy), "{picked:?}");
    let mut none = pod("b", "none", "10.0.0.2");
    none.capacity = 0;
    assert!(picks(service("b", "web", "10.96.0.1"), vec![none], 80).is_empty());
}

#[test]
fn only_endpoints_that_can_serve_are_picked() {
    let web = || service("b", "web", "10.96.0.1");
    let sick = || {
        let mut workload = pod("b", "sick", "10.0.0.2");
        workload.status = HealthStatus::Unhealthy;
        workload
    };
    let well = || pod("b", "well", "10.0.0.3");
    assert_eq!(names(picks(web(), vec![sick(), well()], 80)), ["well"]);
    assert!(picks(web(), vec![well()], 81).is_empty());
    let mut patient = web();
    patient.load_balancer = Some(LoadBalancer {
        routing_preferences: vec![],
        mode: BalanceMode::Standard,
        health_policy: HealthPolicy::AllowAll,
    });
    assert_eq!(
        names(picks(patient, vec![sick(), well()], 80)),
        ["sick", "well"]
    );
    let mut unreachable = well();
    unreachable.addresses = Default::default();
    assert!(picks(web(), vec![unreachable], 80).is_empty());
}

#[test]
fn an_endpoint_without_addresses_is_picked_when_something_leads_to_it() {
    use crate::mesh::workload::{GatewayAddress, GatewayDestination};
    let gateway = || GatewayAddress {
        destination: GatewayDestination::Hostname(key("b", "gw")),
        hbone_mtls_port: 15008,
    };
    // network, hostname, gateway of the network, whether it is picked
    let cases = [
        ("", "", None, false),
        ("", "", Some(gateway()), false),
        ("far", "", None, false),
        ("far", "", Some(gateway()), true),
        ("", "db.example", None, true),
    ];
    for (network, hostname, gateway, picked) in cases {
        let told = format!("{network} {hostname} {gateway:?}");
        let mut bare = pod("b", "bare", "10.0.0.2");
        bare.addresses = Default::default();
        (bare.network, bare.hostname) = (network.into(), hostname.into());
        bare.network_gateway = gateway.map(Box::new);
        let found = picks(service("b", "web", "10.96.0.1"), vec![bare], 80);
        assert_eq!(!found.is_empty(), picked, "{told}");
    }
}

#[test]
fn an_endpoint_that_cannot_resolve_a_named_port_is_not_picked() {
    use crate::mesh::workload::{ApplicationTunnel, TunnelProtocol};
    let mut web = service("b", "web", "10.96.0.1");
    web.ports = [(80, 0)].into();
    let tunnel = |port| {
        let protocol = TunnelProtocol::None;
        Some(ApplicationTunnel { protocol, port })
    };
    // the endpoint's own ports, its application tunnel, whether it is picked
    let cases = [
        (vec![(80, 8080)], None, true),
        (vec![(80, 0)], None, false),
        (vec![(81, 8080)], None, false),
        (vec![], None, false),
        (vec![(80, 0)], tunnel(Some(15088)), true),
        (vec![(80, 0)], tunnel(None), false),
        (vec![], tunnel(Some(15088)), false),
    ];
    for (ports, tunnel, picked) in cases {
        let client = pod("a", "client", "10.0.0.1");
        let mut unclear = pod("b", "unclear", "10.0.0.2");
        let told = format!("{ports:?} {tunnel:?}");
        unclear
            .services
            .insert(web.key(), ports.into_iter().collect());
        unclear.application_tunnel = tunnel;
        let mesh = mesh(vec![
            Resource::Service(web.clone()),
            Resource::Workload(unclear),
        ]);
        let entry = mesh.service_entry(&web.key()).unwrap();
        let found = pick(&mesh, entry, &client, 80, Purpose::Serve, &mut |_: u64| 0);
        assert_eq!(found.is_some(), picked, "{told}");
    }
}

#[test]
fn an_endpoint_that_failed_is_taken_last() {
    struct Shuns(&'static [&'static str], u64);
    impl Choose for Shuns {
        fn random(&mut self, bound: u64) -> u64 {
            self.1 += 1;
            self.1 % bound
        }
        fn is_shunned(&self, workload_uid: &str) -> bool {
            self.0.iter().any(|name| workload_uid.ends_with(name))
        }
    }
    let client = pod("a", "client", "10.0.0.1");
    let preferring = LoadBalancer {
        routing_preferences: vec![Scope::Node],
        mode: BalanceMode::Failover,
        health_policy: HealthPolicy::OnlyHealthy,
    };
    for balancer in [None, Some(preferring)] {
        let mut web = service("b", "web", "10.96.0.1");
        web.load_balancer = balancer;
        let mut near = serving(pod("b", "near", "10.0.0.2"), &web);
        near.node = "n1".into();
        let mut far = serving(pod("b", "far", "10.0.0.3"), &web);
        far.node = "n2".into();
        let mesh = mesh(vec![
            Resource::Service(web.clone()),
            Resource::Workload(near),
            Resource::Workload(far),
        ]);
        let entry = mesh.service_entry(&web.key()).unwrap();
        let picked = |shunned| {
            let mut chooser = Shuns(shunned, 0);
            let mut names: Vec<_> = (0..20)
                .filter_map(|_| pick(&mesh, entry, &client, 80, Purpose::Serve, &mut chooser))
                .map(|(_, workload)| workload.name.to_string())
                .collect();
            names.sort();
            names.dedup();
            names
        };
        assert_eq!(picked(&["near"]), ["far"]);
        assert_eq!(picked(&["far"]), ["near"]);
        assert!(!picked(&["near", "far"]).is_empty());
    }
}

#[test]
fn near_endpoints_come_first_and_strict_takes_no_others() {
    let placed = |name: &str, network: &str, node: &str| {
        let mut workload = pod("b", name, "10.0.0.2");
        (workload.network, workload.node) = (network.into(), node.into());
        workload
    };
    let near = || placed("near", "", "n1");
    let same_network = || placed("same-network", "", "n2");
    let far = || placed("far", "other", "n1");
    let with = |mode, preferences: &[Scope]| {
        let mut web = service("b", "web", "10.96.0.1");
        web.load_balancer = Some(LoadBalancer {
            routing_preferences: preferences.to_vec(),
            mode,
            health_policy: HealthPolicy::OnlyHealthy,
        });
        web
    };
    use BalanceMode::{Failover, Strict};
    use Scope::{Network, Node};
    let cases = [
        (
            Failover,
            &[Node][..],
            vec![near(), same_network()],
            vec!["near"],
        ),
        (
            Failover,
            &[Node],
            vec![same_network()],
            vec!["same-network"],
        ),
        (Strict, &[Node], vec![same_network()], vec![]),
        (
            Failover,
            &[Network, Node],
            vec![same_network(), far()],
            vec!["same-network"],
        ),
        (
            Failover,
            &[Network, Node],
            vec![far(), placed("farther", "other", "n2")],
            vec!["far"],
        ),
        (
            Strict,
            &[Network, Node],
            vec![near(), same_network(), far()],
            vec!["near"],
        ),
    ];
    for (mode, preferences, pods, expected) in cases {
        assert_eq!(
            names(picks(with(mode, preferences), pods, 80)),
            expected,
            "{mode:?} {preferences:?}"
        );
    }
}
