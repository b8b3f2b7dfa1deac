use super::*;
use crate::mesh::service::{CidrAddress, HealthPolicy, LoadBalancer, Visibility, WeightedWaypoint};
use crate::mesh::store::AddressResource as Resource;
use crate::mesh::testing::{mesh, pod, service, serving};
use crate::mesh::workload::{
    ApplicationTunnel, HealthStatus, NamespacedHostname, NetworkAddress, TunnelProtocol,
};

const POD: &str = "10.0.0.9:8080";
const REMOTE: &str = "spiffe://cluster.local/ns/b/sa/remote";
const VIP: &str = "10.96.0.1:80";

fn waypoint_at(ip: &str) -> Option<Box<GatewayAddress>> {
    let address = NetworkAddress {
        network: "".into(),
        address: ip.parse().unwrap(),
    };
    Some(Box::new(GatewayAddress {
        destination: GatewayDestination::Address(address),
        hbone_mtls_port: 15008,
    }))
}

fn waypoint_named(hostname: &str) -> Option<Box<GatewayAddress>> {
    let name = NamespacedHostname {
        namespace: "b".into(),
        hostname: hostname.into(),
    };
    Some(Box::new(GatewayAddress {
        destination: GatewayDestination::Hostname(name),
        hbone_mtls_port: 15008,
    }))
}

/// A server pod `b/web` at 10.0.0.9 behind `web.b` at 10.96.0.1, a waypoint pod at 10.0.0.20; each may be changed.
struct World {
    web: Workload,
    service: Service,
    waypoint: Workload,
    client: Workload,
    /// Where the flow comes from, if not from the client's own address.
    from: Option<IpAddr>,
    /// What else there is.
    more: Vec<Resource>,
}

impl World {
    fn new() -> Self {
        Self {
            web: pod("b", "web", "10.0.0.9"),
            service: service("b", "web", "10.96.0.1"),
            waypoint: pod("b", "waypoint", "10.0.0.20"),
            client: pod("a", "curl", "10.0.0.1"),
            from: None,
            more: vec![],
        }
    }

    fn route(&self, target: &str) -> Result<Route, RouteError> {
        self.route_by(target, &mut |_: u64| 0)
    }

    fn route_by(&self, target: &str, chooser: Chooser<'_>) -> Result<Route, RouteError> {
        let mut resources = vec![
            Resource::Service(self.service.clone()),
            Resource::Workload(serving(self.web.clone(), &self.service)),
            Resource::Workload(self.waypoint.clone()),
            Resource::Workload(self.client.clone()),
        ];
        resources.extend(self.more.iter().cloned());
        let mesh = mesh(resources);
        let from = self.from.unwrap_or(self.client.addresses[0]);
        let client = SocketAddr::new(from, 4444);
        decide(
            &mesh,
            &self.client,
            client,
            target.parse().unwrap(),
            chooser,
        )
    }

    /// `kind connect authority expected...` in short, or the error.
    fn told(&self, target: &str) -> String {
        match self.route(target) {
            Err(error) => error.to_string(),
            Ok(route) => {
                let expected: Vec<_> = route
                    .expected
                    .iter()
                    .map(|id| id.service_account().to_string())
                    .collect();
                let service = route
                    .service
                    .map(|service| service.name.to_string())
                    .unwrap_or_default();
                let beyond = route.beyond.map(|beyond| {
                    let expected = beyond.expected.iter();
                    let names: Vec<_> = expected.map(|id| id.service_account()).collect();
                    let kind = if beyond.is_waypoint { "waypoint " } else { "" };
                    format!(" beyond {kind}[{}]", names.join(","))
                });
                format!(
                    "{:?} {} {} [{}] {service}{}",
                    route.kind,
                    route.connect,
                    route.authority.unwrap_or_default(),
                    expected.join(","),
                    beyond.unwrap_or_default()
                )
            }
        }
    }
}

#[test]
fn plain_cases() {
    let world = World::new();
    assert_eq!(world.told(POD), "Hbone 10.0.0.9:15008 10.0.0.9:8080 [web] ");
    assert_eq!(
        world.told("10.0.0.9:1"),
        "Hbone 10.0.0.9:15008 10.0.0.9:1 [web] "
    );
    assert_eq!(
        world.told(VIP),
        "Hbone 10.0.0.9:15008 10.0.0.9:8080 [web] web"
    );
    assert_eq!(
        world.told("10.96.0.1:81"),
        "no healthy upstream: 10.96.0.1:81"
    );
    assert_eq!(world.told("192.0.2.1:80"), "Passthrough 192.0.2.1:80  [] ");
}

