//! How the proxy lives with its control plane, and how it ends.

use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::harness::{Node, POD, wait_for};
use crate::tunnel::{answer, config, open, request, status, tls};

const APPLICATION: &str = "10.0.0.9:8080";

const ONLY_GATEWAY: &str = "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: only-gateway, namespace: b}
spec:
  selector: {matchLabels: {app: web}}
  action: ALLOW
  rules:
  - from: [{source: {principals: [cluster.local/ns/g/sa/gateway]}}]
";

#[tokio::test]
async fn a_policy_reaches_new_flows_and_live_ones() {
    let Some(node) = Node::start("policy", &[]).await else {
        return;
    };
    let application = node.listen(8080);
    let mut send = open(&node).await.ready().await.unwrap();
    let (response, _stream) = send.send_request(request(APPLICATION), false).unwrap();
    let mut body = response.await.unwrap().into_body();
    let (mut served, client) = application.accept().await.unwrap();
    assert_eq!(
        client.ip().to_string(),
        "10.0.0.1",
        "the application sees the client's own address"
    );
    node.apply("policy.yaml", ONLY_GATEWAY);
    let reset = tokio::time::timeout(Duration::from_secs(20), body.data())
        .await
        .unwrap();
    assert!(
        matches!(reset, Some(Err(_))),
        "the live flow must be cut: {reset:?}"
    );
    assert!(!matches!(served.read(&mut [0; 1]).await, Ok(1..)));
    node.logged(&["closed because it's no longer allowed after a policy update"])
        .await;
    let line = node
        .logged(&["connection closed due to policy change"])
        .await;
    assert!(
        line.contains("error\taccess\tconnection complete"),
        "{line}"
    );
    assert_eq!(status(&node, APPLICATION).await, 401);
    let line = node
        .logged(&[
            "connection closed due to policy rejection: allow policies exist, but none allowed",
        ])
        .await;
    assert!(
        line.contains("src.identity=\"spiffe://cluster.local/ns/a/sa/curl\""),
        "{line}"
    );
    assert!(
        line.contains("dst.service=\"web.b.svc.cluster.local\""),
        "{line}"
    );
}

#[tokio::test]
async fn everything_known_goes_on_working_without_the_control_plane() {
    let Some(mut node) = Node::start("alone", &[]).await else {
        return;
    };
    let _application = node.listen(8080);
    assert_eq!(status(&node, APPLICATION).await, 200);
    node.kill_control();
    node.logged(&["XDS client connection error"]).await;
    assert_eq!(status(&node, APPLICATION).await, 200);
    assert_eq!(
        node.http("GET", 15021, "/healthz/ready").await,
        (200, "ready\n".to_string())
    );
    node.restart_control();
    wait_for("a second stream", || node.count("Stream established") >= 2).await;
    node.apply("policy.yaml", ONLY_GATEWAY);
    node.logged(&["handling RBAC update only-gateway"]).await;
    assert_eq!(status(&node, APPLICATION).await, 401);
}

#[tokio::test]
async fn a_drain_lets_flows_end_within_its_time_and_cuts_the_rest() {
    let variables = [("TERMINATION_GRACE_PERIOD_SECONDS", "2")];
    let Some(mut node) = Node::start("drain", &variables).await else {
        return;
    };
    let application = node.listen(8080);
    let mut send = open(&node).await.ready().await.unwrap();
    let (response, mut stream) = send.send_request(request(APPLICATION), false).unwrap();
    let mut body = response.await.unwrap().into_body();
    let (mut served, _) = application.accept().await.unwrap();
    let ending = tokio::spawn(async move {
        let code = node.terminate().await;
        (node, code)
    });
    // New connections are no longer taken, the open flow goes on.
    tokio::time::sleep(Duration::from_millis(300)).await;
    stream
        .send_data(Bytes::from_static(b"question"), false)
        .unwrap();
    let mut question = [0; 8];
    served.read_exact(&mut question).await.unwrap();
    served.write_all(b"answer").await.unwrap();
    assert_eq!(&body.data().await.unwrap().unwrap()[..], b"answer");
    let (node, code) = ending.await.unwrap();
    assert_eq!(code, Some(0));
    assert!(node.connect(&format!("{POD}:15008")).await.is_err());
    node.logged(&["drain duration expired with pending connections"])
        .await;
    node.logged(&["connection closed due to connection drain"])
        .await;
}

