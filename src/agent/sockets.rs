//! HTTP over the agent's Unix sockets: what the plugin asks, and what it logs.

use std::convert::Infallible;
use std::fs::{self, Permissions};
use std::future::Future;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use cni::event::{self, AddRequest, Decision, PodName};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Deserialize;
use serde_json::Value;
use tokio::net::{UnixListener, UnixStream};
use tokio::time::timeout;

use super::cluster::{Outside, PodFacts};
use super::enroller::{Enroller, Given};

/// How long a request's head and its body may take each.
const PATIENCE: Duration = Duration::from_secs(2);
/// The most that is read of a request, in bytes.
const BODY: usize = 1 << 20;
/// How long the watch may lag behind the runtime.
const LAG: Duration = Duration::from_secs(2);
const LOOK: Duration = Duration::from_millis(20);

/// A status and what is to be said with it.
type Answer = (u16, String);

/// Listens at a path that everybody on the node may connect to; the folder decides who gets that far.
///
/// # Errors
/// Which path cannot be bound.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    let bound = || {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(path)?;
        fs::set_permissions(path, Permissions::from_mode(0o666))?;
        Ok(listener)
    };
    bound().map_err(|error| {
        io::Error::new(
            error.kind(),
            format!("cannot listen at {}: {error}", path.display()),
        )
    })
}

/// Serves the plugin's questions for ever.
pub async fn serve_events(listener: UnixListener, enroller: Arc<Enroller>) {
    accept(listener, move |path, body| {
        let enroller = enroller.clone();
        async move {
            let (status, text) = told(&enroller, &path, &body).await;
            enroller.metrics.plugin_requests.count(status);
            (status, text)
        }
    })
    .await;
}

/// Takes in what the plugin logs, for ever.
pub async fn serve_log(listener: UnixListener) {
    accept(listener, |path, body| async move {
        if path != event::LOG_PATH {
            return (404, format!("there is only {} here", event::LOG_PATH));
        }
        match serde_json::from_slice::<Vec<String>>(&body) {
            Ok(lines) => {
                lines.iter().for_each(|line| relate(line));
                (200, String::new())
            }
            Err(error) => (400, format!("not a list of lines: {error}")),
        }
    })
    .await;
}

async fn accept<H, F>(listener: UnixListener, handler: H)
where
    H: Fn(String, Bytes) -> F + Clone + Send + 'static,
    F: Future<Output = Answer> + Send + 'static,
{
    loop {
        match listener.accept().await {
            Ok((socket, _)) => {
                tokio::spawn(connection(socket, handler.clone()));
            }
            Err(error) => {
                tracing::error!("the plugin cannot connect: {error}");
                tokio::time::sleep(LOOK).await;
            }
        }
    }
}

async fn connection<H, F>(socket: UnixStream, handler: H)
where
    H: Fn(String, Bytes) -> F + Clone + Send + 'static,
    F: Future<Output = Answer> + Send + 'static,
{
    let service = service_fn(move |request: hyper::Request<Incoming>| {
        let handler = handler.clone();
        async move {
            let (status, text) = answer(request, handler).await;
            let mut response = hyper::Response::new(Full::new(Bytes::from(text)));
            if let Ok(status) = hyper::StatusCode::from_u16(status) {
                *response.status_mut() = status;
            }
            Ok::<_, Infallible>(response)
        }
    });
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .serve_connection(TokioIo::new(socket), service)
        .await;
    if let Err(error) = served {
        tracing::debug!("a connection of the plugin ended: {error}");
    }
}

async fn answer<H, F>(request: hyper::Request<Incoming>, handler: H) -> Answer
where
    H: Fn(String, Bytes) -> F,
    F: Future<Output = Answer>,
{
    if request.method() != hyper::Method::POST {
        return (405, "only POST is served here".to_string());
    }
    let path = request.uri().path().to_string();
    let body = Limited::new(request.into_body(), BODY).collect();
    match timeout(PATIENCE, body).await {
        Ok(Ok(body)) => handler(path, body.to_bytes()).await,
        Ok(Err(error)) => (400, format!("the request cannot be read: {error}")),
        Err(_) => (408, "the request did not come to its end".to_string()),
    }
}

async fn told(enroller: &Enroller, path: &str, body: &[u8]) -> Answer {
    match path {
        event::ADD_PATH => match AddRequest::from_json(body) {
            Ok(request) => add(enroller, request).await,
            Err(error) => (400, format!("the request cannot be understood: {error}")),
        },
        event::CHECK_PATH => match AddRequest::from_json(body) {
            Ok(request) => check(enroller, request).await,
            Err(error) => (400, format!("the request cannot be understood: {error}")),
        },
        event::NOTE_PATH => match AddRequest::from_json(body) {
            Ok(request) => note(enroller, request).await,
            Err(error) => (400, format!("the request cannot be understood: {error}")),
        },
        event::DECIDE_PATH => match PodName::from_json(body) {
            Ok(pod) => decide(enroller, &pod),
            Err(error) => (400, format!("the request cannot be understood: {error}")),
        },
        _ => (404, format!("{path} is not served here")),
    }
}

