//! What the lab's commands and a running lab say to each other over its socket: one JSON line each way.
//!
//! `exec` sends its three standard descriptors along with the line.

use std::io::{BufRead, BufReader, Error, ErrorKind, IoSlice, IoSliceMut, Result, Write};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, sendmsg};
use serde::{Deserialize, Serialize};

use super::family::{Addresses, IpFamily};
use super::manifest::{Key, Object};

/// The longest line that is read.
const LONGEST_LINE: usize = 64 << 20;

/// What a command asks.
#[derive(Debug, Serialize, Deserialize)]
pub enum Request {
    Status,
    Apply(Vec<Object>),
    Delete(Vec<Key>),
    /// Answered with `Answer::Ended` when the command has ended.
    Exec {
        pod: PodName,
        command: Vec<String>,
    },
    /// Watches the bridge for `needles` until the caller hangs up or sends an empty line.
    Watch {
        needles: Vec<String>,
    },
    Down,
}

/// `POD` or `deploy/NAME`, and the namespace.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PodName {
    pub namespace: String,
    pub name: String,
}

/// What the lab answers.
#[derive(Debug, Serialize, Deserialize)]
pub enum Answer {
    Refused(String),
    Status(Status),
    /// What became of each object, in kubectl's words.
    Changed(Vec<String>),
    Watching,
    Watched(Sighting),
    /// The exit code, or 128 and the signal.
    Ended(i32),
    Down,
}

/// Everything that `warren lab status` shows.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Status {
    pub families: IpFamily,
    pub control: Process,
    pub nodes: Vec<NodeStatus>,
    pub pods: Vec<PodStatus>,
    pub services: Vec<ServiceStatus>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Process {
    pub ready: bool,
    pub restarts: u32,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NodeStatus {
    pub name: String,
    pub addresses: Addresses,
    pub proxy: Process,
    /// The ready pods that its proxy has not yet heard of as they are, `namespace/name`.
    pub news: Vec<String>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PodStatus {
    pub namespace: String,
    pub name: String,
    pub deployment: Option<String>,
    pub node: String,
    pub addresses: Addresses,
    pub ready: bool,
    pub restarts: u32,
    pub capture: Capture,
    pub containers: Vec<String>,
}

/// How a pod stands to the mesh.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Capture {
    /// Not asked for.
    Outside,
    Captured,
    /// Asked for, and what is wrong.
    Failed(String),
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ServiceStatus {
    pub namespace: String,
    pub name: String,
    pub addresses: Option<Addresses>,
    pub ports: Vec<u16>,
}

/// What a watch of the bridge saw.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sighting {
    pub frames: u64,
    pub bytes: u64,
    /// Frames from or to the tunnel port.
    pub tunnel_frames: u64,
    /// How many frames contained each needle, in the order in which they were given.
    pub found: Vec<u64>,
    /// Frames that the kernel could not hand over.
    pub lost: u64,
}

/// Writes one message as a line.
pub fn send(mut stream: &UnixStream, message: &impl Serialize) -> Result<()> {
    stream.write_all(&line(message)?)
}

/// Writes one message with descriptors.
pub fn send_with(stream: &UnixStream, message: &impl Serialize, fds: &[BorrowedFd]) -> Result<()> {
    let line = line(message)?;
    let raw: Vec<i32> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let sent = sendmsg::<UnixAddr>(
        stream.as_raw_fd(),
        &[IoSlice::new(&line)],
        &[ControlMessage::ScmRights(&raw)],
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    let mut stream = stream;
    stream.write_all(&line[sent..])
}

/// Reads one message.
///
/// # Errors
/// `UnexpectedEof` when the other end hung up.
pub fn receive<T: for<'a> Deserialize<'a>>(reader: &mut BufReader<&UnixStream>) -> Result<T> {
    let mut line = Vec::new();
    let mut limited = std::io::Read::take(reader, LONGEST_LINE as u64);
    limited.read_until(b'\n', &mut line)?;
    parse(&line)
}

/// Reads the first message of a connection and the descriptors that came with it.
pub fn receive_with<T: for<'a> Deserialize<'a>>(stream: &UnixStream) -> Result<(T, Vec<OwnedFd>)> {
    let mut line = Vec::new();
    let mut fds = Vec::new();
    let mut chunk = vec![0_u8; 64 << 10];
    while line.last() != Some(&b'\n') {
        let mut space = nix::cmsg_space!([i32; 3]);
        let mut parts = [IoSliceMut::new(&mut chunk)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = recvmsg::<UnixAddr>(stream.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(raw) = control {
                // SAFETY: the kernel has just made these descriptors for this process; nobody else owns them.
                fds.extend(
                    raw.into_iter()
                        .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }),
                );
            }
        }
        let read = message.bytes;
        if read == 0 || line.len() + read > LONGEST_LINE {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        line.extend_from_slice(&chunk[..read]);
    }
    Ok((parse(&line)?, fds))
}

fn line(message: &impl Serialize) -> Result<Vec<u8>> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    Ok(line)
}

fn parse<T: for<'a> Deserialize<'a>>(line: &[u8]) -> Result<T> {
    if line.last() != Some(&b'\n') {
        return Err(ErrorKind::UnexpectedEof.into());
    }
    serde_json::from_slice(line).map_err(|e| Error::new(ErrorKind::InvalidData, e))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn a_request_travels_with_its_descriptors() {
        let (one, other) = UnixStream::pair().unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        let request = Request::Exec {
            pod: PodName {
                namespace: "default".into(),
                name: "deploy/curl".into(),
            },
            command: vec!["x".repeat(100_000)],
        };
        let sender = std::thread::spawn(move || {
            send_with(&one, &request, &[file.as_fd(), file.as_fd()]).unwrap();
            let answer: Answer = receive(&mut BufReader::new(&one)).unwrap();
            assert!(matches!(answer, Answer::Ended(7)));
        });
        let (request, fds) = receive_with::<Request>(&other).unwrap();
        assert_eq!(fds.len(), 2);
        assert!(matches!(request, Request::Exec { command, .. } if command[0].len() == 100_000));
        send(&other, &Answer::Ended(7)).unwrap();
        sender.join().unwrap();
    }

    #[test]
    fn half_a_line_is_no_message() {
        let (mut one, other) = UnixStream::pair().unwrap();
        one.write_all(b"\"Status\"").unwrap();
        drop(one);
        assert!(receive_with::<Request>(&other).is_err());
    }
}
