//! The node's side in a namespace that plays the node: made, checked, damaged, repaired, taken out.

use std::net::IpAddr;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use cni::host::{Host, HostConfig, HostError};
use cni::{Backend, CaptureConfig, Outcome};

use super::namespace::Namespace;
use super::variants::BACKENDS;

/// A folder that looks like the `/proc` of a node with a kubelet, and goes with this.
pub struct Proc(PathBuf);

impl Proc {
    /// Of a node whose kubelet is root.
    pub fn new(early_demux: &str) -> Self {
        Self::with_kubelet_of(0, early_demux)
    }

    pub fn with_kubelet_of(uid: u32, early_demux: &str) -> Self {
        use std::sync::atomic::{AtomicU32, Ordering};
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "wrn-host-proc-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let folder = std::env::temp_dir().join(name);
        let write = |name: &str, text: &str| {
            let path = folder.join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write("42/comm", "kubelet\n");
        write("42/cmdline", "/usr/bin/kubelet\0--v=2\0");
        let uids = format!("Name:\tkubelet\nUid:\t{uid}\t{uid}\t{uid}\t{uid}\n");
        write("42/status", &uids);
        write("sys/net/ipv4/tcp_early_demux", early_demux);
        Self(folder)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Proc {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub fn config(backend: Backend, proc: &Proc) -> HostConfig {
    let CaptureConfig {
        probe_v4, probe_v6, ..
    } = CaptureConfig::default();
    HostConfig {
        backend,
        ipv6: true,
        probe_v4,
        probe_v6,
        proc: proc.path().to_path_buf(),
        branch_eni: true,
    }
}

pub fn open(node: &Namespace, config: &HostConfig) -> Result<Host, HostError> {
    Host::open(node.as_fd().try_clone_to_owned().unwrap(), config.clone())
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn sorted(host: &Host) -> Vec<(String, String)> {
    let entries = host.entries().unwrap().into_iter();
    let mut entries: Vec<_> = entries.map(|(ip, uid)| (ip.to_string(), uid)).collect();
    entries.sort();
    entries
}

fn held(entries: &[(&str, &str)]) -> Vec<(String, String)> {
    let entries = entries.iter();
    entries
        .map(|(ip, uid)| (ip.to_string(), uid.to_string()))
        .collect()
}

#[test]
fn the_host_rules_are_these() {
    let proc = Proc::new("1\n");
    let Some(node) = Namespace::new("the_host_rules_are_these") else {
        return;
    };
    let host = open(&node, &config(Backend::Iptables, &proc)).unwrap();
    let rules = |family: &str| {
        let text = node.shell(&format!("{family}-save -t nat"));
        let rules = text.lines().filter(|line| line.starts_with("-A"));
        rules.map(str::to_string).collect::<Vec<_>>()
    };
    let rule =
        "-A ISTIO_POSTRT -p tcp -m owner --socket-exists -m set --match-set istio-inpod-probes-";
    let v4 = format!("{rule}v4 dst -j SNAT --to-source 169.254.7.127");
    let v6 = format!("{rule}v6 dst -j SNAT --to-source fd16:9254:7127:1337:ffff:ffff:ffff:ffff");
    let jump = "-A POSTROUTING -j ISTIO_POSTRT";
    assert_eq!(rules("$4"), [jump, &v4]);
    assert_eq!(rules("$6"), [jump, &v6]);
    host.add(ip("10.1.2.3"), "a").unwrap();
    host.add(ip("fd00::1"), "a").unwrap();
    // The program sees what the kernel was told without it.
    let sets = node.shell("ipset save");
    for part in [
        "create istio-inpod-probes-v4 hash:ip family inet ",
        "create istio-inpod-probes-v6 hash:ip family inet6 ",
        " comment",
        "add istio-inpod-probes-v4 10.1.2.3 comment \"a\"",
        "add istio-inpod-probes-v6 fd00::1 comment \"a\"",
    ] {
        assert!(sets.contains(part), "{sets}");
    }
    host.remove_all().unwrap();

    let host = open(&node, &config(Backend::Nftables, &proc)).unwrap();
    host.add(ip("10.1.2.3"), "a").unwrap();
    let table = node.shell("nft -sn list table inet istio-ambient-nat");
    for part in [
        "type nat hook postrouting priority 100; policy accept;",
        "meta l4proto 6 meta skuid 0 ip daddr @istio-inpod-probes-v4 counter snat ip to 169.254.7.127",
        "meta l4proto 6 meta skuid 0 ip6 daddr @istio-inpod-probes-v6 counter snat ip6 to fd16:9254:7127:1337:ffff:ffff:ffff:ffff",
        "elements = { 10.1.2.3 comment \"a\" }",
    ] {
        assert!(table.contains(part), "{table}");
    }
}

#[test]
fn addresses_are_held_for_their_owner_until_that_owner_lets_go() {
    for backend in BACKENDS {
        let proc = Proc::new("1\n");
        let test = "addresses_are_held_for_their_owner_until_that_owner_lets_go";
        let Some(node) = Namespace::new(test) else {
            return;
        };
        let host = open(&node, &config(backend, &proc)).unwrap();
        assert_eq!(sorted(&host), held(&[]));
        for (address, uid) in [("10.0.0.1", "a"), ("fd00::1", "a"), ("10.0.0.2", "b")] {
            host.add(ip(address), uid).unwrap();
            host.add(ip(address), uid).unwrap();
        }
        assert_eq!(
            sorted(&host),
            held(&[("10.0.0.1", "a"), ("10.0.0.2", "b"), ("fd00::1", "a")])
        );
        // A new pod may have the address before the old one is known to be gone.
        host.add(ip("10.0.0.1"), "c").unwrap();
        assert!(!host.remove(ip("10.0.0.1"), "a").unwrap());
        assert_eq!(
            sorted(&host),
            held(&[("10.0.0.1", "c"), ("10.0.0.2", "b"), ("fd00::1", "a")])
        );
        assert!(host.remove(ip("10.0.0.1"), "c").unwrap());
        assert!(!host.remove(ip("10.0.0.1"), "c").unwrap());
        assert!(host.remove(ip("fd00::1"), "a").unwrap());
        assert_eq!(sorted(&host), held(&[("10.0.0.2", "b")]));
        assert!(matches!(
            host.add(ip("10.0.0.3"), "a\" }"),
            Err(HostError::Uid(_))
        ));
        assert_eq!(host.verify().unwrap(), None);
    }
}

#[test]
fn without_ipv6_its_addresses_are_passed_over() {
    for backend in BACKENDS {
        let proc = Proc::new("1\n");
        let Some(node) = Namespace::new("without_ipv6_its_addresses_are_passed_over") else {
            return;
        };
        let config = HostConfig {
            ipv6: false,
            ..config(backend, &proc)
        };
        let host = open(&node, &config).unwrap();
        host.add(ip("fd00::1"), "a").unwrap();
        assert!(!host.remove(ip("fd00::1"), "a").unwrap());
        assert_eq!(sorted(&host), held(&[]));
        let left = format!(
            "{}{}",
            node.shell("$6-save; ipset save"),
            node.shell("nft list ruleset")
        );
        assert!(!left.contains("probes-v6"), "{left}");
    }
}

#[test]
fn opening_again_keeps_what_is_held_and_changes_nothing() {
    for backend in BACKENDS {
        let proc = Proc::new("1\n");
        let test = "opening_again_keeps_what_is_held_and_changes_nothing";
        let Some(node) = Namespace::new(test) else {
            return;
        };
        let config = config(backend, &proc);
        let host = open(&node, &config).unwrap();
        host.add(ip("10.0.0.1"), "a").unwrap();
        host.add(ip("fd00::1"), "a").unwrap();
        let whole = node.dump();
        let again = open(&node, &config).unwrap();
        assert_eq!(node.dump(), whole);
        assert_eq!(again.ensure().unwrap(), Outcome::Unchanged);
        assert_eq!(sorted(&again), held(&[("10.0.0.1", "a"), ("fd00::1", "a")]));
    }
}

#[test]
fn the_nodes_rules_go_whole_and_come_back_beside_those_of_others() {
    let test = "the_nodes_rules_go_whole_and_come_back_beside_those_of_others";
    for backend in BACKENDS {
        let proc = Proc::new("1\n");
        let Some(node) = Namespace::new(test) else {
            return;
        };
        node.shell("$4 -t nat -A POSTROUTING -p sctp -j ACCEPT; ipset create other hash:ip");
        let everything = || node.rules() + &node.shell("ipset save");
        let before = everything();
        let config = config(backend, &proc);
        let host = open(&node, &config).unwrap();
        let whole = everything();
        assert_ne!(whole, before);
        host.remove_all().unwrap();
        assert_eq!(everything(), before, "{backend}");
        assert_eq!(host.ensure().unwrap(), Outcome::Applied, "{backend}");
        assert_eq!(everything(), whole, "{backend}");
        assert_eq!(host.ensure().unwrap(), Outcome::Unchanged, "{backend}");
    }
}

#[test]
fn damage_to_the_node_is_named_and_repaired_and_what_is_held_stays() {
    let test = "damage_to_the_node_is_named_and_repaired_and_what_is_held_stays";
    let nft = "nft flush chain inet istio-ambient-nat postrouting";
    let recreate =
        "$4 -t nat -F; ipset destroy istio-inpod-probes-v4; ipset create istio-inpod-probes-v4";
    let damages = [
        (
            Backend::Iptables,
            "$4 -t nat -D POSTROUTING 1".to_string(),
            "IPv4: the jump to chain ISTIO_POSTRT is missing",
            2,
        ),
        (
            Backend::Iptables,
            "$6 -t nat -F ISTIO_POSTRT".to_string(),
            "IPv6: chain ISTIO_POSTRT has 0 rules instead of 1",
            2,
        ),
        (
            Backend::Iptables,
            "$4 -t nat -F; $4 -t nat -X".to_string(),
            "IPv4: chain ISTIO_POSTRT of table nat is missing",
            2,
        ),
        (
            Backend::Iptables,
            "$4 -t nat -I POSTROUTING 1 -p udp -j ACCEPT".to_string(),
            "IPv4: the jump to chain ISTIO_POSTRT is not the first rule of POSTROUTING",
            2,
        ),
        (
            Backend::Iptables,
            "$4 -t nat -A POSTROUTING -p udp -j ISTIO_POSTRT".to_string(),
            "IPv4: there are more jumps to chain ISTIO_POSTRT",
            2,
        ),
        (
            Backend::Iptables,
            "$4 -t nat -R ISTIO_POSTRT 1 -p tcp -j ACCEPT".to_string(),
            "IPv4: chain ISTIO_POSTRT holds another rule: -A ISTIO_POSTRT -p tcp -j ACCEPT",
            2,
        ),
        (
            Backend::Iptables,
            "$4 -t nat -F; ipset destroy istio-inpod-probes-v4".to_string(),
            "the set istio-inpod-probes-v4 is missing",
            1,
        ),
        (
            Backend::Iptables,
            format!("{recreate} hash:net"),
            "the set istio-inpod-probes-v4 is of another kind",
            1,
        ),
        (
            Backend::Iptables,
            format!("{recreate} hash:ip"),
            "the set istio-inpod-probes-v4 is of another kind",
            1,
        ),
        (
            Backend::Iptables,
            format!("{recreate} hash:ip comment timeout 9"),
            "the set istio-inpod-probes-v4 is of another kind",
            1,
        ),
        (
            Backend::Iptables,
            format!("{recreate} hash:ip comment family inet6"),
            "the set istio-inpod-probes-v4 is of another kind",
            1,
        ),
        (
            Backend::Nftables,
            nft.to_string(),
            "table istio-ambient-nat: the chain's end instead of meta l4proto",
            2,
        ),
        (
            Backend::Nftables,
            "nft delete table inet istio-ambient-nat".to_string(),
            "table istio-ambient-nat is missing",
            0,
        ),
        (
            Backend::Nftables,
            format!("{nft}; nft delete set inet istio-ambient-nat istio-inpod-probes-v6"),
            "table istio-ambient-nat: chain postrouting {",
            1,
        ),
        (
            Backend::Nftables,
            "nft add rule inet istio-ambient-nat postrouting accept".to_string(),
            "table istio-ambient-nat: accept instead of the chain's end",
            2,
        ),
    ];
    for (backend, damage, expected, kept) in damages {
        let proc = Proc::new("1\n");
        let Some(node) = Namespace::new(test) else {
            return;
        };
        node.shell("$4 -t nat -A POSTROUTING -p udp --dport 9 -j ACCEPT; nft 'table inet mine { chain c { accept; }; }'");
        let host = open(&node, &config(backend, &proc)).unwrap();
        host.add(ip("10.0.0.1"), "a").unwrap();
        host.add(ip("fd00::1"), "a").unwrap();
        node.shell(&damage);
        let found = host.verify().unwrap().unwrap_or_else(|| panic!("{damage}"));
        assert!(found.starts_with(expected), "{damage}: {found}");
        assert!(host.ensure().unwrap() > Outcome::Unchanged, "{damage}");
        assert_eq!(host.verify().unwrap(), None, "{damage}");
        assert_eq!(host.ensure().unwrap(), Outcome::Unchanged, "{damage}");
        assert_eq!(sorted(&host).len(), kept, "{damage}");
        host.add(ip("10.0.0.1"), "a").unwrap();
        node.shell(&damage);
        host.remove_all().unwrap();
        host.remove_all().unwrap();
        let left = node.dump() + &node.shell("ipset save");
        assert!(!left.to_lowercase().contains("istio"), "{damage}: {left}");
        assert!(left.contains("table inet mine"), "{left}");
        assert_eq!(sorted(&host), held(&[]));
    }
}

#[test]
fn the_sets_of_others_do_not_matter_and_many_adds_at_once_all_hold() {
    for backend in BACKENDS {
        let proc = Proc::new("1\n");
        let test = "the_sets_of_others_do_not_matter_and_many_adds_at_once_all_hold";
        let Some(node) = Namespace::new(test) else {
            return;
        };
        node.shell("ipset create other hash:ip; ipset add other 10.9.9.9; nft 'table inet mine { set s { type ipv4_addr; }; }'");
        let config = config(backend, &proc);
        let hosts = [open(&node, &config).unwrap(), open(&node, &config).unwrap()];
        // More than fits into one answer of the kernel.
        let total = if backend == Backend::Iptables {
            2000
        } else {
            60
        };
        std::thread::scope(|scope| {
            for worker in 0..4 {
                let host = hosts[worker % 2].clone();
                scope.spawn(move || {
                    for index in (worker..total).step_by(4) {
                        let address = format!("10.1.{}.{}", index / 250, index % 250);
                        host.add(ip(&address), &format!("uid-of-a-pod-{index}"))
                            .unwrap();
                    }
                });
            }
        });
        assert_eq!(hosts[0].entries().unwrap().len(), total);
        hosts[0].remove_all().unwrap();
        assert!(node.shell("ipset save").contains("add other 10.9.9.9"));
        assert!(node.shell("nft list tables").contains("table inet mine"));
    }
}

#[test]
fn nftables_without_a_kubelet_is_refused_before_anything_is_changed() {
    let test = "nftables_without_a_kubelet_is_refused_before_anything_is_changed";
    let Some(node) = Namespace::new(test) else {
        return;
    };
    let proc = Proc::new("1\n");
    std::fs::remove_dir_all(proc.path().join("42")).unwrap();
    let error = open(&node, &config(Backend::Nftables, &proc)).unwrap_err();
    assert!(matches!(error, HostError::NoKubelet(_)), "{error}");
    assert_eq!(node.shell("nft list ruleset"), "");
    open(&node, &config(Backend::Iptables, &proc)).unwrap();
}

/// A node as the AWS plugin makes it for a pod with security groups of its own.
const BRANCH: &str = "ip link add wrnvlan0 type veth peer name wrnvlan1; ip link add wrnpod0 type veth peer name wrnpod1; \
    for name in wrnvlan0 wrnvlan1 wrnpod0 wrnpod1; do ip link set $name up; done; \
    ip route add 10.0.0.1/32 dev wrnpod0 table 1001; ip -6 route add fd00::1/128 dev wrnpod0 table 1001; \
    ip route add default dev wrnvlan0 table 1001; \
    ip rule add iif wrnvlan0 lookup 1001 pref 10; ip rule add iif wrnpod0 lookup 1001 pref 10; \
    ip -6 rule add iif wrnpod0 lookup 1001 pref 10";

#[test]
fn pods_behind_a_branch_interface_are_led_to_and_let_go_of() {
    let test = "pods_behind_a_branch_interface_are_led_to_and_let_go_of";
    for backend in BACKENDS {
        let proc = Proc::new("0\n");
        let Some(node) = Namespace::new(test) else {
            return;
        };
        node.shell(BRANCH);
        let rules = || node.shell("ip rule; ip -6 rule");
        let before = rules();
        let config = config(backend, &proc);
        let host = open(&node, &config).unwrap();
        for address in ["10.0.0.1", "10.0.0.2", "fd00::1"] {
            host.add(ip(address), "a").unwrap();
        }
        let whole = rules();
        let of = |family: &str| node.shell(&format!("ip {family} rule"));
        for (family, to) in [("-4", "10.0.0.1"), ("-6", "fd00::1")] {
            let told = of(family);
            assert!(
                told.contains(&format!("512:\tfrom all to {to} lookup 1001")),
                "{told}"
            );
            assert!(
                told.contains("9:\tfrom all iif wrnpod0 lookup local"),
                "{told}"
            );
        }
        assert_eq!(whole.lines().count(), before.lines().count() + 4);
        // A new agent knows by what is held, and what is lost comes back.
        node.shell("ip rule del pref 512");
        let host = open(&node, &config).unwrap();
        assert_eq!(rules(), whole);
        assert!(host.remove(ip("10.0.0.1"), "a").unwrap());
        assert_eq!(rules().lines().count(), before.lines().count() + 2);
        host.remove_all().unwrap();
        assert_eq!(rules(), before);
        // Where the node was not set up for it, nothing is added.
        for (demux, wanted) in [("1\n", true), ("0\n", false)] {
            let proc = Proc::new(demux);
            let config = HostConfig {
                branch_eni: wanted,
                ..super::host::config(backend, &proc)
            };
            let host = open(&node, &config).unwrap();
            host.add(ip("10.0.0.1"), "a").unwrap();
            assert_eq!(rules(), before);
            host.remove_all().unwrap();
        }
    }
}
