//! Addresses of workloads that have only a hostname: resolved when a flow needs them, in the proxy's own namespace.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hickory_proto::rr::RecordType;
use tokio::net::{TcpStream, UdpSocket};

use super::forward::{self, Sockets, Upstream, forward};

/// So many hostnames are remembered.
const REMEMBERED: usize = 4096;
/// How long an answer is used at least and at most, whatever its records say: the flow that waits for it must find it.
const KEPT: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(3600));
/// How long a failure is remembered, so that not every flow waits for the next.
const FAILED: Duration = Duration::from_secs(2);
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// What is known of a hostname.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Host {
    Addresses(Arc<[IpAddr]>),
    /// Nobody could be asked, or the name does not exist.
    Unresolved,
}

/// What is known of all hostnames. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Hosts(Arc<Mutex<Known>>);

/// Each hostname with what is known of it, and until when.
type Known = HashMap<Box<str>, (Instant, Host)>;

impl Hosts {
    /// What is known of a hostname now.
    pub fn get(&self, hostname: &str) -> Option<Host> {
        let known = self.known();
        let (until, host) = known.get(hostname)?;
        (Instant::now() < *until).then(|| host.clone())
    }

    /// Resolves a hostname, unless it is known.
    pub async fn resolve(&self, hostname: &str, ipv6: bool) {
        if self.get(hostname).is_some() {
            return;
        }
        let text = std::fs::read_to_string(RESOLV_CONF).unwrap_or_default();
        let upstream = Upstream::new(forward::servers(&text));
        let (host, kept) = match ask(hostname, ipv6, &upstream).await {
            Ok((addresses, kept)) => (
                Host::Addresses(addresses.into()),
                kept.clamp(KEPT.0, KEPT.1),
            ),
            Err(error) => {
                tracing::warn!("{hostname} cannot be resolved: {error}");
                (Host::Unresolved, FAILED)
            }
        };
        let now = Instant::now();
        let mut known = self.known();
        if known.len() >= REMEMBERED {
            known.retain(|_, (until, _)| now < *until);
        }
        if known.len() >= REMEMBERED {
            known.clear();
        }
        known.insert(hostname.into(), (now + kept, host));
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The addresses of both families; a family without any is no error.
async fn ask(
    hostname: &str,
    ipv6: bool,
    upstream: &Upstream,
) -> io::Result<(Vec<IpAddr>, Duration)> {
    let of = async |kind| {
        let query = forward::query(hostname, kind)?;
        let answer = forward(&query, forward::random_id(), upstream, &Here).await?;
        forward::addresses(&answer)
    };
    let v6 = async {
        match ipv6 {
            true => of(RecordType::AAAA).await,
            false => Ok((Vec::new(), KEPT.1)),
        }
    };
    match tokio::join!(of(RecordType::A), v6) {
        (Ok((mut v4, kept_v4)), Ok((v6, kept_v6))) => {
            let kept = match (v4.is_empty(), v6.is_empty()) {
                (false, true) => kept_v4,
                (true, false) => kept_v6,
                _ => kept_v4.min(kept_v6),
            };
            v4.extend(v6);
            Ok((v4, kept))
        }
        (Ok(found), Err(_)) | (Err(_), Ok(found)) if !found.0.is_empty() => Ok(found),
        (Err(error), _) | (_, Err(error)) => Err(error),
    }
}

/// Sockets of the process's own namespace.
struct Here;

impl Sockets for Here {
    fn udp(&self, server: SocketAddr) -> io::Result<UdpSocket> {
        let any: IpAddr = match server {
            SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let socket = std::net::UdpSocket::bind((any, 0))?;
        socket.connect(server)?;
        socket.set_nonblocking(true)?;
        UdpSocket::from_std(socket)
    }

    async fn tcp(&self, server: SocketAddr) -> io::Result<TcpStream> {
        TcpStream::connect(server).await
    }
}
