//! One tunnel from the calling end: dialled, proven, pinged, and shared by the flows of one key.

use std::cell::Cell;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use http::StatusCode;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::engine::{Engine, Failure, Outcome, Role, TunnelHandle, handshake};
use crate::error::OpenError;
use crate::guard::Guard;
use crate::http2::Http2Config;
use crate::stream::Stream;
use crate::{Identity, LocalBoxFuture, TlsIdentity};

/// Makes the TCP connections under tunnels, for example inside a pod's network namespace.
pub trait Dialer {
    /// Connects to `destination` within a bounded time.
    fn dial(&self, destination: SocketAddr) -> LocalBoxFuture<'_, io::Result<TcpStream>>;

    /// Whether `source` may open new streams on tunnels that were made with this certificate: not once it was replaced
    /// or withdrawn.
    fn is_current(&self, _source: &Identity, _certificate: &Arc<TlsIdentity>) -> bool {
        true
    }
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
    handle: TunnelHandle,
    limit: usize,
    used: Cell<Instant>,
    peer: Option<Identity>,
    /// What this end proved itself with.
    tls: Arc<TlsIdentity>,
}

impl Tunnel {
    /// Makes a tunnel of a connection: proves both ends and hands it to the engine.
    pub async fn over(
        engine: &Engine,
        socket: TcpStream,
        tls: Arc<TlsIdentity>,
        expected: &[Identity],
        config: &Http2Config,
    ) -> Result<Rc<Self>, OpenError> {
        let tls_config = tls
            .client_config(expected)
            .map_err(|error| OpenError::Tls(error.to_string()))?;
        let proven = timeout(
            config.handshake_timeout,
            handshake::connect(&socket, tls_config),
        );
        let mut proven = proven
            .await
            .unwrap_or_else(|_| {
                Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    "TLS handshake timed out",
                ))
            })
            .map_err(OpenError::from_io)?;
        if !proven.http2 {
            return Err(OpenError::Http2("peer does not speak HTTP/2".to_string()));
        }
        let chain = std::mem::take(&mut proven.chain);
        let guard = Guard::new(config, &tls, &chain, Role::Client).map_err(OpenError::Revoked)?;
        let peer = proven.peer.clone();
        let streams = u32::from(config.max_streams_per_connection);
        let handle = engine.add(socket, proven, Role::Client, config.client(), streams);
        guard.watch(&handle, config);
        Ok(Rc::new(Self {
            handle,
            limit: usize::from(config.max_streams_per_connection),
            used: Cell::new(Instant::now()),
            peer,
            tls,
        }))
    }

    /// The certificate that it was made with.
    pub fn certificate(&self) -> &Arc<TlsIdentity> {
        &self.tls
    }

    /// Whether another stream may be opened now.
    pub fn has_room(&self) -> bool {
        self.handle.has_room(self.limit)
    }

    /// Whether it will never take a stream again.
    pub fn is_dead(&self) -> bool {
        self.handle.is_ending()
    }

    /// When it last took a stream.
    pub fn last_used(&self) -> Instant {
        self.used.get()
    }

    /// Takes no more streams; it ends with its last one.
    pub fn retire(&self) {
        self.handle.retire();
    }

    /// Ends at once, with all its streams.
    pub fn stop(&self) {
        self.handle.stop(Failure::Stopped);
    }

    /// Opens a stream.
    ///
    /// # Errors
    /// `Err(None)` when the tunnel was already on its way out and another one may be tried, else why it failed.
    pub async fn open(
        &self,
        headers: &ConnectHeaders,
        config: &Http2Config,
    ) -> Result<Tunnelled, Option<OpenError>> {
        headers.check()?;
        self.used.set(Instant::now());
        let rest = [
            ("baggage", &headers.baggage),
            ("forwarded", &headers.forwarded),
            ("traceparent", &headers.traceparent),
            ("x-forwarded-network", &headers.forwarded_network),
        ];
        let handle = self.handle.open(&headers.authority, |encoder| {
            for (name, value) in rest {
                if let Some(value) = value {
                    encoder.field(name, value);
                }
            }
        });
        let handle = handle.ok_or(None)?;
        let answer = match timeout(config.answer_timeout, handle.answer()).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(Outcome::Unprocessed)) => return Err(None),
            Ok(Err(outcome)) => return Err(Some(OpenError::from_outcome(outcome))),
            Err(_) => return Err(Some(OpenError::AnswerTimeout(config.answer_timeout))),
        };
        let status = answer
            .status
            .and_then(|status| StatusCode::from_u16(status).ok());
        match status {
            Some(StatusCode::OK) => {}
            Some(status) => return Err(Some(OpenError::Status(status, answer.reason))),
            None => {
                return Err(Some(OpenError::Http2(
                    "an answer without a status".to_string(),
                )));
            }
        }
        Ok(Tunnelled {
            stream: Stream::new(handle),
            peer: self.peer.clone(),
            baggage: answer.baggage.map(String::from),
        })
    }
}

impl ConnectHeaders {
    /// Checks that all of it can be sent as header fields.
    fn check(&self) -> Result<(), Option<OpenError>> {
        let texts = [
            ("authority", Some(&self.authority)),
            ("baggage", self.baggage.as_ref()),
            ("forwarded", self.forwarded.as_ref()),
            ("traceparent", self.traceparent.as_ref()),
            ("x-forwarded-network", self.forwarded_network.as_ref()),
        ];
        for (name, text) in texts {
            if let Some(text) = text
                && text.bytes().any(|byte| byte < b' ' || byte == 0x7f)
            {
                let why = format!("{name} {text:?} cannot be sent as an HTTP header");
                return Err(Some(OpenError::Http2(why)));
            }
        }
        Ok(())
    }
}
