//! What the documentation says to do by hand, done.

use std::net::IpAddr;
use std::os::fd::AsFd;

use cni::capture;

use super::host::{Proc, config, open};
use super::namespace::Namespace;
use super::variants::{BACKENDS, variants, with};

/// A script of the documentation, the first after a line that begins like this.
fn documented(after: &str) -> String {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/capture.md");
    let text = std::fs::read_to_string(path).unwrap();
    let lines = text.lines().skip_while(|line| !line.starts_with(after));
    let script = lines.skip_while(|line| *line != "```sh").skip(1);
    let script: Vec<_> = script.take_while(|line| *line != "```").collect();
    assert!(script.len() > 3, "{script:?}");
    let script = script
        .join("\n")
        .replace("in iptables ip6tables;", "in $4 $6;");
    // What is not there may fail.
    format!("set +e\n{script}\ntrue")
}

#[test]
fn a_pods_rules_are_removed_by_the_documented_commands() {
    let test = "a_pods_rules_are_removed_by_the_documented_commands";
    let script = documented("In the pod's namespace");
    for backend in BACKENDS {
        // Between them they have every chain.
        let has_all = |name: &str| matches!(name, "default" | "ipv6-refused");
        for (name, variant) in variants().into_iter().filter(|(name, _)| has_all(name)) {
            let Some(pod) = Namespace::new(test) else {
                return;
            };
            pod.shell("$4 -t nat -A OUTPUT -p sctp -j ACCEPT");
            let before = pod.rules();
            capture(pod.as_fd(), &with(backend, &variant)).unwrap();
            assert_ne!(pod.rules(), before);
            pod.shell(&script);
            assert_eq!(pod.rules(), before, "{backend} {name}");
        }
    }
}

#[test]
fn the_nodes_rules_are_removed_by_the_documented_commands() {
    let test = "the_nodes_rules_are_removed_by_the_documented_commands";
    let script = documented("On the node, after which");
    for backend in BACKENDS {
        let proc = Proc::new("1\n");
        let Some(node) = Namespace::new(test) else {
            return;
        };
        let everything = || node.rules() + &node.shell("ipset list -n");
        let before = everything();
        let host = open(&node, &config(backend, &proc)).unwrap();
        for ip in ["10.0.0.1", "fd00::1"] {
            let ip: IpAddr = ip.parse().unwrap();
            host.add(ip, "a").unwrap();
        }
        assert_ne!(everything(), before);
        node.shell(&script);
        assert_eq!(everything(), before, "{backend}");
    }
}
