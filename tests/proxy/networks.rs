//! From one network to another: a tunnel in a tunnel, through a gateway that sees nothing of what it passes on.

use std::rc::Rc;

use hbone::{Engine, Http2Config, accept};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::{LocalSet, spawn_local};

use crate::applications::echo;
use crate::harness::Proxy;

const GATEWAY: &str = "10.0.0.21";

const NEAR: &str = r#"
workloads:
- {namespace: a, name: curl, serviceAccount: curl, node: n1, workloadIps: [10.0.0.9], protocol: HBONE,
   workloadName: curl, canonicalName: curl-app, canonicalRevision: v3, clusterId: east}
- {namespace: gw, name: gateway, serviceAccount: gateway, node: n2, workloadIps: [10.0.0.21], protocol: HBONE}
- {uid: far/SplitHorizon/web, namespace: b, network: far, protocol: HBONE, node: "-",
   networkGateway: {destination: /10.0.0.21, hboneMtlsPort: 15009}, services: {b/web.example: {80: 8080}}}
services:
- {name: web, namespace: b, hostname: web.example, vips: [/10.96.0.7], ports: {80: 8080},
   subjectAltNames: ["spiffe://cluster.local/ns/b/sa/$SA"]}
"#;

const FAR: &str = r#"
workloads:
- {namespace: b, name: web-1, serviceAccount: web, node: n1, network: far, workloadIps: [10.0.0.9], protocol: HBONE,
   workloadName: web, canonicalName: web-app, canonicalRevision: v2, clusterId: west, services: {b/web.example: {80: 8080}}}
services:
- {name: web, namespace: b, hostname: web.example, vips: [far/10.96.0.7], ports: {80: 8080}}
"#;

/// Two networks; none without root. The gateway passes the streams of the near one on to the pod of the far one.
async fn networks(name: &str, state: &str, account: &str) -> Option<(Rc<Proxy>, Rc<Proxy>)> {
    let variables = [
        ("PROXY_MODE", "dedicated"),
        ("PROXY_WORKLOAD_INFO", "a/curl/curl"),
        ("UNSTABLE_ENABLE_SOCKS5", "true"),
    ];
    let state = state.replace("$SA", account);
    let near = Rc::new(Proxy::alone(&format!("{name}-near"), &variables, &state).await?);
    near.shell(&format!("ip addr add {GATEWAY}/32 dev eth0"));
    let shared = near.folder().to_str().unwrap();
    let far = [
        ("PROXY_MODE", "dedicated"),
        ("PROXY_WORKLOAD_INFO", "b/web-1/web"),
        ("NETWORK", "far"),
        ("TMPDIR", shared),
    ];
    let far = Rc::new(Proxy::alone(&format!("{name}-far"), &far, FAR).await?);
    far.logged(&["serving the workload of this process"]).await;
    let gateway = near.certificate("spiffe://cluster.local/ns/gw/sa/gateway");
    let (identity, engine) = (gateway.identity(), Engine::start());
    let (listener, behind) = (near.listen_at(GATEWAY, 15009), far.clone());
    spawn_local(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let mut tunnel = accept(&engine, socket, &identity, &Http2Config::default())
                .await
                .unwrap();
            let behind = behind.clone();
            spawn_local(async move {
                while let Some(incoming) = tunnel.next().await {
                    assert_eq!(incoming.authority(), "web.example:80");
                    let pod = behind.connect("10.0.0.9:15008").await.unwrap();
                    let stream = incoming.accept(None).unwrap();
                    spawn_local(async move { stream.carry(pod, &Rc::default()).await });
                }
            });
        }
    });
    Some((near, far))
}

/// Asks the near proxy for the service; gives the answer's code and the socket.
async fn ask(near: &Proxy) -> (u8, tokio::net::TcpStream) {
    let mut socket = near.connect("127.0.0.1:15080").await.unwrap();
    socket.write_all(&[5, 1, 0]).await.unwrap();
    socket
        .write_all(&[5, 1, 0, 1, 10, 96, 0, 7, 0, 80])
        .await
        .unwrap();
    let mut answer = [0; 12];
    socket.read_exact(&mut answer).await.unwrap();
    (answer[3], socket)
}