#[test]
fn a_workload_outside_the_mesh_is_reached_in_the_clear() {
    let mut world = World::new();
    world.web.protocol = Protocol::Tcp;
    assert_eq!(world.told(POD), "Tcp 10.0.0.9:8080  [] ");
    assert_eq!(world.told(VIP), "Tcp 10.0.0.9:8080  [] web");
}

#[test]
fn services_without_a_taker_refuse_unless_they_pass_through() {
    let mut world = World::new();
    world.web.status = HealthStatus::Unhealthy;
    assert_eq!(world.told(VIP), "no healthy upstream: 10.96.0.1:80");
    world.service.load_balancer = Some(LoadBalancer {
        routing_preferences: vec![],
        mode: BalanceMode::Passthrough,
        health_policy: HealthPolicy::OnlyHealthy,
    });
    assert_eq!(world.told(VIP), "Passthrough 10.96.0.1:80  [] ");
}

#[test]
fn a_private_service_does_not_exist_for_others() {
    let mut world = World::new();
    world.service.visibility = Visibility::Namespace;
    assert_eq!(world.told(VIP), "Passthrough 10.96.0.1:80  [] ");
    world.client.namespace = "b".into();
    assert_eq!(
        world.told(VIP),
        "Hbone 10.0.0.9:15008 10.0.0.9:8080 [web] web"
    );
}

#[test]
fn named_ports_are_the_endpoints_own() {
    let mut world = World::new();
    world.service.ports = [(80, 0)].into();
    assert_eq!(
        world.told(VIP),
        "Hbone 10.0.0.9:15008 10.0.0.9:8080 [web] web"
    );
}

#[test]
fn what_the_service_names_is_expected_too() {
    let mut world = World::new();
    world.service.subject_alt_names = vec!["spiffe://td/ns/x/sa/other".into(), "garbage".into()];
    assert_eq!(
        world.told(VIP),
        "Hbone 10.0.0.9:15008 10.0.0.9:8080 [other,web] web"
    );
    assert_eq!(world.told(POD), "Hbone 10.0.0.9:15008 10.0.0.9:8080 [web] ");
}

#[test]
fn a_services_waypoint_takes_everything_sent_to_the_service() {
    let mut world = World::new();
    world.service.waypoint = waypoint_at("10.0.0.20");
    assert_eq!(
        world.told(VIP),
        "Hbone 10.0.0.20:15008 10.96.0.1:80 [waypoint] web"
    );
    assert_eq!(
        world.told("10.96.0.1:81"),
        "Hbone 10.0.0.20:15008 10.96.0.1:81 [waypoint] web"
    );
    assert_eq!(world.told(POD), "Hbone 10.0.0.9:15008 10.0.0.9:8080 [web] ");
    world.service.waypoint = waypoint_at("10.0.0.99");
    assert_eq!(
        world.told(VIP),
        "unknown waypoint: waypoint /10.0.0.99 not found"
    );
    world.service.waypoint = waypoint_named("nowhere");
    assert_eq!(
        world.told(VIP),
        "unknown waypoint: waypoint nowhere not found"
    );
    world.service.waypoint = waypoint_named("wp.example");
    world.waypoint.hostname = "wp.example".into();
    assert_eq!(
        world.told(VIP),
        "Hbone 10.0.0.20:15008 10.96.0.1:80 [waypoint] web"
    );
}

#[test]
fn a_waypoint_may_be_a_service() {
    let mut world = World::new();
    let mut gateway = service("b", "gw", "10.96.0.20");
    gateway.ports = [(15008, 15008)].into();
    world.service.waypoint = waypoint_at("10.96.0.20");
    world.waypoint = serving(world.waypoint, &gateway);
    let mut resources = vec![
        Resource::Service(world.service.clone()),
        Resource::Workload(serving(world.web.clone(), &world.service)),
        Resource::Workload(world.waypoint.clone()),
    ];
    let decided = |resources: &[Resource]| {
        let client = "10.0.0.1:4444".parse().unwrap();
        decide(
            &mesh(resources.to_vec()),
            &world.client,
            client,
            VIP.parse().unwrap(),
            &mut |_: u64| 0,
        )
    };
    assert!(matches!(
        decided(&resources),
        Err(RouteError::UnknownWaypoint(_))
    ));
    resources.push(Resource::Service(gateway));
    let route = decided(&resources).unwrap();
    assert_eq!(route.connect.to_string(), "10.0.0.20:15008");
    assert_eq!(route.authority.as_deref(), Some(VIP));
}

