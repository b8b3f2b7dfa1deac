//! The proxy without a control plane, without a node agent, for one workload only, and for its own.

use crate::applications::{greet, socks, to_address};
use crate::harness::{POD, Proxy};
use crate::tunnel::{answer, exchange, request, tls};

/// The pod as a workload of the mesh.
const STATE: &str = r#"
workloads:
- {namespace: default, name: local, serviceAccount: acc, node: n1, workloadIps: [10.0.0.9], protocol: HBONE,
   services: {default/web.example: {80: 8080}}}
- {namespace: default, name: plain, node: n2, workloadIps: [10.0.0.1]}
services:
- {name: web, namespace: default, hostname: web.example, vips: [/10.96.0.7], ports: {80: 8080}}
"#;

const REFUSING: &str = "
policies:
- {name: no, namespace: default, scope: Namespace, action: Deny, dryRun: false, rules: [[[{destinationPorts: [8080]}]]]}
";

const DEDICATED: [(&str, &str); 3] = [
    ("PROXY_MODE", "dedicated"),
    ("PROXY_WORKLOAD_INFO", "default/local/acc"),
    ("UNSTABLE_ENABLE_SOCKS5", "true"),
];

fn to_name(name: &str, port: u16) -> Vec<u8> {
    let length = [name.len() as u8];
    [
        &[5, 1, 0, 3][..],
        &length,
        name.as_bytes(),
        &port.to_be_bytes(),
    ]
    .concat()
}

#[tokio::test]
async fn a_dedicated_proxy_carries_what_its_socks_port_is_asked_for() {
    let Some(proxy) = Proxy::alone("dedicated", &DEDICATED, STATE).await else {
        return;
    };
    greet(proxy.listen(8080));
    for request in [
        to_address([10, 0, 0, 9], 8080),
        to_address([10, 96, 0, 7], 80),
        to_name("web.example", 80),
    ] {
        assert_eq!(socks(&proxy, &request).await, (0, "hello".to_string()));
    }
    let mtls = "src.identity=\"spiffe://cluster.local/ns/default/sa/acc\"";
    for direction in ["outbound", "inbound"] {
        let direction = format!("direction=\"{direction}\"");
        let service = "dst.service=\"web.example\"";
        proxy
            .logged(&["connection complete", mtls, &direction, service])
            .await;
    }
    let (_, ready) = proxy.http("GET", 15021, "/healthz/ready").await;
    assert_eq!(ready, "ready\n");
}

#[tokio::test]
async fn a_socks_client_learns_why_it_gets_nowhere() {
    let denied = [&DEDICATED[..], &[("OUTBOUND_DENY", "192.0.2.0/24")]].concat();
    let Some(proxy) = Proxy::alone("socks", &denied, STATE).await else {
        return;
    };
    let cases = [
        (to_address([10, 0, 0, 1], 9), 5),
        (to_address([192, 0, 2, 1], 80), 2),
        (to_address([127, 0, 0, 1], 15008), 1),
        (to_address([127, 0, 0, 1], 15080), 1),
        (to_name("nowhere.invalid", 80), 4),
        (vec![5, 2, 0, 1, 10, 0, 0, 9, 0, 80], 7),
        (vec![5, 1, 0, 9, 10, 0, 0, 9, 0, 80], 7),
    ];
    for (request, code) in cases {
        assert_eq!(socks(&proxy, &request).await.0, code, "{request:?}");
    }
    proxy
        .logged(&[
            "connection failed",
            "error=\"socks5: only CONNECT is supported\"",
        ])
        .await;
}

