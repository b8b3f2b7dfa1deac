//! What is logged when a flow comes to nothing: the texts that operators look for.

use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use crate::applications::{socks, to_address};
use crate::harness::{Node, Proxy};
use crate::tunnel::{open, status, tls};

const DEDICATED: [(&str, &str); 3] = [
    ("PROXY_MODE", "dedicated"),
    ("PROXY_WORKLOAD_INFO", "default/local/acc"),
    ("UNSTABLE_ENABLE_SOCKS5", "true"),
];

/// Services at 10.96.0.1 and following, each behind a waypoint of its own port or with a fault of its own.
const STATE: &str = r#"
workloads:
- {namespace: default, name: local, serviceAccount: acc, node: n1, workloadIps: [10.0.0.9], protocol: HBONE}
- {namespace: default, name: waypoint, serviceAccount: waypoint, node: n2, workloadIps: [10.0.0.31], protocol: HBONE}
- {uid: nowhere, name: nowhere, namespace: default, network: far, hostname: nowhere.example, services: {default/nowhere: {80: 80}}}
- {uid: behind, name: behind, namespace: default, network: far, services: {default/behind: {80: 80}},
   networkGateway: {destination: /10.0.0.99, hboneMtlsPort: 15008}}
- {uid: nobody, name: nobody, namespace: default, network: far, services: {default/nobody: {80: 80}},
   networkGateway: {destination: /10.0.0.31, hboneMtlsPort: 15008}}
- {uid: fronted, name: fronted, namespace: default, workloadIps: [10.0.0.41],
   waypoint: {destination: default/far-waypoint, hboneMtlsPort: 15008}}
- {uid: far-waypoint, name: far-waypoint, namespace: default, network: far, hostname: far-waypoint,
   networkGateway: {destination: /10.0.0.31, hboneMtlsPort: 15008}}
- {namespace: default, name: closed, node: n2, workloadIps: [10.0.0.32], services: {default/closed: {80: 81}}}
services:
- {name: refused, namespace: default, hostname: refused, vips: [/10.96.0.1], ports: {80: 80}, waypoint: {destination: /10.0.0.31, hboneMtlsPort: 15101}}
- {name: plain, namespace: default, hostname: plain, vips: [/10.96.0.2], ports: {80: 80}, waypoint: {destination: /10.0.0.31, hboneMtlsPort: 15102}}
- {name: resets, namespace: default, hostname: resets, vips: [/10.96.0.3], ports: {80: 80}, waypoint: {destination: /10.0.0.31, hboneMtlsPort: 15103}}
- {name: breaks, namespace: default, hostname: breaks, vips: [/10.96.0.4], ports: {80: 80}, waypoint: {destination: /10.0.0.31, hboneMtlsPort: 15104}}
- {name: dropped, namespace: default, hostname: dropped, vips: [/10.96.0.5], ports: {80: 80}, waypoint: {destination: /10.0.0.31, hboneMtlsPort: 15105}}
- {name: nowhere, namespace: default, hostname: nowhere, vips: [/10.96.0.6], ports: {80: 80}}
- {name: behind, namespace: default, hostname: behind, vips: [/10.96.0.7], ports: {80: 80}, subjectAltNames: ["spiffe://td/ns/a/sa/b"]}
- {name: nobody, namespace: default, hostname: nobody, vips: [/10.96.0.8], ports: {80: 80}}
- {name: closed, namespace: default, hostname: closed, vips: [/10.96.0.9], ports: {80: 81}}
"#;

/// What a peer does with a tunnel.
#[derive(Clone, Copy)]
enum Peer {
    /// It speaks no HTTP/2.
    Plain,
    /// It resets every stream.
    Resets,
    /// It answers, and then breaks the protocol.
    Breaks,
}

fn serve(proxy: &Proxy, port: u16, peer: Peer) {
    let waypoint = proxy.certificate("spiffe://cluster.local/ns/default/sa/waypoint");
    let mut config = (*waypoint.identity().server_config()).clone();
    if let Peer::Plain = peer {
        config.alpn_protocols.clear();
    }
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = proxy.listen_at("10.0.0.31", port);
    tokio::spawn(accept(listener, acceptor, peer));
}