#[test]
fn weights_choose_among_waypoints() {
    let mut world = World::new();
    let to = |ip, weight| WeightedWaypoint {
        destination: *waypoint_at(ip).unwrap(),
        weight,
    };
    world.service.waypoint = waypoint_at("10.0.0.99");
    world.service.weighted_waypoints = vec![to("10.0.0.98", 0), to("10.0.0.20", 5)];
    assert_eq!(
        world.told(VIP),
        "Hbone 10.0.0.20:15008 10.96.0.1:80 [waypoint] web"
    );
    world.service.weighted_waypoints = vec![to("10.0.0.20", 0)];
    assert_eq!(
        world.told(VIP),
        "unknown waypoint: waypoint /10.0.0.99 not found"
    );
}

#[test]
fn a_workloads_waypoint_takes_what_is_sent_to_the_workload_but_not_its_own() {
    let mut world = World::new();
    world.web.waypoint = waypoint_at("10.0.0.20");
    assert_eq!(
        world.told(POD),
        "Hbone 10.0.0.20:15008 10.0.0.9:8080 [waypoint] "
    );
    assert_eq!(
        world.told(VIP),
        "Hbone 10.0.0.9:15008 10.0.0.9:8080 [web] web"
    );
    world.client = world.waypoint.clone();
    assert_eq!(world.told(POD), "Hbone 10.0.0.9:15008 10.0.0.9:8080 [web] ");
}

#[test]
fn an_application_tunnel_stands_in_for_a_missing_port_of_a_waypoint() {
    let mut world = World::new();
    let gateway = service("b", "gw", "10.96.0.20");
    world.service.waypoint = waypoint_at("10.96.0.20");
    world.waypoint = serving(world.waypoint, &gateway);
    world.waypoint.application_tunnel = Some(ApplicationTunnel {
        protocol: TunnelProtocol::Proxy,
        port: Some(15088),
    });
    let mesh = mesh(vec![
        Resource::Service(world.service.clone()),
        Resource::Service(gateway),
        Resource::Workload(world.waypoint.clone()),
    ]);
    let client = "10.0.0.1:4444".parse().unwrap();
    let route = decide(
        &mesh,
        &world.client,
        client,
        VIP.parse().unwrap(),
        &mut |_: u64| 0,
    )
    .unwrap();
    assert_eq!(route.connect.to_string(), "10.0.0.20:15008");
}

