//! The proof of capture in pods that are captured, that only seem to be, and that are served already; and finding the
//! namespaces of running pods.

mod namespace;

use std::fs::{self, File};
use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::{Child, Command};

use cni::rules::{Family, OUTBOUND_PORT};
use cni::scan::{Wanted, holds_any, scan};
use cni::selftest::{Proof, SelfTestError, is_served, prove};
use cni::{Backend, CaptureConfig, capture, netns};

use namespace::Namespace;

/// A pod with an interface that leads to a node which passes nothing on.
fn pod(test: &str) -> Option<(Namespace, Namespace)> {
    let (pod, node) = (Namespace::new(test)?, Namespace::new(test)?);
    pod.shell(&format!(
        "ip link add wrn0 type veth peer name wrn1; ip link set wrn1 netns {}; ip link set wrn0 up; \
         ip addr add 198.51.100.1/24 dev wrn0; ip -6 addr add 2001:db8:1::1/64 dev wrn0 nodad",
        node.path()
    ));
    node.shell(
        "ip link set wrn1 up; ip addr add 198.51.100.2/24 dev wrn1; ip -6 addr add 2001:db8:1::2/64 dev wrn1 nodad",
    );
    pod.shell("ip route add default via 198.51.100.2; ip -6 route add default via 2001:db8:1::2");
    Some((pod, node))
}

#[test]
fn a_captured_pod_is_proven_to_be_and_nothing_of_the_proof_stays() {
    let Some((pod, _node)) = pod("the proof of capture") else {
        return;
    };
    for backend in [Backend::Iptables, Backend::Nftables] {
        let config = CaptureConfig {
            backend,
            ..CaptureConfig::default()
        };
        capture(pod.as_fd(), &config).unwrap();
        for _ in 0..3 {
            assert_eq!(prove(pod.as_fd(), &config).unwrap(), Proof::Captured);
        }
        assert_eq!(pod.shell("ss -Htan; ss -Huan"), "");
    }
}

#[test]
fn a_pod_whose_rules_do_not_work_is_not_proven() {
    let Some((pod, node)) = pod("the proof of what does not capture") else {
        return;
    };
    let config = CaptureConfig::default();
    node.shell("$4 -A FORWARD -j DROP; sysctl -qw net.ipv4.ip_forward=1");
    let refused = prove(pod.as_fd(), &config).unwrap_err();
    assert!(
        matches!(refused, SelfTestError::NotCaptured(Family::V4)),
        "{refused}"
    );
    // Packets of the proof live for one hop, so the node had nothing to pass on.
    let dropped = node.shell("$4 -L FORWARD -vnx | grep DROP | awk '{print $1}'");
    assert_eq!(dropped.trim(), "0");
    capture(pod.as_fd(), &config).unwrap();
    assert_eq!(prove(pod.as_fd(), &config).unwrap(), Proof::Captured);
    // Somebody else's rule comes first: ours are all there, and do nothing.
    pod.shell("$4 -t nat -I OUTPUT 1 -p tcp -j ACCEPT");
    assert_eq!(cni::verify(pod.as_fd(), &config).unwrap(), None);
    let refused = prove(pod.as_fd(), &config).unwrap_err();
    assert!(
        matches!(refused, SelfTestError::NotCaptured(Family::V4)),
        "{refused}"
    );
    pod.shell("$4 -t nat -D OUTPUT 1; $6 -t nat -I OUTPUT 1 -p tcp -j ACCEPT");
    let refused = prove(pod.as_fd(), &config).unwrap_err();
    assert!(
        matches!(refused, SelfTestError::NotCaptured(Family::V6)),
        "{refused}"
    );
    pod.shell("$6 -t nat -D OUTPUT 1; $4 -t nat -I OUTPUT 1 -p udp -j ACCEPT");
    let refused = prove(pod.as_fd(), &config).unwrap_err();
    assert!(
        matches!(refused, SelfTestError::DnsNotCaptured(Family::V4)),
        "{refused}"
    );
    let without_dns = CaptureConfig {
        dns: false,
        ..config
    };
    capture(pod.as_fd(), &without_dns).unwrap();
    assert_eq!(prove(pod.as_fd(), &without_dns).unwrap(), Proof::Captured);
}

#[test]
fn a_pod_that_is_served_is_not_disturbed_and_one_without_a_way_out_is_told() {
    let Some((pod, _node)) = pod("the proof in a served pod") else {
        return;
    };
    let config = CaptureConfig::default();
    capture(pod.as_fd(), &config).unwrap();
    assert!(!is_served(pod.as_fd()).unwrap());
    let proxy = pod.within(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, OUTBOUND_PORT)));
    let proxy = proxy.unwrap();
    assert_eq!(prove(pod.as_fd(), &config).unwrap(), Proof::Served);
    assert!(is_served(pod.as_fd()).unwrap());
    proxy.set_nonblocking(true).unwrap();
    assert!(proxy.accept().is_err(), "the proof reached the proxy");
    drop(proxy);
    pod.shell("ip route flush table main; ip -6 route flush table main");
    assert_eq!(prove(pod.as_fd(), &config).unwrap(), Proof::Isolated);
}

