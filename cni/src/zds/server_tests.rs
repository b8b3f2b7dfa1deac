//! The agent's end against proxies that behave, are slow, are late, or vanish.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use super::*;

/// A proxy as the agent sees it.
struct Proxy(Connection);

impl Proxy {
    /// Connects and greets.
    async fn connect(path: &Path) -> Self {
        let connection = Connection::connect(path).unwrap();
        let hello = ZdsHello { version: 1 };
        connection.send(&hello, None).await.unwrap();
        Self(connection)
    }

    /// Connects and takes the whole snapshot; gives what it named.
    async fn ready(path: &Path) -> (Self, Vec<Payload>) {
        let proxy = Self::connect(path).await;
        let mut named = Vec::new();
        loop {
            let (payload, _) = proxy.next().await;
            proxy.ack("").await;
            if matches!(payload, Payload::SnapshotSent(_)) {
                return (proxy, named);
            }
            named.push(payload);
        }
    }

    async fn next(&self) -> (Payload, Option<OwnedFd>) {
        let packet = self.0.receive().await.unwrap().unwrap();
        let request: WorkloadRequest = packet.decode().unwrap();
        (request.payload.unwrap(), packet.descriptor)
    }

    async fn ack(&self, error: &str) {
        let answer = WorkloadResponse::ack(error);
        self.0.send(&answer, None).await.unwrap();
    }

    async fn is_disconnected(&self) -> bool {
        matches!(self.0.receive().await, Ok(None) | Err(_))
    }
}

/// A server that waits less long for answers.
fn impatient(path: &Path, answer: Duration) -> ZdsServer {
    let server = ZdsServer {
        answer,
        ..ZdsServer::default()
    };
    server.listen(path).unwrap();
    server
}

fn path(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("wrn-zds-{}-{name}.sock", std::process::id()))
}

fn info() -> WorkloadInfo {
    WorkloadInfo {
        name: "n".into(),
        namespace: "s".into(),
        service_account: "a".into(),
    }
}

fn some_file() -> OwnedFd {
    File::open("/dev/null").unwrap().into()
}

fn add(uid: &str) -> Payload {
    Payload::Add(AddWorkload {
        uid: uid.to_string(),
        workload_info: Some(info()),
    })
}

fn del(uid: &str) -> Payload {
    let uid = uid.to_string();
    Payload::Del(DelWorkload { uid })
}

fn file_id(fd: impl AsFd) -> (u64, u64) {
    let metadata = File::from(fd.as_fd().try_clone_to_owned().unwrap()).metadata();
    let metadata = metadata.unwrap();
    (metadata.dev(), metadata.ino())
}

