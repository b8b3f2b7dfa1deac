//! The rules of pods in real namespaces: put in once, left alone, exchanged, taken out.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::AsFd;

use cni::{
    Backend, CaptureConfig, CaptureError, Ipv6Mode, Outcome, capture, netns, remove, verify,
};

use super::namespace::Namespace;
use super::variants::{BACKENDS, careful, variants, with};

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
            let name = format!("{backend} {name}");
            let config = with(backend, &config);
            pod.shell(OTHERS);
            let others = (of_others(&pod), pod.rules());
            let first = capture(pod.as_fd(), &config).unwrap();
            assert_eq!(first, Outcome::Applied, "{name}");
            assert_eq!(verify(pod.as_fd(), &config).unwrap(), None, "{name}");
            let (whole, rules) = (pod.dump(), pod.rules());
            assert_ne!(rules, others.1, "{name}");
            let routed = 1 + usize::from(config.ipv6 == Ipv6Mode::Capture);
            assert_eq!(whole.matches("lookup 100").count(), routed, "{name}");
            assert_eq!(whole.matches("local default dev lo").count(), routed);
            let second = capture(pod.as_fd(), &config).unwrap();
            assert_eq!(second, Outcome::Unchanged, "{name}");
            assert_eq!(pod.dump(), whole, "{name}");
            for _ in 0..2 {
                remove(pod.as_fd()).unwrap();
                assert_eq!((of_others(&pod), pod.rules()), others, "{name}");
            }
            let again = capture(pod.as_fd(), &careful(&config)).unwrap();
            assert_eq!(again, Outcome::Applied, "{name}");
            assert_eq!(pod.rules(), rules, "{name}");
        }
    }
}

/// A way on which each of so many places follows each, itself too.
fn way(places: usize) -> Vec<usize> {
    let from = |first| {
        let there_and_back = (first + 1..places).flat_map(move |next| [next, first]);
        [first, first].into_iter().chain(there_and_back)
    };
    (0..places).flat_map(from).collect()
}

fn each_variant_to_each_other(test: &str, backend: Backend) {
    let variants = variants();
    let mut straight = Vec::new();
    for (_, config) in &variants {
        let Some(pod) = Namespace::new(test) else {
            return;
        };
        capture(pod.as_fd(), &with(backend, config)).unwrap();
        straight.push(pod.rules());
    }
    let pod = Namespace::new(test).unwrap();
    let (way, mut steps) = (way(variants.len()), BTreeSet::new());
    capture(pod.as_fd(), &with(backend, &variants[way[0]].1)).unwrap();
    for step in way.windows(2) {
        let [from, to] = [step[0], step[1]];
        steps.insert((from, to));
        let name = format!("{backend}: {} to {}", variants[from].0, variants[to].0);
        let config = with(backend, &variants[to].1);
        let outcome = capture(pod.as_fd(), &config).unwrap();
        let expected = match from == to {
            true => Outcome::Unchanged,
            false => Outcome::Repaired,
        };
        assert_eq!(outcome, expected, "{name}");
        assert_eq!(verify(pod.as_fd(), &config).unwrap(), None, "{name}");
        assert_eq!(pod.rules(), straight[to], "{name}");
    }
    assert_eq!(steps.len(), variants.len() * variants.len());
}

#[test]
fn iptables_goes_from_each_variant_to_each_other() {
    let test = "iptables_goes_from_each_variant_to_each_other";
    each_variant_to_each_other(test, Backend::Iptables);
}

