//! One tunnel from the calling end: dialled, proven, pinged, and shared by the flows of one key.

use std::cell::{Cell, RefCell};
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use crate::LocalBoxFuture;
use bytes::Bytes;
use h2::client::{ResponseFuture, SendRequest};
use h2::{Reason, SendStream};
use http::{HeaderValue, Method, Request, StatusCode};
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use crate::error::OpenError;
use crate::http2::{self, Dead, Http2Config};
use crate::spiffe_san::identities;
use crate::stream::Stream;
use crate::{Identity, TlsIdentity};

/// Makes the TCP connections under tunnels, for example inside a pod's network namespace.
pub trait Dialer {
    /// Connects to `destination` within a bounded time.
    fn dial(&self, destination: SocketAddr) -> LocalBoxFuture<'_, io::Result<TcpStream>>;
}

/// What is sent along with a CONNECT.
#[derive(Clone, Debug, Default)]
pub struct ConnectHeaders {
    /// `ip:port`, `[ip]:port` or `host:port`.
    pub authority: String,
    pub baggage: Option<String>,
    pub forwarded: Option<String>,
    pub traceparent: Option<String>,
    /// Only on the inner tunnel across networks.
    pub forwarded_network: Option<String>,
}

/// An opened stream and what the peer said of itself.
pub struct Tunnelled {
    pub stream: Stream,
    /// The identity that the peer proved.
    pub peer: Option<Identity>,
    /// What the peer says of the workload it serves; telemetry only.
    pub baggage: Option<String>,
}

/// A live tunnel.
pub(crate) struct Tunnel {
    send: RefCell<Option<SendRequest<Bytes>>>,
    limit: usize,
    active: Cell<usize>,
    dead: Cell<bool>,
    used: Cell<Instant>,
    peer: Option<Identity>,
    stop: Notify,
}

/// A place on a tunnel, given back when dropped.
struct Place(Rc<Tunnel>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.active.set(self.0.active.get() - 1);
    }
}

impl Tunnel {
    /// Dials, proves both ends and starts the task that drives the tunnel.
    pub async fn connect(
        dialer: &dyn Dialer,
        destination: SocketAddr,
        tls: &Arc<TlsIdentity>,
        expected: &[Identity],
        config: &Rc<Http2Config>,
    ) -> Result<Rc<Self>, OpenError> {
        let tls_config = tls
            .client_config(expected)
            .map_err(|error| OpenError::Tls(error.to_string()))?;
        let socket = dialer
            .dial(destination)
            .await
            .map_err(OpenError::from_dial)?;
        // Nothing is sent of it: SNI is off.
        let name = ServerName::IpAddress(std::net::Ipv4Addr::UNSPECIFIED.into());
        let handshake = TlsConnector::from(tls_config).connect(name, socket);
        let stream = within(config, "TLS handshake", handshake)
            .await?
            .map_err(OpenError::from_io)?;
        let (_, session) = stream.get_ref();
        if session.alpn_protocol() != Some(b"h2") {
            return Err(OpenError::Http2("peer does not speak HTTP/2".to_string()));
        }
        let peer = session
            .peer_certificates()
            .and_then(|chain| identities(chain.first()?).into_iter().next());
        let handshake = config.client().handshake::<_, Bytes>(stream);
        let (send, connection) = within(config, "HTTP/2 handshake", handshake)
            .await?
            .map_err(|error| OpenError::Http2(error.to_string()))?;
        let tunnel = Rc::new(Self {
            send: RefCell::new(Some(send)),
            limit: usize::from(config.max_streams_per_connection),
            active: Cell::new(0),
            dead: Cell::new(false),
            used: Cell::new(Instant::now()),
            peer,
            stop: Notify::new(),
        });
        tokio::task::spawn_local(drive(tunnel.clone(), connection, config.clone()));
        Ok(tunnel)
    }

    /// Whether another stream may be opened now.
    pub fn has_room(&self) -> bool {
        let send = self.send.borrow();
        let Some(send) = send.as_ref() else {
            return false;
        };
        !self.dead.get() && self.active.get() < self.limit.min(send.current_max_send_streams())
    }

    /// Whether it will never take a stream again.
    pub fn is_dead(&self) -> bool {
        self.dead.get() || self.send.borrow().is_none()
    }

    /// When it last took a stream.
    pub fn last_used(&self) -> Instant {
        self.used.get()
    }

    /// Takes no more streams; it ends with its last one.
    pub fn retire(&self) {
        self.send.borrow_mut().take();
    }

