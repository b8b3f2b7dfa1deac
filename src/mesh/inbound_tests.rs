use super::*;

const ILLEGAL: [u16; 3] = [15001, 15006, 15008];
use crate::mesh::service::WeightedWaypoint;
use crate::mesh::store::AddressResource as Resource;
use crate::mesh::testing::{mesh, pod, service, serving};
use crate::mesh::workload::{ApplicationTunnel, Protocol};

fn told(mesh: &Mesh, local: &Workload, authority: &str, host: Option<&str>) -> String {
    let ip = local.addresses[0];
    match mesh.inbound_target(local, &authority.parse().unwrap(), ip, host, &ILLEGAL) {
        Ok(target) => {
            let service = target
                .service
                .map(|service| service.name.to_string())
                .unwrap_or_default();
            let announced = target
                .announced
                .map(|address| format!(" announced as {address}"))
                .unwrap_or_default();
            format!("{} {service}{announced}", target.connect_port)
        }
        Err(refusal) => format!("{} {}", refusal.status, refusal.text),
    }
}

#[test]
fn a_connect_reaches_the_pod_it_arrived_at_and_nothing_else() {
    let web = service("b", "web", "10.96.0.1");
    let mut other = service("b", "other", "10.96.0.2");
    other.ports = [(9, 8080)].into();
    let local = serving(serving(pod("b", "web", "10.0.0.9"), &other), &web);
    let mesh = mesh(vec![
        Resource::Workload(local.clone()),
        Resource::Workload(pod("b", "neighbour", "10.0.0.10")),
        Resource::Service(web),
        Resource::Service(other),
    ]);
    let cases = [
        ("10.0.0.9:8080", Some("web.b.svc.cluster.local"), "8080 web"),
        (
            "10.0.0.9:8080",
            Some("invented.b.svc.cluster.local"),
            "8080 other",
        ),
        ("10.0.0.9:8080", None, "8080 other"),
        ("10.0.0.9:7", None, "7 "),
        ("[::ffff:10.0.0.9]:7", None, "7 "),
        ("web.b.svc.cluster.local:80", None, "8080 web"),
        (
            "web.b.svc.cluster.local:81",
            None,
            "503 requested service web.b.svc.cluster.local:81 found, but cannot resolve port",
        ),
        (
            "unknown:80",
            None,
            "503 no service or workload for hostname: unknown",
        ),
        (
            "10.0.0.10:80",
            None,
            "400 ip mismatch: 10.0.0.9 != 10.0.0.10",
        ),
        (
            "127.0.0.1:80",
            None,
            "400 ip mismatch: 10.0.0.9 != 127.0.0.1",
        ),
        (
            "10.0.0.9:15001",
            None,
            "503 attempted recursive call to ourselves",
        ),
        (
            "10.0.0.9:15006",
            None,
            "503 attempted recursive call to ourselves",
        ),
        (
            "10.0.0.9:15008",
            None,
            "503 attempted recursive call to ourselves",
        ),
    ];
    for (authority, host, expected) in cases {
        assert_eq!(
            told(&mesh, &local, authority, host),
            expected,
            "{authority}"
        );
    }
}

fn at(ip: &str) -> GatewayAddress {
    GatewayAddress {
        destination: GatewayDestination::Address(NetworkAddress {
            network: "".into(),
            address: ip.parse().unwrap(),
        }),
        hbone_mtls_port: 15008,
    }
}

fn named(hostname: &str) -> GatewayAddress {
    GatewayAddress {
        destination: GatewayDestination::Hostname(NamespacedHostname {
            namespace: "b".into(),
            hostname: hostname.into(),
        }),
        hbone_mtls_port: 15008,
    }
}

#[test]
fn an_application_tunnel_takes_any_address_on_its_own_port() {
    use TunnelProtocol::{None as Plain, Proxy};
    let unaddressed = {
        let mut service = service("b", "bare", "10.96.0.2");
        service.vips.clear();
        service
    };
    let dual = {
        let mut service = service("b", "dual", "fd00::1");
        for (network, ip) in [("other", "10.96.0.8"), ("", "10.96.0.3")] {
            service.vips.push(NetworkAddress {
                network: network.into(),
                address: ip.parse().unwrap(),
            });
        }
        service
    };
    // protocol, port of the tunnel, authority, outcome
    let cases = [
        (Plain, Some(15088), "10.0.0.77:80", "15088 "),
        (Plain, Some(8080), "10.0.0.77:80", "8080 bare"),
        (Plain, None, "10.0.0.77:80", "80 "),
        (Plain, None, "bare.b.svc.cluster.local:80", "8080 bare"),
        (
            Plain,
            None,
            "10.0.0.77:15001",
            "503 attempted recursive call to ourselves",
        ),
        (
            Plain,
            Some(15088),
            "10.0.0.77:15008",
            "503 attempted recursive call to ourselves",
        ),
        (
            Plain,
            Some(15008),
            "10.0.0.77:80",
            "503 attempted recursive call to ourselves",
        ),
        (
            Proxy,
            Some(15088),
            "10.0.0.77:80",
            "15088  announced as 10.0.0.77:80",
        ),
        (
            Proxy,
            Some(15088),
            "[::ffff:10.0.0.77]:80",
            "15088  announced as 10.0.0.77:80",
        ),
        (Proxy, None, "10.0.0.77:80", "80  announced as 10.0.0.77:80"),
        (
            Proxy,
            Some(15088),
            "dual.b.svc.cluster.local:80",
            "15088 dual announced as 10.96.0.3:80",
        ),
        (
            Proxy,
            Some(15088),
            "bare.b.svc.cluster.local:80",
            "503 requested service bare.b.svc.cluster.local found, but has no IP addresses",
        ),
    ];
    for (protocol, port, authority, expected) in cases {
        let mut local = serving(serving(pod("b", "gw", "10.0.0.9"), &unaddressed), &dual);
        local.application_tunnel = Some(ApplicationTunnel { protocol, port });
        let mesh = mesh(vec![
            Resource::Workload(local.clone()),
            Resource::Service(unaddressed.clone()),
            Resource::Service(dual.clone()),
        ]);
        assert_eq!(
            told(&mesh, &local, authority, None),
            expected,
            "{protocol:?} {port:?} {authority}"
        );
    }
}

