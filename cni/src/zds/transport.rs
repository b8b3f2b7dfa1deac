//! Packets over a unix socket, one message each, some with a descriptor.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, UnixAddr, accept4, recv, recvmsg,
    sendmsg,
};
use prost::Message;
use socket2::{Domain, SockAddr, Socket, Type};
use thiserror::Error;
use tokio::io::unix::AsyncFd;

/// The largest message, in bytes.
const PACKET: usize = 1024;
/// The most descriptors that the kernel lets one message carry.
const DESCRIPTORS: usize = 253;

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
    /// Connects to the agent, without waiting.
    ///
    /// # Errors
    /// When nobody listens there, or too many already wait to be let in.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let socket = Socket::new(Domain::UNIX, Type::SEQPACKET, None)?;
        socket.set_nonblocking(true)?;
        socket.connect(&SockAddr::unix(path)?)?;
        Ok(Self(register(socket.into())?))
    }

    /// Sends a message, with a descriptor if given.
    ///
    /// # Errors
    /// When the peer is gone, or the message is longer than the peer would read.
    pub async fn send(
        &self,
        message: &impl Message,
        descriptor: Option<BorrowedFd<'_>>,
    ) -> io::Result<()> {
        let data = message.encode_to_vec();
        if data.len() > PACKET {
            let text = format!("{} bytes do not fit a packet of {PACKET}", data.len());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
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

    /// Whether nothing has arrived that was not received yet; the peer's closing counts as something.
    pub fn is_quiet(&self) -> bool {
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        recv(self.0.as_raw_fd(), &mut [0], flags) == Err(Errno::EAGAIN)
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
    // Room for all the descriptors there can be, so that surplus ones are seen and closed rather than lost.
    let mut control = nix::cmsg_space!([std::os::fd::RawFd; DESCRIPTORS]);
    let mut slices = [IoSliceMut::new(&mut buffer)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<UnixAddr>(socket.as_raw_fd(), &mut slices, Some(&mut control), flags)?;
    let mut descriptors = Vec::new();
    // A control message is cut off only when this process can hold no more descriptors.
    for part in message.cmsgs().into_iter().flatten() {
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

/// The agent's listening end; its file is removed when dropped, unless a successor has replaced it.
#[derive(Debug)]
pub struct Listener {
    socket: AsyncFd<OwnedFd>,
    path: PathBuf,
    /// Device and inode of the file.
    file: Option<(u64, u64)>,
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
            file: file_id(path),
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
        if self.file.is_some() && file_id(&self.path) == self.file {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn file_id(path: &Path) -> Option<(u64, u64)> {
    let metadata = std::fs::symlink_metadata(path).ok()?;
    Some((metadata.dev(), metadata.ino()))
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::super::messages::{DelWorkload, ZdsHello};
    use super::*;

    fn hello(version: i32) -> ZdsHello {
        ZdsHello { version }
    }

    /// A connection and the bare other end of it.
    fn pair() -> (Connection, Socket) {
        let (near, far) = Socket::pair(Domain::UNIX, Type::SEQPACKET, None).unwrap();
        near.set_nonblocking(true).unwrap();
        (Connection(register(near.into()).unwrap()), far)
    }

    fn send_descriptors(socket: &Socket, descriptors: &[std::os::fd::RawFd]) {
        let control = [ControlMessage::ScmRights(descriptors)];
        let data = [IoSlice::new(b"\x08\x01")];
        sendmsg::<UnixAddr>(socket.as_raw_fd(), &data, &control, MsgFlags::empty(), None).unwrap();
    }

    fn path(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("wrn-transport-{}-{name}", std::process::id()))
    }

    #[tokio::test]
    async fn messages_keep_their_bounds_and_the_end_is_told() {
        let (near, far) = pair();
        assert!(near.is_quiet());
        far.send(b"\x08\x01").unwrap();
        far.send(b"\x08\x02").unwrap();
        assert!(!near.is_quiet());
        for version in [1, 2] {
            let packet = near.receive().await.unwrap().unwrap();
            assert_eq!(packet.decode::<ZdsHello>().unwrap(), hello(version));
        }
        assert!(near.is_quiet());
        drop(far);
        assert!(!near.is_quiet());
        assert!(near.receive().await.unwrap().is_none());
        assert!(near.send(&hello(1), None).await.is_err());
    }

    #[tokio::test]
    async fn a_descriptor_that_arrives_is_the_file_that_was_sent() {
        let (near, far) = pair();
        let file = File::open("/proc/self/status").unwrap();
        send_descriptors(&far, &[file.as_raw_fd()]);
        let packet = near.receive().await.unwrap().unwrap();
        let arrived = File::from(packet.descriptor.unwrap()).metadata().unwrap();
        let sent = file.metadata().unwrap();
        assert_eq!((arrived.dev(), arrived.ino()), (sent.dev(), sent.ino()));
    }

    #[tokio::test]
    async fn several_descriptors_are_refused_and_all_closed() {
        for count in [2, 9, DESCRIPTORS] {
            let (near, far) = pair();
            let (kept, passed) = Socket::pair(Domain::UNIX, Type::STREAM, None).unwrap();
            send_descriptors(&far, &vec![passed.as_raw_fd(); count]);
            let refused = near.receive().await.unwrap_err();
            assert_eq!(refused.to_string(), format!("Expected 1 FD, got {count}"));
            drop(passed);
            kept.set_read_timeout(Some(std::time::Duration::from_secs(5)))
                .unwrap();
            // The end of the stream shows that no copy of its other end is open any more.
            assert_eq!(recv(kept.as_raw_fd(), &mut [0], MsgFlags::empty()), Ok(0));
        }
    }

    #[tokio::test]
    async fn what_exceeds_a_packet_is_neither_sent_nor_taken() {
        let (near, far) = pair();
        let long = DelWorkload {
            uid: "x".repeat(PACKET),
        };
        let unsent = near.send(&long, None).await.unwrap_err();
        assert_eq!(unsent.kind(), io::ErrorKind::InvalidInput);
        far.send(&long.encode_to_vec()).unwrap();
        let cut = near.receive().await.unwrap_err();
        assert_eq!(cut.to_string(), "received truncated message");
        far.send(b"\x08\x01").unwrap();
        assert!(near.receive().await.unwrap().is_some());
    }

    #[tokio::test]
    async fn a_listener_replaces_what_was_left_and_leaves_its_successor_alone() {
        let path = path("successor");
        std::fs::write(&path, "left over").unwrap();
        let old = Listener::bind(&path).unwrap();
        let new = Listener::bind(&path).unwrap();
        drop(old);
        let _client = Connection::connect(&path).unwrap();
        new.accept().await.unwrap();
        drop(new);
        assert!(!path.exists());
        let gone = Connection::connect(&path).unwrap_err();
        assert_eq!(gone.kind(), io::ErrorKind::NotFound);
    }
}
