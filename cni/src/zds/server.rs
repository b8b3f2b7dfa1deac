//! The agent's end: tells every connected proxy which pods there are.
//!
//! Answers carry no number, they belong to requests by order alone. So a proxy that does not answer in time is
//! disconnected: a late answer could otherwise be taken for that of the next request.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use thiserror::Error;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;

use super::messages::{
    AddWorkload, Answer, DelWorkload, KeepWorkload, Payload, SnapshotSent, WorkloadInfo,
    WorkloadRequest, WorkloadResponse, ZdsHello,
};
use super::transport::{Connection, Listener, TransportError};

/// How long a proxy may take for its hello and for each answer.
const ANSWER: Duration = Duration::from_secs(5);
/// Updates that may wait for a proxy.
const QUEUE: usize = 100;
/// The pause between connections that are accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Why a proxy does not serve a pod.
#[derive(Debug, Error)]
pub enum ZdsError {
    #[error("no proxy is connected")]
    NoProxy,
    #[error("the proxy disconnected")]
    Disconnected,
    #[error("the proxy did not answer within {0:?}")]
    Silent(Duration),
    #[error("the proxy refused: {0}")]
    Refused(String),
    #[error(transparent)]
    Transport(#[from] TransportError),
}

struct Pod {
    info: WorkloadInfo,
    netns: Option<Arc<OwnedFd>>,
}

struct Update {
    request: WorkloadRequest,
    netns: Option<Arc<OwnedFd>>,
    answer: oneshot::Sender<Result<(), ZdsError>>,
}

#[derive(Default)]
struct State {
    pods: BTreeMap<String, Pod>,
    /// The proxies, the newest last.
    proxies: Vec<(u64, mpsc::Sender<Update>)>,
    next: u64,
}

/// The pods of the node and the proxies that are told of them; clones share them.
#[derive(Clone)]
pub struct ZdsServer {
    answer: Duration,
    state: Arc<Mutex<State>>,
    connected: Arc<watch::Sender<usize>>,
}

impl ZdsServer {
    /// Listens at a path; proxies are served while the runtime lives.
    ///
    /// # Errors
    /// When the path cannot be bound.
    pub fn bind(path: &Path) -> io::Result<Self> {
        Self::bind_with(path, ANSWER)
    }