async fn accept(listener: TcpListener, acceptor: TlsAcceptor, peer: Peer) {
    while let Ok((socket, _)) = listener.accept().await {
        let Ok(stream) = acceptor.accept(socket).await else {
            continue;
        };
        match peer {
            Peer::Plain => drop(stream),
            Peer::Resets => drop(tokio::spawn(reset_all(stream))),
            Peer::Breaks => drop(tokio::spawn(answer_and_break(stream))),
        }
    }
}

async fn reset_all(stream: TlsStream<TcpStream>) {
    let mut connection = h2::server::handshake(stream).await.unwrap();
    while let Some(Ok((_, mut respond))) = connection.accept().await {
        respond.send_reset(h2::Reason::INTERNAL_ERROR);
    }
}

async fn answer_and_break(mut stream: TlsStream<TcpStream>) {
    // SETTINGS, HEADERS with status 200 for stream 1, and DATA that belongs to no stream (RFC 9113 §6.1).
    let settings = [0, 0, 0, 4, 0, 0, 0, 0, 0];
    let answer = [0, 0, 1, 1, 4, 0, 0, 0, 1, 0x88];
    let stray = [0, 0, 1, 0, 0, 0, 0, 0, 0, b'x'];
    stream.write_all(&settings).await.unwrap();
    // The preface, the client's settings, its window and the request.
    let mut request = [0; 64];
    stream.read_exact(&mut request).await.unwrap();
    stream.write_all(&answer).await.unwrap();
    tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    stream.write_all(&stray).await.unwrap();
    let mut rest = Vec::new();
    let _ = stream.read_to_end(&mut rest).await;
}

#[tokio::test]
async fn an_outbound_flow_that_comes_to_nothing_says_why_and_for_which_service() {
    let Some(proxy) = Proxy::alone("refusals", &DEDICATED, STATE).await else {
        return;
    };
    proxy.shell(
        "ip addr add 10.0.0.31/32 dev eth0; ip addr add 10.0.0.32/32 dev eth0; \
         iptables -w 10 -A OUTPUT -p tcp --dport 15105 -j DROP",
    );
    proxy
        .logged(&["serving the workload of this process"])
        .await;
    serve(&proxy, 15102, Peer::Plain);
    serve(&proxy, 15103, Peer::Resets);
    serve(&proxy, 15104, Peer::Breaks);
    let cases = [
        (
            1,
            "refused",
            "unreachable",
            "io error: Connection refused (os error 111)",
        ),
        (
            2,
            "plain",
            "http2",
            "http2 handshake failed: peer does not speak HTTP/2",
        ),
        (
            3,
            "resets",
            "http2",
            "h2 failed: the peer reset the stream: INTERNAL_ERROR",
        ),
        (
            6,
            "nowhere",
            "no_address",
            "no valid routing destination for workload: Workload{nowhere with uid nowhere (TCP)}",
        ),
        (
            7,
            "behind",
            "no_gateway",
            "unknown network gateway: network gateway /10.0.0.99 not found",
        ),
        (
            8,
            "nobody",
            "nobody_expected",
            "service nobody names no identities (subject_alt_names), so nobody on network \\\"far\\\" can prove to be it",
        ),
        (
            9,
            "closed",
            "unreachable",
            "io error: Connection refused (os error 111)",
        ),
    ];
    for (last, service, reason, error) in cases {
        assert_eq!(
            socks(&proxy, &to_address([10, 96, 0, last], 80)).await.0,
            5,
            "{service}"
        );
        proxy
            .logged(&[
                "error\taccess\tconnection complete",
                &format!("dst.service=\"{service}\""),
                &format!("reason=\"{reason}\""),
                &format!("error=\"{error}\""),
            ])
            .await;
    }
    // A workload's waypoint on another network, where only services can be asked for.
    assert_eq!(socks(&proxy, &to_address([10, 0, 0, 41], 80)).await.0, 5);
    proxy
        .logged(&[
            "reason=\"no_service\"",
            "error=\"no service for target address: 10.0.0.41:80\"",
        ])
        .await;
    // What breaks when it has begun.
    assert_eq!(socks(&proxy, &to_address([10, 96, 0, 4], 80)).await.0, 0);
    proxy
        .logged(&[
            "dst.service=\"breaks\"",
            "reason=\"broken\"",
            "error=\"send: the tunnel broke: ",
        ])
        .await;
    assert_eq!(socks(&proxy, &to_address([10, 96, 0, 5], 80)).await.0, 5);
    proxy
        .logged(&[
            "dst.service=\"dropped\"",
            "reason=\"timed_out\"",
            "error=\"connection timed out, maybe a NetworkPolicy is blocking HBONE port 15008: deadline has elapsed\"",
        ])
        .await;
    let (_, metrics) = proxy.http("GET", 15020, "/metrics").await;
    for flag in ["CONNECT", "H2_HANDSHAKE_FAILURE", "NETWORK_POLICY"] {
        let failed = |line: &&str| {
            line.starts_with("istio_tcp_connections_failed_total")
                && line.contains(&format!("response_flags=\"{flag}\""))
        };
        assert!(metrics.lines().any(|line| failed(&line)), "{flag}");
    }
}

