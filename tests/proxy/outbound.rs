//! What becomes of captured flows: where they go, where else when that fails, and what is said when they go nowhere.

use crate::applications::{ask, greet};
use crate::harness::Node;

/// A service of two pods outside the mesh, and one of none.
const SERVICES: &str = "apiVersion: v1
kind: Service
metadata: {name: pair, namespace: b}
spec: {clusterIP: 10.96.0.2, selector: {app: pair}, ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: empty, namespace: b}
spec: {clusterIP: 10.96.0.3, selector: {app: nobody}, ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Pod
metadata: {name: deaf, namespace: b, labels: {app: pair}}
spec: {nodeName: n2, serviceAccountName: pair}
status: {podIP: 10.0.0.21, conditions: [{type: Ready, status: 'True'}]}
---
apiVersion: v1
kind: Pod
metadata: {name: sound, namespace: b, labels: {app: pair}}
spec: {nodeName: n2, serviceAccountName: pair}
status: {podIP: 10.0.0.22, conditions: [{type: Ready, status: 'True'}]}
";

async fn with_services(name: &str, variables: &[(&str, &str)]) -> Option<Node> {
    let node = Node::start(name, variables).await?;
    node.capture(
        &["10.96.0.0/16", "192.0.2.0/24"],
        &["10.0.0.21", "10.0.0.22", "192.0.2.1", "192.0.2.9"],
    );
    greet(node.listen_at("10.0.0.22", 8080));
    node.apply("services.yaml", SERVICES);
    for _ in 0..1000 {
        let (_, dump) = node.http("GET", 15000, "/config_dump").await;
        if dump.contains("pair.b.svc.cluster.local") && dump.contains("\"deaf\"") {
            return Some(node);
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    panic!("the proxy did not learn of the services");
}

#[tokio::test]
async fn a_flow_whose_endpoint_refuses_goes_to_another_one() {
    let Some(node) = with_services("another", &[]).await else {
        return;
    };
    for _ in 0..30 {
        assert_eq!(ask(&node, "10.96.0.2:80").await, "hello");
    }
    let line = node
        .logged(&[
            "info\taccess\tconnection complete",
            "dst.addr=10.0.0.22:8080",
        ])
        .await;
    assert!(
        line.contains("dst.service=\"pair.b.svc.cluster.local\""),
        "{line}"
    );
    assert!(line.contains("dst.workload=\"sound\""), "{line}");
    assert_eq!(node.count("error\taccess"), 0);
    let (_, metrics) = node.http("GET", 15020, "/metrics").await;
    let of = |name: &str| -> Vec<u64> {
        let samples = metrics.lines().filter(|line| line.starts_with(name));
        let samples = samples.filter(|line| line.contains("destination_workload=\"deaf\""));
        samples
            .filter_map(|line| line.rsplit(' ').next()?.parse().ok())
            .collect()
    };
    let failed: u64 = of("istio_tcp_connections_failed_total").iter().sum();
    let opened: u64 = of("istio_tcp_connections_opened_total").iter().sum();
    let closed: u64 = of("istio_tcp_connections_closed_total").iter().sum();
    // Each worker tries it at most once, then last for a while.
    assert!((1..=2).contains(&failed), "{failed} attempts\n{metrics}");
    assert_eq!((opened, closed), (failed, failed));
}

#[tokio::test]
async fn a_flow_that_goes_nowhere_is_logged_with_its_service() {
    let Some(node) = with_services("nowhere", &[]).await else {
        return;
    };
    // target, what the line says
    let cases = [
        ("10.96.0.3:80", "empty", "no healthy upstream: 10.96.0.3:80"),
        ("10.96.0.2:81", "pair", "no healthy upstream: 10.96.0.2:81"),
    ];
    for (target, service, error) in cases {
        assert_eq!(ask(&node, target).await, "");
        let line = node
            .logged(&["error\taccess\tconnection complete", error])
            .await;
        for part in [
            &*format!("dst.service=\"{service}.b.svc.cluster.local\""),
            "src.workload=\"web\"",
            "direction=\"outbound\"",
        ] {
            assert!(line.contains(part), "{part} in {line}");
        }
    }
}

#[tokio::test]
async fn only_known_destinations_are_reached_when_that_is_asked_for() {
    let variables = [
        ("OUTBOUND_TRAFFIC_POLICY", "REGISTRY_ONLY"),
        ("OUTBOUND_ALLOW", "192.0.2.1:80"),
        ("OUTBOUND_DENY", "10.96.0.2:443, 192.0.2.1:22"),
    ];
    let Some(node) = with_services("registry", &variables).await else {
        return;
    };
    greet(node.listen_at("192.0.2.1", 80));
    greet(node.listen_at("192.0.2.9", 80));
    // target, what comes back, what the line says
    let cases = [
        ("10.96.0.2:80", "hello", "dst.workload=\"sound\""),
        ("192.0.2.1:80", "hello", "dst.addr=192.0.2.1:80"),
        (
            "192.0.2.9:80",
            "",
            "outbound to 192.0.2.9:80 is not known to the mesh (OUTBOUND_TRAFFIC_POLICY=REGISTRY_ONLY)",
        ),
        (
            "192.0.2.1:22",
            "",
            "outbound to 192.0.2.1:22 is denied by OUTBOUND_DENY=192.0.2.1/32:22",
        ),
        ("10.96.0.2:443", "", "outbound to 10.96.0.2:443 is denied"),
    ];
    for (target, answer, said) in cases {
        assert_eq!(ask(&node, target).await, answer, "{target}");
        let line = node.logged(&["access\tconnection complete", said]).await;
        assert_eq!(
            line.contains("policy rejection"),
            answer.is_empty(),
            "{line}"
        );
    }
    let (_, metrics) = node.http("GET", 15020, "/metrics").await;
    assert!(metrics.contains("response_flags=\"DENY\""), "{metrics}");
}