async fn add(enroller: &Enroller, request: AddRequest) -> Answer {
    let name = format!("{}/{}", request.pod_namespace, request.pod_name);
    let (pod, admitted) = find(enroller, &request.pod_namespace, &request.pod_name).await;
    let Some(pod) = pod else {
        let text = match enroller.cluster.is_synced() {
            true => format!("pod {name} has not been heard of on this node yet"),
            false => "the agent is still reading the list of pods".to_string(),
        };
        return (500, text);
    };
    if admitted == Err(Outside::Proxy) {
        // The plugin cannot tell, and nothing could ever start if the proxy did not.
        return (200, String::new());
    }
    if let Err(reason) = admitted {
        return (500, format!("pod {name} is not to be captured: {reason}"));
    }
    let given = Given {
        netns: request.netns.into(),
        ips: request.ips.into_iter().collect(),
    };
    match enroller.add_given(&pod, given).await {
        Ok(()) => (200, String::new()),
        Err(error) => {
            enroller.report(&pod.uid, &name, &error);
            (500, format!("pod {name}: {error}"))
        }
    }
}

/// The pod of a name; the runtime may know of it a little before the watch does.
async fn find(
    enroller: &Enroller,
    namespace: &str,
    name: &str,
) -> (Option<Arc<PodFacts>>, Result<(), Outside>) {
    let cluster = &enroller.cluster;
    let end = tokio::time::Instant::now() + LAG;
    loop {
        let pod = cluster
            .pod_named(namespace, name)
            .filter(|pod| !pod.terminal);
        let admitted = match &pod {
            Some(pod) => cluster.admit(pod),
            None => Err(Outside::UnknownNamespace),
        };
        if admitted != Err(Outside::UnknownNamespace) || tokio::time::Instant::now() >= end {
            return (pod, admitted);
        }
        tokio::time::sleep(LOOK).await;
    }
}

async fn note(enroller: &Enroller, request: AddRequest) -> Answer {
    let (pod, _) = find(enroller, &request.pod_namespace, &request.pod_name).await;
    let noted = match pod {
        Some(pod) => enroller.note_place(&pod.uid, request.netns.as_ref()),
        None => return (404, "the pod is not known on this node".to_string()),
    };
    match noted {
        Ok(()) => (200, String::new()),
        Err(error) => (500, error.to_string()),
    }
}

async fn check(enroller: &Enroller, request: AddRequest) -> Answer {
    let name = format!("{}/{}", request.pod_namespace, request.pod_name);
    match find(enroller, &request.pod_namespace, &request.pod_name).await {
        (None, _) => (500, format!("pod {name} is not known on this node")),
        (Some(_), Err(Outside::UnknownNamespace)) => {
            (500, format!("the namespace of pod {name} is not known"))
        }
        (Some(_), Err(_)) => (200, String::new()),
        (Some(pod), Ok(())) => match enroller.inspect(&pod.uid).await {
            Ok(None) => (200, String::new()),
            Ok(Some(difference)) => (500, format!("pod {name} is not captured: {difference}")),
            Err(error) => (500, format!("pod {name}: {error}")),
        },
    }
}

fn decide(enroller: &Enroller, asked: &PodName) -> Answer {
    let pod = enroller.cluster.pod_named(&asked.namespace, &asked.name);
    let Some(pod) = pod.filter(|_| enroller.cluster.is_synced()) else {
        return (404, "the pod is not known on this node".to_string());
    };
    let decision = match enroller.cluster.admit(&pod) {
        Err(Outside::UnknownNamespace) => {
            return (404, "the pod's namespace is not known".to_string());
        }
        Ok(()) => Decision {
            enrolled: true,
            reason: "it or its namespace asks for the mesh".to_string(),
        },
        Err(reason) => Decision {
            enrolled: false,
            reason: reason.to_string(),
        },
    };
    (200, decision.to_json())
}

/// A line of the plugin's log.
#[derive(Deserialize)]
struct Record {
    #[serde(default)]
    level: String,
    #[serde(default)]
    msg: String,
    #[serde(flatten)]
    rest: serde_json::Map<String, Value>,
}

/// Puts a line of the plugin's log into the agent's.
fn relate(line: &str) {
    let Ok(mut record) = serde_json::from_str::<Record>(line) else {
        return tracing::info!(target: "cni-plugin", "{line}");
    };
    record.rest.remove("time");
    let rest = match record.rest.is_empty() {
        true => String::new(),
        false => format!(" {}", Value::Object(record.rest)),
    };
    let msg = record.msg;
    match record.level.as_str() {
        "error" | "fatal" => tracing::error!(target: "cni-plugin", "{msg}{rest}"),
        "warn" | "warning" => tracing::warn!(target: "cni-plugin", "{msg}{rest}"),
        "debug" => tracing::debug!(target: "cni-plugin", "{msg}{rest}"),
        _ => tracing::info!(target: "cni-plugin", "{msg}{rest}"),
    }
}
