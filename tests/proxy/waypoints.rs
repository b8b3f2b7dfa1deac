//! Real Envoys between pods: as waypoints, at the way out of the mesh and at the way into it.

use std::io::ErrorKind;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::envoy::{self, Role};
use crate::pods::{Host, LARGE, Pods, serve};

const CLIENT: &str = "10.0.0.11";
const SERVER: &str = "10.0.0.12";
const WAYPOINT: &str = "10.0.0.21";
const OTHER: &str = "10.0.0.22";
/// Where the server's application is.
const APPLICATION: &str = "10.0.0.12:8080";

const CLIENT_ID: &str = "spiffe://cluster.local/ns/default/sa/client";
const SERVER_ID: &str = "spiffe://cluster.local/ns/default/sa/server";
const WAYPOINT_ID: &str = "spiffe://cluster.local/ns/default/sa/waypoint";
const OTHER_ID: &str = "spiffe://cluster.local/ns/default/sa/other";

/// A client, a server with a service that has no waypoint, and two workloads that tunnels end at.
const WORKLOADS: &str = "
workloads:
- {namespace: default, name: client, serviceAccount: client, node: n1, workloadIps: [10.0.0.11], protocol: HBONE}
- {namespace: default, name: server, serviceAccount: server, node: n1, workloadIps: [10.0.0.12], protocol: HBONE,
   services: {default/direct.example: {80: 8080}}, $SERVER}
- {namespace: default, name: waypoint, serviceAccount: waypoint, node: n1, workloadIps: [10.0.0.21], protocol: HBONE,
   services: {default/waypoint.example: {15008: 15008}}, $WAYPOINT}
- {namespace: default, name: other, serviceAccount: other, node: n2, workloadIps: [10.0.0.22], protocol: HBONE}
services:
- {name: direct, namespace: default, hostname: direct.example, vips: [/10.96.0.9], ports: {80: 8080}}
- {name: waypoint, namespace: default, hostname: waypoint.example, vips: [/10.96.0.20], ports: {15008: 15008}}
";
const BY_HOSTNAME: &str = "waypoint: {destination: default/waypoint.example, hboneMtlsPort: 15008}";
const BY_ADDRESS: &str = "waypoint: {destination: /10.0.0.21, hboneMtlsPort: 15008}";

/// The workloads as they are, with further services.
fn state(services: &[String]) -> String {
    let list = services.concat();
    format!("{WORKLOADS}{list}")
        .replace(", $SERVER", "")
        .replace(", $WAYPOINT", "")
}

/// A service of the server.
fn service(name: &str, vip: &str, more: &str) -> String {
    format!(
        "- {{name: {name}, namespace: default, hostname: {name}.example, vips: [/{vip}], ports: {{80: 8080}}, {more}}}\n"
    )
}

/// The captured client and server, whose application answers HTTP; none without Envoy or root.
async fn start(name: &str, variables: &[(&str, &str)], state: &str) -> Option<(Pods, Host, Host)> {
    envoy::binary()?;
    let pods = Pods::start(name, variables, state).await?;
    let client = pods.pod("client", CLIENT).await;
    let server = pods.pod("server", SERVER).await;
    serve(server.listen(8080));
    Some((pods, client, server))
}

/// Asserts that a text holds every one of the parts.
fn has(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{part} is not in {text}");
    }
}

/// An Envoy that takes tunnels for those addresses and passes the HTTP in them to the server in tunnels.
fn to_server(name: &'static str, authorities: &[&str]) -> Role {
    let routes: Vec<_> = authorities
        .iter()
        .map(|authority| (*authority, "server"))
        .collect();
    Role::new(name)
        .waypoint(&routes)
        .tunnelled("server", APPLICATION, SERVER_ID)
}

