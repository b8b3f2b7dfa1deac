//! Questions that the mesh cannot answer, passed on to the upstream servers as they came.

use std::cell::Cell;
use std::future::Future;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{Name, Record, RecordType};
use nix::sys::socket::{MsgFlags, recv};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::{sleep, timeout};

/// How long all of it may take.
const ANSWER: Duration = Duration::from_secs(5);
/// How long a server may be silent before the next one is asked as well.
const SILENCE: Duration = Duration::from_millis(500);
/// How often all servers are asked.
const ATTEMPTS: usize = 2;
/// The bytes before the question.
const HEADER: usize = 12;
/// The largest message there is.
const LARGEST: usize = 65_535;

/// A flag of a message: its byte and bit (RFC 1035 §4.1.1, RFC 4035 §3.2.3).
type Flag = (usize, u8);
/// The message is an answer.
const RESPONSE: Flag = (2, 0x80);
/// The answer is from who owns the name.
const AUTHORITATIVE: Flag = (2, 0x04);
/// The answer over UDP was cut off.
const TRUNCATED: Flag = (2, 0x02);
/// The server looks further by itself.
const RECURSION: Flag = (3, 0x80);
/// The server has verified the answer's signatures.
const AUTHENTIC: Flag = (3, 0x20);

/// Codes with which a server says that it cannot help: SERVFAIL, NOTIMP and REFUSED. Another may.
const UNHELPFUL: [u8; 3] = [2, 4, 5];

/// Makes the sockets towards upstream servers, in the pod's namespace for example.
pub trait Sockets {
    /// A UDP socket connected to the server.
    fn udp(&self, server: SocketAddr) -> io::Result<UdpSocket>;
    /// A TCP connection to the server.
    fn tcp(&self, server: SocketAddr) -> impl Future<Output = io::Result<TcpStream>>;
}

/// The servers that a `resolv.conf` names.
pub fn servers(resolv_conf: &str) -> Vec<SocketAddr> {
    let server = |line: &str| {
        let mut words = line.split_whitespace();
        let address: IpAddr = words
            .next()
            .filter(|word| *word == "nameserver")
            .and(words.next())?
            .parse()
            .ok()?;
        Some(SocketAddr::new(address, 53))
    };
    resolv_conf.lines().filter_map(server).take(3).collect()
}

/// The search domains that a `resolv.conf` names, in lower case; of several lists the last.
pub fn search(resolv_conf: &str) -> Vec<String> {
    let mut lists = resolv_conf.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        matches!(words.next()?, "search" | "domain").then(|| {
            let domains = words.map(|word| word.trim_end_matches('.').to_ascii_lowercase());
            domains.filter(|domain| !domain.is_empty()).collect()
        })
    });
    lists.next_back().unwrap_or_default()
}

/// A number for a question on its way up that nobody can guess (RFC 5452 §9.2).
pub fn random_id() -> u16 {
    // Every hasher is keyed anew from the process's secret.
    RandomState::new().build_hasher().finish() as u16
}

/// A query of our own, which wants the servers to look further by themselves.
///
/// # Errors
/// When the name cannot be asked for.
pub fn query(name: &str, kind: RecordType) -> io::Result<Vec<u8>> {
    let wrong = |error: &dyn std::fmt::Display| {
        io::Error::new(io::ErrorKind::InvalidInput, format!("{name}: {error}"))
    };
    let name = Name::from_ascii(format!("{name}.")).map_err(|error| wrong(&error))?;
    let mut message = Message::new(0, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(name.clone(), kind));
    message
        .to_vec()
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error.to_string()))
}

/// The addresses in an answer, and for how long they may be kept.
///
/// # Errors
/// When it is no answer, or one that says why there is none.
pub fn addresses(answer: &[u8]) -> io::Result<(Vec<IpAddr>, Duration)> {
    let message = Message::from_vec(answer)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))?;
    let code = message.metadata.response_code;
    if !matches!(code, ResponseCode::NoError) {
        return Err(io::Error::new(io::ErrorKind::NotFound, code.to_string()));
    }
    let address = |record: &Record| record.data.ip_addr();
    // That of an alias on the way counts as well.
    let shortest = message.answers.iter().map(|record| record.ttl).min();
    let kept = Duration::from_secs(shortest.unwrap_or(0).into());
    Ok((message.answers.iter().filter_map(address).collect(), kept))
}

/// The servers that questions go to, and which of them answered last.
#[derive(Debug, Default)]
pub struct Upstream {
    servers: Vec<SocketAddr>,
    first: Cell<usize>,
}

impl Upstream {
    /// Servers in the order in which they are preferred.
    pub fn new(servers: Vec<SocketAddr>) -> Self {
        Self {
            servers,
            first: Cell::new(0),
        }
    }
}

/// Asks the servers until one can help, first the one that answered last; `id` is a random number for the question on its
/// way up. A server that is silent for a moment is not waited for: the next one is asked as well.
///
/// # Errors
/// The last server's error, when none answers in time.
pub async fn forward(
    query: &[u8],
    id: u16,
    upstream: &Upstream,
    sockets: &impl Sockets,
) -> io::Result<Vec<u8>> {
    let Some(own_id) = query.get(..2) else {
        return Err(io::ErrorKind::InvalidData.into());
    };
    let mut asked = query.to_vec();
    asked[..2].copy_from_slice(&id.to_be_bytes());
    let mut answer = first_help(&asked, upstream, sockets).await?;
    answer[..2].copy_from_slice(own_id);
    set(&mut answer, AUTHORITATIVE, false);
    set(&mut answer, AUTHENTIC, false);
    set(&mut answer, RECURSION, true);
    Ok(answer)
}

