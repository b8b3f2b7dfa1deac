//! Why a stream could not be opened or a tunnel not be accepted.

use std::io;
use std::rc::Rc;
use std::time::Duration;

use http::StatusCode;
use thiserror::Error;

use crate::engine::{Failure, Outcome};

/// Why a stream could not be opened; cheap to clone, for everyone who waited for the same tunnel.
#[derive(Clone, Debug, Error)]
pub enum OpenError {
    #[error("io error: {0}")]
    Io(Rc<io::Error>),
    #[error("connection timed out, maybe a NetworkPolicy is blocking HBONE port 15008: {0}")]
    ConnectTimeout(Rc<io::Error>),
    #[error("tls error: {0}")]
    Tls(String),
    #[error("identity error: {0}")]
    Identity(Rc<dyn std::error::Error + Send + Sync>),
    #[error("http2 handshake failed: {0}")]
    Http2(String),
    #[error("h2 failed: {0}")]
    H2(String),
    /// Refused, with the code of a reason if the peer gives one.
    #[error("http status: {0}")]
    Status(StatusCode, Option<Box<str>>),
    #[error("io error: the peer did not answer the CONNECT within {0:?}")]
    AnswerTimeout(Duration),
    #[error("io error: {0}")]
    Revoked(Revoked),
    #[error("pool draining")]
    Draining,
}

/// The peer's certificate is on a revocation list.
#[derive(Clone, Copy, Debug, Error)]
#[error("invalid peer certificate: Revoked")]
pub struct Revoked;

impl OpenError {
    /// Whether it says something of the peer alone, so that another may be tried; the peer has taken no byte.
    pub fn is_of_the_endpoint(&self) -> bool {
        match self {
            Self::Io(_)
            | Self::ConnectTimeout(_)
            | Self::Http2(_)
            | Self::H2(_)
            | Self::Revoked(_) => true,
            Self::Status(status, _) => *status == StatusCode::SERVICE_UNAVAILABLE,
            Self::Tls(_) | Self::Identity(_) | Self::AnswerTimeout(_) | Self::Draining => false,
        }
    }

    pub(crate) fn from_io(error: io::Error) -> Self {
        Self::Io(Rc::new(error))
    }

    pub(crate) fn from_dial(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::TimedOut => Self::ConnectTimeout(Rc::new(error)),
            _ => Self::from_io(error),
        }
    }

    /// Of a stream that ended before its answer.
    pub(crate) fn from_outcome(outcome: Outcome) -> Self {
        match outcome {
            Outcome::Reset(reason) => Self::H2(format!("the peer reset the stream: {reason}")),
            Outcome::Tunnel(failure) => Self::H2(failure.to_string()),
            Outcome::Read(error) | Outcome::Write(error) => Self::Io(error),
            Outcome::Ended | Outcome::Unprocessed => {
                Self::H2("the stream ended before it was answered".to_string())
            }
        }
    }
}

/// Why a connection did not become a tunnel.
#[derive(Debug, Error)]
pub enum AcceptError {
    #[error("tls handshake error: {0}")]
    Tls(io::Error),
    #[error("tls handshake error: {0}")]
    Revoked(Revoked),
    #[error("tls handshake error: timed out after {0:?}")]
    TlsTimeout(Duration),
    #[error("h2 failed: {0}")]
    Http2(Failure),
    #[error("h2 failed: no HTTP/2 preface within {0:?}")]
    Http2Timeout(Duration),
    #[error("tls handshake error: peer did not negotiate HTTP/2")]
    NoAlpn,
}

/// Why a stream could not be accepted.
#[derive(Debug, Error)]
#[error("the client gave up the stream")]
pub struct StreamError;