#[tokio::test]
async fn a_services_waypoint_is_found_by_hostname_and_by_address() {
    let services = [
        service("web", "10.96.0.1", BY_HOSTNAME),
        service("named", "10.96.0.2", BY_ADDRESS),
    ];
    let Some((pods, client, _server)) = start("service", &[], &state(&services)).await else {
        return;
    };
    let host = pods.host(WAYPOINT);
    let role = to_server("waypoint", &["10.96.0.1:80", "10.96.0.2:80"]);
    let _envoy = role.start(&pods, &host, WAYPOINT_ID).await;
    for (vip, service) in [("10.96.0.1:80", "web"), ("10.96.0.2:80", "named")] {
        let answer = client.get(vip).await;
        has(
            &answer,
            &[
                "200 OK",
                "x-through: waypoint",
                &format!("x-peer: {CLIENT_ID}"),
                "x-client: 10.0.0.11",
                "hello 10.0.0.21",
            ],
        );
        let service = format!("dst.service=\"{service}.example\"");
        let line = pods
            .logged(&[
                "info\taccess\tconnection complete",
                "direction=\"outbound\"",
                &service,
            ])
            .await;
        has(
            &line,
            &[
                "src.workload=\"client\"",
                "dst.addr=10.0.0.21:15008",
                &format!("dst.hbone_addr={vip}"),
                "dst.workload=\"waypoint\"",
                &format!("dst.identity=\"{WAYPOINT_ID}\""),
            ],
        );
        assert!(!line.contains("error="), "{line}");
    }
    let line = pods
        .logged(&["info\taccess\tconnection complete", "direction=\"inbound\""])
        .await;
    has(
        &line,
        &[
            "src.addr=10.0.0.21:",
            "src.workload=\"waypoint\"",
            &format!("src.identity=\"{WAYPOINT_ID}\""),
            "dst.hbone_addr=10.0.0.12:8080",
            "dst.workload=\"server\"",
        ],
    );
    // The service without a waypoint goes straight to the server.
    let answer = client.get("10.96.0.9:80").await;
    assert!(
        answer.ends_with("hello 10.0.0.11") && !answer.contains("x-through"),
        "{answer}"
    );
}

#[tokio::test]
async fn weighted_waypoints_share_a_services_flows() {
    let weighted = "weightedWaypoints: [
      {destination: {destination: /10.0.0.21, hboneMtlsPort: 15008}, weight: 1},
      {destination: {destination: /10.0.0.22, hboneMtlsPort: 15008}, weight: 1},
      {destination: {destination: /10.0.0.99, hboneMtlsPort: 15008}, weight: 0}]";
    let services = [service("web", "10.96.0.1", weighted)];
    let Some((pods, client, _server)) = start("weighted", &[], &state(&services)).await else {
        return;
    };
    let hosts = [WAYPOINT, OTHER].map(|ip| pods.host(ip));
    let one = to_server("one", &["10.96.0.1:80"]);
    let _one = one.start(&pods, &hosts[0], WAYPOINT_ID).await;
    let two = to_server("two", &["10.96.0.1:80"]);
    let _two = two.start(&pods, &hosts[1], OTHER_ID).await;
    let mut shares = [0, 0];
    for _ in 0..60 {
        let answer = client.get("10.96.0.1:80").await;
        has(&answer, &["200 OK"]);
        let of = |name: &str| usize::from(answer.contains(&format!("x-through: {name}")));
        shares = [shares[0] + of("one"), shares[1] + of("two")];
    }
    assert_eq!(shares[0] + shares[1], 60);
    // A fair coin shows less than 8 of 60 of one side once in 10^10 times.
    assert!(shares.iter().all(|share| *share >= 8), "{shares:?}");
}

#[tokio::test]
async fn a_workloads_waypoint_takes_what_goes_to_the_workload_itself() {
    let state = WORKLOADS
        .replace("$SERVER", BY_HOSTNAME)
        .replace(", $WAYPOINT", "");
    let Some((pods, client, _server)) = start("workload", &[], &state).await else {
        return;
    };
    let host = pods.host(WAYPOINT);
    let role = to_server("waypoint", &[APPLICATION]);
    let _envoy = role.start(&pods, &host, WAYPOINT_ID).await;
    let answer = client.get(APPLICATION).await;
    has(&answer, &["x-through: waypoint", "hello 10.0.0.21"]);
    let line = pods
        .logged(&[
            "info\taccess\tconnection complete",
            "dst.hbone_addr=10.0.0.12:8080",
            "direction=\"outbound\"",
        ])
        .await;
    has(
        &line,
        &["dst.addr=10.0.0.21:15008", "dst.workload=\"waypoint\""],
    );
    assert!(!line.contains("dst.service"), "{line}");
    let answer = client.get("10.96.0.9:80").await;
    assert!(
        answer.ends_with("hello 10.0.0.11") && !answer.contains("x-through"),
        "{answer}"
    );
}

