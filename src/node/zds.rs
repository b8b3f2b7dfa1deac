//! The node agent's word on which pods there are, carried out.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use cni::zds::messages::{VERSION_1, WorkloadRequest, WorkloadResponse, ZdsHello};
use cni::zds::{Connection, Packet, Payload, TransportError, WorkloadInfo};
use prost::Message;
use thiserror::Error;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::netns::PodNetns;

/// The first wait between attempts to connect; it doubles up to the longest.
const FIRST_WAIT: Duration = Duration::from_millis(20);
const LONGEST_WAIT: Duration = Duration::from_secs(15);
/// How long the agent may take to accept a message.
const SEND: Duration = Duration::from_secs(5);
/// When a pod whose proxy could not start is tried again.
const RETRY: Duration = Duration::from_secs(5);

/// Carries out what the agent asks for.
pub trait PodHandler {
    /// Serves a pod; an error is told to the agent and the pod is tried again.
    fn add(
        &self,
        uid: &str,
        info: &WorkloadInfo,
        netns: Arc<PodNetns>,
    ) -> impl Future<Output = Result<(), String>>;
    /// Stops serving a pod; nothing if it is not served.
    fn remove(&self, uid: &str) -> impl Future<Output = ()>;
    /// The pods that are served.
    fn served(&self) -> Vec<String>;
    /// Whether everything the agent has named is served now.
    fn ready(&self, ready: bool);
    /// How many pods wait for another attempt.
    fn pending(&self, count: usize);
}

/// An agent that does not keep to the protocol; nothing it says can be relied on.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ProtocolError {
    #[error("add without workload_info")]
    NoInfo,
    #[error("keep after the snapshot")]
    LateKeep,
    #[error("a second snapshot_sent")]
    SecondSnapshot,
}

enum End {
    /// The agent closed, or spoke what cannot be understood.
    Reconnect,
    Protocol(ProtocolError),
}

struct Pending {
    info: WorkloadInfo,
    netns: Arc<PodNetns>,
    at: Instant,
}

/// One connection's state.
#[derive(Default)]
struct Session {
    named: BTreeSet<String>,
    pending: BTreeMap<String, Pending>,
    snapshot: bool,
}

/// Follows the agent at `path` for ever, reconnecting as needed; pods go on being served meanwhile.
///
/// # Errors
/// When the agent breaks the protocol.
pub async fn follow(path: &Path, handler: &impl PodHandler) -> Result<(), ProtocolError> {
    let mut wait = FIRST_WAIT;
    loop {
        match greet(path).await {
            Ok(connection) => {
                let mut session = Session::default();
                let end = session.serve(&connection, handler).await;
                handler.ready(false);
                handler.pending(0);
                if let End::Protocol(error) = end {
                    return Err(error);
                }
                // An agent that never gets anywhere is not worth an attempt every few milliseconds.
                if session.snapshot {
                    wait = FIRST_WAIT;
                }
                tracing::info!(
                    "the connection to the node agent has ended, connecting again in {wait:?}"
                );
            }
            Err(error) => tracing::warn!(
                "failed to connect to the Istio CNI node agent over {}, is the node agent healthy? details: {error}. \
                 retrying in {wait:?}",
                path.display()
            ),
        }
        sleep(wait).await;
        wait = (wait * 2).min(LONGEST_WAIT);
    }
}

async fn greet(path: &Path) -> io::Result<Connection> {
    let connection = Connection::connect(path)?;
    send(&connection, &ZdsHello { version: VERSION_1 }).await?;
    Ok(connection)
}

/// An agent that does not read is given up like one that is gone.
async fn send(connection: &Connection, message: &impl Message) -> io::Result<()> {
    timeout(SEND, connection.send(message, None)).await?
}