#[tokio::test]
async fn its_endpoints_tell_and_switch() {
    let Some(node) = Node::start("endpoints", &[("LOG_FORMAT", "json")]).await else {
        return;
    };
    let _application = node.listen(8080);
    assert_eq!(status(&node, APPLICATION).await, 200);
    let (code, text) = node.http("GET", 15000, "/config_dump").await;
    let dump: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(
        (code, &dump["workloadState"]["uid-web"]["state"]),
        (200, &"Up".into())
    );
    assert_eq!(dump["workloads"].as_array().map(Vec::len), Some(2));
    assert_eq!(dump["certificates"][0]["state"], "Available");
    assert!(!text.contains("PRIVATE KEY") && !text.contains("Bearer"));
    let (code, text) = node.http("GET", 15020, "/metrics").await;
    assert_eq!(code, 200);
    let opened = text
        .lines()
        .find(|line| line.starts_with("istio_tcp_connections_opened_total{"));
    assert!(
        opened
            .is_some_and(|line| line.contains("reporter=\"destination\",source_workload=\"curl\"")),
        "{text}"
    );
    assert!(text.contains("istio_build{component=\"ztunnel\""));
    assert_eq!(node.http("GET", 15021, "/healthz/ready").await.0, 200);
    let (code, text) = node.http("POST", 15000, "/logging?level=debug").await;
    assert_eq!(code, 200);
    assert!(text.contains("debug"), "{text}");
    let line = node
        .logged(&["\"scope\":\"access\"", "connection complete"])
        .await;
    let line: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!(line["dst.hbone_addr"], APPLICATION);
    assert_eq!(
        node.http("POST", 15000, "/quitquitquit").await,
        (200, "shutdown now\n".to_string())
    );
    node.logged(&["received explicit shutdown signal"]).await;
}

#[tokio::test]
async fn a_malformed_setting_refuses_to_start_and_says_which() {
    for (name, value, says) in [
        ("ZTUNNEL_WORKER_THREADS", "many", "ZTUNNEL_WORKER_THREADS"),
        ("HTTP2_FRAME_SIZE", "5", "HTTP2_FRAME_SIZE"),
        ("RUST_LOG", "x=loud", "RUST_LOG"),
        ("LOG_FORMAT", "xml", "LOG_FORMAT"),
        ("PROXY_MODE", "sidecar", "PROXY_MODE"),
    ] {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_warren"))
            .arg("proxy")
            .env(name, value)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            !output.status.success() && text.contains(says),
            "{name}: {text}"
        );
    }
}

#[tokio::test]
async fn a_revoked_certificate_ends_its_tunnels_and_opens_no_new_ones() {
    let folder = std::env::temp_dir().join(format!("wrn-crl-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let path = folder.join("lists.pem");
    let variables = [("CRL_PATH", path.to_str().unwrap())];
    let Some(node) = Node::start("crl", &variables).await else {
        return;
    };
    node.logged(&["nothing is revoked until they are"]).await;
    let application = node.listen(8080);
    let certificate = node.certificate("spiffe://cluster.local/ns/a/sa/curl");
    let (revoked, sound) = (certificate.identity(), certificate.identity());
    let tunnel = async |identity: &std::sync::Arc<hbone::TlsIdentity>| {
        let stream = tls(&node, config(identity)).await.ok()?;
        let (send, connection) = h2::client::handshake(stream).await.ok()?;
        tokio::spawn(connection);
        answer(send, request(APPLICATION)).await.ok()
    };
    let (send, connection) = h2::client::handshake(tls(&node, config(&revoked)).await.unwrap())
        .await
        .unwrap();
    tokio::spawn(connection);
    let mut send = send.ready().await.unwrap();
    let (response, _stream) = send.send_request(request(APPLICATION), false).unwrap();
    let mut body = response.await.unwrap().into_body();
    let _live = application.accept().await.unwrap();

    std::fs::write(&path, certificate.revoke(&revoked)).unwrap();
    node.logged(&["revocation lists read: 1 revoked certificates"])
        .await;
    let cut = tokio::time::timeout(Duration::from_secs(20), body.data());
    assert!(!matches!(cut.await.unwrap(), Some(Ok(_))));
    let line = node
        .logged(&["connection closed: peer certificate revoked by CRL"])
        .await;
    assert!(
        line.contains("error\taccess\tconnection complete"),
        "{line}"
    );
    assert_eq!(tunnel(&revoked).await, None);
    node.logged(&[
        "connection failed",
        "tls handshake error: invalid peer certificate: Revoked",
    ])
    .await;
    assert_eq!(tunnel(&sound).await, Some(200));

    // What cannot be read changes nothing.
    std::fs::write(&path, "junk").unwrap();
    node.logged(&["what was revoked before stays revoked"])
        .await;
    assert_eq!(tunnel(&revoked).await, None);
    let counted = "istio_crl_policy_rejections_total{reporter=\"destination\"} 3";
    for _ in 0..500 {
        let (_, metrics) = node.http("GET", 15020, "/metrics").await;
        if metrics.contains(counted) && metrics.contains("response_flags=\"CERT_REVOKED\"") {
            let _ = std::fs::remove_dir_all(&folder);
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("{counted} did not come");
}

#[tokio::test]
async fn a_stream_that_is_cancelled_ends_in_order_only_if_all_was_said() {
    let Some(node) = Node::start("cancel", &[]).await else {
        return;
    };
    let application = node.listen(8080);
    for whole in [false, true] {
        let mut send = open(&node).await.ready().await.unwrap();
        let (response, mut stream) = send.send_request(request(APPLICATION), false).unwrap();
        let (mut socket, _) = application.accept().await.unwrap();
        let response = response.await.unwrap();
        assert_eq!(response.status(), 200);
        stream.send_data("half".into(), whole).unwrap();
        let mut half = [0; 4];
        socket.read_exact(&mut half).await.unwrap();
        stream.send_reset(h2::Reason::CANCEL);
        let end = socket.read(&mut half).await;
        match whole {
            true => assert_eq!(end.unwrap(), 0),
            false => assert_eq!(end.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset),
        }
    }
}
