//! A proxy that asks for addresses when it needs them.

use std::time::Duration;

use hickory_proto::op::{Message, MessageType, OpCode, Query};
use hickory_proto::rr::{Name, RecordType};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::applications::{ask, greet};
use crate::harness::{Node, Proxy};
use crate::tunnel;

const SERVICES: &str = "apiVersion: v1
kind: Service
metadata: {name: pair, namespace: c}
spec: {clusterIP: 10.96.0.2, selector: {app: pair}, ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: unused, namespace: c}
spec: {clusterIP: 10.96.0.3, selector: {app: nobody}, ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Pod
metadata: {name: sound, namespace: c, labels: {app: pair}}
spec: {nodeName: n2, serviceAccountName: pair}
status: {podIP: $IP, conditions: [{type: Ready, status: 'True'}]}
";

/// The addresses that the pod's DNS gives for a name.
async fn resolve(proxy: &Proxy, name: &str) -> Vec<String> {
    let mut query = Message::new(7, MessageType::Query, OpCode::Query);
    let name = Name::from_ascii(format!("{name}.")).unwrap();
    query.add_query(Query::query(name, RecordType::A));
    let query = query.to_vec().unwrap();
    let mut socket = proxy.connect("127.0.0.1:15053").await.unwrap();
    socket.write_u16(query.len() as u16).await.unwrap();
    socket.write_all(&query).await.unwrap();
    let mut answer = vec![0; usize::from(socket.read_u16().await.unwrap())];
    socket.read_exact(&mut answer).await.unwrap();
    let answer = Message::from_vec(&answer).unwrap();
    let address = answer
        .answers
        .iter()
        .filter_map(|record| record.data.ip_addr());
    address.map(|ip| ip.to_string()).collect()
}

/// The names of the services that the proxy knows.
async fn services(node: &Node) -> Vec<String> {
    let (_, dump) = node.http("GET", 15000, "/config_dump").await;
    let dump: serde_json::Value = serde_json::from_str(&dump).unwrap();
    let services = dump["services"].as_array().unwrap().iter();
    services
        .map(|service| service["name"].as_str().unwrap().to_string())
        .collect()
}

#[tokio::test]
async fn what_is_asked_for_is_known_and_nothing_else() {
    let Some(mut node) = Node::start("ondemand", &[("XDS_ON_DEMAND", "true")]).await else {
        return;
    };
    node.capture(
        &["10.96.0.0/16", "192.0.2.0/24"],
        &["10.0.0.22", "10.0.0.23", "192.0.2.1"],
    );
    greet(node.listen_at("10.0.0.22", 8080));
    greet(node.listen_at("10.0.0.23", 8080));
    greet(node.listen_at("192.0.2.1", 8080));
    node.apply("services.yaml", &SERVICES.replace("$IP", "10.0.0.22"));
    // The control plane reads its folder on its own time.
    for _ in 0..500 {
        if ask(&node, "10.96.0.2:80").await == "hello" {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(ask(&node, "10.96.0.2:80").await, "hello");
    let line = node
        .logged(&["info", "connection complete", "dst.addr=10.0.0.22:8080"])
        .await;
    assert!(
        line.contains("dst.service=\"pair.c.svc.cluster.local\""),
        "{line}"
    );
    assert_eq!(ask(&node, "192.0.2.1:8080").await, "hello");
    assert_eq!(services(&node).await, ["pair"]);

    // Who calls is asked for, too.
    let _application = node.listen(8080);
    assert_eq!(tunnel::status(&node, "10.0.0.9:8080").await, 200);
    node.logged(&["direction=\"inbound\"", "src.workload=\"curl\""])
        .await;

    assert_eq!(
        resolve(&node, "unused.c.svc.cluster.local").await,
        ["10.96.0.3"]
    );
    assert!(
        resolve(&node, "nothing.c.svc.cluster.local")
            .await
            .is_empty()
    );

    // What was asked for stays known over a restart of the control plane, and follows what becomes of it.
    node.kill_control();
    assert_eq!(ask(&node, "10.96.0.2:80").await, "hello");
    node.restart_control();
    node.apply("services.yaml", &SERVICES.replace("$IP", "10.0.0.23"));
    node.shell("ip addr del 10.0.0.22/32 dev eth0");
    for _ in 0..500 {
        if ask(&node, "10.96.0.2:80").await == "hello" {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    node.logged(&["info", "connection complete", "dst.addr=10.0.0.23:8080"])
        .await;
}

#[tokio::test]
async fn a_control_plane_that_is_gone_holds_unknown_flows_for_a_bounded_time() {
    let Some(mut node) = Node::start("ondemand-gone", &[("XDS_ON_DEMAND", "true")]).await else {
        return;
    };
    node.capture(&["192.0.2.0/24"], &["192.0.2.1"]);
    greet(node.listen_at("192.0.2.1", 8080));
    node.kill_control();
    // What is unknown is passed through as it is.
    assert_eq!(ask(&node, "192.0.2.1:8080").await, "hello");
    node.logged(&["warn", "timed out waiting for /192.0.2.1 from xds"])
        .await;
}
