//! IPv6 where it is not captured: let past, or refused.

use std::io::ErrorKind;
use std::os::fd::AsFd;

use cni::rules::{HBONE_PORT, OUTBOUND_PORT, PLAINTEXT_PORT, PROXY_MARK};
use cni::{CaptureConfig, Ipv6Mode, remove};

use super::LOOPBACK;
use super::dns::{answerer, query};
use super::namespace::Namespace;
use super::net::{Net, PATIENCE, PEER, POD, Seen, accept, connect, connect_from, listen};

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
    let refused = query(&net.pod, (PEER[1], 53), 0, &resolver).unwrap_err();
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
    let answer = query(&net.pod, (PEER[1], 53), 0, &resolver);
    assert_eq!(answer.unwrap(), "answer");
    let application = listen(&net.pod, 8080);
    let client = connect(&net.peer, (POD[1], 8080)).unwrap();
    assert_eq!(accept(&application, client).wanted, (POD[1], 8080));
}