impl Session {
    async fn serve(&mut self, connection: &Connection, handler: &impl PodHandler) -> End {
        loop {
            handler.pending(self.pending.len());
            handler.ready(self.snapshot && self.pending.is_empty());
            let due = self.pending.iter().min_by_key(|(_, pending)| pending.at);
            let due = due.map(|(uid, pending)| (uid.clone(), pending.at));
            let retry = async {
                match &due {
                    Some((_, at)) => sleep_until(*at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                received = connection.receive() => {
                    let packet = match received {
                        Ok(Some(packet)) => packet,
                        Ok(None) => return End::Reconnect,
                        Err(error) => return garbage(connection, &error).await,
                    };
                    if let Some(end) = self.answer(connection, packet, handler).await {
                        return end;
                    }
                }
                () = retry => {
                    if let Some((uid, _)) = due {
                        self.retry(&uid, handler).await;
                    }
                }
            }
        }
    }

    async fn answer(
        &mut self,
        connection: &Connection,
        packet: Packet,
        handler: &impl PodHandler,
    ) -> Option<End> {
        let (payload, netns) = match open(packet) {
            Ok(request) => request,
            Err(error) => return Some(garbage(connection, &error).await),
        };
        let reply = match self.process(payload, netns, handler).await {
            Ok(Ok(())) => WorkloadResponse::ack(""),
            Ok(Err(error)) => WorkloadResponse::ack(error),
            Err(error) => {
                let reply = WorkloadResponse::ack(format!("failure to process message : {error}"));
                let _ = send(connection, &reply).await;
                return Some(End::Protocol(error));
            }
        };
        if let Err(error) = send(connection, &reply).await {
            tracing::warn!("the node agent is gone before its answer: {error}");
            return Some(End::Reconnect);
        }
        None
    }

    async fn process(
        &mut self,
        payload: Payload,
        netns: Option<Arc<PodNetns>>,
        handler: &impl PodHandler,
    ) -> Result<Result<(), String>, ProtocolError> {
        match payload {
            Payload::Add(add) => {
                let (Some(info), Some(netns)) = (add.workload_info, netns) else {
                    return Err(ProtocolError::NoInfo);
                };
                self.named.insert(add.uid.clone());
                return Ok(self.start(add.uid, info, netns, handler).await);
            }
            Payload::Keep(_) if self.snapshot => return Err(ProtocolError::LateKeep),
            Payload::Keep(keep) => {
                self.named.insert(keep.uid);
            }
            Payload::Del(del) => {
                self.named.remove(&del.uid);
                self.pending.remove(&del.uid);
                // Before the snapshot is complete, what is not named goes with it.
                if self.snapshot {
                    handler.remove(&del.uid).await;
                }
            }
            Payload::SnapshotSent(_) if self.snapshot => return Err(ProtocolError::SecondSnapshot),
            Payload::SnapshotSent(_) => {
                tracing::info!("received snapshot sent");
                self.snapshot = true;
                for uid in handler.served() {
                    if !self.named.contains(&uid) {
                        handler.remove(&uid).await;
                    }
                }
            }
        }
        Ok(Ok(()))
    }

    async fn start(
        &mut self,
        uid: String,
        info: WorkloadInfo,
        netns: Arc<PodNetns>,
        handler: &impl PodHandler,
    ) -> Result<(), String> {
        let started = handler.add(&uid, &info, netns.clone()).await;
        match &started {
            Ok(()) => {
                self.pending.remove(&uid);
            }
            Err(error) => {
                tracing::info!(
                    uid,
                    name = info.name,
                    namespace = info.namespace,
                    "scheduling retry: {error}"
                );
                self.pending.insert(
                    uid,
                    Pending {
                        info,
                        netns,
                        at: Instant::now() + RETRY,
                    },
                );
            }
        }
        started.map_err(|error| format!("failure to start proxy : {error}"))
    }

    async fn retry(&mut self, uid: &str, handler: &impl PodHandler) {
        if let Some(pending) = self.pending.remove(uid) {
            tracing::info!(uid, "retrying workload");
            let _ = self
                .start(uid.to_string(), pending.info, pending.netns, handler)
                .await;
        }
    }
}

/// A request and the namespace that came with it.
fn open(packet: Packet) -> Result<(Payload, Option<Arc<PodNetns>>), TransportError> {
    let invalid = |text: &str| TransportError::Io(io::Error::other(text.to_string()));
    let request: WorkloadRequest = packet.decode()?;
    let payload = request.payload.ok_or_else(|| invalid("no payload"))?;
    let netns = match (packet.descriptor, matches!(payload, Payload::Add(_))) {
        (Some(descriptor), true) => Some(Arc::new(PodNetns::new(descriptor)?)),
        (None, true) => return Err(invalid("No control message")),
        (Some(_), false) => return Err(invalid("Unexpected control message")),
        (None, false) => None,
    };
    Ok((payload, netns))
}

async fn garbage(connection: &Connection, error: &TransportError) -> End {
    tracing::error!("the node agent sent what cannot be understood: {error}");
    let reply = WorkloadResponse::ack(format!("failure to read message : {error}"));
    let _ = send(connection, &reply).await;
    End::Reconnect
}

#[cfg(test)]
#[path = "zds_tests.rs"]
mod tests;
