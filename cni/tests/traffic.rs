//! Where traffic goes in captured namespaces: a pod joined to a peer, listeners in the proxy's and the application's place.

mod namespace;

use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::time::Duration;

use cni::rules::{DNS_PORT, HBONE_PORT, OUTBOUND_PORT, PLAINTEXT_PORT, PROXY_MARK};
use cni::{CaptureConfig, Ipv6Mode, capture, remove};
use nix::sys::socket::sockopt;
use socket2::{Domain, Protocol, Socket, Type};

use namespace::Namespace;

const PATIENCE: Duration = Duration::from_secs(5);

const POD: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)),
];
const PEER: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(192, 0, 2, 2)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 2)),
];
const LOOPBACK: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::LOCALHOST),
    IpAddr::V6(Ipv6Addr::LOCALHOST),
];
const PROBE: [&str; 2] = ["169.254.7.127", "fd16:9254:7127:1337:ffff:ffff:ffff:ffff"];

/// A captured pod and a peer outside, who is also the node that probes the pod.
struct Net {
    pod: Namespace,
    peer: Namespace,
}

impl Net {
    fn new(test: &str, config: &CaptureConfig) -> Option<Self> {
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
        capture(pod.as_fd(), config).unwrap();
        Some(Self { pod, peer })
    }
}

/// A TCP socket in a namespace; what it cannot do in time fails.
fn socket(namespace: &Namespace, of: IpAddr, mark: u32) -> Socket {
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

fn listen(namespace: &Namespace, port: u16) -> TcpListener {
    let listener = namespace.within(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)));
    let listener = listener.unwrap();
    socket2::SockRef::from(&listener)
        .set_read_timeout(Some(PATIENCE))
        .unwrap();
    listener
}

/// A TCP socket that speaks in the name of `source`.
fn bound(
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

fn connect_from(
    namespace: &Namespace,
    source: Option<IpAddr>,
    target: (IpAddr, u16),
    mark: u32,
) -> io::Result<TcpStream> {
    let socket = bound(namespace, source, target.0, mark)?;
    socket.connect_timeout(&SocketAddr::from(target).into(), PATIENCE)?;
    Ok(socket.into())
}

fn connect(namespace: &Namespace, target: (IpAddr, u16)) -> io::Result<TcpStream> {
    connect_from(namespace, None, target, 0)
}

/// What a listener sees of its next connection: who comes, and to where it wanted.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    from: IpAddr,
    wanted: (IpAddr, u16),
}

