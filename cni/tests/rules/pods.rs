//! The rules of pods in real namespaces: put in once, left alone, repaired, exchanged, taken out.

use std::os::fd::AsFd;

use cni::rules::Family;
use cni::{
    Backend, CaptureConfig, CaptureError, Ipv6Mode, Outcome, capture, nftables, remove, render,
    verify,
};

use super::namespace::{Namespace, again};
use super::variants::variants;

const BACKENDS: [Backend; 2] = [Backend::Iptables, Backend::Nftables];

fn with(backend: Backend, config: &CaptureConfig) -> CaptureConfig {
    CaptureConfig {
        backend,
        ..config.clone()
    }
}

/// What others may have put into a pod.
const OTHERS: &str = "$4 -A INPUT -p udp --dport 9 -j DROP; $6 -t mangle -A OUTPUT -p udp --dport 9 -j DROP; \
    $4 -t nat -N MINE; $4 -t nat -A OUTPUT -p sctp -j MINE; \
    nft add table inet mine; nft 'add set inet mine s { type ipv4_addr; elements = { 192.0.2.9 }; }'; \
    nft 'add chain inet mine output { type nat hook output priority -100; }'; \
    nft add rule inet mine output ip daddr @s counter accept; \
    nft add table inet istio-ambient-not-ours; nft add chain inet istio-ambient-not-ours istio-output; \
    nft add rule inet istio-ambient-not-ours istio-output counter accept";

/// What is there besides rules of ours; iptables leaves tables without rules behind.
fn of_others(pod: &Namespace) -> String {
    let text = pod.shell("$4-save; $6-save; nft -s list ruleset inet");
    let rules = text.lines().filter(|line| line.starts_with("-A"));
    let tables = text.split("table inet ").skip(1);
    rules.chain(tables).collect::<Vec<_>>().join("\n")
}

#[test]
fn every_variant_is_put_in_once_and_goes_whole_beside_the_rules_of_others() {
    let test = "every_variant_is_put_in_once_and_goes_whole_beside_the_rules_of_others";
    for backend in BACKENDS {
        for (name, config) in variants() {
            let Some(pod) = Namespace::new(test) else {
                return;
            };
            let config = with(backend, &config);
            pod.shell(OTHERS);
            let others = of_others(&pod);
            let first = capture(pod.as_fd(), &config).unwrap();
            assert_eq!(first, Outcome::Applied, "{backend} {name}");
            assert_eq!(verify(pod.as_fd(), &config).unwrap(), None);
            let whole = pod.dump();
            let second = capture(pod.as_fd(), &config).unwrap();
            assert_eq!(second, Outcome::Unchanged, "{backend} {name}");
            assert_eq!(pod.dump(), whole, "{backend} {name}");
            remove(pod.as_fd()).unwrap();
            assert_eq!(of_others(&pod), others, "{backend} {name}");
            assert!(!pod.dump().contains("lookup 100"), "{backend} {name}");
            remove(pod.as_fd()).unwrap();
        }
    }
}

#[test]
fn nftables_goes_from_each_variant_to_each_other() {
    for (from_name, from) in variants() {
        for (to_name, to) in variants() {
            let Some(pod) = Namespace::new("nftables_goes_from_each_variant_to_each_other") else {
                return;
            };
            let [from, to] = [&from, &to].map(|config| with(Backend::Nftables, config));
            capture(pod.as_fd(), &from).unwrap();
            let outcome = capture(pod.as_fd(), &to).unwrap();
            assert_eq!(outcome == Outcome::Unchanged, from_name == to_name);
            let found = verify(pod.as_fd(), &to).unwrap();
            assert_eq!(found, None, "{from_name} {to_name}");
            let raw = pod.shell("nft list tables").contains("istio-ambient-raw");
            assert_eq!(raw, to.dns, "{from_name} {to_name}");
            let routed = pod.shell("ip -6 rule").contains("lookup 100");
            let captured = to.ipv6 == Ipv6Mode::Capture;
            assert_eq!(routed, captured, "{from_name} {to_name}");
        }
    }
}

#[test]
fn a_pod_goes_from_each_backend_to_the_other_and_nothing_of_the_first_stays() {
    let test = "a_pod_goes_from_each_backend_to_the_other_and_nothing_of_the_first_stays";
    for from in BACKENDS {
        for (name, config) in variants() {
            let (Some(pod), Some(straight)) = (Namespace::new(test), Namespace::new(test)) else {
                return;
            };
            let [from, to] = [from, from.other()].map(|backend| with(backend, &config));
            capture(straight.as_fd(), &to).unwrap();
            capture(pod.as_fd(), &from).unwrap();
            let careful = CaptureConfig {
                reconcile: false,
                ..to.clone()
            };
            let before = pod.dump();
            let refused = capture(pod.as_fd(), &careful).unwrap_err();
            assert!(matches!(refused, CaptureError::Foreign(_)), "{refused}");
            assert_eq!(pod.dump(), before, "{name}");
            let changed = capture(pod.as_fd(), &to).unwrap();
            assert_eq!(changed, Outcome::Repaired, "{name}");
            assert_eq!(verify(pod.as_fd(), &to).unwrap(), None, "{name}");
            assert_eq!(pod.state(), straight.state(), "{name}");
            let listing = "nft -s list ruleset inet";
            assert_eq!(pod.shell(listing), straight.shell(listing), "{name}");
        }
    }
}

