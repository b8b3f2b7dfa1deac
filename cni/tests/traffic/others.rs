//! Protocols that no proxy carries: UDP that is not DNS, and ICMP.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr};

use cni::{CaptureConfig, Ipv6Mode};
use socket2::{Domain, Protocol, Socket, Type};

use super::dns::{answerer, query};
use super::namespace::Namespace;
use super::net::{Net, PATIENCE, PEER, POD, both};

/// Asks for an echo and waits for it (RFC 792, RFC 4443 §4.1).
fn echo(namespace: &Namespace, target: IpAddr) -> io::Result<()> {
    let (protocol, request, reply) = match target {
        IpAddr::V4(_) => (Protocol::ICMPV4, 8, 0),
        IpAddr::V6(_) => (Protocol::ICMPV6, 128, 129),
    };
    namespace.shell("echo 0 0 > /proc/sys/net/ipv4/ping_group_range");
    let domain = Domain::for_address((target, 0).into());
    let socket = namespace.within(|| Socket::new(domain, Type::DGRAM, Some(protocol)));
    let mut socket = socket?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.connect(&SocketAddr::new(target, 0).into())?;
    socket.write_all(&[request, 0, 0, 0, 0, 0, 0, 1])?;
    let mut answer = [0; 64];
    let length = socket.read(&mut answer)?;
    assert_eq!((length, answer[0], answer[7]), (8, reply, 1));
    Ok(())
}

#[test]
fn udp_and_icmp_pass_in_both_directions() {
    let plain = CaptureConfig::default();
    let virtual_interfaces = vec!["wrn0".to_string()];
    let virtual_interface = CaptureConfig {
        virtual_interfaces,
        ..plain.clone()
    };
    for config in [plain, virtual_interface] {
        let Some(net) = Net::new("udp_and_icmp_pass_in_both_directions", &config) else {
            return;
        };
        for family in both() {
            let outside = answerer(&net.peer, PEER[family], 443);
            let answer = query(&net.pod, (PEER[family], 443), 0, &outside);
            assert_eq!(answer.unwrap(), "answer");
            // What arrives may even be DNS.
            for port in [443, 53] {
                let inside = answerer(&net.pod, POD[family], port);
                let answer = query(&net.peer, (POD[family], port), 0, &inside);
                assert_eq!(answer.unwrap(), "answer");
            }
            echo(&net.pod, PEER[family]).unwrap();
            echo(&net.peer, POD[family]).unwrap();
        }
    }
}

#[test]
fn icmp_of_refused_ipv6_gets_nowhere() {
    let config = CaptureConfig {
        ipv6: Ipv6Mode::Refuse,
        ..CaptureConfig::default()
    };
    let Some(net) = Net::new("icmp_of_refused_ipv6_gets_nowhere", &config) else {
        return;
    };
    for (from, to) in [(&net.pod, PEER), (&net.peer, POD)] {
        echo(from, to[0]).unwrap();
        let refused = echo(from, to[1]).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied);
    }
    echo(&net.pod, POD[1]).unwrap();
}