#[tokio::test]
async fn a_local_source_is_read_again_when_it_changes() {
    let Some(proxy) = Proxy::alone("reload", &DEDICATED, STATE).await else {
        return;
    };
    greet(proxy.listen(8080));
    let request = to_address([10, 0, 0, 9], 8080);
    assert_eq!(socks(&proxy, &request).await.0, 0);
    proxy.state("workloads: {}");
    proxy
        .logged(&[
            "error",
            "state.yaml: workloads: invalid type",
            "stays in force",
        ])
        .await;
    assert_eq!(socks(&proxy, &request).await.0, 0);
    proxy.state(&format!("{STATE}{REFUSING}"));
    proxy
        .logged(&["local config read again", "num_policies=1"])
        .await;
    assert_eq!(socks(&proxy, &request).await.0, 2);
    let code = "reason=\"policy_denied\"";
    proxy
        .logged(&[
            "direction=\"outbound\"",
            code,
            "http status: 401 Unauthorized",
        ])
        .await;
    proxy
        .logged(&[
            "direction=\"inbound\"",
            code,
            "explicitly denied by: default/no",
        ])
        .await;
    let (_, metrics) = proxy.http("GET", 15020, "/metrics").await;
    for reporter in ["source", "destination"] {
        let sample = format!(
            "warren_flow_failures_total{{reporter=\"{reporter}\",reason=\"policy_denied\"}} 1\n"
        );
        assert!(metrics.contains(&sample), "{metrics}");
    }
    let (_, dump) = proxy.http("GET", 15000, "/config_dump").await;
    let dump: serde_json::Value = serde_json::from_str(&dump).unwrap();
    assert_eq!(dump["staticConfig"]["policies"][0]["name"], "no");
    assert_eq!(dump["policies"][0]["name"], "no");
    assert_eq!(dump["config"]["proxyMode"], "Dedicated");
    proxy.state(STATE);
    proxy
        .logged(&["local config read again", "num_policies=0"])
        .await;
    assert_eq!(socks(&proxy, &request).await.0, 0);
}

#[tokio::test]
async fn a_dedicated_proxy_whose_port_is_taken_does_not_start() {
    let Some(mut proxy) = Proxy::alone("taken", &[("PROXY_MODE", "shared")], STATE).await else {
        return;
    };
    assert_eq!(proxy.terminate().await, Some(0));
    let _taken = proxy.listen_at("0.0.0.0", 15008);
    proxy.start_again(&DEDICATED);
    proxy
        .logged(&["failed to bind to address 0.0.0.0:15008: Address already in use"])
        .await;
    assert_eq!(proxy.ended().await, Some(1));
}

#[tokio::test]
async fn a_connect_may_ask_by_hostname() {
    let Some(proxy) = Proxy::alone("hostname", &DEDICATED, STATE).await else {
        return;
    };
    greet(proxy.listen(8080));
    proxy.logged(&["marking server ready"]).await;
    let caller = proxy.certificate("spiffe://cluster.local/ns/default/sa/gateway");
    let (caller, expected) = (
        caller.identity(),
        "spiffe://cluster.local/ns/default/sa/acc",
    );
    let text = exchange(&proxy, &caller, expected, "web.example:80", b"").await;
    assert_eq!(text, "hello");
    proxy
        .logged(&[
            "info\taccess\tconnection complete",
            "src.identity=\"spiffe://cluster.local/ns/default/sa/gateway\"",
            "dst.hbone_addr=web.example:80 dst.service=\"web.example\" dst.workload=\"local\"",
            "direction=\"inbound\"",
        ])
        .await;
    let cases = [
        (
            "nowhere.example:80",
            "no service or workload for hostname: nowhere.example",
        ),
        (
            "web.example:81",
            "requested service web.example:81 found, but cannot resolve port",
        ),
    ];
    for (authority, error) in cases {
        let config = caller.client_config(&[expected.parse().unwrap()]).unwrap();
        let stream = tls(&proxy, (*config).clone()).await.unwrap();
        let (send, connection) = h2::client::handshake(stream).await.unwrap();
        tokio::spawn(connection);
        assert_eq!(answer(send, request(authority)).await.unwrap(), 503);
        proxy
            .logged(&["warn\taccess\tconnection failed", error])
            .await;
    }
}

#[tokio::test]
async fn a_proxys_own_metrics_are_reached_through_the_mesh() {
    let own = [
        ("POD_NAME", "local"),
        ("POD_NAMESPACE", "default"),
        ("SERVICE_ACCOUNT", "acc"),
    ];
    let Some(proxy) = Proxy::alone("own", &own, STATE).await else {
        return;
    };
    proxy
        .logged(&["serving the workload of this process"])
        .await;
    let caller = proxy.certificate("spiffe://cluster.local/ns/monitoring/sa/prometheus");
    let expected = "spiffe://cluster.local/ns/default/sa/acc";
    let request = b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    let target = format!("{POD}:15020");
    let text = exchange(&proxy, &caller.identity(), expected, &target, request).await;
    assert!(text.contains("istio_build{component=\"ztunnel\""), "{text}");
    proxy
        .logged(&[
            "connection complete",
            "src.identity=\"spiffe://cluster.local/ns/monitoring/sa/prometheus\"",
            "dst.workload=\"local\"",
            "direction=\"inbound\"",
        ])
        .await;
}