#[tokio::test]
async fn a_flow_reaches_another_network_and_both_logs_name_both_ends() {
    LocalSet::new()
        .run_until(async {
            let Some((near, far)) = networks("networks", NEAR, "web").await else {
                return;
            };
            echo(far.listen(8080));
            for _ in 0..3 {
                let (code, mut socket) = ask(&near).await;
                assert_eq!(code, 0);
                let sent = vec![5; 300_000];
                let (mut read, mut write) = socket.split();
                let sending = async {
                    write.write_all(&sent).await.unwrap();
                    write.shutdown().await.unwrap();
                };
                let mut got = Vec::new();
                let (_, count) = tokio::join!(sending, read.read_to_end(&mut got));
                assert_eq!((count.unwrap(), got == sent), (sent.len(), true));
            }
            let near_line = near.logged(&["connection complete"]).await;
            for field in [
                "info",
                "src.workload=\"curl\"",
                "dst.addr=10.0.0.21:15009",
                "dst.hbone_addr=web.example:80",
                "dst.service=\"web.example\"",
                "dst.workload=\"web\"",
                "dst.namespace=\"b\"",
                "dst.identity=\"spiffe://cluster.local/ns/b/sa/web\"",
                "dst.cluster=\"west\"",
                "bytes_sent=300000 bytes_recv=300000",
            ] {
                assert!(near_line.contains(field), "{field}: {near_line}");
            }
            let far_line = far.logged(&["connection complete"]).await;
            for field in [
                "src.workload=\"curl-app\"",
                "src.namespace=\"a\"",
                "src.identity=\"spiffe://cluster.local/ns/a/sa/curl\"",
                "src.cluster=\"east\"",
                "dst.hbone_addr=web.example:80",
                "dst.service=\"web.example\"",
                "dst.workload=\"web-1\"",
            ] {
                assert!(far_line.contains(field), "{field}: {far_line}");
            }
            let (_, metrics) = near.http("GET", 15020, "/metrics").await;
            let opened = metrics
                .lines()
                .find(|line| line.starts_with("istio_tcp_connections_opened_total"))
                .unwrap();
            assert!(
                opened.contains("destination_workload=\"web\"") && opened.ends_with(" 3"),
                "{opened}"
            );
        })
        .await;
}

#[tokio::test]
async fn whoever_answers_behind_a_gateway_without_the_services_identity_is_refused() {
    LocalSet::new()
        .run_until(async {
            let Some((near, _far)) = networks("impostor", NEAR, "other").await else {
                return;
            };
            assert_eq!(ask(&near).await.0, 5);
            near.logged(&[
                "error",
                "connection complete",
                "dst.service=\"web.example\"",
                "peer did not present the expected SAN (spiffe://cluster.local/ns/b/sa/other), got spiffe://cluster.local/ns/b/sa/web",
            ])
            .await;
        })
        .await;
}

#[tokio::test]
async fn a_pod_whose_record_has_not_arrived_can_already_send() {
    LocalSet::new()
        .run_until(async {
            let line = "- {namespace: a, name: curl, ";
            let without: String = NEAR
                .split_inclusive('\n')
                .filter(|text| !text.starts_with(line) && !text.contains("canonicalName: curl-app"))
                .collect();
            let Some((near, far)) = networks("early", &without, "web").await else {
                return;
            };
            echo(far.listen(8080));
            assert_eq!(ask(&near).await.0, 0);
            far.logged(&["direction=\"inbound\"", "src.identity=\"spiffe://cluster.local/ns/a/sa/curl\""])
                .await;
            near.logged(&["the pod sends before its record has arrived, as spiffe://cluster.local/ns/a/sa/curl"])
                .await;
        })
        .await;
}
