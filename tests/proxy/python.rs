//! Tunnels to and from a peer of another make (`peer.py`); `WARREN_PYTHON_PEER` names a folder with the Python
//! packages that it needs (`make test` sets it).

use std::path::Path;
use std::process::{Child, Command};

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::harness::wait_for;
use crate::pods::{Host, Pods};

const LENGTH: usize = 1 << 20;
const POD: &str = "10.0.0.11";
const PEER: &str = "10.0.0.21";
const POD_ID: &str = "spiffe://cluster.local/ns/default/sa/pod";
const PEER_ID: &str = "spiffe://cluster.local/ns/default/sa/peer";

const STATE: &str = "
workloads:
- {namespace: default, name: pod, serviceAccount: pod, node: n1, workloadIps: [10.0.0.11], protocol: HBONE}
- {namespace: default, name: peer, serviceAccount: peer, node: n2, workloadIps: [10.0.0.21], protocol: HBONE}
";

/// A captured pod and a place for the peer; none, with a line that says so, without what they need.
async fn start(name: &str) -> Option<(Pods, Host, Host)> {
    if std::env::var_os("WARREN_PYTHON_PEER").is_none_or(|folder| folder.is_empty()) {
        eprintln!("skipped: WARREN_PYTHON_PEER does not name Python's h2 (make test sets it)");
        return None;
    }
    let pods = Pods::start(name, &[], STATE).await?;
    let pod = pods.pod("pod", POD).await;
    let host = pods.host(PEER);
    pods.certificate(PEER_ID).write(&pods.folder().join("peer"));
    Some((pods, pod, host))
}

/// The peer as a process, ended with this.
struct Peer(Child);

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Peer {
    fn start(pods: &Pods, host: &Host, role: &str, address: &str, authority: &str) -> Self {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/proxy/peer.py");
        let folder = pods.folder().join("peer");
        let mut command = Command::new("python3");
        command.env(
            "PYTHONPATH",
            std::env::var_os("WARREN_PYTHON_PEER").unwrap(),
        );
        command.arg("-B").arg(script).arg(role).arg(&folder);
        command.args([POD_ID, address, authority]);
        Self(host.spawn(&mut command, &folder.join("log")))
    }

    /// What it said once it has ended well.
    async fn ended(&mut self, pods: &Pods) -> String {
        let mut status = None;
        wait_for("the peer's end", || {
            status = self.0.try_wait().unwrap();
            status.is_some()
        })
        .await;
        let log = said(pods);
        assert!(status.unwrap().success(), "{log}");
        log
    }
}

fn said(pods: &Pods) -> String {
    std::fs::read_to_string(pods.folder().join("peer/log")).unwrap_or_default()
}

#[tokio::test]
async fn a_client_of_another_make_reaches_the_application() {
    let Some((pods, pod, host)) = start("python-client").await else {
        return;
    };
    let application = pod.listen(8080);
    tokio::spawn(async move {
        let (mut socket, _) = application.accept().await.unwrap();
        let (mut read, mut write) = socket.split();
        let _ = tokio::io::copy(&mut read, &mut write).await;
    });
    let mut peer = Peer::start(&pods, &host, "client", "10.0.0.11:15008", "10.0.0.11:8080");
    let said = peer.ended(&pods).await;
    assert!(said.contains(&format!("carried {LENGTH} ")), "{said}");
    pods.logged(&[
        "info\taccess\tconnection complete",
        "direction=\"inbound\"",
        &format!("src.identity=\"{PEER_ID}\""),
        &format!("bytes_sent={LENGTH} bytes_recv={LENGTH}"),
    ])
    .await;
}

#[tokio::test]
async fn a_server_of_another_make_is_reached() {
    let Some((pods, pod, host)) = start("python-server").await else {
        return;
    };
    let mut peer = Peer::start(&pods, &host, "server", "10.0.0.21:15008", "10.0.0.21:8080");
    wait_for("the peer", || said(&pods).contains("listening")).await;
    let (mut read, mut write) = pod.connect("10.0.0.21:8080").await.unwrap().into_split();
    let bytes: Vec<u8> = (0..LENGTH).map(|at| (at * at % 251) as u8).collect();
    let sending = async {
        write.write_all(&bytes).await.unwrap();
        write.shutdown().await.unwrap();
    };
    let mut got = Vec::new();
    let (_, read) = tokio::join!(sending, read.read_to_end(&mut got));
    read.unwrap();
    assert!(got == bytes, "{} bytes came back", got.len());
    let said = peer.ended(&pods).await;
    assert!(said.contains(&format!("carried {LENGTH} ")), "{said}");
    pods.logged(&[
        "info\taccess\tconnection complete",
        "direction=\"outbound\"",
        &format!("dst.identity=\"{PEER_ID}\""),
        &format!("bytes_sent={LENGTH} bytes_recv={LENGTH}"),
    ])
    .await;
}
