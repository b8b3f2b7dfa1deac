//! The sockets of the data path: listeners inside pods' namespaces, and the options of whatever connects.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener as StdListener, UdpSocket};
use std::os::fd::AsFd;

use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::net::TcpStream;

use super::netns::PodNetns;
use crate::config::{
    Config, HBONE_PORT, ListenAddress, Mode, OUTBOUND_PORT, PLAINTEXT_PORT, SOCKS5_PORT,
};

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 1024;

/// The listeners of one pod for one worker; those that the configuration does not ask for are not there.
#[derive(Debug, Default)]
pub struct Listeners {
    pub outbound: Option<StdListener>,
    pub plaintext: Option<StdListener>,
    pub hbone: Option<StdListener>,
    pub socks5: Option<StdListener>,
    pub dns_udp: Vec<UdpSocket>,
    pub dns_tcp: Vec<StdListener>,
    /// Whether connections made for arrivals may carry the client's address.
    pub transparent: bool,
}

/// Opens a pod's listeners for every worker.
///
/// # Errors
/// Which address could not be bound, and why.
pub fn listen(netns: &PodNetns, config: &Config) -> io::Result<Vec<Listeners>> {
    netns.run(|| {
        // Connections that arrive while a proxy closes its listener go on to that of its successor. Where this cannot be
        // set, only the queue is emptied before.
        if config.mode == Mode::Shared {
            let _ = std::fs::write("/proc/sys/net/ipv4/tcp_migrate_req", "1");
        }
        let families = Families {
            // One socket takes both families, even where the pod has an address of only one.
            wildcard: if config.ipv6 && Socket::new(Domain::IPV6, Type::STREAM, None).is_ok() {
                IpAddr::V6(Ipv6Addr::UNSPECIFIED)
            } else {
                IpAddr::V4(Ipv4Addr::UNSPECIFIED)
            },
            // Without IPv6 in the pod there is nothing to listen to on its loopback address.
            loopback_v6: config.ipv6 && has_ipv6(),
        };
        (0..config.workers)
            .map(|_| listen_here(config, families))
            .collect()
    })
}

/// Opens the listeners of the proxy's own workload, for every worker: it only takes HBONE.
///
/// # Errors
/// Which address could not be bound, and why.
pub fn listen_for_own(config: &Config) -> io::Result<Vec<Listeners>> {
    let address = SocketAddr::new(config.wildcard(), HBONE_PORT);
    let one = |_| {
        Ok(Listeners {
            hbone: Some(listener(address, config)?.into()),
            ..Listeners::default()
        })
    };
    (0..config.workers).map(one).collect()
}

/// Whether a namespace still has a way to others: that of a pod that is gone has only its loopback left.
pub fn is_connected(netns: &PodNetns) -> bool {
    let interfaces = netns.run(|| Ok(nix::net::if_::if_nameindex()?));
    interfaces.is_ok_and(|interfaces| {
        interfaces
            .to_slice()
            .iter()
            .any(|interface| interface.name() != c"lo")
    })
}

/// What can be listened to in a pod.
#[derive(Clone, Copy)]
struct Families {
    wildcard: IpAddr,
    loopback_v6: bool,
}

fn listen_here(config: &Config, families: Families) -> io::Result<Listeners> {
    let wildcard = families.wildcard;
    let mut transparent = true;
    let mut tcp = |port| {
        let socket = listener(SocketAddr::new(wildcard, port), config)?;
        transparent &= make_transparent(&socket, wildcard.is_ipv6(), config.original_source)?;
        // What is accepted inherits these, so that it need not be asked for again and again.
        let _ = socket.set_tcp_nodelay(true);
        // Tunnels ping each other.
        if port != HBONE_PORT {
            keep_alive(&SockRef::from(&socket), config);
        }
        Ok::<_, io::Error>(StdListener::from(socket))
    };
    let mut listeners = Listeners::default();
    if config.proxy {
        listeners.outbound = Some(tcp(OUTBOUND_PORT)?);
        listeners.plaintext = Some(tcp(PLAINTEXT_PORT)?);
        listeners.hbone = Some(tcp(HBONE_PORT)?);
    }
    listeners.transparent = transparent;
    if config.socks5 {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, SOCKS5_PORT));
        listeners.socks5 = Some(listener(address, config)?.into());
    }
    if config.dns {
        for address in addresses(config.dns_address, families.loopback_v6) {
            let udp = bind(address, Type::DGRAM, Protocol::UDP, config)?;
            listeners.dns_udp.push(udp.into());
            listeners.dns_tcp.push(listener(address, config)?.into());
        }
    }
    Ok(listeners)
}

/// The addresses that an address setting stands for.
pub fn addresses(setting: ListenAddress, ipv6: bool) -> Vec<SocketAddr> {
    match setting {
        ListenAddress::At(address) => vec![address],
        ListenAddress::Localhost(port) => {
            let v4 = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
            let v6 = SocketAddr::from((Ipv6Addr::LOCALHOST, port));
            if ipv6 { vec![v4, v6] } else { vec![v4] }
        }
    }
}

/// Whether the calling thread's namespace has IPv6 on its loopback.
pub fn has_ipv6() -> bool {
    std::fs::read_to_string("/proc/sys/net/ipv6/conf/lo/disable_ipv6")
        .is_ok_and(|text| text.trim() == "0")
}