/// The first answer that helps, else the last that does not.
async fn first_help(
    query: &[u8],
    upstream: &Upstream,
    sockets: &impl Sockets,
) -> io::Result<Vec<u8>> {
    let (servers, first) = (&upstream.servers, upstream.first.get());
    let mut rest = (0..servers.len() * ATTEMPTS).map(|turn| (first + turn) % servers.len());
    let mut asking = FuturesUnordered::new();
    let mut unhelpful = None;
    let mut last = io::Error::new(io::ErrorKind::NotFound, "there is no upstream server");
    let limit = sleep(ANSWER);
    tokio::pin!(limit);
    let mut next = rest.next();
    loop {
        if let Some(place) = next.take() {
            asking.push(async move { (place, ask(query, servers[place], sockets).await) });
        }
        tokio::select! {
            Some((place, answer)) = asking.next() => match answer {
                Ok(answer) if !UNHELPFUL.contains(&code(&answer)) => {
                    upstream.first.set(place);
                    return Ok(answer);
                }
                Ok(answer) => {
                    unhelpful = Some(answer);
                    next = rest.next();
                }
                Err(error) => {
                    last = error;
                    next = rest.next();
                }
            },
            () = sleep(SILENCE), if rest.len() > 0 => next = rest.next(),
            () = &mut limit => {
                last = io::ErrorKind::TimedOut.into();
                asking.clear();
            }
        }
        if asking.is_empty() && next.is_none() {
            return unhelpful.ok_or(last);
        }
    }
}

async fn ask(query: &[u8], server: SocketAddr, sockets: &impl Sockets) -> io::Result<Vec<u8>> {
    let over_udp = async {
        let socket = sockets.udp(server)?;
        socket.send(query).await?;
        loop {
            let received = receive(&socket).await?;
            match answers(query, &received) {
                Reply::Answer => return Ok(received),
                Reply::Refusal => return Err(refusal(&received)),
                // Whatever does not answer this question is somebody's guess.
                Reply::Other => {}
            }
        }
    };
    let answer = timeout(ANSWER, over_udp).await??;
    if !has(&answer, TRUNCATED) {
        return Ok(answer);
    }
    let over_tcp = async {
        let mut stream = sockets.tcp(server).await?;
        stream.write_all(&framed(query)).await?;
        let length = stream.read_u16().await?;
        let mut answer = vec![0; usize::from(length)];
        stream.read_exact(&mut answer).await?;
        match answers(query, &answer) {
            Reply::Answer => Ok(answer),
            Reply::Refusal => Err(refusal(&answer)),
            Reply::Other => Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the answer is to another question",
            )),
        }
    };
    timeout(ANSWER, over_tcp).await?
}

/// Receives a datagram of any size; there is a buffer only once it has come.
async fn receive(socket: &UdpSocket) -> io::Result<Vec<u8>> {
    // That nobody listens there arrives as an error, not as something to read.
    let interest = Interest::READABLE | Interest::ERROR;
    let take = || {
        let mut buffer = vec![0; LARGEST];
        let length = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        Ok(buffer[..length].to_vec())
    };
    socket.async_io(interest, take).await
}

fn refusal(answer: &[u8]) -> io::Error {
    let code = ResponseCode::from(0, code(answer));
    io::Error::other(format!("the upstream server refuses: {code}"))
}

/// A message as it goes over TCP, behind its length (RFC 1035 §4.2.2).
pub fn framed(message: &[u8]) -> Vec<u8> {
    let length = u16::try_from(message.len()).unwrap_or(u16::MAX);
    let mut framed = length.to_be_bytes().to_vec();
    framed.extend_from_slice(&message[..usize::from(length)]);
    framed
}

/// What a message is to a query.
#[derive(Debug, PartialEq, Eq)]
enum Reply {
    Answer,
    /// An error of a server that does not even repeat the question.
    Refusal,
    Other,
}

/// An answer has the same number and the same question, letter case aside.
fn answers(query: &[u8], message: &[u8]) -> Reply {
    let Some(end) = question_end(query) else {
        return Reply::Other;
    };
    if message.len() < HEADER || message[..2] != query[..2] || !has(message, RESPONSE) {
        return Reply::Other;
    }
    let same_question = || message[HEADER..end].eq_ignore_ascii_case(&query[HEADER..end]);
    if message.len() >= end && message[4..6] == query[4..6] && same_question() {
        Reply::Answer
    } else if message[4..6] == [0, 0] && code(message) != 0 {
        Reply::Refusal
    } else {
        Reply::Other
    }
}

/// Whether a flag of a message is set; not in what is too short for one.
fn has(message: &[u8], (byte, bit): Flag) -> bool {
    message.get(byte).is_some_and(|byte| byte & bit != 0)
}

fn set(message: &mut [u8], (byte, bit): Flag, on: bool) {
    if let Some(byte) = message.get_mut(byte) {
        *byte = if on { *byte | bit } else { *byte & !bit };
    }
}

/// The response code of a message.
fn code(message: &[u8]) -> u8 {
    message.get(3).map_or(0, |byte| byte & 0x0f)
}

/// Where the only question of a query ends.
fn question_end(query: &[u8]) -> Option<usize> {
    let mut at = HEADER;
    loop {
        let length = usize::from(*query.get(at)?);
        match length {
            0 => break,
            1..=63 => at += length + 1,
            _ => return None,
        }
    }
    (at + 5 <= query.len()).then_some(at + 5)
}

#[cfg(test)]
#[path = "forward_tests.rs"]
mod tests;
