//! A mixed load for a while: nothing is lost, nothing leaks. `make soak` runs it for ten minutes, `make test` for seconds.

use std::cell::Cell;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cni::zds::WorkloadInfo;
use hbone::{
    ConnectHeaders, Dialer, Engine, LocalBoxFuture, OpenError, Pool, PoolKey, TlsIdentity,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{LocalSet, spawn_local};
use tokio::time::{sleep, timeout};

use crate::harness::{Node, namespace, wait_for};
use crate::tunnel::{CURL, HBONE};

const VICTIM: &str = "spiffe://cluster.local/ns/a/sa/victim";
const WEB: &str = "spiffe://cluster.local/ns/b/sa/web";
/// How long any one flow may take, however busy the machine is.
const STUCK: Duration = Duration::from_secs(60);
/// The proxy's certificates live for so long, and are renewed at half of it.
const TTL: &str = "8s";
/// How long a flow that says a little all the time goes on.
const CHAT: Duration = Duration::from_millis(300);

const DENY_VICTIM: &str = "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: no-victim, namespace: b}
spec:
  selector: {matchLabels: {app: web}}
  action: DENY
  rules:
  - from: [{source: {principals: [cluster.local/ns/a/sa/victim]}}]
";

const DENY_NOBODY: &str = "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: no-victim, namespace: b}
spec:
  selector: {matchLabels: {app: web}}
  action: DENY
  rules:
  - from: [{source: {principals: [cluster.local/ns/none/sa/nobody]}}]
";

struct Inside(Rc<Node>);

impl Dialer for Inside {
    fn dial(&self, destination: SocketAddr) -> LocalBoxFuture<'_, io::Result<TcpStream>> {
        Box::pin(async move { self.0.connect(&destination.to_string()).await })
    }
}

/// A client of the mesh, with a tunnel end of its own.
struct Client {
    pool: Pool,
    identity: Arc<TlsIdentity>,
    uri: &'static str,
}

impl Client {
    fn new(node: &Rc<Node>, engine: &Engine, uri: &'static str) -> Self {
        Self {
            pool: Pool::new(engine.clone(), Rc::default(), Rc::new(Inside(node.clone()))),
            identity: node.certificate(uri).identity(),
            uri,
        }
    }

    /// The client's end of a new flow to the application.
    async fn flow(&self) -> Result<TcpStream, OpenError> {
        let dst: SocketAddr = HBONE.parse().unwrap();
        let key = PoolKey {
            src: self.uri.parse().unwrap(),
            expected: vec![WEB.parse().unwrap()],
            dst,
            src_ip: dst.ip(),
        };
        let headers = ConnectHeaders {
            authority: "10.0.0.9:8080".to_string(),
            ..Default::default()
        };
        let tls = || {
            let identity = self.identity.clone();
            async move { Ok(identity) }
        };
        let tunnelled = timeout(STUCK, self.pool.open(&key, tls, &headers))
            .await
            .unwrap()?;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (near, carried) = tokio::join!(TcpStream::connect(address), listener.accept());
        let carried = carried.unwrap().0;
        spawn_local(async move { tunnelled.stream.carry(carried, &Rc::default()).await });
        Ok(near.unwrap())
    }
}

/// Bytes that cannot be in the wrong place unnoticed.
fn pattern(seed: usize, length: usize) -> Vec<u8> {
    let mut state = seed as u64 + 1;
    let step = |_| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(99);
        (state >> 56) as u8
    };
    (0..length).map(step).collect()
}

/// Sends so many bytes and ends; the application sends back the same and ends.
async fn exchange(socket: TcpStream, seed: usize, length: usize) {
    let (mut read, mut write) = socket.into_split();
    let bytes = pattern(seed, length);
    let mut got = Vec::new();
    let sending = async {
        write.write_all(&bytes).await.unwrap();
        write.shutdown().await.unwrap();
    };
    let both = async { tokio::join!(sending, read.read_to_end(&mut got)) };
    let (_, end) = timeout(STUCK, both).await.unwrap();
    end.unwrap();
    assert!(
        got == bytes,
        "flow {seed} of {length} bytes came out changed"
    );
}

async fn echo(application: TcpListener) {
    while let Ok((socket, _)) = application.accept().await {
        spawn_local(async move {
            let (mut read, mut write) = socket.into_split();
            let _ = tokio::io::copy(&mut read, &mut write).await;
        });
    }
}

/// What the whole of the load did.
#[derive(Default)]
struct Done {
    over: Cell<bool>,
    flows: Cell<usize>,
    resets: Cell<usize>,
    cut: Cell<usize>,
    pods: Cell<usize>,
}

impl Done {
    fn add(count: &Cell<usize>) {
        count.set(count.get() + 1);
    }
}

/// Flows of every size, one after the other.
async fn carry(client: Rc<Client>, first: usize, largest: usize, done: Rc<Done>) {
    let mut seed = first;
    while !done.over.get() {
        let socket = client.flow().await.unwrap();
        if seed % 10 == 9 {
            // The client breaks off in the middle.
            let mut socket = socket;
            socket.write_all(&pattern(seed, 5000)).await.unwrap();
            socket2::SockRef::from(&socket)
                .set_linger(Some(Duration::ZERO))
                .unwrap();
            drop(socket);
            Done::add(&done.resets);
        } else {
            exchange(socket, seed, seed * 7919 % largest).await;
            Done::add(&done.flows);
        }
        seed += 1;
    }
}

