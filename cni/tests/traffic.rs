//! Where traffic goes in captured namespaces: a pod joined to a peer, listeners in the proxy's and the application's place.

mod namespace;
#[path = "namespace/net.rs"]
mod net;

use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::time::Duration;

use cni::rules::{DNS_PORT, HBONE_PORT, OUTBOUND_PORT, PLAINTEXT_PORT, PROXY_MARK};
use cni::{CaptureConfig, Ipv6Mode, remove};
use socket2::{Domain, Socket, Type};

use namespace::{Namespace, again};
use net::{
    BACKEND, Net, PATIENCE, PEER, POD, Seen, accept, both, bound, connect, connect_from, listen,
    probe,
};

const LOOPBACK: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::LOCALHOST),
    IpAddr::V6(Ipv6Addr::LOCALHOST),
];

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
    let damage =
        "$4 -t nat -D ISTIO_OUTPUT 1 || nft flush chain inet istio-ambient-nat istio-output";
    net.pod.shell(damage);
    net.capture(&CaptureConfig::default());
    client.write_all(b"x").unwrap();
    accepted.read_exact(&mut [0]).unwrap();
    accepted.write_all(b"y").unwrap();
    client.read_exact(&mut [0]).unwrap();
}

/// What has IPv6 refused, and what of it stays.
fn refusing() -> CaptureConfig {
    CaptureConfig {
        ipv6: Ipv6Mode::Refuse,
        ..CaptureConfig::default()
    }
}

#[test]
fn refused_ipv6_fails_at_once_in_both_directions_while_ipv4_is_captured() {
    let test = "refused_ipv6_fails_at_once_in_both_directions_while_ipv4_is_captured";
    let Some(net) = Net::new(test, &refusing()) else {
        return;
    };
    let proxy = listen(&net.pod, OUTBOUND_PORT);
    let _others = [8080, HBONE_PORT, PLAINTEXT_PORT].map(|port| listen(&net.pod, port));
    let _peer = listen(&net.peer, 80);
    // An answer at all shows that neighbours still find each other.
    net.pod.shell("ip -6 neigh flush dev wrn0");
    net.peer.shell("ip -6 neigh flush dev wrn1");
    for mark in [0, PROXY_MARK] {
        let refused = connect_from(&net.pod, None, (PEER[1], 80), mark).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "{mark:#x}");
    }
    for port in [8080, HBONE_PORT, PLAINTEXT_PORT, OUTBOUND_PORT] {
        let refused = connect(&net.peer, (POD[1], port)).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "{port}");
    }
    let client = connect(&net.pod, (PEER[0], 80)).unwrap();
    assert_eq!(accept(&proxy, client).wanted, (PEER[0], 80));
}

#[test]
fn refused_ipv6_that_is_not_tcp_is_told_so() {
    let Some(net) = Net::new("refused_ipv6_that_is_not_tcp_is_told_so", &refusing()) else {
        return;
    };
    let resolver = answerer(&net.peer, PEER[1], 53);
    let refused = query(&net, (PEER[1], 53), 0, &resolver).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::PermissionDenied);
    let _application = answerer(&net.pod, POD[1], 5353);
    let stranger = answerer(&net.peer, PEER[1], 5353);
    stranger.connect((POD[1], 5353)).unwrap();
    stranger.set_read_timeout(Some(PATIENCE)).unwrap();
    stranger.send(b"query").unwrap();
    let refused = stranger.recv(&mut [0; 8]).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::PermissionDenied);
}

#[test]
fn refused_ipv6_does_not_keep_a_pod_from_itself() {
    let test = "refused_ipv6_does_not_keep_a_pod_from_itself";
    let Some(net) = Net::new(test, &refusing()) else {
        return;
    };
    let application = listen(&net.pod, 8080);
    for own in [LOOPBACK[1], POD[1], "fd00::240".parse().unwrap()] {
        let client = connect(&net.pod, (own, 8080)).unwrap();
        assert_eq!(accept(&application, client).wanted, (own, 8080));
    }
}

#[test]
fn what_a_pod_forwards_of_refused_ipv6_is_refused_too() {
    let test = "what_a_pod_forwards_of_refused_ipv6_is_refused_too";
    let (Some(net), Some(inner)) = (Net::new(test, &refusing()), Namespace::new(test)) else {
        return;
    };
    net.pod.shell(&format!(
        "ip link add wrn2 type veth peer name wrn3; ip link set wrn3 netns {}; ip link set wrn2 up; \
         ip -6 addr add 2001:db8:2::1/64 dev wrn2 nodad; echo 1 > /proc/sys/net/ipv6/conf/all/forwarding",
        inner.path()
    ));
    inner.shell(
        "ip link set wrn3 up; ip -6 addr add 2001:db8:2::2/64 dev wrn3 nodad; \
         ip -6 route add default via 2001:db8:2::1",
    );
    net.peer
        .shell("ip -6 route add 2001:db8:2::/64 via 2001:db8::1");
    let peer = listen(&net.peer, 80);
    let refused = connect(&inner, (PEER[1], 80)).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    // It was not for want of a way.
    remove(net.pod.as_fd()).unwrap();
    let client = connect(&inner, (PEER[1], 80)).unwrap();
    assert_eq!(accept(&peer, client).wanted, (PEER[1], 80));
}

#[test]
fn ipv6_let_past_is_not_even_captured_where_it_is_dns_or_of_a_virtual_interface() {
    let test = "ipv6_let_past_is_not_even_captured_where_it_is_dns_or_of_a_virtual_interface";
    let config = CaptureConfig {
        ipv6: Ipv6Mode::Pass,
        virtual_interfaces: vec!["wrn0".to_string()],
        ..CaptureConfig::default()
    };
    let Some(net) = Net::new(test, &config) else {
        return;
    };
    let resolver = answerer(&net.peer, PEER[1], 53);
    let answer = query(&net, (PEER[1], 53), 0, &resolver);
    assert_eq!(answer.unwrap(), "answer");
    let application = listen(&net.pod, 8080);
    let client = connect(&net.peer, (POD[1], 8080)).unwrap();
    assert_eq!(accept(&application, client).wanted, (POD[1], 8080));
}

#[test]
fn interfaces_are_told_by_the_beginning_of_their_name_too() {
    let config = CaptureConfig {
        virtual_interfaces: vec!["wr+".to_string()],
        ..CaptureConfig::default()
    };
    let test = "interfaces_are_told_by_the_beginning_of_their_name_too";
    let Some(net) = Net::new(test, &config) else {
        return;
    };
    let proxy = listen(&net.pod, OUTBOUND_PORT);
    net.peer.shell("ip route add 198.51.100.0/24 via 192.0.2.1");
    let wanted = ("198.51.100.7".parse().unwrap(), 80);
    let client = connect(&net.peer, wanted).unwrap();
    assert_eq!(accept(&proxy, client).wanted, wanted);
}

/// Runs every other test of this file with other variables.
fn all_again(variables: &[(&str, &str)]) {
    let others = ["--skip", "does_as_well"];
    let passed = again(variables, &others).unwrap_or_else(|errors| panic!("{errors}"));
    assert!(passed > 10, "{passed}");
}

#[test]
fn nftables_does_as_well() {
    all_again(&[(BACKEND, "nftables")]);
}

#[test]
fn legacy_iptables_does_as_well() {
    all_again(&[("FORCE_IPTABLES_BINARY", "legacy")]);
}