async fn wait_for(server: &ZdsServer, proxies: usize) {
    let mut connected = server.connected();
    let reached = timeout(
        Duration::from_secs(5),
        connected.wait_for(|n| *n == proxies),
    );
    reached.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_proxy_hears_of_every_pod_then_of_changes() {
    let path = path("changes");
    let server = ZdsServer::bind(&path).unwrap();
    let unheard = server.add("early", info(), some_file()).await;
    assert!(matches!(unheard, Err(ZdsError::NoProxy)));
    server.keep("kept");
    let (proxy, named) = Proxy::ready(&path).await;
    let kept = Payload::Keep(KeepWorkload { uid: "kept".into() });
    assert_eq!(named, [add("early"), kept]);
    wait_for(&server, 1).await;
    let refused = tokio::join!(server.add("late", info(), some_file()), async {
        assert!(matches!(proxy.next().await, (Payload::Add(_), Some(_))));
        proxy.ack("no room").await;
    });
    let refused = refused.0.unwrap_err().to_string();
    assert_eq!(refused, "the proxy refused: no room");
    let removed = tokio::join!(server.remove("early"), async {
        assert_eq!(proxy.next().await.0, del("early"));
        proxy.ack("").await;
    });
    removed.0.unwrap();
    drop(proxy);
    wait_for(&server, 0).await;
}

#[tokio::test]
async fn the_descriptor_of_a_pod_is_passed_with_it_and_with_nothing_else() {
    let path = path("descriptor");
    let server = ZdsServer::bind(&path).unwrap();
    let netns = File::open("/proc/self/status").unwrap();
    let id = file_id(&netns);
    let _ = server.add("a", info(), netns.into()).await;
    server.keep("b");
    let proxy = Proxy::connect(&path).await;
    let (payload, descriptor) = proxy.next().await;
    assert_eq!(payload, add("a"));
    assert_eq!(file_id(descriptor.unwrap()), id);
    proxy.ack("").await;
    for _ in ["keep", "snapshot sent"] {
        assert!(proxy.next().await.1.is_none());
        proxy.ack("").await;
    }
    wait_for(&server, 1).await;
    let other = File::open("/proc/self/stat").unwrap();
    let id = file_id(&other);
    let added = tokio::join!(server.add("c", info(), other.into()), async {
        assert_eq!(file_id(proxy.next().await.1.unwrap()), id);
        proxy.ack("").await;
    });
    added.0.unwrap();
}

#[tokio::test]
async fn a_late_answer_is_never_taken_for_that_of_another_request() {
    let path = path("late");
    let server = impatient(&path, Duration::from_millis(300));
    let (proxy, _) = Proxy::ready(&path).await;
    wait_for(&server, 1).await;
    let silent = server.add("x", info(), some_file()).await.unwrap_err();
    assert!(matches!(silent, ZdsError::Silent(_)), "{silent}");
    proxy.next().await;
    // The late answer meets a closed connection; the next connection begins anew with everything there is.
    let late = proxy.0.send(&WorkloadResponse::ack(""), None).await;
    assert!(late.is_err() || proxy.is_disconnected().await);
    wait_for(&server, 0).await;
    let (again, named) = Proxy::ready(&path).await;
    assert_eq!(named, [add("x")]);
    wait_for(&server, 1).await;
    let refused = tokio::join!(server.add("y", info(), some_file()), async {
        assert_eq!(again.next().await.0, add("y"));
        again.ack("no room").await;
    });
    assert!(matches!(refused.0, Err(ZdsError::Refused(_))));
}

#[tokio::test]
async fn an_answer_nobody_asked_for_ends_the_connection() {
    let path = path("unasked");
    let server = ZdsServer::bind(&path).unwrap();
    let (proxy, _) = Proxy::ready(&path).await;
    wait_for(&server, 1).await;
    proxy.ack("").await;
    // Whether the server meets it at rest or when it has something to ask, it does not count.
    let added = server.add("x", info(), some_file()).await.unwrap_err();
    assert!(
        matches!(
            added,
            ZdsError::OutOfStep | ZdsError::Disconnected | ZdsError::NoProxy
        ),
        "{added}"
    );
    assert!(proxy.is_disconnected().await);
    wait_for(&server, 0).await;

    // During the snapshot too.
    let hasty = Proxy::connect(&path).await;
    hasty.next().await;
    hasty.ack("").await;
    hasty.ack("").await;
    assert_eq!(*server.connected().borrow(), 0);
    let end = async { while hasty.0.receive().await.is_ok_and(|packet| packet.is_some()) {} };
    timeout(ANSWER / 2, end).await.unwrap();
}

#[tokio::test]
async fn what_happens_during_a_snapshot_follows_it() {
    let path = path("during");
    let server = ZdsServer::bind(&path).unwrap();
    let _ = server.add("a", info(), some_file()).await;
    let proxy = Proxy::connect(&path).await;
    assert_eq!(proxy.next().await.0, add("a"));
    let (added, removed, seen) = tokio::join!(
        server.add("b", info(), some_file()),
        server.remove("a"),
        async {
            tokio::task::yield_now().await;
            proxy.ack("").await;
            let mut seen = Vec::new();
            for _ in 0..3 {
                seen.push(proxy.next().await.0);
                proxy.ack("").await;
            }
            seen
        }
    );
    added.unwrap();
    removed.unwrap();
    let sent = Payload::SnapshotSent(SnapshotSent {});
    assert_eq!(seen, [sent, add("b"), del("a")]);
    drop(proxy);
    wait_for(&server, 0).await;
    assert_eq!(Proxy::ready(&path).await.1, [add("b")]);
}

#[tokio::test]
async fn pods_are_added_to_the_newest_proxy_and_removed_from_all() {
    let path = path("newest");
    let server = ZdsServer::bind(&path).unwrap();
    let (old, _) = Proxy::ready(&path).await;
    let (new, _) = Proxy::ready(&path).await;
    wait_for(&server, 2).await;
    let added = tokio::join!(server.add("x", info(), some_file()), async {
        assert_eq!(new.next().await.0, add("x"));
        new.ack("").await;
    });
    added.0.unwrap();
    let removed = tokio::join!(server.remove("x"), async {
        // Both are asked before either has answered, and what one of them objects to does not count.
        assert_eq!(old.next().await.0, del("x"));
        assert_eq!(new.next().await.0, del("x"));
        new.ack("").await;
        old.ack("never heard of it").await;
    });
    removed.0.unwrap();
    assert_eq!(*server.connected().borrow(), 2);
}

#[tokio::test]
async fn when_the_newest_proxy_is_lost_the_older_one_serves_the_pod() {
    let path = path("fallback");
    let server = impatient(&path, Duration::from_millis(600));
    let (old, _) = Proxy::ready(&path).await;
    let (new, _) = Proxy::ready(&path).await;
    wait_for(&server, 2).await;
    let added = tokio::join!(server.add("x", info(), some_file()), async {
        new.next().await;
        drop(new);
        assert_eq!(old.next().await.0, add("x"));
        old.ack("").await;
    });
    added.0.unwrap();
    wait_for(&server, 1).await;

    // One that connects but never greets holds nobody up for long.
    let mute = Connection::connect(&path).unwrap();
    tokio::time::sleep(ACCEPT_PAUSE).await;
    let added = tokio::join!(server.add("y", info(), some_file()), async {
        assert_eq!(old.next().await.0, add("y"));
        old.ack("").await;
    });
    added.0.unwrap();
    assert!(mute.receive().await.unwrap().is_none());
    wait_for(&server, 1).await;

    // A refusal is an answer: nobody else is asked.
    let (third, _) = Proxy::ready(&path).await;
    wait_for(&server, 2).await;
    let refused = tokio::join!(server.add("z", info(), some_file()), async {
        third.next().await;
        third.ack("no room").await;
    });
    assert!(matches!(refused.0, Err(ZdsError::Refused(_))));
    assert!(old.0.is_quiet());
}

#[tokio::test]
async fn a_pod_refused_in_the_snapshot_does_not_hold_up_the_others() {
    let path = path("partial");
    let server = ZdsServer::bind(&path).unwrap();
    for uid in ["a", "b"] {
        let _ = server.add(uid, info(), some_file()).await;
    }
    let proxy = Proxy::connect(&path).await;
    for (expected, answer) in [(add("a"), "no room"), (add("b"), "")] {
        assert_eq!(proxy.next().await.0, expected);
        proxy.ack(answer).await;
    }
    assert!(matches!(
        proxy.next().await,
        (Payload::SnapshotSent(_), None)
    ));
    proxy.ack("").await;
    wait_for(&server, 1).await;
}

#[tokio::test]
async fn a_pod_that_was_added_is_not_forgotten_by_keeping_it() {
    let path = path("keep");
    let server = ZdsServer::bind(&path).unwrap();
    server.keep("a");
    let _ = server.add("a", info(), some_file()).await;
    server.keep("a");
    assert_eq!(Proxy::ready(&path).await.1, [add("a")]);
}

#[tokio::test]
async fn those_who_wait_for_a_proxy_that_vanishes_are_told() {
    let path = path("vanish");
    let server = ZdsServer::bind(&path).unwrap();
    let (proxy, _) = Proxy::ready(&path).await;
    wait_for(&server, 1).await;
    let (first, second, removed, ()) = tokio::join!(
        server.add("x", info(), some_file()),
        server.add("y", info(), some_file()),
        server.remove("z"),
        async {
            proxy.next().await;
            drop(proxy);
        }
    );
    assert!(matches!(first, Err(ZdsError::Disconnected)), "{first:?}");
    assert!(matches!(second, Err(ZdsError::Disconnected)), "{second:?}");
    removed.unwrap();
    wait_for(&server, 0).await;
}

#[tokio::test]
async fn garbage_instead_of_a_hello_is_disconnected() {
    let path = path("garbage");
    let server = ZdsServer::bind(&path).unwrap();
    let connection = Connection::connect(&path).unwrap();
    let garbage = AddWorkload {
        uid: "x".to_string(),
        workload_info: None,
    };
    connection.send(&garbage, None).await.unwrap();
    assert!(connection.receive().await.unwrap().is_none());
    assert_eq!(*server.connected().borrow(), 0);
}
