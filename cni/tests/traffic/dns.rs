//! Where DNS goes.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use cni::CaptureConfig;
use cni::rules::{DNS_PORT, OUTBOUND_PORT, PROXY_MARK};
use socket2::{Domain, Socket, Type};

use super::LOOPBACK;
use super::namespace::Namespace;
use super::net::{Net, PATIENCE, PEER, POD, accept, both, connect, connect_from, listen};

/// Sends a query and gives what comes back; `answers` answers it, wherever that is.
pub fn query(
    asker: &Namespace,
    target: (IpAddr, u16),
    mark: u32,
    answers: &UdpSocket,
) -> io::Result<String> {
    let asker = asker.within(|| {
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

pub fn answerer(namespace: &Namespace, address: IpAddr, port: u16) -> UdpSocket {
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
        assert_eq!(query(&net.pod, target, 0, &proxy).unwrap(), "answer");
        assert_eq!(
            query(&net.pod, target, PROXY_MARK, &resolver).unwrap(),
            "answer"
        );
        let client = connect(&net.pod, target).unwrap();
        assert_eq!(accept(&proxy_tcp, client).wanted, target);
        // Only DNS is captured of UDP.
        let target = (PEER[family], 5353);
        assert_eq!(query(&net.pod, target, 0, &other).unwrap(), "answer");
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
        assert_eq!(query(&net.pod, target, 0, &resolver).unwrap(), "answer");
        // Over TCP it is egress like any other.
        let client = connect(&net.pod, target).unwrap();
        assert_eq!(accept(&proxy, client).wanted, target);
    }
}

#[test]
fn dns_of_the_proxy_reaches_the_resolver_over_tcp_too() {
    let test = "dns_of_the_proxy_reaches_the_resolver_over_tcp_too";
    let Some(net) = Net::new(test, &CaptureConfig::default()) else {
        return;
    };
    let resolver = listen(&net.peer, 53);
    for family in both() {
        let target = (PEER[family], 53);
        let proxy = connect_from(&net.pod, None, target, PROXY_MARK).unwrap();
        assert_eq!(accept(&resolver, proxy).wanted, target);
    }
}

#[test]
fn a_resolver_inside_the_pod_is_asked_itself_but_over_tcp_only_by_its_loopback_address() {
    let test =
        "a_resolver_inside_the_pod_is_asked_itself_but_over_tcp_only_by_its_loopback_address";
    let Some(net) = Net::new(test, &CaptureConfig::default()) else {
        return;
    };
    let (proxy, resolver) = (listen(&net.pod, DNS_PORT), listen(&net.pod, 53));
    for family in both() {
        for own in [LOOPBACK[family], POD[family]] {
            let inside = answerer(&net.pod, own, 53);
            assert_eq!(query(&net.pod, (own, 53), 0, &inside).unwrap(), "answer");
        }
        for (own, listener) in [(LOOPBACK[family], &resolver), (POD[family], &proxy)] {
            let client = connect(&net.pod, (own, 53)).unwrap();
            assert_eq!(accept(listener, client).wanted, (own, 53));
        }
    }
}
