//! What cannot be captured: why, what to do about it, and that everything is as before.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::PathBuf;
use std::process::Command;

use cni::iptables::Iptables;
use cni::rules::Family;
use cni::{
    Backend, CaptureConfig, CaptureError, Ipv6Mode, Outcome, capture, netns, remove, verify,
};

use super::namespace::{Namespace, again};
use super::variants::{BACKENDS, careful, with};

#[test]
fn a_capture_that_fails_leaves_the_pod_as_it_was() {
    let test = "a_capture_that_fails_leaves_the_pod_as_it_was";
    for backend in BACKENDS {
        let Some(pod) = Namespace::new(test) else {
            return;
        };
        // The route cannot be set while lo is down.
        pod.shell("ip link set lo down");
        let config = with(backend, &CaptureConfig::default());
        let before = pod.rules();
        let error = capture(pod.as_fd(), &config).unwrap_err();
        assert!(error.to_string().contains("is the pod's interface lo up?"));
        assert_eq!(pod.rules(), before);
        pod.shell("ip link set lo up");
        assert_eq!(capture(pod.as_fd(), &config).unwrap(), Outcome::Applied);
    }
}

#[test]
fn a_conflict_in_one_family_is_found_before_the_other_is_captured() {
    let test = "a_conflict_in_one_family_is_found_before_the_other_is_captured";
    let Some(pod) = Namespace::new(test) else {
        return;
    };
    pod.shell("$6 -t nat -N ISTIO_TEST");
    let before = pod.rules();
    let error = capture(pod.as_fd(), &careful(&CaptureConfig::default())).unwrap_err();
    assert!(matches!(error, CaptureError::Foreign(_)), "{error}");
    assert_eq!(pod.rules(), before);
}

#[test]
fn a_name_that_is_no_interface_is_refused_before_anything_is_changed() {
    let test = "a_name_that_is_no_interface_is_refused_before_anything_is_changed";
    for backend in BACKENDS {
        let Some(pod) = Namespace::new(test) else {
            return;
        };
        let before = pod.rules();
        let config = CaptureConfig {
            backend,
            virtual_interfaces: vec!["eth0 -j ACCEPT".to_string()],
            ..CaptureConfig::default()
        };
        let refused = capture(pod.as_fd(), &config).unwrap_err().to_string();
        let expected = "eth0 -j ACCEPT is not the name of a network interface";
        assert_eq!(refused, expected);
        assert_eq!(pod.rules(), before);
    }
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

/// A folder with some of the machine's programs, some that only fail, and no others.
struct Programs(PathBuf);

impl Programs {
    fn new(test: &str, names: &[String], broken: &[&str]) -> Self {
        let folder = std::env::temp_dir().join(format!("wrn-path-{}-{test}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let path = std::env::var_os("PATH").unwrap();
        for name in names.iter().filter(|name| !broken.contains(&&***name)) {
            let mut places = std::env::split_paths(&path).map(|place| place.join(name));
            let found = places.find(|place| place.exists());
            let found = found.unwrap_or_else(|| panic!("there is no {name}"));
            symlink(found, folder.join(name)).unwrap();
        }
        for name in broken {
            let script = folder.join(name);
            fs::write(&script, "#!/bin/sh\necho no luck today >&2; exit 1\n").unwrap();
            fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
        }
        Self(folder)
    }
}

impl Drop for Programs {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The programs of iptables for a family, of either variant.
fn iptables(name: &str) -> Vec<String> {
    let of = |variant| ["", "-save", "-restore"].map(|suffix| format!("{name}-{variant}{suffix}"));
    ["nft", "legacy"].map(of).concat()
}

/// Whether the test has but these programs and those that make namespaces. Where it has more it is run again.
fn has_only(test: &str, programs: &[String], broken: &[&str]) -> bool {
    const INNER: &str = "WARREN_TEST_PROGRAMS";
    if std::env::var_os(INNER).is_some() {
        return true;
    }
    if Namespace::new(test).is_some() {
        let usual = ["ip", "sh", "nft"].map(str::to_string);
        let usual = &usual[..if programs.is_empty() { 2 } else { 3 }];
        let programs = Programs::new(test, &[programs, usual].concat(), broken);
        let variables = [(INNER, "1"), ("PATH", programs.0.to_str().unwrap())];
        let name = format!("refusals::{test}");
        assert_eq!(again(&variables, &["--exact", &name]), Ok(1));
    }
    false
}

/// A pod for where there are not all programs that others need.
fn pod() -> File {
    let pod = netns::fresh().unwrap();
    let up = || {
        Command::new("ip")
            .args(["link", "set", "lo", "up"])
            .status()
    };
    assert!(netns::within(pod.as_fd(), up).unwrap().success());
    pod
}

#[test]
fn a_machine_without_iptables_is_told_what_to_do() {
    let test = "a_machine_without_iptables_is_told_what_to_do";
    if !has_only(test, &[], &[]) {
        return;
    }
    let pod = pod();
    let error = capture(pod.as_fd(), &CaptureConfig::default()).unwrap_err();
    assert!(matches!(error, CaptureError::Iptables(_)), "{error}");
    let error = error.to_string();
    for part in [
        "no usable iptables was found: iptables-legacy-save cannot be run: No such file",
        "apt-get install iptables",
    ] {
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn a_node_without_nft_is_told_what_to_do() {
    let test = "a_node_without_nft_is_told_what_to_do";
    if !has_only(test, &[], &[]) {
        return;
    }
    let pod = pod();
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

#[test]
fn ip6tables_may_be_missing_only_where_ipv6_is_let_past() {
    let test = "ip6tables_may_be_missing_only_where_ipv6_is_let_past";
    if !has_only(test, &iptables("iptables"), &[]) {
        return;
    }
    let of = |ipv6| CaptureConfig {
        ipv6,
        ..CaptureConfig::default()
    };
    for mode in [Ipv6Mode::Capture, Ipv6Mode::Refuse] {
        let pod = pod();
        let error = capture(pod.as_fd(), &of(mode)).unwrap_err().to_string();
        let start = "no usable ip6tables was found";
        assert!(error.starts_with(start), "{error}");
        let end = "or turn the capture of IPv6 off";
        assert!(error.ends_with(end), "{error}");
        let held = Iptables::detect(Family::V4).unwrap().save(pod.as_fd());
        assert!(!held.unwrap().has_chains());
    }
    let (pod, config) = (pod(), of(Ipv6Mode::Pass));
    assert_eq!(capture(pod.as_fd(), &config).unwrap(), Outcome::Applied);
    assert_eq!(capture(pod.as_fd(), &config).unwrap(), Outcome::Unchanged);
    assert_eq!(verify(pod.as_fd(), &config).unwrap(), None);
    remove(pod.as_fd()).unwrap();
    assert!(verify(pod.as_fd(), &config).unwrap().is_some());
}

#[test]
fn what_one_family_got_is_taken_back_when_the_other_fails() {
    let test = "what_one_family_got_is_taken_back_when_the_other_fails";
    let programs = [iptables("iptables"), iptables("ip6tables")].concat();
    let broken = ["ip6tables-nft-restore", "ip6tables-legacy-restore"];
    if !has_only(test, &programs, &broken) {
        return;
    }
    let pod = Namespace::new(test).unwrap();
    let before = pod.rules();
    let error = capture(pod.as_fd(), &CaptureConfig::default()).unwrap_err();
    assert!(error.to_string().contains("no luck today"), "{error}");
    assert_eq!(pod.rules(), before);
}
