//! The plugin's questions to the node agent, over the agent's socket.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper::Method;
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::exchange::{Asked, exchange};
use super::input::Pod;
use super::outcome::{Failure, code};
use crate::event::{self, AddRequest, Assigned, Decision, PodName};

/// How long the agent may take for everything that a pod needs.
const WORK: Duration = Duration::from_secs(5);
/// How long a pod may be held up for what only helps later.
const COURTESY: Duration = Duration::from_millis(200);
const DECISION: Duration = Duration::from_secs(1);

/// The agent of this node, by its run directory.
pub struct Agent<'a> {
    pub run_dir: &'a Path,
}

impl Agent<'_> {
    /// Has a pod captured.
    ///
    /// # Errors
    /// Why it is not: [`code::TRY_AGAIN`] without an agent, [`code::NOT_CAPTURED`] if the agent says so.
    pub async fn add(&self, request: &AddRequest, assigned: &[Assigned]) -> Result<(), Failure> {
        self.order(event::ADD_PATH, request, assigned).await
    }

    /// Asks whether a pod is captured as it should be.
    ///
    /// # Errors
    /// As for [`Self::add`].
    pub async fn check(&self, request: &AddRequest, assigned: &[Assigned]) -> Result<(), Failure> {
        self.order(event::CHECK_PATH, request, assigned).await
    }

    /// Tells where the namespace of a pod is that may be enrolled later; the agent finds it in other ways, too.
    pub async fn note(&self, request: &AddRequest, assigned: &[Assigned]) -> Result<(), String> {
        let body = request.to_json(assigned);
        let (status, text) = self
            .post(event::EVENT_SOCKET, event::NOTE_PATH, body, COURTESY)
            .await?;
        said(status, &text)
    }

    /// Asks whether a pod is enrolled, as far as the agent knows.
    ///
    /// # Errors
    /// Why the agent cannot tell.
    pub async fn decide(&self, pod: &Pod) -> Result<Decision, String> {
        let pod = PodName {
            namespace: pod.namespace.clone(),
            name: pod.name.clone(),
        };
        let body = pod.to_json();
        let (status, text) = self
            .post(event::EVENT_SOCKET, event::DECIDE_PATH, body, DECISION)
            .await?;
        said(status, &text)?;
        Decision::from_json(&text).map_err(|error| error.to_string())
    }

    /// Hands over log records.
    pub async fn log(&self, records: &[String]) -> Result<(), String> {
        let body = serde_json::to_string(records).unwrap_or_default();
        let (status, text) = self
            .post(event::LOG_SOCKET, event::LOG_PATH, body, COURTESY)
            .await?;
        said(status, &text)
    }

    async fn order(
        &self,
        path: &str,
        request: &AddRequest,
        assigned: &[Assigned],
    ) -> Result<(), Failure> {
        let answered = self
            .post(event::EVENT_SOCKET, path, request.to_json(assigned), WORK)
            .await;
        let (status, text) = answered.map_err(|error| {
            let text = "the pod is enrolled in the mesh, and the node agent that captures it does not answer";
            Failure::new(code::TRY_AGAIN, text).because(error)
        })?;
        said(status, &text).map_err(|reason| {
            let text = "the pod is enrolled in the mesh and is not captured";
            Failure::new(code::NOT_CAPTURED, text).because(reason)
        })
    }

    async fn post(
        &self,
        socket: &str,
        path: &str,
        body: String,
        patience: Duration,
    ) -> Result<(u16, Vec<u8>), String> {
        let socket = self.run_dir.join(socket);
        let asked = Asked {
            method: Method::POST,
            host: "warren",
            path,
            token: None,
            body,
        };
        let posted = async {
            let stream = connect(&socket).await?;
            exchange(stream, asked).await
        };
        let answered = timeout(patience, posted).await;
        let (status, body) = answered
            .unwrap_or_else(|_| Err(format!("no answer within {patience:?}")))
            .map_err(|error| format!("{}: {error}", socket.display()))?;
        Ok((status.as_u16(), body.to_vec()))
    }
}

/// Paths of sockets are short by nature (108 bytes); a long one is reached through a descriptor of its folder.
async fn connect(socket: &PathBuf) -> Result<UnixStream, String> {
    let words = |error: io::Error| error.to_string();
    let short = match (socket.parent(), socket.file_name()) {
        (Some(folder), Some(name)) if socket.as_os_str().len() > 100 => {
            let folder = std::fs::File::open(folder).map_err(words)?;
            let fd = std::os::fd::AsRawFd::as_raw_fd(&folder);
            let path = Path::new("/proc/self/fd").join(fd.to_string()).join(name);
            return UnixStream::connect(path).await.map_err(words);
        }
        _ => socket,
    };
    UnixStream::connect(short).await.map_err(words)
}

fn said(status: u16, text: &[u8]) -> Result<(), String> {
    match status {
        200 => Ok(()),
        _ => {
            let text = String::from_utf8_lossy(text);
            let reason = match text.trim() {
                "" => "no reason given",
                text => text,
            };
            Err(format!("the agent answered {status}: {reason}"))
        }
    }
}
