use std::cell::{Cell, RefCell};
use std::io::Read;
use std::path::PathBuf;

use cni::zds::Listener;
use cni::zds::messages::{AddWorkload, Answer, DelWorkload, KeepWorkload, SnapshotSent};
use socket2::{Domain, SockAddr, Socket, Type};

use super::*;
use crate::node::sockets::{self, Listeners};
use crate::node::testing::{config, namespace, skip};

/// Remembers what it was asked to do; pods named `bad` cannot be served.
#[derive(Default)]
struct Recorder {
    served: RefCell<BTreeSet<String>>,
    ready: Cell<bool>,
    pending: Cell<usize>,
}

impl PodHandler for Recorder {
    async fn add(&self, uid: &str, info: &WorkloadInfo, _: Arc<PodNetns>) -> Result<(), String> {
        if info.name == "bad" {
            return Err("no room".to_string());
        }
        self.served.borrow_mut().insert(uid.to_string());
        Ok(())
    }

    async fn remove(&self, uid: &str) {
        self.served.borrow_mut().remove(uid);
    }

    fn served(&self) -> Vec<String> {
        self.served.borrow().iter().cloned().collect()
    }

    fn ready(&self, ready: bool) {
        self.ready.set(ready);
    }

    fn pending(&self, count: usize) {
        self.pending.set(count);
    }
}

struct Agent {
    connection: Connection,
}

impl Agent {
    async fn accept(listener: &Listener) -> Self {
        let connection = listener.accept().await.unwrap();
        let hello: ZdsHello = connection
            .receive()
            .await
            .unwrap()
            .unwrap()
            .decode()
            .unwrap();
        assert_eq!(hello.version, VERSION_1);
        Self { connection }
    }

    /// Asks and gives the answer's error, or none when the proxy disconnects.
    async fn ask(&self, payload: Payload, with_netns: bool) -> Option<String> {
        let netns = PodNetns::current().unwrap();
        self.ask_with(payload, with_netns.then_some(&netns)).await
    }

    async fn ask_with(&self, payload: Payload, netns: Option<&PodNetns>) -> Option<String> {
        let descriptor = netns.map(std::os::fd::AsFd::as_fd);
        self.connection
            .send(
                &WorkloadRequest {
                    payload: Some(payload),
                },
                descriptor,
            )
            .await
            .unwrap();
        let response: WorkloadResponse =
            self.connection.receive().await.unwrap()?.decode().unwrap();
        let Some(Answer::Ack(ack)) = response.payload else {
            panic!("no ack")
        };
        Some(ack.error)
    }
}

fn add(uid: &str, name: &str) -> Payload {
    let info = WorkloadInfo {
        name: name.into(),
        namespace: "ns".into(),
        service_account: "sa".into(),
    };
    Payload::Add(AddWorkload {
        uid: uid.to_string(),
        workload_info: Some(info),
    })
}

fn path(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("wrn-follow-{}-{name}.sock", std::process::id()))
}

/// Runs a proxy against `agent`; gives how the proxy ended, if it did.
async fn against<F: Future<Output = ()>>(
    name: &str,
    handler: &Recorder,
    agent: impl FnOnce(Listener) -> F,
) -> Option<ProtocolError> {
    let path = path(name);
    let listener = Listener::bind(&path).unwrap();
    let limit = sleep(Duration::from_secs(20));
    tokio::select! {
        ended = follow(&path, handler) => ended.err(),
        () = agent(listener) => None,
        () = limit => panic!("the agent's script did not end"),
    }
}

#[tokio::test]
async fn pods_are_served_until_a_snapshot_no_longer_names_them() {
    let handler = Recorder::default();
    let script = |listener: Listener| async move {
        let agent = Agent::accept(&listener).await;
        assert_eq!(agent.ask(add("a", "x"), true).await.as_deref(), Some(""));
        assert_eq!(agent.ask(add("b", "y"), true).await.as_deref(), Some(""));
        assert_eq!(
            agent
                .ask(Payload::SnapshotSent(SnapshotSent {}), false)
                .await
                .as_deref(),
            Some("")
        );
        drop(agent);
        // A new agent knows only one of them, and that one by name alone.
        let agent = Agent::accept(&listener).await;
        let keep = Payload::Keep(KeepWorkload {
            uid: "b".to_string(),
        });
        assert_eq!(agent.ask(keep, false).await.as_deref(), Some(""));
        assert_eq!(
            agent
                .ask(Payload::SnapshotSent(SnapshotSent {}), false)
                .await
                .as_deref(),
            Some("")
        );
        let unknown = Payload::Del(DelWorkload {
            uid: "unknown".to_string(),
        });
        assert_eq!(agent.ask(unknown, false).await.as_deref(), Some(""));
    };
    assert_eq!(against("snapshot", &handler, script).await, None);
    assert_eq!(handler.served(), ["b"]);
    assert!(handler.ready.get());
}