/// A captured pod whose Envoy takes PROXY headers; what it sends on is captured, too.
async fn sandwich(name: &str, localhost: &str, at: &str, seen_from: &str) {
    let tunnel = "applicationTunnel: {protocol: PROXY, port: 15088}";
    let state = format!("{WORKLOADS}{}", service("web", "10.96.0.1", BY_HOSTNAME))
        .replace("$SERVER", BY_HOSTNAME)
        .replace("$WAYPOINT", tunnel);
    let variables = [("LOCALHOST_APP_TUNNEL", localhost)];
    let Some((pods, client, _server)) = start(name, &variables, &state).await else {
        return;
    };
    let pod = pods.pod("waypoint", WAYPOINT).await;
    let routes = [("10.96.0.1:80", "server"), (APPLICATION, "server")];
    let role = Role::new("waypoint")
        .behind_proxy_headers(at, 15088, &routes)
        .plain("server", SERVER, 8080);
    let _envoy = role.start(&pods, &pod, WAYPOINT_ID).await;
    for target in ["10.96.0.1:80", APPLICATION] {
        let answer = client.get(target).await;
        has(
            &answer,
            &[
                "x-through: waypoint",
                &format!("x-peer: {CLIENT_ID}"),
                "x-client: 10.0.0.11",
                &format!("x-from: {seen_from}"),
                "hello 10.0.0.21",
            ],
        );
        let line = pods
            .logged(&[
                "info\taccess\tconnection complete",
                "src.workload=\"client\"",
                &format!("dst.hbone_addr={target}"),
                "direction=\"inbound\"",
            ])
            .await;
        has(
            &line,
            &[
                "dst.addr=10.0.0.21:15008",
                "dst.workload=\"waypoint\"",
                &format!("src.identity=\"{CLIENT_ID}\""),
            ],
        );
    }
    // What the waypoint itself sends to the server does not come back to it.
    let line = pods
        .logged(&[
            "info\taccess\tconnection complete",
            "src.workload=\"waypoint\"",
            "direction=\"outbound\"",
        ])
        .await;
    has(
        &line,
        &[
            "dst.addr=10.0.0.12:15008",
            "dst.hbone_addr=10.0.0.12:8080",
            "dst.workload=\"server\"",
        ],
    );
}

#[tokio::test]
async fn a_waypoint_behind_the_proxy_is_told_of_the_client_over_loopback() {
    sandwich("loopback", "true", "127.0.0.1", "127.0.0.1").await;
}

#[tokio::test]
async fn a_waypoint_behind_the_proxy_is_told_of_the_client_at_its_own_address() {
    sandwich("own-address", "false", WAYPOINT, CLIENT).await;
}

#[tokio::test]
async fn a_waypoint_that_cannot_be_had_closes_the_way_and_is_named() {
    let unready = "- {namespace: default, name: unready, node: n2, workloadIps: [10.0.0.23], protocol: HBONE, status: Unhealthy,
   services: {default/unready.example: {15008: 15008}}}\nservices:";
    let waypoint = |to: &str| format!("waypoint: {{destination: {to}, hboneMtlsPort: 15008}}");
    let services = [
        service("impostor", "10.96.0.1", BY_ADDRESS),
        service("down", "10.96.0.2", &waypoint("/10.0.0.22")),
        service("unnamed", "10.96.0.3", &waypoint("default/nowhere.example")),
        service("unaddressed", "10.96.0.4", &waypoint("/10.0.0.99")),
        service("waiting", "10.96.0.5", &waypoint("default/unready.example")),
        service("unready", "10.96.0.6", ""),
    ];
    let state = state(&services).replace("services:\n", &format!("{unready}\n"));
    let Some((pods, client, _server)) = start("closed", &[], &state).await else {
        return;
    };
    let hosts = [WAYPOINT, OTHER].map(|ip| pods.host(ip));
    let role = to_server("impostor", &["10.96.0.1:80"]);
    let _envoy = role.start(&pods, &hosts[0], OTHER_ID).await;
    // service, VIP, what the line says
    let cases: [(&str, &str, &[&str]); 5] = [
        (
            "impostor",
            "10.96.0.1:80",
            &[
                "dst.workload=\"waypoint\"",
                "peer did not present the expected SAN",
                OTHER_ID,
            ],
        ),
        (
            "down",
            "10.96.0.2:80",
            &[
                "dst.workload=\"other\"",
                "dst.hbone_addr=10.96.0.2:80",
                "Connection refused",
            ],
        ),
        (
            "unnamed",
            "10.96.0.3:80",
            &["unknown waypoint: waypoint nowhere.example not found"],
        ),
        (
            "unaddressed",
            "10.96.0.4:80",
            &["unknown waypoint: waypoint /10.0.0.99 not found"],
        ),
        (
            "waiting",
            "10.96.0.5:80",
            &["unknown waypoint: waypoint unready.example has no healthy endpoint"],
        ),
    ];
    for (service, vip, says) in cases {
        assert_eq!(client.get(vip).await, "", "{service}");
        let service = format!("dst.service=\"{service}.example\"");
        let line = pods
            .logged(&["error\taccess\tconnection complete", &service])
            .await;
        has(&line, says);
        has(
            &line,
            &[
                "src.workload=\"client\"",
                "direction=\"outbound\"",
                "bytes_recv=0",
            ],
        );
    }
    // Nothing of it reached the server by another way.
    assert_eq!(pods.count("direction=\"inbound\""), 0);
}