/// A process in a namespace.
struct Process(Child);

impl Process {
    fn start(namespace: &Namespace) -> Self {
        let sleep = namespace.within(|| Command::new("sleep").arg("600").spawn());
        Self(sleep.unwrap())
    }

    /// Its namespace as `/proc` shows it, under a name that may be another than its own.
    fn show(&self, proc: &Proc, name: u32, began: u64, group: &str) {
        let folder = proc.0.join(name.to_string());
        fs::create_dir_all(folder.join("ns")).unwrap();
        let link = format!("/proc/{}/ns/net", self.0.id());
        std::os::unix::fs::symlink(link, folder.join("ns/net")).unwrap();
        let fields: Vec<_> = (3..=52)
            .map(|field| if field == 22 { began } else { field }.to_string())
            .collect();
        fs::write(
            folder.join("stat"),
            format!("{name} (pause) {}", fields.join(" ")),
        )
        .unwrap();
        fs::write(folder.join("cgroup"), format!("0::{group}\n")).unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A folder in the place of `/proc`.
struct Proc(PathBuf);

impl Proc {
    fn new(name: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("wrn-scan-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(folder.join("self")).unwrap();
        Self(folder)
    }
}

impl Drop for Proc {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn uid(number: u8) -> String {
    format!("2c48913c-b29f-11e7-9350-0209681477{number:02}")
}

fn group(number: u8, container: &str) -> String {
    format!("/kubepods/besteffort/pod{}/{container}", uid(number))
}

fn wanted(number: u8, ip: &str) -> Wanted {
    Wanted {
        uid: uid(number),
        ips: vec![ip.parse().unwrap()],
    }
}

#[test]
fn a_pods_namespace_is_that_of_its_oldest_process_which_has_its_address() {
    let test = "finding namespaces";
    let (Some(first), Some(second), Some(host)) = (
        Namespace::new(test),
        Namespace::new(test),
        Namespace::new(test),
    ) else {
        return;
    };
    second.shell("ip addr add 10.9.8.7/32 dev lo");
    let processes = [&first, &second, &host].map(Process::start);
    let proc = Proc::new("oldest");
    // The pod's own process and a younger one of the same pod in another namespace that has the address too.
    processes[0].show(&proc, 30, 500, &group(1, "aa"));
    processes[1].show(&proc, 31, 900, &group(1, "bb"));
    // The second pod: a foreign process in the first pod's namespace does not make it the second's.
    processes[0].show(&proc, 20, 100, &group(2, "cc"));
    processes[1].show(&proc, 32, 700, &group(2, "dd"));
    // Nor is any a pod's whose addresses are not known.
    processes[1].show(&proc, 33, 50, &group(4, "ff"));
    // Nor is the node's ever a pod's.
    processes[2].show(&proc, 10, 1, &group(3, "ee"));
    let foreign = [netns::id(host.as_fd()).unwrap()].into();
    let all = [
        wanted(1, "240.240.240.240"),
        wanted(2, "10.9.8.7"),
        wanted(3, "240.240.240.240"),
        Wanted {
            uid: uid(4),
            ips: Vec::new(),
        },
    ];
    let found = scan(&proc.0, &all[..1], &foreign).unwrap();
    assert_eq!(found.len(), 1);
    let of = |number: u8| netns::id(&found[&uid(number)].netns).unwrap();
    assert_eq!(of(1), netns::id(first.as_fd()).unwrap());
    let found = scan(&proc.0, &all[1..], &foreign).unwrap();
    assert_eq!(found.keys().collect::<Vec<_>>(), [&uid(2)]);
    let of = |number: u8| netns::id(&found[&uid(number)].netns).unwrap();
    assert_eq!(of(2), netns::id(second.as_fd()).unwrap());
}

#[test]
fn any_address_of_a_dual_stack_pod_is_enough_and_none_is_not() {
    let Some(namespace) = Namespace::new("addresses of namespaces") else {
        return;
    };
    let netns = File::open(namespace.path()).unwrap();
    let holds = |ips: &[&str]| {
        let ips: Vec<IpAddr> = ips.iter().map(|ip| ip.parse().unwrap()).collect();
        holds_any(&netns, &ips).unwrap()
    };
    assert!(holds(&["10.0.0.1", "fd00::240"]));
    assert!(holds(&["::ffff:240.240.240.240"]));
    assert!(!holds(&["10.0.0.1", "fd00::241"]));
    assert!(!holds(&[]));
}