#[tokio::test]
async fn a_pod_that_cannot_be_served_is_told_and_keeps_the_proxy_unready() {
    let handler = Recorder::default();
    let script = |listener: Listener| async move {
        let agent = Agent::accept(&listener).await;
        let answer = agent.ask(add("a", "bad"), true).await.unwrap();
        assert_eq!(answer, "failure to start proxy : no room");
        agent
            .ask(Payload::SnapshotSent(SnapshotSent {}), false)
            .await;
    };
    against("unready", &handler, script).await;
    assert!(!handler.ready.get());
    assert_eq!(handler.pending.get(), 1);
}

#[tokio::test]
async fn what_cannot_be_understood_leads_to_a_new_connection() {
    let handler = Recorder::default();
    let script = |listener: Listener| async move {
        let agent = Agent::accept(&listener).await;
        let refused = agent.ask(add("a", "x"), false).await.unwrap();
        assert_eq!(refused, "failure to read message : No control message");
        let agent = Agent::accept(&listener).await;
        let refused = agent
            .ask(Payload::SnapshotSent(SnapshotSent {}), true)
            .await
            .unwrap();
        assert_eq!(
            refused,
            "failure to read message : Unexpected control message"
        );
    };
    assert_eq!(against("garbage", &handler, script).await, None);
}

#[tokio::test]
async fn a_packet_that_is_too_long_leads_to_a_new_connection() {
    let path = path("long");
    let listener = Socket::new(Domain::UNIX, Type::SEQPACKET, None).unwrap();
    listener.bind(&SockAddr::unix(&path).unwrap()).unwrap();
    listener.listen(1).unwrap();
    // The agent's own connection would not send it, so this one is bare.
    let agent = move || {
        let mut buffer = [0; 1024];
        let (mut first, _) = listener.accept().unwrap();
        first.set_read_timeout(Some(SEND)).unwrap();
        assert!(first.read(&mut buffer).unwrap() > 0, "a hello");
        first.send(&[0x0a; 2000]).unwrap();
        let length = first.read(&mut buffer).unwrap();
        let response = WorkloadResponse::decode(&buffer[..length]).unwrap();
        let expected = "failure to read message : received truncated message";
        assert_eq!(response, WorkloadResponse::ack(expected));
        assert_eq!(first.read(&mut buffer).unwrap(), 0);
        listener.accept().unwrap();
    };
    let handler = Recorder::default();
    tokio::select! {
        ended = follow(&path, &handler) => panic!("{ended:?}"),
        done = tokio::task::spawn_blocking(agent) => done.unwrap(),
    }
    std::fs::remove_file(&path).unwrap();
    assert!(handler.served().is_empty());
}

#[tokio::test]
async fn an_agent_that_breaks_the_protocol_ends_the_proxy() {
    let no_info = Payload::Add(AddWorkload {
        uid: "a".to_string(),
        workload_info: None,
    });
    let snapshot = || Payload::SnapshotSent(SnapshotSent {});
    let keep = Payload::Keep(KeepWorkload {
        uid: "b".to_string(),
    });
    let cases = [
        ("info", vec![no_info], ProtocolError::NoInfo),
        (
            "twice",
            vec![snapshot(), snapshot()],
            ProtocolError::SecondSnapshot,
        ),
        ("keep", vec![snapshot(), keep], ProtocolError::LateKeep),
    ];
    for (name, payloads, expected) in cases {
        let handler = Recorder::default();
        let script = |listener: Listener| async move {
            let agent = Agent::accept(&listener).await;
            for payload in payloads {
                let with_netns = matches!(payload, Payload::Add(_));
                agent.ask(payload, with_netns).await;
            }
            std::future::pending().await
        };
        assert_eq!(against(name, &handler, script).await, Some(expected));
    }
}

type Pod = (Arc<PodNetns>, Vec<Listeners>);

/// Listens in the pods' namespaces.
#[derive(Default)]
struct Listening {
    pods: RefCell<BTreeMap<String, Pod>>,
    ready: Cell<bool>,
}

impl PodHandler for Listening {
    async fn add(&self, uid: &str, _: &WorkloadInfo, netns: Arc<PodNetns>) -> Result<(), String> {
        let listeners = sockets::listen(&netns, &config()).map_err(|error| error.to_string())?;
        let pod = (netns, listeners);
        self.pods.borrow_mut().insert(uid.to_string(), pod);
        Ok(())
    }

    async fn remove(&self, uid: &str) {
        self.pods.borrow_mut().remove(uid);
    }

    fn served(&self) -> Vec<String> {
        self.pods.borrow().keys().cloned().collect()
    }