#[test]
fn rules_of_both_backends_are_told_and_removed() {
    let test = "rules_of_both_backends_are_told_and_removed";
    let Some(pod) = Namespace::new(test) else {
        return;
    };
    let config = with(Backend::Nftables, &CaptureConfig::default());
    capture(pod.as_fd(), &config).unwrap();
    pod.shell("$6 -t nat -N ISTIO_OUTPUT; $6 -t nat -A OUTPUT -j ISTIO_OUTPUT");
    let found = verify(pod.as_fd(), &config).unwrap();
    let expected = "there are rules of iptables besides those of nftables";
    assert_eq!(found.as_deref(), Some(expected));
    remove(pod.as_fd()).unwrap();
    let left = pod.dump();
    assert!(!left.to_lowercase().contains("istio"), "{left}");
}

/// Every command that deletes one of our rules.
fn deletions(pod: &Namespace, backend: Backend) -> Vec<String> {
    match backend {
        Backend::Iptables => {
            let mut commands = Vec::new();
            for family in ["$4", "$6"] {
                let text = pod.shell(&format!("{family}-save"));
                let mut table = "";
                for line in text.lines() {
                    table = line.strip_prefix('*').unwrap_or(table);
                    let ours = line.contains("ISTIO").then(|| line.strip_prefix("-A "));
                    if let Some(rule) = ours.flatten() {
                        commands.push(format!("{family} -t {table} -D {rule}"));
                    }
                }
            }
            commands
        }
        Backend::Nftables => {
            let text = pod.shell("nft -a list ruleset inet");
            let (mut table, mut chain) = ("", "");
            let mut commands = Vec::new();
            for line in text.lines() {
                let mut words = line.split_whitespace();
                match (words.next(), words.next(), words.next()) {
                    (Some("table"), _, Some(name)) => table = name,
                    (Some("chain"), Some(name), _) => chain = name,
                    (Some("type"), ..) => {}
                    _ => {
                        let handle = line.split("# handle ").nth(1);
                        let rule = |handle| {
                            format!("nft delete rule inet {table} {chain} handle {handle}")
                        };
                        commands.extend(handle.map(rule));
                    }
                }
            }
            commands
        }
    }
}

/// How many rules are written for a pod.
fn written(config: &CaptureConfig) -> usize {
    let text = match config.backend {
        Backend::Iptables => [Family::V4, Family::V6]
            .map(|family| render::restore(family, config))
            .concat(),
        Backend::Nftables => nftables::render::script(config),
    };
    let is_rule = |line: &&str| line.starts_with("-A ") || line.starts_with("add rule ");
    text.lines().filter(is_rule).count()
}

#[test]
fn the_loss_of_any_single_rule_is_found_and_repaired() {
    let test = "the_loss_of_any_single_rule_is_found_and_repaired";
    for ipv6 in [Ipv6Mode::Capture, Ipv6Mode::Refuse] {
        for backend in BACKENDS {
            let Some(pod) = Namespace::new(test) else {
                return;
            };
            let config = CaptureConfig {
                ipv6,
                backend,
                ..CaptureConfig::default()
            };
            capture(pod.as_fd(), &config).unwrap();
            let whole = (pod.state(), pod.shell("nft -s list ruleset inet"));
            let count = deletions(&pod, backend).len();
            assert_eq!(count, written(&config));
            // Repair gives new handles, so each is looked up when its turn comes.
            for index in 0..count {
                let deletion = &deletions(&pod, backend)[index];
                pod.shell(deletion);
                let found = verify(pod.as_fd(), &config).unwrap();
                assert!(found.is_some(), "{deletion}");
                let repaired = capture(pod.as_fd(), &config).unwrap();
                assert_eq!(repaired, Outcome::Repaired, "{deletion}");
                let now = (pod.state(), pod.shell("nft -s list ruleset inet"));
                assert_eq!(now, whole, "{deletion}");
            }
        }
    }
}

