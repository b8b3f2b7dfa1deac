//! One CONNECT stream, and how it carries an application's socket.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::rc::Rc;

use thiserror::Error;
use tokio::net::TcpStream;

use crate::Counters;
use crate::engine::{Failure, Outcome, StreamHandle, is_abrupt_close};

/// An open CONNECT stream; dropping it resets it.
pub struct Stream(StreamHandle);

/// A flow that broke off rather than ended.
#[derive(Clone, Debug, Error)]
pub enum CarryError {
    #[error("send: the tunnel broke: {0}")]
    Tunnel(Failure),
    #[error("connection closed: peer certificate revoked by CRL")]
    Revoked,
    #[error("connection closed: a certificate that its tunnel was made with has expired")]
    Expired,
    #[error("send: {0}")]
    Read(Rc<io::Error>),
    #[error("receive: {0}")]
    Write(Rc<io::Error>),
}

impl Stream {
    pub(crate) fn new(handle: StreamHandle) -> Self {
        Self(handle)
    }

    /// A socket whose other end the stream carries, within this process: for a tunnel in the stream.
    ///
    /// # Errors
    /// When the kernel has no more sockets.
    pub(crate) fn into_socket(self) -> io::Result<TcpStream> {
        let (near, far) = UnixStream::pair()?;
        let [near, far] = [near, far].map(|end| -> io::Result<TcpStream> {
            end.set_nonblocking(true)?;
            // A stream is a stream: of what is particular to TCP, a tunnel and a relay use nothing.
            TcpStream::from_std(OwnedFd::from(end).into())
        });
        let (near, far) = (near?, far?);
        tokio::task::spawn_local(async move { self.carry(far, &Rc::default()).await });
        Ok(near)
    }

    /// Carries the socket's bytes both ways until both directions have ended.
    ///
    /// A half-close stays a half-close, a reset of either end arrives at the other as a reset. Dropping the future
    /// resets both ends.
    ///
    /// # Errors
    /// When the tunnel or the socket failed in another way than by the peer's closing it.
    pub async fn carry(self, socket: TcpStream, counters: &Rc<Counters>) -> Result<(), CarryError> {
        if self.0.is_gone() {
            // The peer gave up before it began; so must the application see it.
            let _ = socket2::SockRef::from(&socket).set_linger(Some(std::time::Duration::ZERO));
        } else {
            self.0.carry(socket, counters);
        }
        match self.0.over().await {
            Outcome::Ended | Outcome::Reset(_) | Outcome::Unprocessed => Ok(()),
            Outcome::Tunnel(failure) if failure.is_abrupt_close() => Ok(()),
            Outcome::Tunnel(Failure::Revoked) => Err(CarryError::Revoked),
            Outcome::Tunnel(Failure::Expired) => Err(CarryError::Expired),
            Outcome::Tunnel(failure) => Err(CarryError::Tunnel(failure)),
            Outcome::Read(error) | Outcome::Write(error) if is_abrupt_close(&error) => Ok(()),
            Outcome::Read(error) => Err(CarryError::Read(error)),
            Outcome::Write(error) => Err(CarryError::Write(error)),
        }
    }
}