/// One flow that says a little all the time.
async fn chat(client: Rc<Client>, done: Rc<Done>) {
    let mut round = 0;
    while !done.over.get() {
        // Well within the time that is left to a tunnel which takes no more flows because its certificate ends.
        let mut socket = client.flow().await.unwrap();
        let until = Instant::now() + CHAT;
        while !done.over.get() && Instant::now() < until {
            let question = pattern(round, 100);
            let mut answer = vec![0; 100];
            socket.write_all(&question).await.unwrap();
            timeout(STUCK, socket.read_exact(&mut answer))
                .await
                .unwrap()
                .unwrap();
            assert!(answer == question, "round {round}");
            round += 1;
            sleep(Duration::from_millis(5)).await;
        }
    }
    assert!(
        round > 10,
        "a flow that lives on must have been served all the time"
    );
}

/// A policy comes and cuts one client's flow, and goes, all the time.
async fn police(node: Rc<Node>, victim: Client, done: Rc<Done>) {
    while !done.over.get() {
        let mut socket = loop {
            match victim.flow().await {
                Ok(socket) => break socket,
                Err(error) => assert_eq!(error.to_string(), "http status: 401 Unauthorized"),
            }
            sleep(Duration::from_millis(20)).await;
        };
        node.apply("policy.yaml", DENY_VICTIM);
        let cut = timeout(STUCK, socket.read(&mut [0; 1])).await.unwrap();
        assert!(!matches!(cut, Ok(1..)), "the flow must be cut: {cut:?}");
        Done::add(&done.cut);
        node.apply("policy.yaml", DENY_NOBODY);
        sleep(Duration::from_millis(200)).await;
    }
}

/// Pods come and go beside the one that carries the load.
async fn come_and_go(node: Rc<Node>, done: Rc<Done>) {
    while !done.over.get() {
        let uid = format!("uid-guest-{}", done.pods.get());
        let info = WorkloadInfo {
            name: "web".into(),
            namespace: "b".into(),
            service_account: "web".into(),
        };
        node.agent()
            .add(&uid, info, namespace().into())
            .await
            .unwrap();
        sleep(Duration::from_millis(100)).await;
        node.agent().remove(&uid).await.unwrap();
        Done::add(&done.pods);
        sleep(Duration::from_millis(100)).await;
    }
}

/// What the proxy says of its certificates.
async fn certificates(node: &Node) -> serde_json::Value {
    let (_, dump) = node.http("GET", 15000, "/config_dump").await;
    let mut dump: serde_json::Value = serde_json::from_str(&dump).unwrap();
    dump["certificates"].take()
}

#[tokio::test]
async fn a_mixed_load_loses_nothing_and_leaks_nothing() {
    let seconds = std::env::var("WARREN_SOAK_SECONDS").ok();
    let seconds = seconds.map_or(6, |text| {
        text.parse().expect("WARREN_SOAK_SECONDS: a number")
    });
    let ttl = ["--workload-cert-ttl", TTL];
    let Some(node) = Node::start_with("soak", &[("RUST_LOG", "warn")], &ttl).await else {
        return;
    };
    LocalSet::new()
        .run_until(soak(Rc::new(node), seconds))
        .await;
}

async fn soak(node: Rc<Node>, seconds: u64) {
    spawn_local(echo(node.listen(8080)));
    let engine = Engine::start();
    let client = Rc::new(Client::new(&node, &engine, CURL));
    exchange(client.flow().await.unwrap(), 1, 1000).await;
    let (descriptors, started) = (node.descriptors(), Instant::now());
    let certificates = certificates(&node).await;
    let done = Rc::new(Done::default());
    let mut load = vec![
        spawn_local(chat(client.clone(), done.clone())),
        spawn_local(police(
            node.clone(),
            Client::new(&node, &engine, VICTIM),
            done.clone(),
        )),
        spawn_local(come_and_go(node.clone(), done.clone())),
    ];
    for (first, largest) in [
        (0, 2_000),
        (100_000, 2_000),
        (200_000, 300_000),
        (300_000, 4_000_000),
    ] {
        load.push(spawn_local(carry(
            client.clone(),
            first,
            largest,
            done.clone(),
        )));
    }
    let mut early = 0;
    for step in 1..=10 {
        sleep(Duration::from_millis(seconds * 100)).await;
        // Nobody failed so far; else its task would have ended.
        assert!(load.iter().all(|task| !task.is_finished()) || done.over.get());
        if step == 2 {
            early = node.memory();
        }
        eprintln!(
            "{:>4} s: {} flows, {} resets, {} cut, {} pods came and went, {} KiB, {} descriptors",
            started.elapsed().as_secs(),
            done.flows.get(),
            done.resets.get(),
            done.cut.get(),
            done.pods.get(),
            node.memory(),
            node.descriptors(),
        );
    }
    let late = node.memory();
    assert_ne!(
        certificates,
        self::certificates(&node).await,
        "they live for {TTL}"
    );
    done.over.set(true);
    for task in load {
        task.await.unwrap();
    }
    for count in [&done.flows, &done.resets, &done.cut, &done.pods] {
        assert!(count.get() > 0);
    }
    assert!(
        late < early + early / 4 + 8192,
        "memory grew from {early} to {late} KiB"
    );
    drop(client);
    // The tunnels of the clients that are gone may stay for a moment.
    wait_for("the end of every socket", || {
        node.descriptors() <= descriptors + 4
    })
    .await;
}