#[tokio::test]
async fn a_waypoint_that_refuses_is_told_of() {
    let services = [service("web", "10.96.0.1", BY_HOSTNAME)];
    let Some((pods, client, _server)) = start("refuses", &[], &state(&services)).await else {
        return;
    };
    let host = pods.host(WAYPOINT);
    let role = to_server("waypoint", &["10.96.0.1:80"]);
    let _envoy = role.start(&pods, &host, WAYPOINT_ID).await;
    // The port is not validated here: that is the waypoint's business.
    assert_eq!(client.get("10.96.0.1:81").await, "");
    let line = pods
        .logged(&[
            "error\taccess\tconnection complete",
            "http status: 404 Not Found",
        ])
        .await;
    has(
        &line,
        &[
            "dst.service=\"web.example\"",
            "dst.workload=\"waypoint\"",
            "dst.hbone_addr=10.96.0.1:81",
        ],
    );
}

#[tokio::test]
async fn a_service_outside_is_reached_through_an_egress_gateway() {
    let outside = "- {name: outside, namespace: default, hostname: outside.example, vips: [/240.240.0.1], ports: {80: 80},
   waypoint: {destination: default/waypoint.example, hboneMtlsPort: 15008}}\n";
    let Some((pods, client, _server)) = start("egress", &[], &state(&[outside.to_string()])).await
    else {
        return;
    };
    let external = pods.host("10.0.0.40");
    serve(external.listen(8000));
    let host = pods.host(WAYPOINT);
    let role = Role::new("egress")
        .waypoint(&[("240.240.0.1:80", "outside")])
        .plain("outside", external.ip(), 8000);
    let _envoy = role.start(&pods, &host, WAYPOINT_ID).await;
    let answer = client.get("240.240.0.1:80").await;
    has(
        &answer,
        &[
            "x-through: egress",
            &format!("x-peer: {CLIENT_ID}"),
            "hello 10.0.0.21",
        ],
    );
    let line = pods
        .logged(&[
            "info\taccess\tconnection complete",
            "dst.service=\"outside.example\"",
        ])
        .await;
    has(
        &line,
        &[
            "dst.addr=10.0.0.21:15008",
            "dst.hbone_addr=240.240.0.1:80",
            "dst.workload=\"waypoint\"",
        ],
    );
}

#[tokio::test]
async fn an_ingress_gateway_comes_in_if_policy_names_it() {
    let policy = "policies:
- {name: gateway-only, namespace: default, scope: Namespace, action: Allow, rules: [[[{principals: [{Exact: cluster.local/ns/default/sa/waypoint}]}]]]}
";
    let state = format!("{}{policy}", state(&[]));
    let Some((pods, client, _server)) = start("ingress", &[], &state).await else {
        return;
    };
    let user = pods.host("10.0.0.40");
    let hosts = [WAYPOINT, OTHER].map(|ip| pods.host(ip));
    let role = |name| {
        Role::new(name)
            .http(80, "server")
            .tunnelled("server", APPLICATION, SERVER_ID)
    };
    let _gateway = role("gateway").start(&pods, &hosts[0], WAYPOINT_ID).await;
    let _other = role("other").start(&pods, &hosts[1], OTHER_ID).await;
    let answer = user.get("10.0.0.21:80").await;
    has(
        &answer,
        &["200 OK", "x-through: gateway", "hello 10.0.0.21"],
    );
    let line = pods
        .logged(&[
            "info\taccess\tconnection complete",
            &format!("src.identity=\"{WAYPOINT_ID}\""),
        ])
        .await;
    has(
        &line,
        &[
            "dst.service=\"direct.example\"",
            "dst.workload=\"server\"",
            "direction=\"inbound\"",
        ],
    );
    let answer = user.get("10.0.0.22:80").await;
    has(&answer, &["503 Service Unavailable", "x-through: other"]);
    let line = pods
        .logged(&[
            "error\taccess\tconnection complete",
            &format!("src.identity=\"{OTHER_ID}\""),
        ])
        .await;
    has(
        &line,
        &[
            "src.workload=\"other\"",
            "dst.hbone_addr=10.0.0.12:8080",
            "connection closed due to policy rejection: allow policies exist, but none allowed",
        ],
    );
    // Without a gateway nobody comes in: in a tunnel, or as plain text.
    assert_eq!(client.get(APPLICATION).await, "");
    pods.logged(&["direction=\"outbound\"", "http status: 401 Unauthorized"])
        .await;
    assert_eq!(user.get(APPLICATION).await, "");
}