fn listener(address: SocketAddr, config: &Config) -> io::Result<Socket> {
    let socket = bind(address, Type::STREAM, Protocol::TCP, config)?;
    socket.listen(BACKLOG)?;
    Ok(socket)
}

fn bind(
    address: SocketAddr,
    kind: Type,
    protocol: Protocol,
    config: &Config,
) -> io::Result<Socket> {
    let made = || {
        let socket = Socket::new(Domain::for_address(address), kind, Some(protocol))?;
        mark(&socket, config)?;
        // Every worker has its own socket on the port, and a new proxy starts while the old one drains.
        if config.port_reuse || config.workers > 1 {
            socket.set_reuse_port(true)?;
        } else {
            socket.set_reuse_address(true)?;
        }
        if address.is_ipv6() && address.ip().is_unspecified() {
            socket.set_only_v6(false)?;
        }
        socket.set_nonblocking(true)?;
        socket.bind(&address.into())?;
        Ok(socket)
    };
    made().map_err(|error: io::Error| {
        io::Error::new(
            error.kind(),
            format!("failed to bind to address {address}: {error}"),
        )
    })
}

/// Marks a socket's packets, so that they are not captured again.
pub(super) fn mark(socket: &Socket, config: &Config) -> io::Result<()> {
    match config.packet_mark {
        None => Ok(()),
        Some(mark) => socket.set_mark(mark).map_err(|error| {
            io::Error::new(
                error.kind(),
                format!("failed to set socket mark: {error}, make sure the proxy has CAP_NET_RAW and CAP_NET_ADMIN"),
            )
        }),
    }
}

/// Lets a listener's connections be carried on with the client's own address; gives whether that works.
fn make_transparent(socket: &Socket, ipv6: bool, wanted: Option<bool>) -> io::Result<bool> {
    if wanted == Some(false) {
        return Ok(false);
    }
    let set = socket
        .set_ip_transparent_v4(true)
        .and_then(|()| match ipv6 {
            true => socket.set_ip_transparent_v6(true),
            false => Ok(()),
        });
    match set {
        Ok(()) => Ok(true),
        Err(error) if wanted == Some(true) => Err(io::Error::new(
            error.kind(),
            format!(
                "ENABLE_ORIG_SRC=true, but transparent sockets are not possible: {error}; grant CAP_NET_ADMIN"
            ),
        )),
        Err(_) => Ok(false),
    }
}

/// Has the kernel look after idle connections, as configured. Failures are ignored: a flow without keep-alive is better than none.
pub(super) fn keep_alive(socket: &SockRef<'_>, config: &Config) {
    let settings = &config.keepalive;
    if settings.enabled {
        let keepalive = TcpKeepalive::new()
            .with_time(settings.time)
            .with_interval(settings.interval)
            .with_retries(settings.retries);
        let _ = socket.set_tcp_keepalive(&keepalive);
    }
    if settings.user_timeout {
        let timeout = settings.time + settings.interval * settings.retries;
        let _ = socket.set_tcp_user_timeout(Some(timeout));
    }
}

/// A UDP socket in a pod's namespace, connected to a server.
///
/// # Errors
/// The kernel's error.
pub fn udp(
    netns: &PodNetns,
    config: &Config,
    server: SocketAddr,
) -> io::Result<tokio::net::UdpSocket> {
    let socket = netns.run(|| {
        let kind = Type::DGRAM.nonblocking();
        let socket = Socket::new(Domain::for_address(server), kind, Some(Protocol::UDP))?;
        mark(&socket, config)?;
        socket.connect(&server.into())?;
        Ok(socket)
    })?;
    tokio::net::UdpSocket::from_std(socket.into())
}

/// Where a redirected connection was going: what the kernel remembers, else its own address.
///
/// # Errors
/// When the connection is already gone.
pub fn original_destination(socket: &TcpStream, client: SocketAddr) -> io::Result<SocketAddr> {
    let reference = SockRef::from(socket);
    // Both families arrive at one listener, each is remembered in its own table.
    let remembered = match client.ip().to_canonical().is_ipv4() {
        true => reference.original_dst_v4(),
        false => reference.original_dst_v6(),
    };
    let address = match remembered.map(|address| address.as_socket()) {
        Ok(Some(address)) => address,
        unknown => {
            // A transparent socket may have been reached without translation: its own address is right then.
            if let Err(error) = unknown
                && !reference.ip_transparent_v4().unwrap_or(false)
            {
                tracing::warn!("failed to read SO_ORIGINAL_DST: {error}");
            }
            socket.local_addr()?
        }
    };
    Ok(hbone::canonical(address))
}

/// Checks at start that this process may do what serving pods takes.
///
/// # Errors
/// What is missing.
pub fn check_privileges(config: &Config) -> io::Result<()> {
    if config.mode == Mode::Shared {
        PodNetns::current()?.probe().map_err(|error| {
            io::Error::new(
                error.kind(),
                format!("failed to set netns: {error}; grant CAP_SYS_ADMIN"),
            )
        })?;
    }
    let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
    mark(&socket, config)
}

/// Whether a descriptor is a network namespace, as far as can be told.
pub fn is_netns(descriptor: &impl AsFd) -> bool {
    nix::sys::statfs::fstatfs(descriptor.as_fd())
        .is_ok_and(|stat| stat.filesystem_type() == nix::sys::statfs::NSFS_MAGIC)
}

#[cfg(test)]
#[path = "sockets_tests.rs"]
mod tests;