/// Accepts a connection of `client`, checks that both ends can talk, and says where it was bound for.
fn accept(listener: &TcpListener, mut client: TcpStream) -> Seen {
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

fn both() -> [usize; 2] {
    [0, 1]
}

fn probe(family: usize) -> IpAddr {
    PROBE[family].parse().unwrap()
}

#[test]
fn what_the_pod_sends_out_reaches_the_proxy() {
    let test = "what_the_pod_sends_out_reaches_the_proxy";
    let Some(net) = Net::new(test, &CaptureConfig::default()) else {
        return;
    };
    let proxy = listen(&net.pod, OUTBOUND_PORT);
    for family in both() {
        for port in [80, HBONE_PORT, OUTBOUND_PORT] {
            let wanted = (PEER[family], port);
            let client = connect(&net.pod, wanted).unwrap();
            let from = POD[family];
            assert_eq!(accept(&proxy, client), Seen { from, wanted });
        }
    }
}

#[test]
fn what_the_proxy_sends_out_reaches_the_peer() {
    let test = "what_the_proxy_sends_out_reaches_the_peer";
    let Some(net) = Net::new(test, &CaptureConfig::default()) else {
        return;
    };
    let peer = listen(&net.peer, 80);
    for family in both() {
        // The upper bits of a mark are others' to use.
        for mark in [PROXY_MARK, 0xabcd_0000 | PROXY_MARK] {
            let wanted = (PEER[family], 80);
            let client = connect_from(&net.pod, None, wanted, mark).unwrap();
            let from = POD[family];
            assert_eq!(accept(&peer, client), Seen { from, wanted });
        }
    }
}

#[test]
fn plaintext_for_the_pod_reaches_the_proxy_and_tunnels_arrive_as_they_are() {
    let test = "plaintext_for_the_pod_reaches_the_proxy_and_tunnels_arrive_as_they_are";
    let Some(net) = Net::new(test, &CaptureConfig::default()) else {
        return;
    };
    let plaintext = listen(&net.pod, PLAINTEXT_PORT);
    let tunnels = listen(&net.pod, HBONE_PORT);
    let _application = listen(&net.pod, 8080);
    for family in both() {
        let from = PEER[family];
        for (port, listener) in [(8080, &plaintext), (HBONE_PORT, &tunnels)] {
            let wanted = (POD[family], port);
            let client = connect(&net.peer, wanted).unwrap();
            assert_eq!(accept(listener, client), Seen { from, wanted });
        }
    }
}

#[test]
fn the_pod_talks_to_itself_without_the_proxy() {
    let test = "the_pod_talks_to_itself_without_the_proxy";
    let Some(net) = Net::new(test, &CaptureConfig::default()) else {
        return;
    };
    let application = listen(&net.pod, 8080);
    let other = ["240.240.240.240", "fd00::240"].map(|text| text.parse().unwrap());
    for own in [LOOPBACK, POD, other].concat() {
        let client = connect(&net.pod, (own, 8080)).unwrap();
        assert_eq!(accept(&application, client).wanted, (own, 8080));
    }
}

#[test]
fn the_proxy_talks_to_the_application_in_the_clients_name() {
    let test = "the_proxy_talks_to_the_application_in_the_clients_name";
    let Some(net) = Net::new(test, &CaptureConfig::default()) else {
        return;
    };
    let application = listen(&net.pod, 8080);
    for family in both() {
        let (from, wanted) = (PEER[family], (POD[family], 8080));
        // The answers would leave the pod but for the mark and the route.
        let proxy = connect_from(&net.pod, Some(from), wanted, PROXY_MARK).unwrap();
        assert_eq!(accept(&application, proxy), Seen { from, wanted });
    }
    net.pod
        .shell("ip rule del pref 32764; ip -6 rule del pref 32764");
    for family in both() {
        let (from, wanted) = (PEER[family], (POD[family], 8080));
        let proxy = bound(&net.pod, Some(from), wanted.0, PROXY_MARK).unwrap();
        let lost = proxy.connect_timeout(&SocketAddr::from(wanted).into(), PATIENCE / 5);
        assert!(lost.is_err());
    }
}

#[test]
fn probes_of_the_node_reach_the_application_and_are_answered() {
    let test = "probes_of_the_node_reach_the_application_and_are_answered";
    let Some(net) = Net::new(test, &CaptureConfig::default()) else {
        return;
    };
    let application = listen(&net.pod, 8080);
    let node = listen(&net.peer, 80);
    for family in both() {
        let (from, wanted) = (probe(family), (POD[family], 8080));
        let client = connect_from(&net.peer, Some(from), wanted, 0).unwrap();
        assert_eq!(accept(&application, client), Seen { from, wanted });
        let (from, wanted) = (POD[family], (probe(family), 80));
        let client = connect(&net.pod, wanted).unwrap();
        assert_eq!(accept(&node, client), Seen { from, wanted });
    }
}

#[test]
fn a_pod_that_bypasses_capture_of_arrivals_gets_them_itself_and_still_takes_tunnels() {
    let test = "a_pod_that_bypasses_capture_of_arrivals_gets_them_itself_and_still_takes_tunnels";
    let config = CaptureConfig {
        bypass_inbound: true,
        ..CaptureConfig::default()
    };
    let Some(net) = Net::new(test, &config) else {
        return;
    };
    let application = listen(&net.pod, 8080);
    let proxy = listen(&net.pod, OUTBOUND_PORT);
    for family in both() {
        let (from, wanted) = (PEER[family], (POD[family], 8080));
        let client = connect(&net.peer, wanted).unwrap();
        assert_eq!(accept(&application, client), Seen { from, wanted });
        let spoofed = connect_from(&net.pod, Some(from), wanted, PROXY_MARK).unwrap();
        assert_eq!(accept(&application, spoofed), Seen { from, wanted });
        let wanted = (PEER[family], 80);
        let client = connect(&net.pod, wanted).unwrap();
        assert_eq!(accept(&proxy, client).wanted, wanted);
    }
}

#[test]
fn what_comes_from_a_virtual_interface_is_the_pods_own_egress() {
    let test = "what_comes_from_a_virtual_interface_is_the_pods_own_egress";
    let config = CaptureConfig {
        virtual_interfaces: vec!["wrn0".to_string()],
        ..CaptureConfig::default()
    };
    let Some(net) = Net::new(test, &config) else {
        return;
    };
    let proxy = listen(&net.pod, OUTBOUND_PORT);
    net.peer.shell("ip route add 198.51.100.0/24 via 192.0.2.1; ip -6 route add 2001:db8:1::/48 via 2001:db8::1");
    for (family, target) in ["198.51.100.7", "2001:db8:1::7"].into_iter().enumerate() {
        let (from, wanted) = (PEER[family], (target.parse().unwrap(), 80));
        let client = connect(&net.peer, wanted).unwrap();
        assert_eq!(accept(&proxy, client), Seen { from, wanted });
    }
}

/// Sends a query and gives what comes back; `answers` answers it, wherever that is.
fn query(net: &Net, target: (IpAddr, u16), mark: u32, answers: &UdpSocket) -> io::Result<String> {
    let asker = net.pod.within(|| {
        let unspecified = match target.0 {
            IpAddr::V4(_) => IpAddr::from(Ipv4Addr::UNSPECIFIED),
            IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let asker = UdpSocket::bind((unspecified, 0))?;
        socket2::SockRef::from(&asker).set_mark(mark)?;
        asker.set_read_timeout(Some(PATIENCE))?;
        // Only answers from where it asked are taken.
        asker.connect(target)?;
        asker.send(b"query")?;
        Ok(asker)
    })?;
    answers.set_read_timeout(Some(Duration::from_millis(500)))?;
    let mut buffer = [0; 16];
    let (length, from) = answers.recv_from(&mut buffer)?;
    assert_eq!(&buffer[..length], b"query");
    answers.send_to(b"answer", from)?;
    let length = asker.recv(&mut buffer)?;
    Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
}

fn answerer(namespace: &Namespace, address: IpAddr, port: u16) -> UdpSocket {
    let socket = namespace.within(|| UdpSocket::bind((address, port)));
    socket.unwrap()
}

#[test]
fn dns_of_the_pod_reaches_the_proxy_and_that_of_the_proxy_the_resolver() {
    let test = "dns_of_the_pod_reaches_the_proxy_and_that_of_the_proxy_the_resolver";
    let Some(net) = Net::new(test, &CaptureConfig::default()) else {
        return;
    };
    let proxy_tcp = listen(&net.pod, DNS_PORT);
    for family in both() {
        let proxy = answerer(&net.pod, LOOPBACK[family], DNS_PORT);
        let resolver = answerer(&net.peer, PEER[family], 53);
        let other = answerer(&net.peer, PEER[family], 5353);
        let target = (PEER[family], 53);
        assert_eq!(query(&net, target, 0, &proxy).unwrap(), "answer");
        assert_eq!(
            query(&net, target, PROXY_MARK, &resolver).unwrap(),
            "answer"
        );
        let client = connect(&net.pod, target).unwrap();
        assert_eq!(accept(&proxy_tcp, client).wanted, target);
        // Only DNS is captured of UDP.
        let target = (PEER[family], 5353);
        assert_eq!(query(&net, target, 0, &other).unwrap(), "answer");
    }
}

#[test]
fn the_pods_and_the_proxys_queries_do_not_mix_even_from_the_same_port() {
    let test = "the_pods_and_the_proxys_queries_do_not_mix_even_from_the_same_port";
    let Some(net) = Net::new(test, &CaptureConfig::default()) else {
        return;
    };
    let proxy = answerer(&net.pod, LOOPBACK[0], DNS_PORT);
    let resolver = answerer(&net.peer, PEER[0], 53);
    let ask = |mark: u32| {
        let asker = net.pod.within(|| {
            let asker = Socket::new(Domain::IPV4, Type::DGRAM, None)?;
            asker.set_reuse_address(true)?;
            asker.set_mark(mark)?;
            asker.bind(&SocketAddr::new(POD[0], 5300).into())?;
            Ok(UdpSocket::from(asker))
        });
        let asker = asker.unwrap();
        asker.send_to(b"query", (PEER[0], 53)).unwrap();
        asker
    };
    let mut buffer = [0; 16];
    for (mark, at) in [(0, &proxy), (PROXY_MARK, &resolver), (0, &proxy)] {
        let _asker = ask(mark);
        at.set_read_timeout(Some(PATIENCE)).unwrap();
        assert_eq!(at.recv(&mut buffer).unwrap(), 5, "{mark:#x}");
    }
}

#[test]
fn without_dns_capture_queries_reach_the_resolver() {
    let config = CaptureConfig {
        dns: false,
        ..CaptureConfig::default()
    };
    let Some(net) = Net::new("without_dns_capture_queries_reach_the_resolver", &config) else {
        return;
    };
    let proxy = listen(&net.pod, OUTBOUND_PORT);
    for family in both() {
        let target = (PEER[family], 53);
        let resolver = answerer(&net.peer, PEER[family], 53);
        assert_eq!(query(&net, target, 0, &resolver).unwrap(), "answer");
        // Over TCP it is egress like any other.
        let client = connect(&net.pod, target).unwrap();
        assert_eq!(accept(&proxy, client).wanted, target);
    }
}

#[test]
fn without_ipv6_capture_only_ipv4_reaches_the_proxy() {
    let config = CaptureConfig {
        ipv6: Ipv6Mode::Pass,
        ..CaptureConfig::default()
    };
    let Some(net) = Net::new("without_ipv6_capture_only_ipv4_reaches_the_proxy", &config) else {
        return;
    };
    let (proxy, peer) = (listen(&net.pod, OUTBOUND_PORT), listen(&net.peer, 80));
    for (family, listener) in [(0, &proxy), (1, &peer)] {
        let wanted = (PEER[family], 80);
        let client = connect(&net.pod, wanted).unwrap();
        let from = POD[family];
        assert_eq!(accept(listener, client), Seen { from, wanted });
    }
}

#[test]
fn captured_traffic_nobody_listens_for_goes_nowhere_until_capture_is_removed() {
    let test = "captured_traffic_nobody_listens_for_goes_nowhere_until_capture_is_removed";
    let Some(net) = Net::new(test, &CaptureConfig::default()) else {
        return;
    };
    let peer = listen(&net.peer, 80);
    for family in both() {
        let wanted = (PEER[family], 80);
        let refused = connect(&net.pod, wanted).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    }
    remove(net.pod.as_fd()).unwrap();
    for family in both() {
        let (from, wanted) = (POD[family], (PEER[family], 80));
        let client = connect(&net.pod, wanted).unwrap();
        assert_eq!(accept(&peer, client), Seen { from, wanted });
    }
}

#[test]
fn repair_does_not_break_what_is_under_way() {
    let test = "repair_does_not_break_what_is_under_way";
    let Some(net) = Net::new(test, &CaptureConfig::default()) else {
        return;
    };
    let proxy = listen(&net.pod, OUTBOUND_PORT);
    let mut client = connect(&net.pod, (PEER[0], 80)).unwrap();
    let (mut accepted, _) = proxy.accept().unwrap();
    net.pod.shell("$4 -t nat -D ISTIO_OUTPUT 1");
    capture(net.pod.as_fd(), &CaptureConfig::default()).unwrap();
    client.write_all(b"x").unwrap();
    accepted.read_exact(&mut [0]).unwrap();
    accepted.write_all(b"y").unwrap();
    client.read_exact(&mut [0]).unwrap();
}
