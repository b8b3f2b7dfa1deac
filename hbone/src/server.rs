//! The serving end of tunnels.

use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;

use bytes::Bytes;
use h2::server::SendResponse;
use h2::{Reason, RecvStream};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode};
use rustls::ServerConfig;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use crate::Identity;
use crate::error::{AcceptError, StreamError};
use crate::headers::forwarded_host;
use crate::http2::{self, Dead, Http2Config};
use crate::spiffe_san::identities;
use crate::stream::Stream;

/// An accepted tunnel; nothing moves on it unless `next` is awaited.
pub struct ServerTunnel {
    connection: h2::server::Connection<TlsStream<TcpStream>, Bytes>,
    peer: Option<Identity>,
    dead: std::pin::Pin<Box<dyn Future<Output = Dead>>>,
}

/// Makes a tunnel of an accepted connection.
///
/// # Errors
/// When the peer proves no acceptable identity, does not speak HTTP/2, or is too slow about it.
pub async fn accept(
    socket: TcpStream,
    tls: Arc<ServerConfig>,
    config: &Http2Config,
) -> Result<ServerTunnel, AcceptError> {
    let limit = config.handshake_timeout;
    let stream = timeout(limit, TlsAcceptor::from(tls).accept(socket))
        .await
        .map_err(|_| AcceptError::TlsTimeout(limit))?
        .map_err(AcceptError::Tls)?;
    let (_, session) = stream.get_ref();
    if session.alpn_protocol() != Some(b"h2") {
        return Err(AcceptError::NoAlpn);
    }
    let peer = session
        .peer_certificates()
        .and_then(|chain| identities(chain.first()?).into_iter().next());
    let mut connection = timeout(limit, config.server().handshake::<_, Bytes>(stream))
        .await
        .map_err(|_| AcceptError::Http2Timeout(limit))?
        .map_err(AcceptError::Http2)?;
    let pings = connection.ping_pong();
    let config = config.clone();
    let dead = Box::pin(async move {
        match pings {
            Some(pings) => http2::watch(pings, &config).await,
            None => std::future::pending().await,
        }
    });
    Ok(ServerTunnel {
        connection,
        peer,
        dead,
    })
}

impl ServerTunnel {
    /// The identity that the peer proved.
    pub fn peer(&self) -> Option<&Identity> {
        self.peer.as_ref()
    }

    /// Drives the tunnel until a request arrives; none when it has ended. Safe to drop and call again.
    pub async fn next(&mut self) -> Option<Incoming> {
        let accepted = tokio::select! {
            accepted = self.connection.accept() => accepted,
            dead = &mut self.dead => {
                match dead {
                    Dead::Silent => tracing::debug!("HBONE ping timeout: the peer is gone"),
                    Dead::Error(error) => tracing::debug!("HBONE tunnel ended under a ping: {error}"),
                }
                self.dead = Box::pin(std::future::pending());
                self.connection.abrupt_shutdown(Reason::NO_ERROR);
                self.connection.accept().await
            }
        };
        match accepted? {
            Ok((request, respond)) => Some(Incoming::new(request, respond)),
            Err(error) => {
                tracing::debug!("HBONE tunnel ended: {error}");
                None
            }
        }
    }

    /// Tells the peer to open its next streams elsewhere; those that are open go on.
    pub fn graceful_shutdown(&mut self) {
        self.connection.graceful_shutdown();
    }
}

/// What came along with a CONNECT.
pub struct IncomingHeaders(HeaderMap);

impl IncomingHeaders {
    fn text(&self, name: &str) -> Option<&str> {
        self.0.get(name)?.to_str().ok()
    }

    /// The hostname that the client says it meant; telemetry only.
    pub fn forwarded_host(&self) -> Option<String> {
        forwarded_host(self.text("forwarded")?).map(str::to_string)
    }

    /// What the client says of itself; telemetry only.
    pub fn baggage(&self) -> Option<crate::Baggage> {
        let mut joined = String::new();
        for value in self.0.get_all("baggage") {
            if !joined.is_empty() {
                joined.push(',');
            }
            joined.push_str(value.to_str().ok()?);
        }
        (!joined.is_empty()).then(|| crate::Baggage::parse(&joined))
    }

    /// The network that the flow came from, across a gateway.
    pub fn forwarded_network(&self) -> Option<&str> {
        self.text("x-forwarded-network")
    }
}

/// A request that waits for its answer; dropping it resets the stream.
pub struct Incoming {
    method: http::Method,
    authority: String,
    pub headers: IncomingHeaders,
    body: RecvStream,
    respond: SendResponse<Bytes>,
}

impl Incoming {
    fn new(request: Request<RecvStream>, respond: SendResponse<Bytes>) -> Self {
        let (parts, body) = request.into_parts();
        let authority = parts
            .uri
            .authority()
            .map(ToString::to_string)
            .unwrap_or_default();
        Self {
            method: parts.method,
            authority,
            headers: IncomingHeaders(parts.headers),
            body,
            respond,
        }
    }

    /// The request's method.
    pub fn method(&self) -> &str {
        self.method.as_str()
    }

    /// The `:authority` as it came; empty when there is none.
    pub fn authority(&self) -> &str {
        &self.authority
    }

    /// Answers 200 and opens the stream.
    ///
    /// # Errors
    /// When the client gave up meanwhile, or the baggage cannot be a header.
    pub fn accept(mut self, baggage: Option<&str>) -> Result<Stream, StreamError> {
        let mut response = Response::new(());
        if let Some(baggage) = baggage.and_then(|text| HeaderValue::from_str(text).ok()) {
            response.headers_mut().insert("baggage", baggage);
        }
        let send = self
            .respond
            .send_response(response, false)
            .map_err(StreamError)?;
        Ok(Stream::new(send, self.body, None))
    }

    /// Waits until the client has given up.
    pub async fn cancelled(&mut self) {
        let reset = std::future::poll_fn(|cx| self.respond.poll_reset(cx));
        let _ = pin!(reset).await;
    }

    /// Answers with an error status and nothing else.
    pub fn refuse(mut self, status: u16) {
        let mut response = Response::new(());
        *response.status_mut() =
            StatusCode::from_u16(status).unwrap_or(StatusCode::SERVICE_UNAVAILABLE);
        if let Err(error) = self.respond.send_response(response, true) {
            tracing::debug!("the client was gone before it was refused: {error}");
        }
    }
}

/// The peer's address without the mapping of IPv4 into IPv6.
pub fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
