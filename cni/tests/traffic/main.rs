//! Where traffic goes in captured namespaces: a pod joined to a peer, listeners in the proxy's and the application's place.

mod dns;
mod ipv6;
#[path = "../namespace/mod.rs"]
mod namespace;
#[path = "../namespace/net.rs"]
mod net;
mod others;

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;

use cni::rules::{DNS_PORT, HBONE_PORT, OUTBOUND_PORT, PLAINTEXT_PORT, PROXY_MARK, SPOOFED_MARK};
use cni::{CaptureConfig, remove};

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
        for port in [80, HBONE_PORT, OUTBOUND_PORT, PLAINTEXT_PORT, DNS_PORT] {
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
    let _others = [8080, OUTBOUND_PORT, DNS_PORT].map(|port| listen(&net.pod, port));
    for family in both() {
        let from = PEER[family];
        for (port, listener) in [
            (8080, &plaintext),
            (HBONE_PORT, &tunnels),
            (OUTBOUND_PORT, &plaintext),
            (PLAINTEXT_PORT, &plaintext),
            (DNS_PORT, &plaintext),
        ] {
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
    // Who dials a port of the proxy's gets there, but not by capture.
    let ports = [8080, HBONE_PORT, OUTBOUND_PORT, PLAINTEXT_PORT, DNS_PORT];
    let other = ["127.0.0.2", "240.240.240.240", "fd00::240"].map(|text| text.parse().unwrap());
    for port in ports {
        let listener = listen(&net.pod, port);
        for own in [&LOOPBACK[..], &POD, &other].concat() {
            let client = connect(&net.pod, (own, port)).unwrap();
            assert_eq!(accept(&listener, client).wanted, (own, port));
        }
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
        let from = PEER[family];
        // Whatever it is for, be it the pod itself.
        let outside = (target.parse().unwrap(), 80);
        for wanted in [outside, (POD[family], 8080), (POD[family], HBONE_PORT)] {
            let client = connect(&net.peer, wanted).unwrap();
            assert_eq!(accept(&proxy, client), Seen { from, wanted });
        }
    }
}

#[test]
fn a_virtual_interface_is_captured_also_where_arrivals_are_not() {
    let test = "a_virtual_interface_is_captured_also_where_arrivals_are_not";
    let config = CaptureConfig {
        bypass_inbound: true,
        virtual_interfaces: vec!["wrn0".to_string()],
        ..CaptureConfig::default()
    };
    let Some(net) = Net::new(test, &config) else {
        return;
    };
    let proxy = listen(&net.pod, OUTBOUND_PORT);
    for family in both() {
        let (from, wanted) = (PEER[family], (POD[family], 8080));
        let client = connect(&net.peer, wanted).unwrap();
        assert_eq!(accept(&proxy, client), Seen { from, wanted });
    }
}

#[test]
fn what_a_pod_forwards_for_others_is_an_arrival() {
    let test = "what_a_pod_forwards_for_others_is_an_arrival";
    for bypass_inbound in [false, true] {
        let config = CaptureConfig {
            bypass_inbound,
            ..CaptureConfig::default()
        };
        let (Some(net), Some(behind)) = (Net::new(test, &config), Namespace::new(test)) else {
            return;
        };
        net.pod.shell(&format!(
            "ip link add wrn2 type veth peer name wrn3; ip link set wrn3 netns {}; ip link set wrn2 up; \
             ip addr add 198.51.100.1/24 dev wrn2; ip -6 addr add 2001:db8:2::1/64 dev wrn2 nodad; \
             echo 1 > /proc/sys/net/ipv4/ip_forward; echo 1 > /proc/sys/net/ipv6/conf/all/forwarding",
            behind.path()
        ));
        behind.shell(
            "ip link set wrn3 up; ip addr add 198.51.100.7/24 dev wrn3; \
             ip -6 addr add 2001:db8:2::7/64 dev wrn3 nodad; \
             ip route add default via 198.51.100.1; ip -6 route add default via 2001:db8:2::1",
        );
        net.peer.shell(
            "ip route add 198.51.100.0/24 via 192.0.2.1; ip -6 route add 2001:db8:2::/64 via 2001:db8::1",
        );
        let (proxy, outside) = (listen(&net.pod, PLAINTEXT_PORT), listen(&net.peer, 80));
        let inside = listen(&behind, 80);
        for (family, target) in ["198.51.100.7", "2001:db8:2::7"].into_iter().enumerate() {
            let target: IpAddr = target.parse().unwrap();
            for (from, dials, wanted, listener) in [
                (PEER[family], &net.peer, target, &inside),
                (target, &behind, PEER[family], &outside),
            ] {
                let wanted = (wanted, 80);
                let client = connect(dials, wanted).unwrap();
                let listener = if bypass_inbound { listener } else { &proxy };
                assert_eq!(accept(listener, client), Seen { from, wanted });
            }
        }
    }
}

#[test]
fn addresses_of_metadata_are_egress_like_any_other() {
    let test = "addresses_of_metadata_are_egress_like_any_other";
    let Some(net) = Net::new(test, &CaptureConfig::default()) else {
        return;
    };
    let proxy = listen(&net.pod, OUTBOUND_PORT);
    for (family, target) in ["169.254.169.254", "fd00:ec2::254"].into_iter().enumerate() {
        let (from, wanted) = (POD[family], (target.parse().unwrap(), 80));
        let client = connect(&net.pod, wanted).unwrap();
        assert_eq!(accept(&proxy, client), Seen { from, wanted });
    }
}

#[test]
fn what_bears_the_mark_of_answers_does_not_leave_the_pod() {
    let test = "what_bears_the_mark_of_answers_does_not_leave_the_pod";
    let Some(net) = Net::new(test, &CaptureConfig::default()) else {
        return;
    };
    let peer = listen(&net.peer, 80);
    for family in both() {
        let (from, wanted) = (POD[family], (PEER[family], 80));
        let lost = bound(&net.pod, Some(from), wanted.0, SPOOFED_MARK).unwrap();
        let lost = lost.connect_timeout(&SocketAddr::from(wanted).into(), PATIENCE / 10);
        assert!(lost.is_err());
        // The first to come is one that sets out later.
        let client = connect_from(&net.pod, Some(from), wanted, PROXY_MARK).unwrap();
        let port = client.local_addr().unwrap().port();
        let (_, first) = peer.accept().unwrap();
        assert_eq!(first.port(), port);
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
