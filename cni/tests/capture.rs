//! The rules and routes of capture in real namespaces: put in, left alone, repaired, taken out.

mod namespace;

use std::fs::File;
use std::os::fd::AsFd;

use cni::iptables::IptablesError;
use cni::{CaptureConfig, CaptureError, Ipv6Mode, Outcome, capture, remove, verify};

use namespace::{Namespace, again};

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
            ipv6: Ipv6Mode::Pass,
            ..plain
        },
    ]
}

#[test]
fn every_variant_is_applied_once_left_alone_and_removed_whole() {
    for config in variants() {
        let Some(pod) =
            Namespace::new("every_variant_is_applied_once_left_alone_and_removed_whole")
        else {
            return;
        };
        let before = pod.state();
        let first = capture(pod.as_fd(), &config).unwrap();
        assert_eq!(first, Outcome::Applied, "{config:?}");
        let applied = pod.state();
        let rules = applied.iter().filter(|line| line.contains("lookup 100"));
        let families = if config.ipv6 == Ipv6Mode::Capture {
            2
        } else {
            1
        };
        assert_eq!(rules.count(), families, "{applied:?}");
        assert_eq!(verify(pod.as_fd(), &config).unwrap(), None);
        let second = capture(pod.as_fd(), &config).unwrap();
        assert_eq!(second, Outcome::Unchanged, "{config:?}");
        assert_eq!(pod.state(), applied);
        remove(pod.as_fd()).unwrap();
        assert_eq!(pod.state(), before);
        remove(pod.as_fd()).unwrap();
        assert_eq!(capture(pod.as_fd(), &config).unwrap(), Outcome::Applied);
        assert_eq!(pod.state(), applied);
    }
}

