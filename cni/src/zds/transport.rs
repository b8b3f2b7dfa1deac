//! Packets over a unix socket, one message each, some with a descriptor.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::sys::socket::SockFlag;
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, accept4, recvmsg, sendmsg,
};
use prost::Message;
use socket2::{Domain, SockAddr, Socket, Type};
use thiserror::Error;
use tokio::io::unix::AsyncFd;

/// The largest message, in bytes.
const PACKET: usize = 1024;

/// Why nothing could be sent or received.
#[derive(Debug, Error)]
pub enum TransportError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("received truncated message")]
    Truncated,
    #[error("Expected 1 FD, got {0}")]
    Descriptors(usize),
    #[error("malformed message: {0}")]
    Malformed(#[from] prost::DecodeError),
}

/// A received message, still encoded.
#[derive(Debug)]
pub struct Packet {
    pub data: Vec<u8>,
    pub descriptor: Option<OwnedFd>,
}

impl Packet {
    /// Decodes the message.
    ///
    /// # Errors
    /// When it is none of this type.
    pub fn decode<M: Message + Default>(&self) -> Result<M, TransportError> {
        Ok(M::decode(&*self.data)?)
    }
}

/// One end of a connection between the agent and a proxy.
#[derive(Debug)]
pub struct Connection(AsyncFd<OwnedFd>);

impl Connection {
    /// Connects to the agent.
    ///
    /// # Errors
    /// When nobody listens there.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let socket = Socket::new(Domain::UNIX, Type::SEQPACKET, None)?;
        socket.connect(&SockAddr::unix(path)?)?;
        socket.set_nonblocking(true)?;
        Ok(Self(register(socket.into())?))
    }

    /// Sends a message, with a descriptor if given.
    ///
    /// # Errors
    /// When the peer is gone.
    pub async fn send(
        &self,
        message: &impl Message,
        descriptor: Option<BorrowedFd<'_>>,
    ) -> io::Result<()> {
        let data = message.encode_to_vec();
        let raw: Vec<i32> = descriptor.iter().map(|fd| fd.as_raw_fd()).collect();
        let control = [ControlMessage::ScmRights(&raw)];
        let control = if raw.is_empty() { &[][..] } else { &control };
        loop {
            let mut ready = self.0.writable().await?;
            let sent = ready.try_io(|fd| {
                let data = [IoSlice::new(&data)];
                Ok(sendmsg::<UnixAddr>(
                    fd.as_raw_fd(),
                    &data,
                    control,
                    MsgFlags::MSG_NOSIGNAL,
                    None,
                )?)
            });
            if let Ok(sent) = sent {
                return sent.map(|_| ());
            }
        }
    }

    /// Receives a message; none when the peer has closed.
    ///
    /// # Errors
    /// When the message was cut off or carries several descriptors; all of those are closed.
    pub async fn receive(&self) -> Result<Option<Packet>, TransportError> {
        loop {
            let mut ready = self.0.readable().await?;
            if let Ok(received) = ready.try_io(|fd| receive(fd.get_ref())) {
                return match received? {
                    Received {
                        truncated: true, ..
                    } => Err(TransportError::Truncated),
                    Received { descriptors, .. } if descriptors.len() > 1 => {
                        Err(TransportError::Descriptors(descriptors.len()))
                    }
                    Received { data, .. } if data.is_empty() => Ok(None),
                    Received {
                        data,
                        mut descriptors,
                        ..
                    } => Ok(Some(Packet {
                        data,
                        descriptor: descriptors.pop(),
                    })),
                };
            }
        }
    }
}

fn register(socket: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the AsyncFd owns the descriptor, an OwnedFd always gives the same one, and nobody else closes it.
    unsafe { Ok(AsyncFd::register(socket)?) }
}

struct Received {
    data: Vec<u8>,
    descriptors: Vec<OwnedFd>,
    truncated: bool,
}

fn receive(socket: &OwnedFd) -> io::Result<Received> {
    let mut buffer = [0u8; PACKET];
    // Room for more than one descriptor, so that surplus ones are seen and closed rather than lost.
    let mut control = nix::cmsg_space!([std::os::fd::RawFd; 8]);
    let mut slices = [IoSliceMut::new(&mut buffer)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<UnixAddr>(socket.as_raw_fd(), &mut slices, Some(&mut control), flags)?;
    let mut descriptors = Vec::new();
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = part {
            // SAFETY: the kernel has just made these descriptors for this process and nobody else owns them.
            descriptors.extend(
                raw.into_iter()
                    .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }),
            );
        }
    }
    let truncated = message
        .flags
        .intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC);
    let length = message.bytes;
    Ok(Received {
        data: buffer[..length].to_vec(),
        descriptors,
        truncated,
    })
}

/// The agent's listening end; its file is removed when dropped.
#[derive(Debug)]
pub struct Listener {
    socket: AsyncFd<OwnedFd>,
    path: PathBuf,
}

impl Listener {
    /// Listens at a path, replacing a left-over file.
    ///
    /// # Errors
    /// When the path cannot be bound.
    pub fn bind(path: &Path) -> io::Result<Self> {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let socket = Socket::new(Domain::UNIX, Type::SEQPACKET, None)?;
        socket.bind(&SockAddr::unix(path)?)?;
        socket.listen(16)?;
        socket.set_nonblocking(true)?;
        Ok(Self {
            socket: register(socket.into())?,
            path: path.to_path_buf(),
        })
    }

    /// The next connection.
    ///
    /// # Errors
    /// When the process has no descriptors left, for example.
    pub async fn accept(&self) -> io::Result<Connection> {
        loop {
            let mut ready = self.socket.readable().await?;
            let accepted = ready.try_io(|fd| {
                Ok(accept4(
                    fd.as_raw_fd(),
                    SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC,
                )?)
            });
            if let Ok(raw) = accepted {
                // SAFETY: accept4 has just made this descriptor and nobody else owns it.
                let fd = unsafe { OwnedFd::from_raw_fd(raw?) };
                return Ok(Connection(register(fd)?));
            }
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}