    fn bind_with(path: &Path, answer: Duration) -> io::Result<Self> {
        let listener = Listener::bind(path)?;
        let server = Self {
            answer,
            state: Arc::default(),
            connected: Arc::new(watch::Sender::new(0)),
        };
        let accepting = server.clone();
        tokio::spawn(async move {
            loop {
                match listener.accept().await {
                    Ok(connection) => accepting.admit(connection),
                    Err(error) => tracing::warn!("a proxy could not connect: {error}"),
                }
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        });
        Ok(server)
    }

    /// How many proxies have seen every pod.
    pub fn connected(&self) -> watch::Receiver<usize> {
        self.connected.subscribe()
    }

    /// Makes a pod known, and waits until the newest proxy serves it; older ones are on their way out.
    ///
    /// # Errors
    /// When no proxy is connected (the next one will hear of the pod) or the proxy cannot serve it.
    pub async fn add(&self, uid: &str, info: WorkloadInfo, netns: OwnedFd) -> Result<(), ZdsError> {
        let netns = Arc::new(netns);
        let add = AddWorkload {
            uid: uid.to_string(),
            workload_info: Some(info.clone()),
        };
        let newest = {
            let mut state = self.state();
            state.pods.insert(
                uid.to_string(),
                Pod {
                    info,
                    netns: Some(netns.clone()),
                },
            );
            state.proxies.last().map(|(_, proxy)| proxy.clone())
        };
        let proxy = newest.ok_or(ZdsError::NoProxy)?;
        ask(&proxy, Payload::Add(add), Some(netns)).await
    }

    /// Forgets a pod and waits until no proxy serves it any more.
    ///
    /// # Errors
    /// The first proxy that would not have it.
    pub async fn remove(&self, uid: &str) -> Result<(), ZdsError> {
        let proxies: Vec<_> = {
            let mut state = self.state();
            state.pods.remove(uid);
            state
                .proxies
                .iter()
                .map(|(_, proxy)| proxy.clone())
                .collect()
        };
        let mut result = Ok(());
        for proxy in proxies {
            match ask(
                &proxy,
                Payload::Del(DelWorkload {
                    uid: uid.to_string(),
                }),
                None,
            )
            .await
            {
                // Its pods go with it.
                Err(ZdsError::Disconnected) | Ok(()) => {}
                Err(error) => result = Err(error),
            }
        }
        result
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn admit(&self, connection: Connection) {
        let (sender, updates) = mpsc::channel(QUEUE);
        let (id, snapshot) = {
            let mut state = self.state();
            let id = state.next;
            state.next += 1;
            // From here on updates wait in the queue; what is known by now is the snapshot.
            state.proxies.push((id, sender));
            let requests = state
                .pods
                .iter()
                .map(|(uid, pod)| snapshot_request(uid, pod));
            (id, requests.collect::<Vec<_>>())
        };
        let server = self.clone();
        tokio::spawn(async move {
            let mut counted = false;
            if let Err(error) = server
                .serve(&connection, snapshot, updates, &mut counted)
                .await
            {
                tracing::warn!("a proxy was disconnected: {error}");
            }
            server.state().proxies.retain(|(known, _)| *known != id);
            if counted {
                server.connected.send_modify(|count| *count -= 1);
            }
        });
    }

    async fn serve(
        &self,
        connection: &Connection,
        snapshot: Vec<(WorkloadRequest, Option<Arc<OwnedFd>>)>,
        mut updates: mpsc::Receiver<Update>,
        counted: &mut bool,
    ) -> Result<(), ZdsError> {
        let limit = self.answer;
        let hello = timeout(limit, connection.receive())
            .await
            .map_err(|_| ZdsError::Silent(limit))??;
        let hello: ZdsHello = hello.ok_or(ZdsError::Disconnected)?.decode()?;
        tracing::info!("a proxy connected, protocol version {}", hello.version);
        for (request, netns) in snapshot {
            if let Err(error) = self
                .exchange(connection, &request, netns.as_deref())
                .await?
            {
                tracing::warn!("a proxy does not serve a pod: {error}");
            }
        }
        let sent = WorkloadRequest {
            payload: Some(Payload::SnapshotSent(SnapshotSent {})),
        };
        if let Err(error) = self.exchange(connection, &sent, None).await? {
            tracing::warn!("a proxy did not take the snapshot: {error}");
        }
        self.connected.send_modify(|count| *count += 1);
        *counted = true;
        loop {
            tokio::select! {
                update = updates.recv() => {
                    let Some(update) = update else { return Ok(()) };
                    match self.exchange(connection, &update.request, update.netns.as_deref()).await {
                        Ok(answer) => {
                            let _ = update.answer.send(answer.map_err(ZdsError::Refused));
                        }
                        Err(error) => {
                            let text = error.to_string();
                            let _ = update.answer.send(Err(error));
                            tracing::warn!("a proxy is disconnected: {text}");
                            return Ok(());
                        }
                    }
                }
                // Nobody asked: either the proxy has closed, or it is out of step.
                unasked = connection.receive() => {
                    return match unasked? {
                        None => Ok(()),
                        Some(_) => Err(ZdsError::Refused("it spoke without being asked".to_string())),
                    };
                }
            }
        }
    }

    /// One request and its answer; the inner error is what the proxy says.
    async fn exchange(
        &self,
        connection: &Connection,
        request: &WorkloadRequest,
        netns: Option<&OwnedFd>,
    ) -> Result<Result<(), String>, ZdsError> {
        let talk = async {
            connection
                .send(request, netns.map(AsFd::as_fd))
                .await
                .map_err(TransportError::Io)?;
            let packet = connection.receive().await?.ok_or(ZdsError::Disconnected)?;
            let response: WorkloadResponse = packet.decode()?;
            Ok(match response.payload {
                Some(Answer::Ack(ack)) if ack.error.is_empty() => Ok(()),
                Some(Answer::Ack(ack)) => Err(ack.error),
                None => Err("an answer without content".to_string()),
            })
        };
        let limit = self.answer;
        timeout(limit, talk)
            .await
            .map_err(|_| ZdsError::Silent(limit))?
    }
}

fn snapshot_request(uid: &str, pod: &Pod) -> (WorkloadRequest, Option<Arc<OwnedFd>>) {
    let uid = uid.to_string();
    let payload = match &pod.netns {
        Some(_) => Payload::Add(AddWorkload {
            uid,
            workload_info: Some(pod.info.clone()),
        }),
        None => Payload::Keep(KeepWorkload { uid }),
    };
    (
        WorkloadRequest {
            payload: Some(payload),
        },
        pod.netns.clone(),
    )
}

async fn ask(
    proxy: &mpsc::Sender<Update>,
    payload: Payload,
    netns: Option<Arc<OwnedFd>>,
) -> Result<(), ZdsError> {
    let (answer, answered) = oneshot::channel();
    let update = Update {
        request: WorkloadRequest {
            payload: Some(payload),
        },
        netns,
        answer,
    };
    proxy
        .send(update)
        .await
        .map_err(|_| ZdsError::Disconnected)?;
    answered.await.map_err(|_| ZdsError::Disconnected)?
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    struct Proxy(Connection);

    impl Proxy {
        async fn connect(path: &Path) -> Self {
            let connection = Connection::connect(path).unwrap();
            connection
                .send(&ZdsHello { version: 1 }, None)
                .await
                .unwrap();
            Self(connection)
        }

        async fn next(&self) -> (Payload, Option<OwnedFd>) {
            let packet = self.0.receive().await.unwrap().unwrap();
            let request: WorkloadRequest = packet.decode().unwrap();
            (request.payload.unwrap(), packet.descriptor)
        }

        async fn ack(&self, error: &str) {
            self.0
                .send(&WorkloadResponse::ack(error), None)
                .await
                .unwrap();
        }
    }

    fn path(name: &str) -> std::path::PathBuf {
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
        std::fs::File::open("/dev/null").unwrap().into()
    }

    #[tokio::test]
    async fn a_proxy_hears_of_every_pod_then_of_changes() {
        let path = path("changes");
        let server = ZdsServer::bind(&path).unwrap();
        assert!(matches!(
            server.add("early", info(), some_file()).await,
            Err(ZdsError::NoProxy)
        ));
        let proxy = Proxy::connect(&path).await;
        let (payload, descriptor) = proxy.next().await;
        assert!(
            matches!(payload, Payload::Add(add) if add.uid == "early" && add.workload_info == Some(info()))
        );
        assert!(descriptor.is_some_and(|fd| fd.as_raw_fd() >= 0));
        proxy.ack("").await;
        assert!(matches!(
            proxy.next().await,
            (Payload::SnapshotSent(_), None)
        ));
        proxy.ack("").await;
        server
            .connected()
            .wait_for(|count| *count == 1)
            .await
            .unwrap();
        let refused = tokio::join!(server.add("late", info(), some_file()), async {
            assert!(matches!(proxy.next().await, (Payload::Add(_), Some(_))));
            proxy.ack("no room").await;
        });
        assert_eq!(
            refused.0.unwrap_err().to_string(),
            "the proxy refused: no room"
        );
        let removed = tokio::join!(server.remove("early"), async {
            assert!(matches!(proxy.next().await, (Payload::Del(del), None) if del.uid == "early"));
            proxy.ack("").await;
        });
        removed.0.unwrap();
        drop(proxy);
        server
            .connected()
            .wait_for(|count| *count == 0)
            .await
            .unwrap();
    }

    #[tokio::test]
    async fn a_proxy_that_does_not_answer_in_time_is_disconnected() {
        let path = path("late");
        let server = ZdsServer::bind_with(&path, Duration::from_millis(300)).unwrap();
        let proxy = Proxy::connect(&path).await;
        proxy.next().await;
        proxy.ack("").await;
        server
            .connected()
            .wait_for(|count| *count == 1)
            .await
            .unwrap();
        let silent = server.add("x", info(), some_file()).await.unwrap_err();
        assert!(matches!(silent, ZdsError::Silent(_)), "{silent}");
        proxy.next().await;
        // The late answer meets a closed connection.
        let late = proxy.0.send(&WorkloadResponse::ack(""), None).await;
        assert!(late.is_err() || proxy.0.receive().await.unwrap().is_none());
        let gone = server.add("y", info(), some_file()).await.unwrap_err();
        assert!(
            matches!(gone, ZdsError::NoProxy | ZdsError::Disconnected),
            "{gone}"
        );
    }

    #[tokio::test]
    async fn garbage_instead_of_a_hello_is_disconnected() {
        let path = path("garbage");
        let _server = ZdsServer::bind(&path).unwrap();
        let connection = Connection::connect(&path).unwrap();
        connection
            .send(
                &AddWorkload {
                    uid: "x".to_string(),
                    workload_info: None,
                },
                None,
            )
            .await
            .unwrap();
        assert!(connection.receive().await.unwrap().is_none());
    }
}