#[test]
fn nftables_goes_from_each_variant_to_each_other() {
    let test = "nftables_goes_from_each_variant_to_each_other";
    each_variant_to_each_other(test, Backend::Nftables);
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
            let before = pod.dump();
            let refused = capture(pod.as_fd(), &careful(&to)).unwrap_err();
            assert!(matches!(refused, CaptureError::Foreign(_)), "{refused}");
            assert_eq!(pod.dump(), before, "{name}");
            let changed = capture(pod.as_fd(), &to).unwrap();
            assert_eq!(changed, Outcome::Repaired, "{name}");
            assert_eq!(verify(pod.as_fd(), &to).unwrap(), None, "{name}");
            assert_eq!(pod.rules(), straight.rules(), "{name}");
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

#[test]
fn a_pod_without_ipv6_is_captured_as_far_as_it_goes() {
    let test = "a_pod_without_ipv6_is_captured_as_far_as_it_goes";
    for backend in BACKENDS {
        let Some(pod) = Namespace::new(test) else {
            return;
        };
        pod.shell("echo 1 > /proc/sys/net/ipv6/conf/lo/disable_ipv6");
        let config = with(backend, &CaptureConfig::default());
        assert_eq!(capture(pod.as_fd(), &config).unwrap(), Outcome::Applied);
        assert_eq!(capture(pod.as_fd(), &config).unwrap(), Outcome::Unchanged);
        assert_eq!(verify(pod.as_fd(), &config).unwrap(), None);
        // The route follows as soon as it can.
        pod.shell("echo 0 > /proc/sys/net/ipv6/conf/lo/disable_ipv6");
        let found = verify(pod.as_fd(), &config).unwrap();
        let expected = "IPv6: the route for answers to the proxy is missing";
        assert_eq!(found.as_deref(), Some(expected));
        assert_eq!(capture(pod.as_fd(), &config).unwrap(), Outcome::Repaired);
        assert_eq!(pod.shell("ip -6 route show table 100").lines().count(), 1);
        remove(pod.as_fd()).unwrap();
    }
}

#[test]
fn a_missing_rule_of_one_family_is_added_though_the_other_is_there() {
    let test = "a_missing_rule_of_one_family_is_added_though_the_other_is_there";
    for backend in BACKENDS {
        let Some(pod) = Namespace::new(test) else {
            return;
        };
        pod.shell("ip rule add fwmark 0x111/0xfff pref 32764 lookup 100");
        capture(pod.as_fd(), &with(backend, &CaptureConfig::default())).unwrap();
        for family in ["-4", "-6"] {
            let rules = pod.shell(&format!("ip {family} rule show pref 32764"));
            let expected = "32764:\tfrom all fwmark 0x111/0xfff lookup 100\n";
            assert_eq!(rules, expected);
            let routes = pod.shell(&format!("ip {family} route show table 100"));
            assert!(routes.starts_with("local default dev lo"), "{routes}");
        }
    }
}

/// Captures every pod by so many threads of its own at once; the outcomes by pod.
fn at_once(pods: &[Namespace], threads: usize, config: &CaptureConfig) -> Vec<Vec<Outcome>> {
    let one = |pod: &Namespace| capture(pod.as_fd(), config).unwrap();
    std::thread::scope(|scope| {
        let begun: Vec<Vec<_>> = pods
            .iter()
            .map(|pod| (0..threads).map(|_| scope.spawn(|| one(pod))).collect())
            .collect();
        let joined = begun.into_iter().map(|threads| {
            let outcomes = threads.into_iter().map(|thread| thread.join().unwrap());
            outcomes.collect()
        });
        joined.collect()
    })
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
        let outcomes = at_once(&pods, 1, &config);
        assert_eq!(outcomes.concat(), [Outcome::Applied; 50]);
        let expected = pods[0].rules();
        for pod in &pods {
            assert_eq!(verify(pod.as_fd(), &config).unwrap(), None);
            assert_eq!(pod.rules(), expected);
        }
    }
}

#[test]
fn many_hands_on_one_pod_capture_it_once() {
    let test = "many_hands_on_one_pod_capture_it_once";
    for backend in BACKENDS {
        let pods: Option<Vec<_>> = (0..4).map(|_| Namespace::new(test)).collect();
        let Some(pods) = pods else {
            return;
        };
        let config = with(backend, &CaptureConfig::default());
        for outcomes in at_once(&pods, 4, &config) {
            let applied = outcomes.iter().filter(|one| **one == Outcome::Applied);
            assert_eq!(applied.count(), 1, "{outcomes:?}");
            assert!(!outcomes.contains(&Outcome::Repaired), "{outcomes:?}");
        }
        for pod in &pods {
            assert_eq!(verify(pod.as_fd(), &config).unwrap(), None);
        }
    }
}

#[test]
fn a_namespace_descriptor_tells_which_namespace_it_is() {
    let test = "a_namespace_descriptor_tells_which_namespace_it_is";
    let (Some(one), Some(two)) = (Namespace::new(test), Namespace::new(test)) else {
        return;
    };
    let id = |file: &dyn AsFd| netns::id(file.as_fd()).unwrap();
    assert_ne!(id(&one), id(&two));
    let again = one.within(|| File::open("/proc/thread-self/ns/net"));
    assert_eq!(id(&again.unwrap()), id(&one));
    let by_path = netns::open(one.path().as_ref()).unwrap();
    assert_eq!(id(&by_path), id(&one));
}