#[test]
fn other_damage_to_nftables_is_named_and_repaired_unless_it_is_to_be_left_alone() {
    let test = "other_damage_to_nftables_is_named_and_repaired_unless_it_is_to_be_left_alone";
    let nat = "inet istio-ambient-nat";
    let damages = [
        (
            format!("delete table {nat}"),
            "table istio-ambient-nat is missing",
        ),
        (
            format!("flush chain {nat} istio-output"),
            "table istio-ambient-nat: the chain's end instead of",
        ),
        (
            format!("add chain {nat} more"),
            "table istio-ambient-nat: chain more",
        ),
        (
            format!("add rule {nat} istio-output accept"),
            "table istio-ambient-nat: accept instead of the chain's end",
        ),
        (
            format!("insert rule {nat} istio-output return"),
            "table istio-ambient-nat: return instead of",
        ),
        (
            format!("add set {nat} s {{ type ipv4_addr ; }}"),
            "table istio-ambient-nat: set s {",
        ),
        (
            format!("chain {nat} output {{ policy drop ; }}"),
            "table istio-ambient-nat: type nat hook output priority -100; policy drop;",
        ),
        (
            "add table inet istio-ambient-filter".to_string(),
            "unexpected table istio-ambient-filter",
        ),
    ];
    let config = with(Backend::Nftables, &CaptureConfig::default());
    let careful = CaptureConfig {
        reconcile: false,
        ..config.clone()
    };
    for (damage, expected) in damages {
        let Some(pod) = Namespace::new(test) else {
            return;
        };
        assert_eq!(capture(pod.as_fd(), &careful).unwrap(), Outcome::Applied);
        let whole = pod.shell("nft -s list ruleset");
        pod.shell(&format!("nft '{damage}'"));
        let found = verify(pod.as_fd(), &config).unwrap().unwrap();
        assert!(found.starts_with(expected), "{found}");
        let damaged = pod.dump();
        let refused = capture(pod.as_fd(), &careful).unwrap_err();
        assert!(matches!(refused, CaptureError::Foreign(_)), "{refused}");
        assert_eq!(pod.dump(), damaged, "{damage}");
        assert_eq!(capture(pod.as_fd(), &config).unwrap(), Outcome::Repaired);
        assert_eq!(pod.shell("nft -s list ruleset"), whole, "{damage}");
        assert_eq!(capture(pod.as_fd(), &careful).unwrap(), Outcome::Unchanged);
        pod.shell(&format!("nft '{damage}'"));
        remove(pod.as_fd()).unwrap();
        assert_eq!(pod.shell("nft list ruleset"), "", "{damage}");
    }
}

#[test]
fn a_capture_that_fails_leaves_no_nftables_behind() {
    let test = "a_capture_that_fails_leaves_no_nftables_behind";
    let Some(pod) = Namespace::new(test) else {
        return;
    };
    pod.shell("ip link set lo down");
    let config = with(Backend::Nftables, &CaptureConfig::default());
    let before = pod.dump();
    let error = capture(pod.as_fd(), &config).unwrap_err();
    assert!(error.to_string().contains("is the pod's interface lo up?"));
    assert_eq!(pod.dump(), before);
    pod.shell("ip link set lo up");
    assert_eq!(capture(pod.as_fd(), &config).unwrap(), Outcome::Applied);
}

#[test]
fn fifty_pods_at_once_are_each_captured_once() {
    let test = "fifty_pods_at_once_are_each_captured_once";
    for backend in BACKENDS {
        let pods: Option<Vec<_>> = (0..50).map(|_| Namespace::new(test)).collect();
        let Some(pods) = pods else {
            return;
        };
        let config = with(backend, &CaptureConfig::default());
        let outcomes: Vec<_> = std::thread::scope(|scope| {
            let captures = pods
                .iter()
                .map(|pod| scope.spawn(|| capture(pod.as_fd(), &config)));
            let captures: Vec<_> = captures.collect();
            captures
                .into_iter()
                .map(|capture| capture.join().unwrap().unwrap())
                .collect()
        });
        assert_eq!(outcomes, [Outcome::Applied; 50]);
        for pod in &pods {
            assert_eq!(verify(pod.as_fd(), &config).unwrap(), None);
        }
    }
}

#[test]
fn a_node_without_nft_is_told_what_to_do() {
    const INNER: &str = "WARREN_TEST_WITHOUT_NFT";
    let test = "pods::a_node_without_nft_is_told_what_to_do";
    let Some(pod) = Namespace::new(test) else {
        return;
    };
    if std::env::var_os(INNER).is_none() {
        assert_eq!(again(&[(INNER, "1")], &["--exact", test]), Ok(1));
        return;
    }
    // SAFETY: this process runs this test alone.
    unsafe { std::env::set_var("PATH", "/nonexistent") };
    let config = with(Backend::Nftables, &CaptureConfig::default());
    let error = capture(pod.as_fd(), &config).unwrap_err().to_string();
    assert!(
        error.starts_with("nft cannot be run: No such file"),
        "{error}"
    );
    assert!(error.contains("apt-get install nftables"), "{error}");
    // Nothing is there to be removed, so no program is needed for it.
    remove(pod.as_fd()).unwrap();
}