#[test]
fn other_networks_are_reached_through_their_gateways() {
    const THROUGH: &str =
        "Hbone 10.0.0.20:15008 web.b.svc.cluster.local:80 [waypoint] web beyond [remote]";
    // An application tunnel stands in for a missing port of a waypoint, but not of a gateway.
    let unserved = service("b", "gw", "10.96.0.20");
    let tunnel = Some(ApplicationTunnel {
        protocol: TunnelProtocol::Proxy,
        port: Some(15088),
    });
    let mut portless = serving(pod("b", "gw", "10.0.0.30"), &unserved);
    portless.application_tunnel = tunnel;
    // gateway of the network, outcome
    let cases = [
        (
            None,
            "no valid routing destination for workload: Workload{web with uid Kubernetes//Pod/b/web (HBONE)}",
        ),
        (waypoint_at("10.0.0.20"), THROUGH),
        (waypoint_named("wp.example"), THROUGH),
        (
            waypoint_at("10.0.0.99"),
            "unknown network gateway: network gateway /10.0.0.99 not found",
        ),
        (
            waypoint_named("nowhere"),
            "unknown network gateway: network gateway nowhere not found",
        ),
        (
            waypoint_at("10.96.0.20"),
            "unknown network gateway: network gateway /10.96.0.20 has no healthy endpoint",
        ),
    ];
    for (gateway, expected) in cases {
        let mut world = World::new();
        world.more = vec![
            Resource::Service(unserved.clone()),
            Resource::Workload(portless.clone()),
        ];
        world.waypoint.hostname = "wp.example".into();
        world.web.network = "far".into();
        world.web.network_gateway = gateway.clone();
        world.service.subject_alt_names = vec![REMOTE.into(), "no identity".into()];
        assert_eq!(world.told(VIP), expected, "endpoint, {gateway:?}");

        // The same when the far workload is a waypoint, behind a service of its own.
        let mut front = service("b", "front", "10.96.0.40");
        front.subject_alt_names = vec![REMOTE.into()];
        let mut far = serving(pod("b", "web", "10.9.0.9"), &front);
        (far.network, far.network_gateway) = ("far".into(), gateway.clone());
        far.application_tunnel = tunnel;
        let mut world = World::new();
        world.waypoint.hostname = "wp.example".into();
        world.web = pod("b", "other", "10.0.0.8");
        world.service.waypoint = waypoint_at("10.96.0.40");
        world.more = vec![
            Resource::Service(unserved.clone()),
            Resource::Workload(portless.clone()),
            Resource::Service(front),
            Resource::Workload(far),
        ];
        let expected = expected.replace("beyond [", "beyond waypoint [");
        assert_eq!(world.told(VIP), expected, "waypoint, {gateway:?}");
    }
}

#[test]
fn nobody_is_reached_on_another_network_who_cannot_be_told_from_others() {
    let mut world = World::new();
    world.web.network = "far".into();
    world.web.network_gateway = waypoint_at("10.0.0.20");
    assert_eq!(
        world.told(VIP),
        "service web.b.svc.cluster.local names no identities (subject_alt_names), so nobody on network \"far\" can prove to be it"
    );
}

#[test]
fn an_address_of_a_workload_and_a_service_means_one_of_them_throughout() {
    // The service's own address is the service, with its balancing and its waypoint.
    let mut world = World::new();
    world.client.addresses = vec!["10.96.0.1".parse().unwrap()].into();
    assert_eq!(
        world.told(VIP),
        "Hbone 10.0.0.9:15008 10.0.0.9:8080 [web] web"
    );
    world.service.waypoint = waypoint_at("10.0.0.20");
    assert_eq!(
        world.told(VIP),
        "Hbone 10.0.0.20:15008 10.96.0.1:80 [waypoint] web"
    );
    // A workload within a service's range is itself.
    let mut world = World::new();
    world.service.vips.clear();
    world.service.cidr_vips = vec![CidrAddress {
        network: "".into(),
        cidr: "10.0.0.0/8".parse().unwrap(),
    }];
    world.service.waypoint = waypoint_at("10.0.0.99");
    assert_eq!(world.told(POD), "Hbone 10.0.0.9:15008 10.0.0.9:8080 [web] ");
    assert!(world.told(VIP).contains("unknown waypoint"));
}

#[test]
fn what_comes_from_a_waypoint_does_not_go_to_it_again() {
    let gateway = || {
        let mut gateway = service("b", "gw", "10.96.0.20");
        gateway.ports = [(15008, 15008)].into();
        gateway
    };
    let through = "Hbone 10.0.0.20:15008 10.0.0.9:8080 [waypoint] ";
    let direct = "Hbone 10.0.0.9:15008 10.0.0.9:8080 [web] ";
    let references = [
        waypoint_at("10.0.0.20"),
        waypoint_named("wp.example"),
        waypoint_at("10.96.0.20"),
        waypoint_named("gw.b.svc.cluster.local"),
    ];
    for reference in references {
        let world = || {
            let mut world = World::new();
            world.more.push(Resource::Service(gateway()));
            world.waypoint.hostname = "wp.example".into();
            world.waypoint = serving(world.waypoint, &gateway());
            world.web.waypoint = reference.clone();
            world
        };
        assert_eq!(world().told(POD), through, "{reference:?}");

        let mut itself = world();
        itself.client = itself.waypoint.clone();
        assert_eq!(itself.told(POD), direct, "{reference:?}");

        // A pod that runs as the waypoint's account is not the waypoint: it does not own its address.
        let mut namesake = world();
        namesake.client.identity = namesake.waypoint.identity.clone();
        assert_eq!(namesake.told(POD), through, "{reference:?}");

        // Nor is a pod that sends from the address, but runs as another account.
        let mut impostor = world();
        impostor.from = Some(impostor.waypoint.addresses[0]);
        assert_eq!(impostor.told(POD), through, "{reference:?}");
    }
}

