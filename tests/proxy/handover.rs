//! One proxy follows another: in order, after a crash, and out of a pod that goes on without one.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use cni::zds::{WorkloadInfo, ZdsServer};
use hbone::TlsIdentity;
use tokio::task::{LocalSet, spawn_local};

use crate::applications::echo;
use crate::harness::Proxy;
use crate::tunnel::{request, tls};

const STATE: &str = r#"
workloads:
- {namespace: b, name: web, serviceAccount: web, node: n1, workloadIps: [10.0.0.9], protocol: HBONE}
"#;
const WEB: &str = "spiffe://cluster.local/ns/b/sa/web";

/// A proxy that serves the pod `web`, and the node agent.
async fn node(name: &str) -> Option<(Proxy, ZdsServer)> {
    let proxy = Proxy::alone(name, &[], STATE).await?;
    let agent = ZdsServer::bind(&proxy.folder().join("zds.sock")).unwrap();
    let mut connected = agent.connected();
    connected.wait_for(|count| *count > 0).await.unwrap();
    let info = WorkloadInfo {
        name: "web".into(),
        namespace: "b".into(),
        service_account: "web".into(),
    };
    let netns = proxy.netns().try_clone().unwrap();
    agent.add("uid-web", info, netns.into()).await.unwrap();
    echo(proxy.listen(8080));
    Some((proxy, agent))
}

/// Has a tunnel and a flow of its own, says something and hears it again.
async fn flow(proxy: &Proxy, caller: &TlsIdentity) -> Result<(), String> {
    let told = |error: &dyn std::fmt::Display| error.to_string();
    let config = caller.client_config(&[WEB.parse().unwrap()]).unwrap();
    let stream = tls(proxy, (*config).clone()).await;
    let stream = stream.map_err(|error| format!("tls: {error}"))?;
    let (send, connection) = h2::client::handshake(stream)
        .await
        .map_err(|error| told(&error))?;
    let driven = spawn_local(connection);
    let mut send = send.ready().await.map_err(|error| told(&error))?;
    let (response, mut upload) = send
        .send_request(request("10.0.0.9:8080"), false)
        .map_err(|error| told(&error))?;
    let response = response.await.map_err(|error| told(&error))?;
    if response.status() != 200 {
        return Err(response.status().to_string());
    }
    upload
        .send_data("hello".into(), true)
        .map_err(|error| told(&error))?;
    let mut body = response.into_body();
    let mut got = Vec::new();
    while let Some(part) = body.data().await {
        got.extend_from_slice(&part.map_err(|error| told(&error))?);
    }
    drop(send);
    driven.abort();
    match &got[..] {
        b"hello" => Ok(()),
        _ => Err(format!("{got:?} came back")),
    }
}

/// Opens flows one after the other until told to stop.
struct Load {
    over: Rc<Cell<bool>>,
    tasks: Vec<tokio::task::JoinHandle<usize>>,
}

impl Load {
    fn start(proxy: &Rc<Proxy>, caller: &Arc<TlsIdentity>) -> Self {
        let over = Rc::new(Cell::new(false));
        let task = |_| {
            let (proxy, caller, over) = (proxy.clone(), caller.clone(), over.clone());
            spawn_local(async move {
                let mut count = 0;
                while !over.get() {
                    flow(&proxy, &caller).await.unwrap();
                    count += 1;
                }
                count
            })
        };
        Self {
            tasks: (0..8).map(task).collect(),
            over,
        }
    }

    /// How many flows there were, each of which came to a good end.
    async fn stop(self) -> usize {
        self.over.set(true);
        let mut count = 0;
        for task in self.tasks {
            count += task.await.unwrap();
        }
        count
    }
}

async fn ready(proxy: &Proxy) {
    for _ in 0..1000 {
        if proxy.http("GET", 15021, "/healthz/ready").await.0 == 200 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("the proxy does not get ready");
}

#[tokio::test]
async fn no_new_flow_is_refused_while_one_proxy_follows_another() {
    LocalSet::new()
        .run_until(async {
            let Some((first, _agent)) = node("handover").await else {
                return;
            };
            let shared = first.folder().to_path_buf();
            let socket = shared.join("zds.sock");
            let variables = [
                ("TMPDIR", shared.to_str().unwrap()),
                ("INPOD_UDS", socket.to_str().unwrap()),
            ];
            let caller = first
                .certificate("spiffe://cluster.local/ns/a/sa/curl")
                .identity();
            let mut current = Rc::new(first);
            let pod = current.clone();
            let load = Load::start(&pod, &caller);
            let mut later = Vec::new();
            for number in 0..3 {
                let name = format!("handover-{number}");
                let next = Rc::new(Proxy::alone(&name, &variables, STATE).await.unwrap());
                ready(&next).await;
                current.ask_to_stop();
                current.logged(&["shutdown complete"]).await;
                later.push(std::mem::replace(&mut current, next));
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
            let count = load.stop().await;
            eprintln!("{count} flows");
            assert!(count > 100, "{count}");
        })
        .await;
}

#[tokio::test]
async fn a_crash_costs_only_the_flows_that_were_open() {
    LocalSet::new()
        .run_until(async {
            let Some((mut proxy, _agent)) = node("crash").await else {
                return;
            };
            let caller = proxy
                .certificate("spiffe://cluster.local/ns/a/sa/curl")
                .identity();
            flow(&proxy, &caller).await.unwrap();
            proxy.kill();
            assert!(flow(&proxy, &caller).await.is_err());
            proxy.start_again(&[]);
            // The agent tells the new process of the pod by itself.
            let mut attempts = 0;
            while let Err(error) = flow(&proxy, &caller).await {
                attempts += 1;
                assert!(attempts < 1000, "{error}");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            for _ in 0..20 {
                flow(&proxy, &caller).await.unwrap();
            }
        })
        .await;
}

#[tokio::test]
async fn a_pod_that_leaves_the_mesh_and_lives_on_keeps_its_flows_for_a_while() {
    LocalSet::new()
        .run_until(async {
            let Some((proxy, agent)) = node("leaves").await else {
                return;
            };
            let caller = proxy
                .certificate("spiffe://cluster.local/ns/a/sa/curl")
                .identity();
            let config = caller.client_config(&[WEB.parse().unwrap()]).unwrap();
            let stream = tls(&proxy, (*config).clone()).await.unwrap();
            let (send, connection) = h2::client::handshake(stream).await.unwrap();
            spawn_local(connection);
            let mut send = send.ready().await.unwrap();
            let (response, mut upload) =
                send.send_request(request("10.0.0.9:8080"), false).unwrap();
            let mut body = response.await.unwrap().into_body();
            agent.remove("uid-web").await.unwrap();
            // New flows are not served any more, soon.
            while flow(&proxy, &caller).await.is_ok() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            upload.send_data("still here".into(), true).unwrap();
            assert_eq!(body.data().await.unwrap().unwrap(), "still here");
            proxy
                .logged(&["info", "connection complete", "bytes_recv=10"])
                .await;
        })
        .await;
}
