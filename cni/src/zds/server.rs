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
    #[error("the proxy answered without being asked")]
    OutOfStep,
    #[error(transparent)]
    Transport(#[from] TransportError),
}

/// Who a pod is and where, unless only its existence is known.
type Pod = Option<(WorkloadInfo, Arc<OwnedFd>)>;

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

impl State {
    fn proxies(&self) -> Vec<mpsc::Sender<Update>> {
        self.proxies
            .iter()
            .map(|(_, proxy)| proxy.clone())
            .collect()
    }
}

/// The pods of the node and the proxies that are told of them; clones share them. The default has no pods, and
/// nobody who is told of them yet.
#[derive(Clone)]
pub struct ZdsServer {
    answer: Duration,
    state: Arc<Mutex<State>>,
    connected: Arc<watch::Sender<usize>>,
}

impl Default for ZdsServer {
    fn default() -> Self {
        Self {
            answer: ANSWER,
            state: Arc::default(),
            connected: Arc::new(watch::Sender::new(0)),
        }
    }
}

impl ZdsServer {
    /// Listens at a path; proxies are served while the runtime lives.
    ///
    /// # Errors
    /// When the path cannot be bound.
    pub fn bind(path: &Path) -> io::Result<Self> {
        let server = Self::default();
        server.listen(path)?;
        Ok(server)
    }

    /// Listens at a path; proxies are served while the runtime lives. Pods that run already must be known by now: a
    /// proxy lets go of those it is not told of.
    ///
    /// # Errors
    /// When the path cannot be bound.
    pub fn listen(&self, path: &Path) -> io::Result<()> {
        let listener = Listener::bind(path)?;
        let accepting = self.clone();
        tokio::spawn(async move {
            loop {
                match listener.accept().await {
                    Ok(connection) => accepting.admit(connection),
                    Err(error) => tracing::warn!("a proxy could not connect: {error}"),
                }
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        });
        Ok(())
    }

    /// How many proxies have seen every pod.
    pub fn connected(&self) -> watch::Receiver<usize> {
        self.connected.subscribe()
    }

    /// Makes a pod known, and waits until the newest proxy serves it; older ones are on their way out, and are asked
    /// only when the newer ones are lost.
    ///
    /// # Errors
    /// When no proxy is connected (the next one will hear of the pod) or the proxy cannot serve it.
    pub async fn add(&self, uid: &str, info: WorkloadInfo, netns: OwnedFd) -> Result<(), ZdsError> {
        let netns = Arc::new(netns);
        let proxies = {
            let mut state = self.state();
            let pod = Some((info.clone(), netns.clone()));
            state.pods.insert(uid.to_string(), pod);
            state.proxies()
        };
        let mut result = Err(ZdsError::NoProxy);
        for proxy in proxies.iter().rev() {
            let add = AddWorkload {
                uid: uid.to_string(),
                workload_info: Some(info.clone()),
            };
            result = match ask(proxy, Payload::Add(add), Some(netns.clone())).await {
                Ok(answered) => answer_to(answered).await,
                Err(error) => Err(error),
            };
            if matches!(result, Ok(()) | Err(ZdsError::Refused(_))) {
                break;
            }
        }
        result
    }

    /// Makes a pod known without telling those who are connected.
    pub fn know(&self, uid: &str, info: WorkloadInfo, netns: OwnedFd) {
        let pod = Some((info, Arc::new(netns)));
        self.state().pods.insert(uid.to_string(), pod);
    }

    /// Makes a pod known whose namespace is not at hand: a proxy that serves it already is to go on.
    pub fn keep(&self, uid: &str) {
        self.state().pods.entry(uid.to_string()).or_default();
    }

    /// Forgets a pod and waits until no proxy serves it any more.
    ///
    /// # Errors
    /// The last proxy that did not answer; it is disconnected.
    pub async fn remove(&self, uid: &str) -> Result<(), ZdsError> {
        let proxies = {
            let mut state = self.state();
            state.pods.remove(uid);
            state.proxies()
        };
        let mut asked = Vec::new();
        for proxy in proxies {
            let uid = uid.to_string();
            // A proxy that is gone has no pods.
            asked.extend(ask(&proxy, Payload::Del(DelWorkload { uid }), None).await);
        }
        let mut result = Ok(());
        for answered in asked {
            match answer_to(answered).await {
                Ok(()) | Err(ZdsError::Disconnected) => {}
                Err(ZdsError::Refused(error)) => {
                    tracing::warn!(uid, "a proxy objects to the end of a pod: {error}");
                }
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
            (id, state.pods.clone())
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
        snapshot: BTreeMap<String, Pod>,
        mut updates: mpsc::Receiver<Update>,
        counted: &mut bool,
    ) -> Result<(), ZdsError> {
        let limit = self.answer;
        let hello = timeout(limit, connection.receive())
            .await
            .map_err(|_| ZdsError::Silent(limit))??;
        let hello: ZdsHello = hello.ok_or(ZdsError::Disconnected)?.decode()?;
        tracing::info!("a proxy connected, protocol version {}", hello.version);
        for (uid, pod) in snapshot {
            let netns = pod.as_ref().map(|(_, netns)| netns.clone());
            let request = snapshot_request(&uid, pod);
            let answer = self
                .exchange(connection, &request, netns.as_deref())
                .await?;
            if let Err(error) = answer {
                tracing::warn!(uid, "a proxy does not serve a pod: {error}");
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
                    return if unasked?.is_some() { Err(ZdsError::OutOfStep) } else { Ok(()) };
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
            // What is there before the question cannot be its answer.
            if !connection.is_quiet() {
                let unasked = connection.receive().await?;
                return Err(unasked.map_or(ZdsError::Disconnected, |_| ZdsError::OutOfStep));
            }
            connection
                .send(request, netns.map(AsFd::as_fd))
                .await
                .map_err(TransportError::Io)?;
            let packet = connection.receive().await?.ok_or(ZdsError::Disconnected)?;
            let response: WorkloadResponse = packet.decode()?;
            Ok(match response.payload {
                Some(Answer::Ack(ack)) if ack.error.is_empty() => Ok(()),
                Some(Answer::Ack(ack)) => Err(ack.error),
                None => return Err(ZdsError::OutOfStep),
            })
        };
        let limit = self.answer;
        timeout(limit, talk)
            .await
            .map_err(|_| ZdsError::Silent(limit))?
    }
}

fn snapshot_request(uid: &str, pod: Pod) -> WorkloadRequest {
    let uid = uid.to_string();
    let payload = match pod {
        Some((info, _)) => Payload::Add(AddWorkload {
            uid,
            workload_info: Some(info),
        }),
        None => Payload::Keep(KeepWorkload { uid }),
    };
    WorkloadRequest {
        payload: Some(payload),
    }
}

type Answered = oneshot::Receiver<Result<(), ZdsError>>;

async fn ask(
    proxy: &mpsc::Sender<Update>,
    payload: Payload,
    netns: Option<Arc<OwnedFd>>,
) -> Result<Answered, ZdsError> {
    let (answer, answered) = oneshot::channel();
    let update = Update {
        request: WorkloadRequest {
            payload: Some(payload),
        },
        netns,
        answer,
    };
    let sent = proxy.send(update).await;
    sent.map(|()| answered).map_err(|_| ZdsError::Disconnected)
}

async fn answer_to(answered: Answered) -> Result<(), ZdsError> {
    answered.await.unwrap_or(Err(ZdsError::Disconnected))
}

#[cfg(test)]
#[path = "server_tests.rs"]
mod tests;
