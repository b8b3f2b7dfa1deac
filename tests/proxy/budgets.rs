//! What one pod may use, and how it is told that this is used up.

use std::time::Duration;

use bytes::Bytes;
use tokio::io::AsyncReadExt;

use crate::harness::Node;
use crate::tunnel::{open, request};

/// The value of a metric without labels.
async fn metric(node: &Node, name: &str) -> u64 {
    let (_, text) = node.http("GET", 15020, "/metrics").await;
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    line.unwrap().trim().parse().unwrap()
}

/// Waits until a metric is as it should be.
async fn until(node: &Node, name: &str, fits: impl Fn(u64) -> bool) {
    for _ in 0..1000 {
        if fits(metric(node, name).await) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("{name} stays at {}", metric(node, name).await);
}

#[tokio::test]
async fn a_pod_that_has_used_up_its_flows_is_told_so_and_gets_places_back() {
    let budget = [("FLOW_BUDGET_PER_POD", "3"), ("FLOW_BUDGET", "100")];
    let Some(node) = Node::start("flows", &budget).await else {
        return;
    };
    let application = node.listen(8080);
    tokio::spawn(async move {
        let mut all = Vec::new();
        while let Ok((socket, _)) = application.accept().await {
            all.push(socket);
        }
    });
    // The tunnel has a place, and each of its streams.
    let mut send = open(&node).await;
    let mut streams = Vec::new();
    for _ in 0..2 {
        send = send.ready().await.unwrap();
        let (response, stream) = send.send_request(request("10.0.0.9:8080"), false).unwrap();
        assert_eq!(response.await.unwrap().status(), 200);
        streams.push(stream);
    }
    assert_eq!(metric(&node, "warren_flow_budget ").await, 100);
    let mut ask = async || {
        send = send.clone().ready().await.unwrap();
        let (response, _stream) = send.send_request(request("10.0.0.9:8080"), false).unwrap();
        let response = response.await.unwrap();
        let reason = response.headers().get("x-warren-reason");
        let reason = reason.map(|reason| reason.to_str().unwrap().to_string());
        (response.status().as_u16(), reason)
    };
    assert_eq!(ask().await, (503, Some("too_many_flows".to_string())));
    node.logged(&[
        "warn\taccess\tconnection failed",
        "reason=\"too_many_flows\"",
        "error=\"the pod's budget of 3 flows is used up; raise FLOW_BUDGET_PER_POD\"",
    ])
    .await;
    // Nobody else gets in either: the connection is reset before a word is said.
    if let Ok(mut socket) = node.connect("10.0.0.9:15008").await {
        assert!(socket.read(&mut [0; 1]).await.is_err());
    }
    streams.pop().unwrap().send_reset(h2::Reason::CANCEL);
    until(&node, "warren_flows ", |flows| flows == 2).await;
    assert_eq!(ask().await, (200, None));
}

#[tokio::test]
async fn a_pod_whose_readers_are_slow_gets_no_more_flows_until_they_have_read() {
    let budget = [("MEMORY_BUDGET_PER_POD", "500k")];
    let Some(node) = Node::start("memory", &budget).await else {
        return;
    };
    let application = node.listen(8080);
    let mut send = open(&node).await.ready().await.unwrap();
    let (response, mut stream) = send.send_request(request("10.0.0.9:8080"), false).unwrap();
    let (mut slow, _) = application.accept().await.unwrap();
    let response = response.await.unwrap();
    assert_eq!(response.status(), 200);
    let sent = 16 << 20;
    let sending = tokio::spawn(async move {
        let mut left = sent;
        while left > 0 {
            stream.reserve_capacity(left);
            let granted = std::future::poll_fn(|cx| stream.poll_capacity(cx)).await;
            let part = granted.unwrap().unwrap().min(left);
            stream.send_data(Bytes::from(vec![1; part]), false).unwrap();
            left -= part;
        }
        stream.send_data(Bytes::new(), true).unwrap();
    });
    until(&node, "warren_waiting_bytes ", |bytes| bytes > 500_000).await;
    let mut send = send.ready().await.unwrap();
    let (response, _other) = send.send_request(request("10.0.0.9:8080"), false).unwrap();
    let response = response.await.unwrap();
    assert_eq!(response.status(), 503);
    assert_eq!(response.headers()["x-warren-reason"], "out_of_memory");
    node.logged(&[
        "reason=\"out_of_memory\"",
        "the pod's budget of 500000 bytes that wait for slow readers is used up; raise MEMORY_BUDGET_PER_POD",
    ])
    .await;
    let mut all = Vec::new();
    slow.read_to_end(&mut all).await.unwrap();
    assert_eq!(all.len(), sent);
    sending.await.unwrap();
    until(&node, "warren_waiting_bytes ", |bytes| bytes == 0).await;
    let mut send = send.ready().await.unwrap();
    let (response, _again) = send.send_request(request("10.0.0.9:8080"), false).unwrap();
    assert_eq!(response.await.unwrap().status(), 200);
}