#[test]
fn a_workloads_waypoint_that_cannot_be_found_is_not_gone_around() {
    let cases = [
        (
            waypoint_at("10.0.0.99"),
            "unknown waypoint: waypoint /10.0.0.99 not found",
        ),
        (
            waypoint_named("nowhere"),
            "unknown waypoint: waypoint nowhere not found",
        ),
    ];
    for (waypoint, expected) in cases {
        let mut world = World::new();
        world.web.waypoint = waypoint;
        assert_eq!(world.told(POD), expected);
        world.web.protocol = Protocol::Tcp;
        assert_eq!(world.told(POD), expected);
        assert_eq!(world.told(VIP), "Tcp 10.0.0.9:8080  [] web");
    }
}

#[test]
fn a_services_waypoint_comes_before_its_balancing() {
    let passthrough = LoadBalancer {
        routing_preferences: vec![],
        mode: BalanceMode::Passthrough,
        health_policy: HealthPolicy::OnlyHealthy,
    };
    // balancer, health of the endpoint
    let cases = [
        (Some(passthrough), HealthStatus::Healthy),
        (None, HealthStatus::Unhealthy),
    ];
    for (balancer, health) in cases {
        let mut world = World::new();
        world.service.waypoint = waypoint_at("10.0.0.20");
        (world.service.load_balancer, world.web.status) = (balancer, health);
        assert_eq!(
            world.told(VIP),
            "Hbone 10.0.0.20:15008 10.96.0.1:80 [waypoint] web"
        );
    }
}

#[test]
fn the_address_keeps_the_family_asked_for_within_what_the_service_allows() {
    let mut world = World::new();
    world.web.addresses = vec!["10.0.0.9".parse().unwrap(), "fd00::9".parse().unwrap()].into();
    let mut v6 = world.service.vips[0].clone();
    v6.address = "fd00:96::1".parse().unwrap();
    world.service.vips.push(v6);
    assert!(
        world
            .told("[fd00:96::1]:80")
            .starts_with("Hbone [fd00::9]:15008 [fd00::9]:8080")
    );
    world.service.ip_families = Some(IpFamilies::Ipv4);
    assert!(
        world
            .told("[fd00:96::1]:80")
            .starts_with("Hbone 10.0.0.9:15008")
    );
    world.service.ip_families = Some(IpFamilies::Ipv6);
    assert!(world.told(VIP).starts_with("Hbone [fd00::9]:15008"));
}

#[test]
fn a_hostname_goes_to_an_address_of_the_family_asked_for_or_says_why_not() {
    struct Knows(Resolved);
    impl crate::mesh::balance::Choose for Knows {
        fn random(&mut self, _: u64) -> u64 {
            0
        }
        fn resolved(&mut self, hostname: &str) -> Resolved {
            assert_eq!(hostname, "web.example");
            self.0.clone()
        }
    }
    let mut world = World::new();
    world.web.addresses = Default::default();
    world.web.hostname = "web.example".into();
    world.web.protocol = Protocol::Tcp;
    let to = |ips: &[&str]| Resolved::To(ips.iter().map(|ip| ip.parse().unwrap()).collect());
    let cases = [
        (to(&["fd00::9", "10.0.0.9"]), "10.0.0.9:8080"),
        (to(&["fd00::9"]), "[fd00::9]:8080"),
        (
            to(&[]),
            "ip addresses were resolved for workload Kubernetes//Pod/b/web, but valid dns response had no A/AAAA records",
        ),
        (
            Resolved::Failed,
            "no ip addresses were resolved for workload: Kubernetes//Pod/b/web",
        ),
        (
            Resolved::NotYet,
            "no ip addresses were resolved for workload: Kubernetes//Pod/b/web",
        ),
    ];
    for (resolved, expected) in cases {
        let told = match world.route_by(VIP, &mut Knows(resolved)) {
            Ok(route) => route.connect.to_string(),
            Err(error) => error.to_string(),
        };
        assert_eq!(told, expected);
    }
}
