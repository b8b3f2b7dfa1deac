//! SOCKS5 (RFC 1928) for an application that asks for its connections instead of having them captured.
//!
//! No authentication, CONNECT only. The answer is given once the flow is open, so that it tells the truth.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::rc::Rc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::outbound::{self, Entry};
use super::pod::Pod;
use super::{Accepted, Refusal, pod_dns};
use crate::telemetry::{Direction, Flow, FlowError, Reason};

/// How long a client may take to say what it wants.
const REQUEST: Duration = Duration::from_secs(10);

/// How long a client that is not understood may take to see so.
const LINGER: Duration = Duration::from_secs(1);

const VERSION: u8 = 5;
const NO_AUTHENTICATION: u8 = 0;
const NO_METHOD: u8 = 0xff;
const CONNECT: u8 = 1;
const IPV4: u8 = 1;
const DOMAIN: u8 = 3;
const IPV6: u8 = 4;

/// An answer to a request (RFC 1928 §6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reply {
    Succeeded = 0,
    Failure = 1,
    NotAllowed = 2,
    HostUnreachable = 4,
    Refused = 5,
    NotSupported = 7,
}

/// Where the client wants to go.
#[derive(Debug, PartialEq, Eq)]
enum Target {
    Address(SocketAddr),
    Name(String, u16),
}

/// Serves one connection accepted on the SOCKS5 port.
pub fn serve(pod: Rc<Pod>, accepted: Accepted) -> impl Future<Output = ()> {
    outbound::serve_entry(pod, accepted, Entry::Socks5)
}

/// Learns from a client where it wants to go; none when that is not to be had, which has been told then.
pub async fn target(
    pod: &Rc<Pod>,
    socket: &mut TcpStream,
    client: SocketAddr,
) -> Option<SocketAddr> {
    let local = socket.local_addr().ok()?;
    let deny = |reason, text: String| {
        let telemetry = pod.shared.telemetry.clone();
        let error = FlowError::new(reason, text);
        Flow::new(Direction::Outbound, client, local, telemetry).early_deny(&error);
        None
    };
    let asked = timeout(REQUEST, request(socket)).await;
    match asked.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
        Ok(Target::Address(target)) => Some(target),
        Ok(Target::Name(name, port)) => match resolve(pod, &name).await {
            Ok(ip) => Some(SocketAddr::new(ip, port)),
            Err(error) => {
                let _ = reply(socket, Reply::HostUnreachable).await;
                deny(Reason::UnknownHost, format!("dns: {name}: {error}"))
            }
        },
        Err(error) => deny(Reason::BadRequest, format!("socks5: {error}")),
    }
}

/// Tells a client how the flow that it asked for has begun, or why it has not.
pub async fn answer(socket: &mut TcpStream, refusal: Option<&Refusal>) {
    let code = refusal.map_or(Reply::Succeeded, Reply::of);
    // A client that is gone by now is met again while its flow is carried.
    let _ = reply(socket, code).await;
}

impl Reply {
    fn of(refusal: &Refusal) -> Self {
        match refusal {
            Refusal::Early(_) => Self::Failure,
            // Also when it was the peer who said so.
            Refusal::Failed(error) if error.reason.flag() == "DENY" => Self::NotAllowed,
            Refusal::Failed(_) => Self::Refused,
        }
    }
}

/// Reads what a client wants; what is not understood has been answered when this fails.
async fn request(socket: &mut TcpStream) -> io::Result<Target> {
    let version = socket.read_u8().await?;
    if version != VERSION {
        return refuse(socket, Reply::NotSupported, "the client speaks no SOCKS5").await;
    }
    let mut methods = vec![0; usize::from(socket.read_u8().await?)];
    socket.read_exact(&mut methods).await?;
    if !methods.contains(&NO_AUTHENTICATION) {
        socket.write_all(&[VERSION, NO_METHOD]).await?;
        return Err(unsupported("the client insists on authentication"));
    }
    socket.write_all(&[VERSION, NO_AUTHENTICATION]).await?;
    let [version, command, _, kind] = read(socket).await?;
    if version != VERSION {
        return refuse(socket, Reply::NotSupported, "the request is no SOCKS5").await;
    }
    if command != CONNECT {
        return refuse(socket, Reply::NotSupported, "only CONNECT is supported").await;
    }
    Ok(match kind {
        IPV4 => {
            let ip = Ipv4Addr::from(read::<4>(socket).await?);
            Target::Address(SocketAddr::new(ip.into(), socket.read_u16().await?))
        }
        IPV6 => {
            let ip = IpAddr::from(Ipv6Addr::from(read::<16>(socket).await?));
            let port = socket.read_u16().await?;
            Target::Address(SocketAddr::new(ip.to_canonical(), port))
        }
        DOMAIN => {
            let mut name = vec![0; usize::from(socket.read_u8().await?)];
            socket.read_exact(&mut name).await?;
            let port = socket.read_u16().await?;
            let Ok(name) = String::from_utf8(name) else {
                return refuse(socket, Reply::NotSupported, "the host name is no text").await;
            };
            match name.parse::<IpAddr>() {
                Ok(ip) => Target::Address(SocketAddr::new(ip, port)),
                Err(_) => Target::Name(name, port),
            }
        }
        _ => {
            return refuse(
                socket,
                Reply::NotSupported,
                "the address is of no known kind",
            )
            .await;
        }
    })
}

async fn read<const N: usize>(socket: &mut TcpStream) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    socket.read_exact(&mut bytes).await?;
    Ok(bytes)
}

async fn refuse<T>(socket: &mut TcpStream, code: Reply, why: &str) -> io::Result<T> {
    reply(socket, code).await?;
    // What is left unread would turn the answer into a reset.
    socket.shutdown().await?;
    let mut rest = [0; 512];
    let _ = timeout(LINGER, socket.read(&mut rest)).await;
    Err(unsupported(why))
}

fn unsupported(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

async fn reply(socket: &mut TcpStream, code: Reply) -> io::Result<()> {
    let bound = [0; 6];
    socket.write_all(&[VERSION, code as u8, 0, IPV4]).await?;
    socket.write_all(&bound).await
}

/// The first address of a name, as the pod's DNS would give it; IPv4 before IPv6.
async fn resolve(pod: &Rc<Pod>, name: &str) -> io::Result<IpAddr> {
    let mut last = io::Error::new(
        io::ErrorKind::NotFound,
        "dns response had no valid IP addresses",
    );
    for v6 in [false, true] {
        match pod_dns::lookup(pod, name, v6).await {
            Ok(addresses) => {
                if let Some(ip) = addresses.first() {
                    return Ok(*ip);
                }
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}