#[tokio::test]
async fn an_idle_tunnel_that_an_envoy_resets_is_no_error() {
    let services = [service("web", "10.96.0.1", BY_HOSTNAME)];
    let Some((pods, client, server)) = start("idle", &[], &state(&services)).await else {
        return;
    };
    let user = pods.host("10.0.0.40");
    let hosts = [WAYPOINT, OTHER].map(|ip| pods.host(ip));
    let gateway = Role::new("gateway")
        .idle_after("0.3s")
        .tcp(80, "server")
        .tunnelled("server", "10.0.0.12:9000", SERVER_ID);
    let _gateway = gateway.start(&pods, &hosts[1], OTHER_ID).await;
    let waypoint = Role::new("waypoint")
        .idle_after("0.3s")
        .waypoint(&[("10.96.0.1:80", "server")])
        .plain("server", SERVER, 8080);
    let _waypoint = waypoint.start(&pods, &hosts[0], WAYPOINT_ID).await;

    let mut asking = client.connect("10.96.0.1:80").await.unwrap();
    asking
        .write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        .await
        .unwrap();
    let mut answer = Vec::new();
    let end = asking.read_to_end(&mut answer).await;
    assert_eq!(end.unwrap_err().kind(), ErrorKind::ConnectionReset);
    has(
        &String::from_utf8(answer).unwrap(),
        &["200 OK", "x-through: waypoint"],
    );

    let application = server.listen(9000);
    let mut asking = user.connect("10.0.0.22:80").await.unwrap();
    asking.write_all(b"ping").await.unwrap();
    let (mut served, _) = application.accept().await.unwrap();
    let mut word = [0; 4];
    served.read_exact(&mut word).await.unwrap();
    served.write_all(b"pong").await.unwrap();
    asking.read_exact(&mut word).await.unwrap();
    assert_eq!(&word, b"pong");
    let end = served.read(&mut word).await;
    assert_eq!(end.unwrap_err().kind(), ErrorKind::ConnectionReset);

    for (direction, authority) in [("outbound", "10.96.0.1:80"), ("inbound", "10.0.0.12:9000")] {
        let (direction, authority) = (
            format!("direction=\"{direction}\""),
            format!("dst.hbone_addr={authority}"),
        );
        let line = pods
            .logged(&["\taccess\tconnection complete", &direction, &authority])
            .await;
        has(&line, &["\tinfo\t"]);
        assert!(!line.contains("error="), "{line}");
    }
}

#[tokio::test]
async fn a_slow_client_gets_all_that_came_before_envoys_reset() {
    let services = [service("web", "10.96.0.1", BY_HOSTNAME)];
    let Some((pods, client, _server)) = start("slow", &[], &state(&services)).await else {
        return;
    };
    let host = pods.host(WAYPOINT);
    let role = to_server("waypoint", &["10.96.0.1:80"]);
    let mut envoy = role.start(&pods, &host, WAYPOINT_ID).await;
    let mut asking = client.connect("10.96.0.1:80").await.unwrap();
    asking
        .write_all(b"GET /large HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        .await
        .unwrap();
    pods.logged(&["connection complete", "direction=\"inbound\""])
        .await;
    // Envoy has passed all of it on when nothing is under way there.
    let requests = "/stats?filter=http.http.downstream_rq_active";
    envoy.says(&host, requests, "_active: 0").await;
    let mut answer = Vec::new();
    let _ = asking.read_to_end(&mut answer).await;
    let head = answer.windows(4).position(|end| end == b"\r\n\r\n");
    assert_eq!(answer.len() - head.unwrap() - 4, LARGE);
    let line = pods
        .logged(&[
            "info\taccess\tconnection complete",
            "direction=\"outbound\"",
        ])
        .await;
    let received = format!("bytes_recv={} ", answer.len());
    has(&line, &[&received]);
    assert!(!line.contains("error="), "{line}");
}
