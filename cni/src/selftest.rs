//! Proof that a pod is captured: a connection of the pod's own that must end where the proxy will listen.
//!
//! Rules that are listed are not yet rules that work: another table may come first, a module may be missing, the
//! namespace may be the wrong one. So the pod dials out before the proxy is told of it, towards addresses that belong
//! to nobody and with packets that live for one hop, and this end must get to see it.

use std::io::{self, ErrorKind, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, SockRef, Socket, Type};
use thiserror::Error;

use crate::netns::within;
use crate::rules::{CaptureConfig, DNS_PORT, Family, OUTBOUND_PORT};

/// How long a redirected packet may take; it never leaves the namespace.
const ARRIVES: Duration = Duration::from_secs(1);
/// The pause between two looks.
const LOOK: Duration = Duration::from_millis(1);

/// What was proven.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Proof {
    /// What the pod sends comes to the proxy's ports.
    Captured,
    /// Somebody listens on the proxy's ports already, so nothing was dialled.
    Served,
    /// The pod has no route to anywhere, so it can send nothing.
    Isolated,
}

/// Why a pod is not captured, although it holds the rules.
#[derive(Debug, Error)]
pub enum SelfTestError {
    #[error(
        "the pod's {0} connections do not come to port {OUTBOUND_PORT}: its rules are there but do not work; look \
         for other rules in its namespace that come first, and for a CNI plugin that replaces its network"
    )]
    NotCaptured(Family),
    #[error("the pod's {0} DNS queries do not come to port {DNS_PORT}, although its rules say so")]
    DnsNotCaptured(Family),
    #[error("the self-test cannot be made: {0}")]
    Io(#[from] io::Error),
}

/// Dials from the pod as its applications do, and looks where it arrives.
///
/// # Errors
/// What is not captured.
pub fn prove(netns: BorrowedFd<'_>, config: &CaptureConfig) -> Result<Proof, SelfTestError> {
    let mut proof = Proof::Isolated;
    for family in [Family::V4, Family::V6] {
        if family == Family::V6 && !config.captures_ipv6() {
            continue;
        }
        let outcome = within(netns, || Ok(dial(family)))??;
        match outcome {
            Proof::Served => return Ok(Proof::Served),
            Proof::Isolated => continue,
            Proof::Captured => proof = Proof::Captured,
        }
        if config.dns {
            within(netns, || Ok(query(family)))??;
        }
    }
    Ok(proof)
}

/// An address for documentation, which no network has (RFC 5737, RFC 3849).
fn nowhere(family: Family, port: u16) -> SocketAddr {
    match family {
        Family::V4 => (Ipv4Addr::new(192, 0, 2, 127), port).into(),
        Family::V6 => (Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0x7f, 0x7f), port).into(),
    }
}

