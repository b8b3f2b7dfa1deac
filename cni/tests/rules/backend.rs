//! Which backend a node gets.

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;

use cni::Backend;
use cni::backend::{Choice, choose};

use super::host::{Proc, config, open};
use super::namespace::{Namespace, again};

#[test]
fn nftables_is_used_if_asked_for_unless_the_node_uses_iptables_already() {
    let test = "nftables_is_used_if_asked_for_unless_the_node_uses_iptables_already";
    let Some(node) = Namespace::new(test) else {
        return;
    };
    let plain = |backend| Choice {
        backend,
        note: None,
    };
    assert_eq!(choose(node.as_fd(), false), plain(Backend::Iptables));
    assert_eq!(choose(node.as_fd(), true), plain(Backend::Nftables));
    let proc = Proc::new("1\n");
    let host = open(&node, &config(Backend::Iptables, &proc)).unwrap();
    let choice = choose(node.as_fd(), true);
    assert_eq!(choice.backend, Backend::Iptables);
    let note = choice.note.unwrap();
    assert!(
        note.contains("the ipset istio-inpod-probes-v4 shows that this node uses iptables"),
        "{note}"
    );
    host.remove_all().unwrap();
    assert_eq!(choose(node.as_fd(), true), plain(Backend::Nftables));
    node.shell("ipset create istio-inpod-probes-v6 hash:ip family inet6");
    assert_eq!(choose(node.as_fd(), true).backend, Backend::Iptables);
}

/// Runs the named test again with an nft that is this script.
fn with_nft(name: &str, script: &str) -> Option<Choice> {
    const INNER: &str = "WARREN_TEST_NFT";
    let node = Namespace::new(name)?;
    if std::env::var_os(INNER).is_some() {
        return Some(choose(node.as_fd(), true));
    }
    let folder = std::env::temp_dir().join(format!("wrn-nft-{}-{name}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let program = folder.join("nft");
    fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", folder.display(), std::env::var("PATH").unwrap());
    let test = format!("backend::{name}");
    let passed = again(&[(INNER, "1"), ("PATH", &path)], &["--exact", &test]);
    let _ = fs::remove_dir_all(&folder);
    assert_eq!(passed, Ok(1));
    None
}

#[test]
fn an_nft_without_json_means_iptables() {
    let script = "echo 'Error: JSON support not compiled-in' >&2; exit 1";
    let Some(choice) = with_nft("an_nft_without_json_means_iptables", script) else {
        return;
    };
    assert_eq!(choice.backend, Backend::Iptables);
    assert!(choice.note.unwrap().contains("built without JSON"));
}

#[test]
fn an_nft_that_fails_otherwise_is_told_and_used() {
    let script = "echo 'no luck today' >&2; exit 1";
    let Some(choice) = with_nft("an_nft_that_fails_otherwise_is_told_and_used", script) else {
        return;
    };
    assert_eq!(choice.backend, Backend::Nftables);
    let expected = "nft --json list tables failed: no luck today";
    assert_eq!(choice.note.as_deref(), Some(expected));
}
