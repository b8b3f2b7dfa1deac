//! Damage to the rules of pods: found, named, repaired, or left alone if that is asked for.

use std::os::fd::AsFd;

use cni::rules::Family;
use cni::{
    Backend, CaptureConfig, CaptureError, Ipv6Mode, Outcome, capture, nftables, remove, render,
    verify,
};

use super::namespace::Namespace;
use super::variants::{careful, with};

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

fn lose_each_rule(test: &str, backend: Backend) {
    for ipv6 in [Ipv6Mode::Capture, Ipv6Mode::Refuse] {
        let Some(pod) = Namespace::new(test) else {
            return;
        };
        let config = CaptureConfig {
            ipv6,
            backend,
            ..CaptureConfig::default()
        };
        capture(pod.as_fd(), &config).unwrap();
        let whole = pod.rules();
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
            assert_eq!(pod.rules(), whole, "{deletion}");
        }
    }
}

#[test]
fn the_loss_of_any_single_rule_of_iptables_is_found_and_repaired() {
    let test = "the_loss_of_any_single_rule_of_iptables_is_found_and_repaired";
    lose_each_rule(test, Backend::Iptables);
}

#[test]
fn the_loss_of_any_single_rule_of_nftables_is_found_and_repaired() {
    let test = "the_loss_of_any_single_rule_of_nftables_is_found_and_repaired";
    lose_each_rule(test, Backend::Nftables);
}

#[test]
fn damage_is_found_and_repaired_and_the_pods_own_rules_survive() {
    let config = CaptureConfig::default();
    let swap = "-p tcp -m mark --mark 0x111/0xfff -j ACCEPT";
    let damages = [
        "$4 -t nat -F ISTIO_OUTPUT",
        "$4 -t nat -D OUTPUT -j ISTIO_OUTPUT",
        "$6 -t mangle -F ISTIO_PRERT",
        "$4 -t nat -A ISTIO_PRERT -p tcp -j RETURN",
        "$4 -t nat -N ISTIO_TEST && $4 -t nat -A OUTPUT -j ISTIO_TEST",
        "$4 -t filter -N ISTIO_TEST && $4 -A INPUT -g ISTIO_TEST && $4 -A ISTIO_TEST -j DROP",
        "$4 -t nat -R ISTIO_OUTPUT 1 -p tcp -j RETURN",
        "$6 -t raw -F && $6 -t raw -X",
        &format!("$4 -t nat -D ISTIO_OUTPUT {swap} && $4 -t nat -A ISTIO_OUTPUT {swap}"),
        "ip rule del pref 32764",
        "ip -6 rule del pref 32764",
        "ip route flush table 100",
        "ip -6 route flush table 100",
    ];
    for damage in damages {
        let test = "damage_is_found_and_repaired_and_the_pods_own_rules_survive";
        let Some(pod) = Namespace::new(test) else {
            return;
        };
        pod.shell("$4 -A INPUT -p udp --dport 9 -j DROP");
        pod.shell("$4 -t nat -N MINE; $4 -t nat -A OUTPUT -p sctp -m comment --comment 'to ISTIO_OUTPUT -j ISTIO_OUTPUT' -j MINE");
        let own = pod.state();
        assert_eq!(capture(pod.as_fd(), &config).unwrap(), Outcome::Applied);
        let whole = pod.state();
        pod.shell(damage);
        let damaged = pod.state();
        let found = verify(pod.as_fd(), &config).unwrap();
        assert!(found.is_some(), "{damage}");
        if damage.starts_with('$') {
            let refused = capture(pod.as_fd(), &careful(&config)).unwrap_err();
            assert!(matches!(refused, CaptureError::Foreign(_)), "{damage}");
            assert_eq!(pod.state(), damaged, "{damage}");
        }
        let repaired = capture(pod.as_fd(), &config).unwrap();
        assert_eq!(repaired, Outcome::Repaired, "{damage}");
        assert_eq!(verify(pod.as_fd(), &config).unwrap(), None, "{damage}");
        assert_eq!(pod.state(), whole, "{damage}");
        assert_eq!(capture(pod.as_fd(), &config).unwrap(), Outcome::Unchanged);
        pod.shell(damage);
        remove(pod.as_fd()).unwrap();
        assert_eq!(pod.state(), own, "{damage}");
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
    let careful = careful(&config);
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
fn what_a_killed_agent_left_half_done_is_completed_or_removed() {
    let config = CaptureConfig::default();
    let text = render::restore(Family::V4, &config);
    let tables: Vec<_> = text.split_inclusive("COMMIT\n").collect();
    for done in 1..=tables.len() {
        let test = "what_a_killed_agent_left_half_done_is_completed_or_removed";
        let Some(pod) = Namespace::new(test) else {
            return;
        };
        let before = pod.state();
        let half = format!(
            "$4-restore --noflush <<'END'\n{}END\n",
            tables[..done].concat()
        );
        pod.shell(&half);
        assert!(verify(pod.as_fd(), &config).unwrap().is_some());
        assert_eq!(capture(pod.as_fd(), &config).unwrap(), Outcome::Repaired);
        assert_eq!(verify(pod.as_fd(), &config).unwrap(), None);
        remove(pod.as_fd()).unwrap();
        assert_eq!(pod.state(), before);
        pod.shell(&half);
        remove(pod.as_fd()).unwrap();
        assert_eq!(pod.state(), before);
    }
}
