//! Faults that a proxy of this kind is known to have had.

use std::time::Duration;

use tokio::io::AsyncWriteExt;

use crate::harness::{MISSING, Node, Proxy, RESOLV_CONF};
use crate::tunnel::{answer, open, request, status};

#[tokio::test]
async fn a_trace_header_of_any_form_harms_nobody() {
    let Some(node) = Node::start("trace", &[]).await else {
        return;
    };
    let _application = node.listen(8080);
    let dashless = "0".repeat(55);
    for value in [&*dashless, "", "00--", "00-é", "\u{1}"] {
        let mut asked = request("10.0.0.9:8080");
        if let Ok(value) = http::HeaderValue::from_bytes(value.as_bytes()) {
            asked.headers_mut().insert("traceparent", value);
        }
        assert_eq!(answer(open(&node).await, asked).await.unwrap(), 200);
    }
}

#[tokio::test]
async fn a_proxy_without_descriptors_rests_and_goes_on_when_it_has_some() {
    let Some(node) = Node::start("descriptors", &[]).await else {
        return;
    };
    let _application = node.listen(8080);
    assert_eq!(status(&node, "10.0.0.9:8080").await, 200);
    let before = node.descriptors();
    node.limit_descriptors(before + 3);
    let mut held = Vec::new();
    for _ in 0..12 {
        held.push(node.connect("10.0.0.9:15008").await.unwrap());
    }
    node.logged(&["error", "Failed TCP handshake", "Too many open files"])
        .await;
    let first = node.count("Failed TCP handshake");
    tokio::time::sleep(Duration::from_secs(1)).await;
    let more = node.count("Failed TCP handshake") - first;
    assert!(more < 500, "{more} attempts within a second");
    drop(held);
    node.limit_descriptors(before + 1000);
    for _ in 0..500 {
        if node.connect("127.0.0.1:15021").await.is_ok() {
            break;
        }
    }
    assert_eq!(status(&node, "10.0.0.9:8080").await, 200);
}

const DROPPED: &str = r#"
workloads:
- {namespace: default, name: local, serviceAccount: acc, node: n1, workloadIps: [10.0.0.9], protocol: HBONE}
"#;

#[tokio::test]
async fn a_client_that_goes_away_while_the_proxy_dials_is_noticed() {
    let dedicated = [
        ("PROXY_MODE", "dedicated"),
        ("PROXY_WORKLOAD_INFO", "default/local/acc"),
        ("UNSTABLE_ENABLE_SOCKS5", "true"),
    ];
    let Some(proxy) = Proxy::alone("gone", &dedicated, DROPPED).await else {
        return;
    };
    proxy.shell("iptables -w 10 -A OUTPUT -p tcp -d 10.0.0.77 -j DROP");
    proxy
        .logged(&["serving the workload of this process"])
        .await;
    let mut socket = proxy.connect("127.0.0.1:15080").await.unwrap();
    let wish = [5, 1, 0, 5, 1, 0, 1, 10, 0, 0, 77, 0, 80];
    socket.write_all(&wish).await.unwrap();
    proxy
        .logged(&["connection opened", "dst.addr=10.0.0.77:80"])
        .await;
    socket2::SockRef::from(&socket)
        .set_linger(Some(Duration::ZERO))
        .unwrap();
    drop(socket);
    proxy
        .logged(&[
            "dst.addr=10.0.0.77:80",
            "reason=\"client_gone\"",
            "error=\"the client went away before the flow was open\"",
        ])
        .await;
}

#[tokio::test]
async fn a_machine_without_a_resolver_file_can_be_a_node() {
    let dedicated = [
        ("PROXY_MODE", "dedicated"),
        ("PROXY_WORKLOAD_INFO", "default/local/acc"),
        (RESOLV_CONF, MISSING),
    ];
    let Some(proxy) = Proxy::alone("resolver", &dedicated, DROPPED).await else {
        return;
    };
    proxy
        .logged(&[
            "warn",
            "/etc/resolv.conf cannot be read, names outside the mesh will not resolve",
        ])
        .await;
    let (status, _) = proxy.http("GET", 15021, "/healthz/ready").await;
    assert_eq!(status, 200);
}
