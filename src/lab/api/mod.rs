//! An API server of Kubernetes' protocol for the lab: it stores objects, lists and watches them, and takes patches.
//!
//! It speaks to unmodified clients, so that the roles run in a lab as they do in a cluster. It is not for clusters: it
//! keeps everything in memory, validates next to nothing and has no authorisation.

mod faults;
mod requests;
mod resources;
mod selectors;
mod store;
mod watch;

use std::collections::HashMap;
use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::watch as signal;
use tokio_rustls::TlsAcceptor;

pub use faults::Held;

use faults::Faults;
use requests::{Answer, BODY, Request, Target, answer, failure};
use resources::Resource;
use store::Store;

/// How long a client may take for its request's head, and for a handshake.
const HEAD: Duration = Duration::from_secs(10);

/// Whose a token is.
#[derive(Clone, Debug)]
pub struct Review {
    pub user: String,
    pub uid: String,
    pub audiences: Vec<String>,
}

/// Makes a token for a service account, by its namespace and name.
pub type IssueToken = Box<dyn Fn(&str, &str) -> String + Send + Sync>;
/// Tells whose a token is, or why it is nobody's.
pub type ReviewToken = Box<dyn Fn(&str) -> Result<Review, String> + Send + Sync>;

/// What a server does besides storing.
pub struct Options {
    /// The bearer tokens of those who may ask at all; none: everybody may.
    pub tokens: Option<Vec<String>>,
    pub issue_token: Option<IssueToken>,
    pub review_token: Option<ReviewToken>,
    /// How often a watch is told how far it has come.
    pub bookmarks: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            tokens: None,
            issue_token: None,
            review_token: None,
            bookmarks: Duration::from_secs(10),
        }
    }
}

struct Shared {
    options: Options,
    store: Mutex<Store>,
    /// The version of the last change.
    changed: signal::Sender<u64>,
    /// Goes up when every connection is to end.
    epoch: signal::Sender<u64>,
    faults: Faults,
}

/// The server; clones are the same one.
#[derive(Clone)]
pub struct ApiServer(Arc<Shared>);

type Body = BoxBody<Bytes, Infallible>;

impl ApiServer {
    /// A server without objects.
    pub fn new(options: Options) -> Self {
        Self(Arc::new(Shared {
            options,
            store: Mutex::default(),
            changed: signal::Sender::new(0),
            epoch: signal::Sender::new(0),
            faults: Faults::default(),
        }))
    }

    /// Serves until `stop` is over.
    ///
    /// # Errors
    /// When no connection can be accepted any more.
    pub async fn serve(
        &self,
        listener: TcpListener,
        tls: Option<Arc<rustls::ServerConfig>>,
        stop: impl Future<Output = ()>,
    ) -> io::Result<()> {
        let tls = tls.map(TlsAcceptor::from);
        let mut stop = pin!(stop);
        loop {
            let (socket, _) = tokio::select! {
                () = &mut stop => return Ok(()),
                accepted = listener.accept() => accepted?,
            };
            let _ = socket.set_nodelay(true);
            let (server, tls) = (self.clone(), tls.clone());
            tokio::spawn(async move {
                match tls {
                    None => server.connection(socket).await,
                    Some(tls) => match tokio::time::timeout(HEAD, tls.accept(socket)).await {
                        Ok(Ok(socket)) => server.connection(socket).await,
                        Ok(Err(error)) => tracing::debug!("a TLS handshake failed: {error}"),
                        Err(_) => tracing::debug!("a TLS handshake took too long"),
                    },
                }
            });
        }
    }

    /// Stores an object in the place of another of its name; gives it as it is stored, or none if its kind is not
    /// served.
    pub fn put(&self, object: Value) -> Option<Value> {
        let resource = Resource::of(&object)?;
        let stored = self.change(|store| store.put(resource, object));
        Some(stored)
    }

    /// As [`Self::put`], but `keep` may bring into the new object what it wants of the one before.
    pub fn put_keeping(
        &self,
        mut object: Value,
        keep: impl FnOnce(&Value, &mut Value),
    ) -> Option<Value> {
        let resource = Resource::of(&object)?;
        let text = |name: &str| object["metadata"][name].as_str().unwrap_or_default();
        let key = store::key(resource, text("namespace"), text("name"));
        let stored = self.change(|store| {
            if let Some(before) = store.get(&key) {
                keep(before, &mut object);
            }
            store.put(resource, object)
        });
        Some(stored)
    }

    /// The version of the last change, as it changes.
    pub fn changes(&self) -> signal::Receiver<u64> {
        self.0.changed.subscribe()
    }

    /// Removes an object of the kind that `plural` names.
    pub fn delete(&self, plural: &str, namespace: &str, name: &str) -> Option<Value> {
        let resource = resources::RESOURCES
            .iter()
            .find(|known| known.plural == plural)?;
        self.change(|store| store.delete(resource, &store::key(resource, namespace, name)))
    }