#[tokio::test]
async fn a_pod_without_a_certificate_says_so_on_both_sides() {
    let variables = [
        ("CA_ADDRESS", "https://127.0.0.1:1"),
        ("UNSTABLE_ENABLE_SOCKS5", "true"),
    ];
    let Some(node) = Node::start("no-ca", &variables).await else {
        return;
    };
    let config = crate::tunnel::config(&node.certificate(crate::tunnel::CURL).identity());
    assert!(tls(&node, config).await.is_err());
    node.logged(&[
        "warn\taccess\tconnection failed",
        "direction=\"inbound\"",
        "reason=\"no_certificate\"",
        "error=\"signing error: signing gRPC error (",
    ])
    .await;
    assert_eq!(socks(&node, &to_address([10, 0, 0, 1], 80)).await.0, 5);
    node.logged(&[
        "error\taccess\tconnection complete",
        "dst.workload=\"curl\"",
        "reason=\"no_certificate\"",
        "error=\"identity error: signing gRPC error (",
    ])
    .await;
    let (_, metrics) = node.http("GET", 15020, "/metrics").await;
    assert!(metrics.contains("response_flags=\"IDENTITY_ERROR\""));
}

#[tokio::test]
async fn a_pod_that_the_control_plane_does_not_know_is_not_served() {
    let Some(proxy) = Proxy::alone("unknown", &DEDICATED, "workloads: []").await else {
        return;
    };
    proxy
        .logged(&["serving the workload of this process"])
        .await;
    let mut socket = proxy.connect("10.0.0.9:15008").await.unwrap();
    let mut nothing = [0; 1];
    assert_eq!(socket.read(&mut nothing).await.unwrap_or(0), 0);
    proxy
        .logged(&[
            "warn",
            "timed out waiting for workload 'acc.default (local)' from xds",
        ])
        .await;
    proxy
        .logged(&[
            "warn\taccess\tconnection failed",
            "reason=\"unknown_self\"",
            "error=\"failed to fetch information about local workload: acc.default (local)\"",
        ])
        .await;
}

#[tokio::test]
async fn a_name_that_has_no_address_cannot_be_announced_to_an_application() {
    let state = "
workloads:
- {namespace: b, name: web, serviceAccount: web, node: n1, workloadIps: [10.0.0.9], protocol: HBONE,
   applicationTunnel: {protocol: PROXY, port: 15088}, services: {b/web.example: {80: 8080}}}
services:
- {name: web, namespace: b, hostname: web.example, ports: {80: 8080}}
";
    let variables = [
        ("PROXY_MODE", "dedicated"),
        ("PROXY_WORKLOAD_INFO", "b/web/web"),
    ];
    let Some(proxy) = Proxy::alone("no-vip", &variables, state).await else {
        return;
    };
    proxy
        .logged(&["serving the workload of this process"])
        .await;
    let identity = proxy.certificate(crate::tunnel::CURL).identity();
    let stream = tls(&proxy, crate::tunnel::config(&identity)).await.unwrap();
    let (send, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    let request = crate::tunnel::request("web.example:80");
    let answer = crate::tunnel::answer(send, request).await.unwrap();
    assert_eq!(answer, 503);
    proxy
        .logged(&[
            "reason=\"no_address\"",
            "error=\"requested service web.example found, but has no IP addresses\"",
        ])
        .await;
}

#[tokio::test]
async fn a_plaintext_flow_to_a_closed_port_is_told_like_a_tunnelled_one() {
    let Some(node) = Node::start("closed", &[]).await else {
        return;
    };
    assert_eq!(status(&node, "10.0.0.9:9").await, 503);
    node.logged(&[
        "reason=\"unreachable\"",
        "error=\"connection failed: Connection refused",
    ])
    .await;
    drop(open(&node).await);
}