    /// Ends at once, with all its streams.
    pub fn stop(&self) {
        self.stop.notify_one();
    }

    /// Opens a stream.
    ///
    /// # Errors
    /// `Err(None)` when the tunnel was already on its way out and another one may be tried, else why it failed.
    pub async fn open(
        self: &Rc<Self>,
        headers: &ConnectHeaders,
        config: &Http2Config,
    ) -> Result<Tunnelled, Option<OpenError>> {
        let request = request(headers)?;
        self.used.set(Instant::now());
        self.active.set(self.active.get() + 1);
        let place = Place(self.clone());
        let (answer, send) = self.send_request(request).await?;
        let response = match timeout(config.answer_timeout, answer).await {
            Ok(Ok(response)) => response,
            Ok(Err(error)) if is_unprocessed(&error) => {
                self.dead.set(true);
                return Err(None);
            }
            Ok(Err(error)) => return Err(Some(OpenError::from_h2(error))),
            Err(_) => return Err(Some(OpenError::AnswerTimeout(config.answer_timeout))),
        };
        if response.status() != StatusCode::OK {
            return Err(Some(OpenError::Status(response.status())));
        }
        let baggage = response
            .headers()
            .get("baggage")
            .and_then(|value| value.to_str().ok())
            .map(str::to_string);
        let stream = Stream::new(send, response.into_body(), Some(Box::new(place)));
        Ok(Tunnelled {
            stream,
            peer: self.peer.clone(),
            baggage,
        })
    }

    async fn send_request(
        &self,
        request: Request<()>,
    ) -> Result<(ResponseFuture, SendStream<Bytes>), Option<OpenError>> {
        let Some(send) = self.send.borrow().clone() else {
            return Err(None);
        };
        let Ok(mut send) = send.ready().await else {
            self.dead.set(true);
            return Err(None);
        };
        send.send_request(request, false).map_err(|error| {
            tracing::debug!("HBONE tunnel takes no more streams: {error}");
            self.dead.set(true);
            None
        })
    }
}

/// Whether the peer surely did not act on a request, so that it may be sent again (RFC 9113 §8.7).
fn is_unprocessed(error: &h2::Error) -> bool {
    error.is_remote()
        && ((error.is_go_away() && error.reason() == Some(Reason::NO_ERROR))
            || (error.is_reset() && error.reason() == Some(Reason::REFUSED_STREAM)))
}

fn request(headers: &ConnectHeaders) -> Result<Request<()>, Option<OpenError>> {
    let invalid = |what: &str| {
        Some(OpenError::Http2(format!(
            "{what} cannot be sent as an HTTP header"
        )))
    };
    let uri = http::Uri::builder()
        .authority(headers.authority.as_str())
        .build()
        .map_err(|_| invalid(&format!("authority {:?}", headers.authority)))?;
    let mut request = Request::new(());
    *request.method_mut() = Method::CONNECT;
    *request.uri_mut() = uri;
    *request.version_mut() = http::Version::HTTP_2;
    let rest = [
        ("baggage", &headers.baggage),
        ("forwarded", &headers.forwarded),
        ("traceparent", &headers.traceparent),
        ("x-forwarded-network", &headers.forwarded_network),
    ];
    for (name, value) in rest {
        if let Some(value) = value {
            let value = HeaderValue::from_str(value).map_err(|_| invalid(name))?;
            request.headers_mut().insert(name, value);
        }
    }
    Ok(request)
}

async fn within<T>(
    config: &Http2Config,
    what: &str,
    work: impl Future<Output = T>,
) -> Result<T, OpenError> {
    timeout(config.handshake_timeout, work).await.map_err(|_| {
        OpenError::from_io(io::Error::new(
            io::ErrorKind::TimedOut,
            format!("{what} timed out"),
        ))
    })
}

async fn drive<T>(
    tunnel: Rc<Tunnel>,
    mut connection: h2::client::Connection<T, Bytes>,
    config: Rc<Http2Config>,
) where
    T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    let pings = connection.ping_pong();
    let dead = async {
        match pings {
            Some(pings) => http2::watch(pings, &config).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        ended = connection => if let Err(error) = ended {
            tracing::debug!("HBONE tunnel ended: {error}");
        },
        dead = dead => match dead {
            Dead::Silent => tracing::warn!("HBONE ping timeout/error: no answer within {:?}", config.ping_timeout),
            Dead::Error(error) => tracing::debug!("HBONE tunnel ended under a ping: {error}"),
        },
        () = tunnel.stop.notified() => {}
    }
    tunnel.dead.set(true);
    tunnel.retire();
}