#[test]
fn a_waypoint_may_be_asked_for_what_it_fronts_and_for_nothing_else() {
    let gateway = service("b", "gw", "10.96.0.20");
    let local = {
        let mut workload = serving(pod("b", "waypoint", "10.0.0.20"), &gateway);
        workload.hostname = "waypoint.example".into();
        workload
    };
    let share = |ip, weight| WeightedWaypoint {
        destination: at(ip),
        weight,
    };
    let (own, other) = ("10.0.0.20", "10.0.0.21");
    // the waypoint reference, the weighted ones, whether this waypoint is asked
    let cases = [
        (None, vec![], false),
        (Some(at(own)), vec![], true),
        (Some(at("10.96.0.20")), vec![], true),
        (Some(named("gw.b.svc.cluster.local")), vec![], true),
        (Some(named("waypoint.example")), vec![], true),
        (Some(at(other)), vec![], false),
        (Some(at("10.0.0.99")), vec![], false),
        (Some(named("nowhere")), vec![], false),
        (Some(named("other.b.svc.cluster.local")), vec![], false),
        (None, vec![share(other, 9), share(own, 1)], true),
        (None, vec![share(other, 9), share(own, 0)], false),
        (Some(at(own)), vec![share(other, 9)], true),
    ];
    for (waypoint, weighted, asked) in cases {
        let mut web = service("b", "web", "10.96.0.1");
        let mut app = pod("b", "app", "10.0.0.9");
        app.protocol = Protocol::Tcp;
        let waypoint = waypoint.map(Box::new);
        (web.waypoint, app.waypoint) = (waypoint.clone(), waypoint.clone());
        web.weighted_waypoints = weighted.clone();
        let mesh = mesh(vec![
            Resource::Workload(local.clone()),
            Resource::Workload(pod("b", "neighbour", other)),
            Resource::Workload(app),
            Resource::Service(gateway.clone()),
            Resource::Service(service("b", "other", "10.96.0.30")),
            Resource::Service(web),
        ]);
        let outcome = |ip: &str, asked| match asked {
            true => "80 ".to_string(),
            false => format!("400 ip mismatch: {own} != {ip}"),
        };
        let case = format!("{waypoint:?} {weighted:?}");
        let target = |ip: &str| told(&mesh, &local, &format!("{ip}:80"), None);
        assert_eq!(target("10.96.0.1"), outcome("10.96.0.1", asked), "{case}");
        let of_workload = asked && waypoint.is_some();
        assert_eq!(
            target("10.0.0.9"),
            outcome("10.0.0.9", of_workload),
            "{case}"
        );
        assert_eq!(target("10.0.0.10"), outcome("10.0.0.10", false), "{case}");
    }
}

#[test]
fn a_hostname_means_a_service_that_the_workload_can_see_its_own_namespace_first() {
    use crate::mesh::service::Visibility;
    let of = |namespace: &str, visibility, target: u16| {
        let mut service = service(namespace, "web", "10.96.0.1");
        service.hostname = "web.example".into();
        service.visibility = visibility;
        service.ports = [(80, target)].into();
        service
    };
    let (public, private) = (Visibility::Public, Visibility::Namespace);
    // the services of that name, the ports the workload maps itself, outcome
    let cases = [
        (vec![of("x", public, 1), of("b", public, 2)], None, "2 web"),
        (vec![of("b", private, 2)], None, "2 web"),
        (vec![of("b", public, 2)], Some(3), "3 web"),
        (vec![of("b", public, 0)], Some(3), "3 web"),
        (vec![of("b", public, 2)], Some(0), "2 web"),
        (
            vec![of("b", public, 0)],
            None,
            "503 requested service web.example:80 found, but cannot resolve port",
        ),
        (
            vec![of("x", private, 1)],
            None,
            "503 no service or workload for hostname: web.example",
        ),
        (
            vec![of("b", public, 15006)],
            None,
            "503 attempted recursive call to ourselves",
        ),
    ];
    for (services, mapped, expected) in cases {
        let mut local = pod("b", "web", "10.0.0.9");
        if let Some(target) = mapped {
            local
                .services
                .insert(services[0].key(), [(80, target)].into());
        }
        let records = services.iter().cloned().map(Resource::Service);
        let mesh = mesh(records.chain([Resource::Workload(local.clone())]).collect());
        assert_eq!(
            told(&mesh, &local, "web.example:80", None),
            expected,
            "{services:?} {mapped:?}"
        );
    }
}

#[test]
fn the_local_address_may_come_mapped_into_ipv6() {
    let local = pod("b", "web", "10.0.0.9");
    let mesh = mesh(vec![Resource::Workload(local.clone())]);
    let authority = "10.0.0.9:80".parse().unwrap();
    let arrived = "::ffff:10.0.0.9".parse().unwrap();
    let target = mesh.inbound_target(&local, &authority, arrived, None, &ILLEGAL);
    assert_eq!(target.map(|target| target.connect_port), Ok(80));
}
