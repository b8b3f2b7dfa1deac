//! How a tunnel ends, and what it shares with its owners until then.

use std::cell::{Cell, RefCell};
use std::io::{self, ErrorKind};
use std::rc::Rc;
use std::task::Waker;

use thiserror::Error;
use tokio::sync::Notify;

use super::connection::{Fault, Fields};
use super::flow::Ticket;
use super::record::RecordError;

/// Why a tunnel ended.
#[derive(Clone, Debug, Error)]
pub enum Failure {
    #[error("the peer closed the tunnel")]
    Closed,
    #[error("{0}")]
    Io(Rc<io::Error>),
    #[error("{0}")]
    Records(#[from] RecordError),
    #[error("{0}")]
    Protocol(#[from] Fault),
    #[error("the peer answers no pings")]
    Silent,
    #[error("the tunnel was stopped")]
    Stopped,
    #[error("peer certificate revoked by CRL")]
    Revoked,
    #[error("a certificate that it was made with has expired")]
    Expired,
}

impl Failure {
    /// Whether the peer merely went away.
    pub fn is_abrupt_close(&self) -> bool {
        match self {
            Self::Closed | Self::Stopped => true,
            Self::Io(error) => is_abrupt_close(error),
            Self::Records(_) | Self::Protocol(_) | Self::Silent | Self::Revoked | Self::Expired => {
                false
            }
        }
    }
}

/// Whether a peer closed without ceremony, which ends a flow but is no failure.
pub fn is_abrupt_close(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::NotConnected
            | ErrorKind::UnexpectedEof
            | ErrorKind::ConnectionReset
            | ErrorKind::ConnectionAborted
            | ErrorKind::BrokenPipe
    )
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Io(Rc::new(error))
    }
}

/// Shared by the engine and the owners of a tunnel.
#[derive(Debug, Default)]
pub struct Shared {
    /// Why it ended, once it has.
    pub ended: RefCell<Option<Failure>>,
    /// Whether the peer was heard to speak HTTP/2.
    pub settled: Cell<bool>,
    /// The task that takes requests.
    pub acceptor: RefCell<Option<Waker>>,
    /// Told of every answered ping.
    pub pong: Notify,
    /// Told of the end.
    pub over: Notify,
}

impl Shared {
    pub fn is_over(&self) -> bool {
        self.ended.borrow().is_some()
    }

    pub fn wake_acceptor(&self) {
        if let Some(waker) = self.acceptor.borrow_mut().take() {
            waker.wake();
        }
    }
}

/// A stream that waits to be taken by the serving end.
#[derive(Debug)]
pub struct Request {
    pub place: usize,
    pub ticket: Rc<Ticket>,
    pub fields: Box<Fields>,
}