fn any(family: Family, port: u16) -> SocketAddr {
    let ip = match family {
        Family::V4 => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        Family::V6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    (ip, port).into()
}

fn domain(family: Family) -> Domain {
    match family {
        Family::V4 => Domain::IPV4,
        Family::V6 => Domain::IPV6,
    }
}

fn socket(family: Family, kind: Type, protocol: Protocol) -> io::Result<Socket> {
    let socket = Socket::new(domain(family), kind, Some(protocol))?;
    socket.set_nonblocking(true)?;
    if family == Family::V6 {
        socket.set_only_v6(true)?;
    }
    Ok(socket)
}

/// Nothing is to leave the node, should the rules not work.
fn one_hop(socket: &Socket, family: Family) -> io::Result<()> {
    match family {
        Family::V4 => socket.set_ttl_v4(1),
        Family::V6 => socket.set_unicast_hops_v6(1),
    }
}

fn dial(family: Family) -> Result<Proof, SelfTestError> {
    let listener = socket(family, Type::STREAM, Protocol::TCP)?;
    if let Some(proof) = occupied(listener.bind(&any(family, OUTBOUND_PORT).into()))? {
        return Ok(proof);
    }
    if let Some(proof) = occupied(listener.listen(16))? {
        return Ok(proof);
    }
    let client = socket(family, Type::STREAM, Protocol::TCP)?;
    one_hop(&client, family)?;
    // No trace is to stay behind: a reset ends both sides at once.
    client.set_linger(Some(Duration::ZERO))?;
    let target = nowhere(family, 80);
    match client.connect(&target.into()) {
        Ok(()) => {}
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {}
        Err(error) if is_unroutable(&error) => return Ok(Proof::Isolated),
        Err(error) => return Err(error.into()),
    }
    let own = client.local_addr()?.as_socket();
    let listener = TcpListener::from(listener);
    let end = Instant::now() + ARRIVES;
    while Instant::now() < end {
        match listener.accept() {
            Ok((accepted, peer)) => {
                SockRef::from(&accepted).set_linger(Some(Duration::ZERO))?;
                // An application of the pod may dial at the same time; it is refused, as without a proxy.
                let ours = own.is_some_and(|own| own.port() == peer.port());
                if ours && original(&accepted, family)? == Some(target) {
                    return Ok(Proof::Captured);
                }
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => std::thread::sleep(LOOK),
            Err(error) => return Err(error.into()),
        }
    }
    Err(SelfTestError::NotCaptured(family))
}

fn query(family: Family) -> Result<(), SelfTestError> {
    let listener = socket(family, Type::DGRAM, Protocol::UDP)?;
    if occupied(listener.bind(&any(family, DNS_PORT).into()))?.is_some() {
        return Ok(());
    }
    let client = socket(family, Type::DGRAM, Protocol::UDP)?;
    one_hop(&client, family)?;
    let text = format!("self-test {}", std::process::id());
    match client.send_to(text.as_bytes(), &nowhere(family, 53).into()) {
        Ok(_) => {}
        Err(error) if is_unroutable(&error) => return Ok(()),
        Err(error) => return Err(error.into()),
    }
    let listener = UdpSocket::from(listener);
    let mut buffer = [0; 64];
    let end = Instant::now() + ARRIVES;
    while Instant::now() < end {
        match listener.recv_from(&mut buffer) {
            Ok((length, _)) if &buffer[..length] == text.as_bytes() => return Ok(()),
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => std::thread::sleep(LOOK),
            Err(error) => return Err(error.into()),
        }
    }
    Err(SelfTestError::DnsNotCaptured(family))
}

fn occupied(bound: io::Result<()>) -> io::Result<Option<Proof>> {
    match bound {
        Ok(()) => Ok(None),
        Err(error) if error.kind() == ErrorKind::AddrInUse => Ok(Some(Proof::Served)),
        Err(error) => Err(error),
    }
}

fn is_unroutable(error: &io::Error) -> bool {
    let codes = [libc::ENETUNREACH, libc::EHOSTUNREACH, libc::EADDRNOTAVAIL];
    error
        .raw_os_error()
        .is_some_and(|code| codes.contains(&code))
}

/// Where a redirected connection was going.
fn original(accepted: &std::net::TcpStream, family: Family) -> io::Result<Option<SocketAddr>> {
    let accepted = SockRef::from(accepted);
    let original = match family {
        Family::V4 => accepted.original_dst_v4(),
        Family::V6 => accepted.original_dst_v6(),
    };
    match original {
        Ok(address) => Ok(address.as_socket()),
        // It was not redirected.
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether somebody listens for the pod's egress, which a proxy that serves the pod does.
///
/// # Errors
/// When the namespace cannot be entered.
pub fn is_served(netns: BorrowedFd<'_>) -> io::Result<bool> {
    within(netns, || {
        let listening = |path: &str| -> io::Result<bool> {
            let mut table = String::new();
            match std::fs::File::open(path) {
                Ok(mut file) => file.read_to_string(&mut table)?,
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
                Err(error) => return Err(error),
            };
            Ok(table.lines().skip(1).any(listens))
        };
        Ok(listening("/proc/thread-self/net/tcp")? || listening("/proc/thread-self/net/tcp6")?)
    })
}

/// Whether a line of `/proc/net/tcp` is of a listener on the port for egress (proc(5)).
fn listens(line: &str) -> bool {
    const LISTEN: &str = "0A";
    let mut fields = line.split_ascii_whitespace();
    let port = fields.nth(1).and_then(|local| local.rsplit(':').next());
    let port = port.and_then(|port| u16::from_str_radix(port, 16).ok());
    port == Some(OUTBOUND_PORT) && fields.nth(1) == Some(LISTEN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listeners_are_told_from_connections() {
        let listener = "   0: 00000000:3A99 00000000:0000 0A 00000000:00000000 00:00000000";
        let connection = "   1: 0100007F:3A99 0100007F:8234 01 00000000:00000000 00:00000000";
        let other = "   2: 00000000:3A9A 00000000:0000 0A 00000000:00000000 00:00000000";
        assert!(listens(listener));
        assert!(!listens(connection));
        assert!(!listens(other));
        assert!(!listens("rubbish"));
    }
}