#[test]
fn a_pod_goes_from_each_variant_to_each_other() {
    for from in variants() {
        for to in variants() {
            let Some(pod) = Namespace::new("a_pod_goes_from_each_variant_to_each_other") else {
                return;
            };
            capture(pod.as_fd(), &from).unwrap();
            let outcome = capture(pod.as_fd(), &to).unwrap();
            assert_eq!(verify(pod.as_fd(), &to).unwrap(), None, "{from:?} {to:?}");
            let same = from == to;
            assert_eq!(outcome == Outcome::Unchanged, same, "{from:?} {to:?}");
            remove(pod.as_fd()).unwrap();
            let clean = pod.state();
            assert!(
                !clean.iter().any(|line| line.contains("ISTIO")),
                "{clean:?}"
            );
        }
    }
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
        let careful = CaptureConfig {
            reconcile: false,
            ..config.clone()
        };
        if damage.starts_with('$') {
            let refused = capture(pod.as_fd(), &careful).unwrap_err();
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
fn what_a_killed_agent_left_half_done_is_completed_or_removed() {
    let config = CaptureConfig::default();
    let text = cni::render::restore(cni::rules::Family::V4, &config);
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

#[test]
fn a_capture_that_fails_leaves_the_pod_as_it_was() {
    let Some(pod) = Namespace::new("a_capture_that_fails_leaves_the_pod_as_it_was") else {
        return;
    };
    // The route cannot be set while lo is down.
    pod.shell("ip link set lo down");
    let before = pod.state();
    let error = capture(pod.as_fd(), &CaptureConfig::default()).unwrap_err();
    assert!(error.to_string().contains("is the pod's interface lo up?"));
    assert_eq!(pod.state(), before);
    pod.shell("ip link set lo up");
    capture(pod.as_fd(), &CaptureConfig::default()).unwrap();
}

#[test]
fn a_failure_with_one_family_takes_the_other_back() {
    let Some(pod) = Namespace::new("a_failure_with_one_family_takes_the_other_back") else {
        return;
    };
    // By the time that IPv6 is refused, IPv4 is captured.
    pod.shell("$6 -t nat -N ISTIO_TEST");
    let before = pod.state();
    let careful = CaptureConfig {
        reconcile: false,
        ..CaptureConfig::default()
    };
    let error = capture(pod.as_fd(), &careful).unwrap_err();
    assert!(matches!(error, CaptureError::Foreign(_)), "{error}");
    assert_eq!(pod.state(), before);
}

#[test]
fn a_pod_without_ipv6_is_captured_as_far_as_it_goes() {
    let Some(pod) = Namespace::new("a_pod_without_ipv6_is_captured_as_far_as_it_goes") else {
        return;
    };
    pod.shell("echo 1 > /proc/sys/net/ipv6/conf/lo/disable_ipv6");
    let config = CaptureConfig::default();
    assert_eq!(capture(pod.as_fd(), &config).unwrap(), Outcome::Applied);
    assert_eq!(capture(pod.as_fd(), &config).unwrap(), Outcome::Unchanged);
    assert_eq!(verify(pod.as_fd(), &config).unwrap(), None);
    // The route follows as soon as it can.
    pod.shell("echo 0 > /proc/sys/net/ipv6/conf/lo/disable_ipv6");
    assert!(verify(pod.as_fd(), &config).unwrap().is_some());
    assert_eq!(capture(pod.as_fd(), &config).unwrap(), Outcome::Repaired);
    assert_eq!(pod.shell("ip -6 route show table 100").lines().count(), 1);
    remove(pod.as_fd()).unwrap();
}

#[test]
fn a_missing_rule_of_one_family_is_added_though_the_other_is_there() {
    let test = "a_missing_rule_of_one_family_is_added_though_the_other_is_there";
    let Some(pod) = Namespace::new(test) else {
        return;
    };
    pod.shell("ip rule add fwmark 0x111/0xfff pref 32764 lookup 100");
    capture(pod.as_fd(), &CaptureConfig::default()).unwrap();
    for family in ["-4", "-6"] {
        let rules = pod.shell(&format!("ip {family} rule show pref 32764"));
        let expected = "32764:\tfrom all fwmark 0x111/0xfff lookup 100\n";
        assert_eq!(rules, expected);
        let routes = pod.shell(&format!("ip {family} route show table 100"));
        assert!(routes.starts_with("local default dev lo"), "{routes}");
    }
}

#[test]
fn many_at_once_do_not_get_in_each_others_way() {
    let config = CaptureConfig::default();
    let mut pods = Vec::new();
    for _ in 0..4 {
        let Some(pod) = Namespace::new("many_at_once_do_not_get_in_each_others_way") else {
            return;
        };
        pods.push(pod);
    }
    let one = |pod: &Namespace| capture(pod.as_fd(), &config).unwrap();
    let outcomes: Vec<Vec<Outcome>> = std::thread::scope(|scope| {
        let mut running = Vec::new();
        for pod in &pods {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| one(pod))).collect();
            running.push(threads);
        }
        let done = running.into_iter().map(|threads| {
            let outcomes = threads.into_iter().map(|thread| thread.join().unwrap());
            outcomes.collect()
        });
        done.collect()
    });
    for (pod, outcomes) in pods.iter().zip(outcomes) {
        let applied = outcomes.iter().filter(|one| **one == Outcome::Applied);
        assert_eq!(applied.count(), 1, "{outcomes:?}");
        assert!(!outcomes.contains(&Outcome::Repaired), "{outcomes:?}");
        assert_eq!(verify(pod.as_fd(), &config).unwrap(), None);
    }
}

#[test]
fn a_name_that_is_no_interface_is_refused_before_anything_is_changed() {
    let test = "a_name_that_is_no_interface_is_refused_before_anything_is_changed";
    let Some(pod) = Namespace::new(test) else {
        return;
    };
    let before = pod.state();
    let config = CaptureConfig {
        virtual_interfaces: vec!["eth0 -j ACCEPT".to_string()],
        ..CaptureConfig::default()
    };
    let refused = capture(pod.as_fd(), &config).unwrap_err().to_string();
    assert_eq!(
        refused,
        "eth0 -j ACCEPT is not the name of a network interface"
    );
    assert_eq!(pod.state(), before);
}

#[test]
fn what_is_no_namespace_is_neither_captured_nor_cleared() {
    let file = File::open("/proc/self/status").unwrap();
    let config = CaptureConfig::default();
    let error = capture(file.as_fd(), &config).unwrap_err();
    assert!(matches!(error, CaptureError::Namespace(_)), "{error}");
    assert!(verify(file.as_fd(), &config).is_err());
    assert!(remove(file.as_fd()).is_err());
}

#[test]
fn a_namespace_descriptor_tells_which_namespace_it_is() {
    let test = "a_namespace_descriptor_tells_which_namespace_it_is";
    let (Some(one), Some(two)) = (Namespace::new(test), Namespace::new(test)) else {
        return;
    };
    let id = |file: &dyn AsFd| cni::netns::id(file.as_fd()).unwrap();
    assert_ne!(id(&one), id(&two));
    let again = one.within(|| File::open("/proc/thread-self/ns/net"));
    assert_eq!(id(&again.unwrap()), id(&one));
    let by_path = cni::netns::open(one.path().as_ref()).unwrap();
    assert_eq!(id(&by_path), id(&one));
}

#[test]
fn legacy_iptables_does_as_well() {
    let tests = [
        "every_variant_is_applied_once_left_alone_and_removed_whole",
        "damage_is_found_and_repaired_and_the_pods_own_rules_survive",
        "what_a_killed_agent_left_half_done_is_completed_or_removed",
        "a_failure_with_one_family_takes_the_other_back",
        "many_at_once_do_not_get_in_each_others_way",
    ];
    let exactly = [&["--exact"], &tests[..]].concat();
    let passed = again(&[("FORCE_IPTABLES_BINARY", "legacy")], &exactly);
    assert_eq!(passed, Ok(tests.len()));
}

#[test]
fn a_machine_without_iptables_is_told_what_to_do() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIPPED a_machine_without_iptables_is_told_what_to_do: it needs root");
        return;
    }
    const INNER: &str = "WARREN_TEST_WITHOUT_IPTABLES";
    if std::env::var_os(INNER).is_none() {
        let test = "a_machine_without_iptables_is_told_what_to_do";
        return assert_eq!(again(&[(INNER, "1")], &["--exact", test]), Ok(1));
    }
    // SAFETY: this process runs this test alone.
    unsafe { std::env::set_var("PATH", "/nonexistent") };
    let own = File::open("/proc/self/ns/net").unwrap();
    let pod = std::thread::spawn(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        File::open("/proc/thread-self/ns/net").unwrap()
    });
    let pod = pod.join().unwrap();
    assert_ne!(cni::netns::id(&own).unwrap(), cni::netns::id(&pod).unwrap());
    let error = capture(pod.as_fd(), &CaptureConfig::default()).unwrap_err();
    let missing = IptablesError::NoBinary {
        program: "iptables",
        reasons: String::new(),
        hint: "",
    };
    let CaptureError::Iptables(error) = error else {
        panic!("{error}");
    };
    assert_eq!(
        std::mem::discriminant(&error),
        std::mem::discriminant(&missing)
    );
    let text = error.to_string();
    for part in [
        "no usable iptables was found: iptables-legacy-save cannot be run: No such file",
        "apt-get install iptables",
    ] {
        assert!(text.contains(part), "{text}");
    }
}