    fn ready(&self, ready: bool) {
        self.ready.set(ready);
    }

    fn pending(&self, _: usize) {}
}

#[tokio::test]
async fn pods_outlive_the_agent_and_failed_ones_are_tried_again() {
    let (Some(good), Some(busy)) = (namespace(), namespace()) else {
        return skip("pods_outlive_the_agent_and_failed_ones_are_tried_again");
    };
    let handler = Listening::default();
    let path = path("restart");
    let reachable =
        |netns: &PodNetns| netns.run(|| std::net::TcpStream::connect("127.0.0.1:15008"));
    let script = async {
        let listener = Listener::bind(&path).unwrap();
        let agent = Agent::accept(&listener).await;
        let done = Some(String::new());
        let snapshot = || Payload::SnapshotSent(SnapshotSent {});
        assert_eq!(agent.ask_with(add("good", "x"), Some(&good)).await, done);
        assert_eq!(agent.ask_with(snapshot(), None).await, done);
        reachable(&good).unwrap();
        drop((agent, listener));
        // The agent is away for a while: nothing changes for the pods, but the proxy is not ready.
        sleep(Duration::from_millis(200)).await;
        assert!(!handler.ready.get());
        reachable(&good).unwrap();
        let listener = Listener::bind(&path).unwrap();
        let agent = Agent::accept(&listener).await;
        let occupied = busy
            .run(|| std::net::TcpListener::bind("0.0.0.0:15008"))
            .unwrap();
        let keep = Payload::Keep(KeepWorkload { uid: "good".into() });
        assert_eq!(agent.ask_with(keep, None).await, done);
        let refused = agent.ask_with(add("busy", "y"), Some(&busy)).await.unwrap();
        let expected = "failure to start proxy : failed to bind to address [::]:15008: ";
        assert!(refused.starts_with(expected), "{refused}");
        assert_eq!(agent.ask_with(snapshot(), None).await, done);
        drop(occupied);
        while !handler.ready.get() {
            sleep(Duration::from_millis(50)).await;
        }
        reachable(&busy).unwrap();
        assert_eq!(handler.pods.borrow()["busy"].0.id(), busy.id());
        let del = Payload::Del(DelWorkload { uid: "good".into() });
        assert_eq!(agent.ask_with(del, None).await, done);
        assert!(reachable(&good).is_err());
    };
    tokio::select! {
        ended = follow(&path, &handler) => panic!("{ended:?}"),
        done = timeout(Duration::from_secs(20), script) => done.unwrap(),
    }
}

#[tokio::test]
async fn an_agent_that_gets_nowhere_is_left_alone_ever_longer() {
    let handler = Recorder::default();
    let script = |listener: Listener| async move {
        let start = Instant::now();
        for _ in 0..4 {
            drop(Agent::accept(&listener).await);
        }
        // 20 + 40 + 80 ms.
        assert!(start.elapsed() >= Duration::from_millis(140));
        let agent = Agent::accept(&listener).await;
        agent
            .ask(Payload::SnapshotSent(SnapshotSent {}), false)
            .await;
    };
    assert_eq!(against("nowhere", &handler, script).await, None);
}

#[tokio::test]
async fn whatever_bytes_arrive_the_proxy_connects_again() {
    let handler = Recorder::default();
    let script = |listener: Listener| async move {
        for garbage in [
            &b"\xff\xff\xff\xff"[..],
            b"\x0a\x7f",
            b"\x1a\x01",
            b"\x32\x00",
        ] {
            let agent = Agent::accept(&listener).await;
            let message = Raw(garbage.to_vec());
            agent.connection.send(&message, None).await.unwrap();
            let packet = agent.connection.receive().await.unwrap().unwrap();
            let Some(Answer::Ack(ack)) = packet.decode::<WorkloadResponse>().unwrap().payload
            else {
                panic!("no ack")
            };
            assert!(
                ack.error.starts_with("failure to read message : "),
                "{ack:?}"
            );
            assert!(agent.connection.receive().await.unwrap().is_none());
        }
    };
    assert_eq!(against("bytes", &handler, script).await, None);
    assert!(handler.served().is_empty());
}

/// A message that is sent as it is.
#[derive(Debug)]
struct Raw(Vec<u8>);

impl Message for Raw {
    fn encode_raw(&self, buffer: &mut impl prost::bytes::BufMut) {
        buffer.put_slice(&self.0);
    }

    fn merge_field(
        &mut self,
        _: u32,
        _: prost::encoding::WireType,
        _: &mut impl prost::bytes::Buf,
        _: prost::encoding::DecodeContext,
    ) -> Result<(), prost::DecodeError> {
        Ok(())
    }

    fn encoded_len(&self) -> usize {
        self.0.len()
    }

    fn clear(&mut self) {}
}
