//! The serving end of tunnels.

use std::net::SocketAddr;

use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::engine::REASON;
use crate::engine::{Engine, Failure, Fields, Role, StreamHandle, TunnelHandle, handshake};
use crate::error::{AcceptError, StreamError};
use crate::guard::Guard;
use crate::headers::forwarded_host;
use crate::http2::Http2Config;
use crate::stream::Stream;
use crate::{Identity, TlsIdentity};

/// An accepted tunnel; dropping it ends it with all its streams.
pub struct ServerTunnel {
    handle: TunnelHandle,
    peer: Option<Identity>,
}

/// Makes a tunnel of an accepted connection.
///
/// # Errors
/// When the peer proves no acceptable identity, does not speak HTTP/2, or is too slow about it.
pub async fn accept(
    engine: &Engine,
    socket: TcpStream,
    tls: &TlsIdentity,
    config: &Http2Config,
) -> Result<ServerTunnel, AcceptError> {
    let limit = config.handshake_timeout;
    let mut proven = timeout(limit, handshake::accept(&socket, tls.server_config()))
        .await
        .map_err(|_| AcceptError::TlsTimeout(limit))?
        .map_err(AcceptError::Tls)?;
    if !proven.http2 {
        return Err(AcceptError::NoAlpn);
    }
    let chain = std::mem::take(&mut proven.chain);
    let guard = Guard::new(config, tls, &chain, Role::Server).map_err(AcceptError::Revoked)?;
    let peer = proven.peer.clone();
    let tunnel = ServerTunnel {
        handle: engine.add(socket, proven, Role::Server, config.server(), 0),
        peer,
    };
    timeout(limit, tunnel.handle.settled())
        .await
        .map_err(|_| AcceptError::Http2Timeout(limit))?
        .map_err(AcceptError::Http2)?;
    guard.watch(&tunnel.handle, config);
    Ok(tunnel)
}

impl ServerTunnel {
    /// The identity that the peer proved.
    pub fn peer(&self) -> Option<&Identity> {
        self.peer.as_ref()
    }

    /// Waits for a request; none when the tunnel has ended. Safe to drop and call again.
    pub async fn next(&mut self) -> Option<Incoming> {
        match self.handle.request().await {
            Some((handle, fields)) => Some(Incoming {
                headers: IncomingHeaders(fields),
                handle,
            }),
            None => {
                if let Some(failure) = self.handle.failure()
                    && !failure.is_abrupt_close()
                {
                    tracing::debug!("HBONE tunnel ended: {failure}");
                }
                None
            }
        }
    }

    /// Tells the peer to open its next streams elsewhere; those that are open go on.
    pub fn graceful_shutdown(&mut self) {
        self.handle.shut_down();
    }
}

impl Drop for ServerTunnel {
    fn drop(&mut self) {
        self.handle.stop(Failure::Stopped);
    }
}

/// What came along with a CONNECT.
pub struct IncomingHeaders(Box<Fields>);

impl IncomingHeaders {
    /// The hostname that the client says it meant; telemetry only.
    pub fn forwarded_host(&self) -> Option<String> {
        forwarded_host(self.0.forwarded.as_deref()?).map(str::to_string)
    }

    /// What the client says of itself; telemetry only.
    pub fn baggage(&self) -> Option<crate::Baggage> {
        self.0.baggage.as_deref().map(crate::Baggage::parse)
    }

    /// The network that the flow came from, across a gateway.
    pub fn forwarded_network(&self) -> Option<&str> {
        self.0.forwarded_network.as_deref()
    }
}

/// A request that waits for its answer; dropping it resets the stream.
pub struct Incoming {
    pub headers: IncomingHeaders,
    handle: StreamHandle,
}

impl Incoming {
    /// The request's method.
    pub fn method(&self) -> &str {
        self.headers.0.method.as_deref().unwrap_or_default()
    }

    /// The `:authority` as it came; empty when there is none.
    pub fn authority(&self) -> &str {
        self.headers.0.authority.as_deref().unwrap_or_default()
    }

    /// Answers 200 and opens the stream.
    ///
    /// # Errors
    /// When the client gave up meanwhile.
    pub fn accept(self, baggage: Option<&str>) -> Result<Stream, StreamError> {
        if self.handle.is_gone() {
            return Err(StreamError);
        }
        let baggage = baggage.filter(|text| text.bytes().all(|byte| byte >= b' ' && byte != 0x7f));
        self.handle.respond(200, false, |encoder| {
            if let Some(baggage) = baggage {
                encoder.field("baggage", baggage);
            }
        });
        Ok(Stream::new(self.handle))
    }

    /// Waits until the client has given up.
    pub async fn cancelled(&mut self) {
        self.handle.over().await;
    }

    /// Answers with an error status and the code of a reason, which is no text but a word.
    pub fn refuse(self, status: u16, reason: &str) {
        self.handle
            .respond(status, true, |encoder| encoder.field(REASON, reason));
    }
}

/// The peer's address without the mapping of IPv4 into IPv6.
pub fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