    /// Removes an object by its kind's name.
    pub fn delete_kind(&self, kind: &str, namespace: &str, name: &str) -> Option<Value> {
        let resource = resources::RESOURCES
            .iter()
            .find(|known| known.kind == kind)?;
        self.change(|store| store.delete(resource, &store::key(resource, namespace, name)))
    }

    /// An object as it is stored.
    pub fn object(&self, plural: &str, namespace: &str, name: &str) -> Option<Value> {
        let resource = resources::RESOURCES
            .iter()
            .find(|known| known.plural == plural)?;
        let key = store::key(resource, namespace, name);
        self.store().get(&key).cloned()
    }

    /// Ends every connection abruptly, as a server that is replaced does.
    pub fn drop_connections(&self) {
        self.0.epoch.send_modify(|epoch| *epoch += 1);
    }

    /// Forgets all changes so far: watches that lag behind have to list anew (410 Gone).
    pub fn compact(&self) {
        self.store().compact();
    }

    /// Fails the next requests of a method to paths that begin with `path`.
    pub fn fail(&self, method: &str, path: &str, status: u16, times: usize) {
        self.0.faults.fail(method, path, status, times);
    }

    /// Lets everything succeed again that [`Self::fail`] had fail.
    pub fn recover(&self) {
        self.0.faults.recover();
    }

    /// Keeps requests of a method to paths that begin with `path` waiting.
    pub fn hold(&self, method: &str, path: &str) -> Held {
        self.0.faults.hold(method, path)
    }

    fn change<T>(&self, work: impl FnOnce(&mut Store) -> T) -> T {
        let mut store = self.store();
        let result = work(&mut store);
        let version = store.version;
        drop(store);
        self.0.changed.send_if_modified(|known| {
            let news = *known < version;
            *known = version.max(*known);
            news
        });
        result
    }

    fn store(&self) -> MutexGuard<'_, Store> {
        self.0.store.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn connection(&self, socket: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) {
        let server = self.clone();
        let service = service_fn(move |request| {
            let server = server.clone();
            async move { Ok::<_, Infallible>(server.respond(request).await) }
        });
        let mut epoch = self.0.epoch.subscribe();
        let serving = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD)
            .serve_connection(TokioIo::new(socket), service);
        tokio::select! {
            served = serving => if let Err(error) = served {
                tracing::debug!("a connection ended: {error}");
            },
            _ = epoch.changed() => {}
        }
    }

    async fn respond(&self, request: hyper::Request<Incoming>) -> hyper::Response<Body> {
        let (head, body) = request.into_parts();
        let text = |name| {
            let value = head.headers.get(name).and_then(|value| value.to_str().ok());
            value.unwrap_or_default().to_string()
        };
        let (method, path) = (head.method.to_string(), head.uri.path().to_string());
        if let Some(tokens) = &self.0.options.tokens {
            let shown = text(hyper::header::AUTHORIZATION);
            let shown = shown.strip_prefix("Bearer ").unwrap_or_default();
            if !tokens.iter().any(|known| known == shown) {
                return reply(failure(401, "Unauthorized"));
            }
        }
        let body = match Limited::new(body, BODY).collect().await {
            Ok(body) => body.to_bytes().to_vec(),
            Err(_) => return reply(failure(413, "the body is too large or breaks off")),
        };
        if let Some(status) = self.0.faults.meet(&method, &path).await {
            return reply(failure(status, "asked to fail"));
        }
        let query = head.uri.query().unwrap_or_default();
        let query: HashMap<_, _> = form(query).into_iter().collect();
        let request = Request {
            content_type: text(hyper::header::CONTENT_TYPE),
            method,
            path,
            query: query.into_iter().collect(),
            body,
        };
        if request.method == "GET"
            && request.is_set("watch")
            && let Some(target) = Target::of(&request.path)
        {
            return match self.watch(&target, &request) {
                Ok(stream) => {
                    let mut response = hyper::Response::new(stream);
                    let json = hyper::header::HeaderValue::from_static("application/json");
                    response
                        .headers_mut()
                        .insert(hyper::header::CONTENT_TYPE, json);
                    response
                }
                Err(answer) => reply(answer),
            };
        }
        reply(self.change(|store| answer(store, &self.0.options, &request)))
    }
}

fn reply((status, value): Answer) -> hyper::Response<Body> {
    let body = Full::new(Bytes::from(value.to_string())).boxed();
    let mut response = hyper::Response::new(body);
    *response.status_mut() =
        hyper::StatusCode::from_u16(status).unwrap_or(hyper::StatusCode::INTERNAL_SERVER_ERROR);
    let json = hyper::header::HeaderValue::from_static("application/json");
    response
        .headers_mut()
        .insert(hyper::header::CONTENT_TYPE, json);
    response
}

/// The pairs of a query, with their escapes undone.
fn form(query: &str) -> Vec<(String, String)> {
    let pairs = query.split('&').filter(|pair| !pair.is_empty());
    pairs
        .map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            (
                crate::admin::http::unescape(name),
                crate::admin::http::unescape(value),
            )
        })
        .collect()
}
