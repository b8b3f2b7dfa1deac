//! A captured pod joined to a peer, and traffic between the two.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::time::Duration;

use cni::{Backend, CaptureConfig, capture};
use nix::sys::socket::sockopt;
use socket2::{Domain, Protocol, Socket, Type};

use super::namespace::Namespace;

/// Names the backend of the pods, if it is not the usual one.
pub const BACKEND: &str = "WARREN_TEST_BACKEND";

pub const PATIENCE: Duration = Duration::from_secs(5);

pub const POD: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)),
];
pub const PEER: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(192, 0, 2, 2)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 2)),
];
pub const PROBE: [&str; 2] = ["169.254.7.127", "fd16:9254:7127:1337:ffff:ffff:ffff:ffff"];

/// A captured pod and a peer outside, who is also the node that probes the pod.
pub struct Net {
    pub pod: Namespace,
    pub peer: Namespace,
}

impl Net {
    pub fn new(test: &str, config: &CaptureConfig) -> Option<Self> {
        let (pod, peer) = (Namespace::new(test)?, Namespace::new(test)?);
        pod.shell(&format!(
            "ip link add wrn0 type veth peer name wrn1; ip link set wrn1 netns {}; ip link set wrn0 up; \
             ip addr add 192.0.2.1/24 dev wrn0; ip -6 addr add 2001:db8::1/64 dev wrn0 nodad",
            peer.path()
        ));
        peer.shell(&format!(
            "ip link set wrn1 up; ip addr add 192.0.2.2/24 dev wrn1; ip -6 addr add 2001:db8::2/64 dev wrn1 nodad; \
             ip addr add {}/32 dev lo; ip -6 addr add {}/128 dev lo",
            PROBE[0], PROBE[1]
        ));
        pod.shell("ip route add default via 192.0.2.2; ip -6 route add default via 2001:db8::2");
        let net = Self { pod, peer };
        net.capture(config);
        Some(net)
    }
}

impl Net {
    /// Captures the pod with the backend under test.
    pub fn capture(&self, config: &CaptureConfig) {
        let backend = match std::env::var(BACKEND).as_deref() {
            Ok("nftables") => Backend::Nftables,
            _ => config.backend,
        };
        let config = CaptureConfig {
            backend,
            ..config.clone()
        };
        capture(self.pod.as_fd(), &config).unwrap();
    }
}

/// A TCP socket in a namespace; what it cannot do in time fails.
pub fn socket(namespace: &Namespace, of: IpAddr, mark: u32) -> Socket {
    let socket = namespace.within(|| {
        let socket = Socket::new(
            Domain::for_address((of, 0).into()),
            Type::STREAM,
            Some(Protocol::TCP),
        )?;
        socket.set_mark(mark)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.set_write_timeout(Some(PATIENCE))?;
        Ok(socket)
    });
    socket.unwrap()
}

pub fn listen(namespace: &Namespace, port: u16) -> TcpListener {
    let listener = namespace.within(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)));
    let listener = listener.unwrap();
    socket2::SockRef::from(&listener)
        .set_read_timeout(Some(PATIENCE))
        .unwrap();
    listener
}

/// A TCP socket that speaks in the name of `source`.
pub fn bound(
    namespace: &Namespace,
    source: Option<IpAddr>,
    target: IpAddr,
    mark: u32,
) -> io::Result<Socket> {
    let socket = socket(namespace, target, mark);
    if let Some(source) = source {
        // Whosever address it is: this is how the proxy speaks in a client's name.
        nix::sys::socket::setsockopt(&socket, sockopt::IpTransparent, &true)?;
        socket.bind(&SocketAddr::new(source, 0).into())?;
    }
    Ok(socket)
}

pub fn connect_from(
    namespace: &Namespace,
    source: Option<IpAddr>,
    target: (IpAddr, u16),
    mark: u32,
) -> io::Result<TcpStream> {
    let socket = bound(namespace, source, target.0, mark)?;
    socket.connect_timeout(&SocketAddr::from(target).into(), PATIENCE)?;
    Ok(socket.into())
}

pub fn connect(namespace: &Namespace, target: (IpAddr, u16)) -> io::Result<TcpStream> {
    connect_from(namespace, None, target, 0)
}

/// What a listener sees of its next connection: who comes, and to where it wanted.
#[derive(Debug, PartialEq, Eq)]
pub struct Seen {
    pub from: IpAddr,
    pub wanted: (IpAddr, u16),
}

/// Accepts a connection of `client`, checks that both ends can talk, and says where it was bound for.
pub fn accept(listener: &TcpListener, mut client: TcpStream) -> Seen {
    let (mut accepted, from) = listener.accept().unwrap();
    let mut buffer = [0; 4];
    client.write_all(b"ping").unwrap();
    accepted.read_exact(&mut buffer).unwrap();
    accepted.write_all(b"pong").unwrap();
    client.read_exact(&mut buffer).unwrap();
    assert_eq!(&buffer, b"pong");
    let socket = socket2::SockRef::from(&accepted);
    let original = if accepted.local_addr().unwrap().ip().to_canonical().is_ipv4() {
        socket.original_dst_v4()
    } else {
        socket.original_dst_v6()
    };
    let wanted = match original {
        Ok(address) => address.as_socket().unwrap(),
        Err(_) => accepted.local_addr().unwrap(),
    };
    Seen {
        from: from.ip().to_canonical(),
        wanted: (wanted.ip().to_canonical(), wanted.port()),
    }
}

pub fn both() -> [usize; 2] {
    [0, 1]
}

pub fn probe(family: usize) -> IpAddr {
    PROBE[family].parse().unwrap()
}
