//! Capture for real: rules in network namespaces of our own, and traffic through them.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::process::Command;

use cni::netns::within;
use cni::{CaptureConfig, Outcome, capture, remove, verify};
use nix::sched::{CloneFlags, unshare};

/// A network namespace that lives as long as this does, with an address on its loopback that is not loopback.
struct Namespace(File);

impl Namespace {
    /// None, with a line that says so, where this process may not make namespaces.
    fn new() -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: capture tests need root");
            return None;
        }
        let made = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            File::open("/proc/thread-self/ns/net")
        });
        let namespace = Self(made.join().unwrap().unwrap());
        namespace.shell("ip link set lo up && ip addr add 240.240.240.240/32 dev lo && ip -6 addr add fd00::240/128 dev lo");
        Some(namespace)
    }

    fn within<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        within(self.0.as_fd(), work)
    }

    /// Runs a command line inside; gives its output.
    fn shell(&self, line: &str) -> String {
        let output = self
            .within(|| Command::new("sh").args(["-ec", line]).output())
            .unwrap();
        assert!(
            output.status.success(),
            "{line}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Every rule and route, sorted; tables without rules stay behind once they were used and do not count.
    fn state(&self) -> Vec<String> {
        let text = self.shell(
            "iptables-save; ip6tables-save; ip rule; ip -6 rule; \
             ip route show table 100 2>/dev/null || true; ip -6 route show table 100 2>/dev/null || true",
        );
        let counts = |line: &&str| !line.starts_with(['*', ':', '#']) && *line != "COMMIT";
        let mut lines: Vec<_> = text.lines().filter(counts).map(str::to_string).collect();
        lines.sort();
        lines
    }
}

fn variants() -> Vec<CaptureConfig> {
    let plain = CaptureConfig::default();
    let interfaces = vec!["vif0".to_string(), "vif1".to_string()];
    vec![
        plain.clone(),
        CaptureConfig {
            dns: false,
            ..plain.clone()
        },
        CaptureConfig {
            bypass_inbound: true,
            ..plain.clone()
        },
        CaptureConfig {
            virtual_interfaces: interfaces.clone(),
            ..plain.clone()
        },
        CaptureConfig {
            bypass_inbound: true,
            virtual_interfaces: interfaces,
            ..plain.clone()
        },
        CaptureConfig {
            ipv6: false,
            ..plain
        },
    ]
}

#[test]
fn every_variant_is_applied_once_left_alone_and_removed_whole() {
    for config in variants() {
        let Some(namespace) = Namespace::new() else {
            return;
        };
        let netns = namespace.0.as_fd();
        let before = namespace.state();
        assert_eq!(
            capture(netns, &config).unwrap(),
            Outcome::Applied,
            "{config:?}"
        );
        let applied = namespace.state();
        let rules = applied.iter().filter(|line| line.contains("lookup 100"));
        assert_eq!(
            rules.count(),
            if config.ipv6 { 2 } else { 1 },
            "{applied:?}"
        );
        assert_eq!(verify(netns, &config).unwrap(), None);
        assert_eq!(
            capture(netns, &config).unwrap(),
            Outcome::Unchanged,
            "{config:?}"
        );
        assert_eq!(namespace.state(), applied);
        remove(netns).unwrap();
        assert_eq!(namespace.state(), before);
        remove(netns).unwrap();
        assert_eq!(capture(netns, &config).unwrap(), Outcome::Applied);
    }
}

#[test]
fn damage_is_found_and_repaired_and_the_pods_own_rules_survive() {
    let config = CaptureConfig::default();
    let damages = [
        "iptables -t nat -F ISTIO_OUTPUT",
        "iptables -t nat -D OUTPUT -j ISTIO_OUTPUT",
        "ip6tables -t mangle -F ISTIO_PRERT",
        "iptables -t nat -A ISTIO_PRERT -p tcp -j RETURN",
        "iptables -t nat -N ISTIO_TEST && iptables -t nat -A OUTPUT -j ISTIO_TEST",
        "iptables -t nat -R ISTIO_OUTPUT 1 -p tcp -j RETURN",
    ];
    for damage in damages {
        let Some(namespace) = Namespace::new() else {
            return;
        };
        let netns = namespace.0.as_fd();
        namespace.shell("iptables -t filter -A INPUT -p udp --dport 9 -j DROP");
        assert_eq!(capture(netns, &config).unwrap(), Outcome::Applied);
        let whole = namespace.state();
        namespace.shell(damage);
        assert!(verify(netns, &config).unwrap().is_some(), "{damage}");
        let careful = CaptureConfig {
            reconcile: false,
            ..config.clone()
        };
        assert!(capture(netns, &careful).is_err(), "{damage}");
        assert_eq!(
            capture(netns, &config).unwrap(),
            Outcome::Repaired,
            "{damage}"
        );
        assert_eq!(verify(netns, &config).unwrap(), None, "{damage}");
        assert_eq!(namespace.state(), whole, "{damage}");
        remove(netns).unwrap();
        assert!(
            namespace
                .shell("iptables-save")
                .contains("--dport 9 -j DROP")
        );
    }
}

#[test]
fn a_name_that_is_no_interface_is_refused_before_anything_is_changed() {
    let Some(namespace) = Namespace::new() else {
        return;
    };
    let before = namespace.state();
    let names = vec!["eth0 -j ACCEPT".to_string()];
    let config = CaptureConfig {
        virtual_interfaces: names,
        ..CaptureConfig::default()
    };
    assert!(capture(namespace.0.as_fd(), &config).is_err());
    assert_eq!(namespace.state(), before);
}

#[test]
fn captured_traffic_arrives_at_the_proxys_ports() {
    let Some(namespace) = Namespace::new() else {
        return;
    };
    // Everything outside is out of an interface, so that it passes the rules for what leaves the pod.
    namespace.shell("ip link add wrn0 type veth peer name wrn1 && ip addr add 192.0.2.1/24 dev wrn0 && ip link set wrn0 up && ip link set wrn1 up && ip -6 addr add 2001:db8::1/64 dev wrn0 nodad");
    capture(namespace.0.as_fd(), &CaptureConfig::default()).unwrap();
    let told = namespace
        .within(|| {
            let outbound = TcpListener::bind("[::]:15001")?;
            let dns = UdpSocket::bind((Ipv4Addr::LOCALHOST, 15053))?;
            let mut told = Vec::new();
            for target in ["192.0.2.7:80", "[2001:db8::7]:80"] {
                let target: SocketAddr = target.parse().unwrap();
                let mut client = TcpStream::connect(target)?;
                client.write_all(b"x")?;
                let (mut accepted, _) = outbound.accept()?;
                accepted.read_exact(&mut [0])?;
                told.push(original_destination(&accepted)?);
            }
            let asker = UdpSocket::bind("0.0.0.0:0")?;
            asker.send_to(b"query", "192.0.2.53:53")?;
            let mut buffer = [0; 16];
            let length = dns.recv(&mut buffer)?;
            told.push(String::from_utf8_lossy(&buffer[..length]).into_owned());
            // What stays within the pod is not captured.
            let own = TcpListener::bind((IpAddr::from([240, 240, 240, 240]), 0))?;
            TcpStream::connect(own.local_addr()?)?;
            own.accept()?;
            Ok(told)
        })
        .unwrap();
    assert_eq!(told, ["192.0.2.7:80", "[2001:db8::7]:80", "query"]);
}

fn original_destination(socket: &TcpStream) -> io::Result<String> {
    let socket = socket2::SockRef::from(socket);
    let address = socket
        .original_dst_v4()
        .or_else(|_| socket.original_dst_v6())?;
    let address = address.as_socket().ok_or(io::ErrorKind::InvalidData)?;
    Ok(SocketAddr::new(address.ip().to_canonical(), address.port()).to_string())
}

#[test]
fn a_namespace_descriptor_tells_which_namespace_it_is() {
    let (Some(one), Some(two)) = (Namespace::new(), Namespace::new()) else {
        return;
    };
    assert_ne!(
        cni::netns::id(&one.0).unwrap(),
        cni::netns::id(&two.0).unwrap()
    );
    let again = one
        .within(|| File::open("/proc/thread-self/ns/net"))
        .unwrap();
    assert_ne!(again.as_raw_fd(), one.0.as_raw_fd());
    assert_eq!(
        cni::netns::id(&again).unwrap(),
        cni::netns::id(&one.0).unwrap()
    );
}
