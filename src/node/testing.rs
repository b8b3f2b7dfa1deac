//! Network namespaces for tests: without a name, gone with their last descriptor.

use std::os::fd::{AsFd, AsRawFd};
use std::process::Command;

use nix::sched::{CloneFlags, unshare};

use super::netns::PodNetns;
use crate::config::Config;

/// A new namespace with its loopback up; none when this process may not make one.
pub fn namespace() -> Option<PodNetns> {
    let made = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).ok()?;
        PodNetns::current().ok()
    });
    let netns = made.join().unwrap()?;
    command(&netns, "ip link set lo up");
    Some(netns)
}

/// Links a pod at 10.77.0.2 and fd77::2 to a new namespace at 10.77.0.1 and fd77::1, its gateway.
pub fn linked(pod: &PodNetns) -> PodNetns {
    let other = namespace().unwrap();
    let descriptor = other.as_fd().as_raw_fd();
    let peer = format!("/proc/{}/fd/{descriptor}", std::process::id());
    command(pod, "ip link add wrn0 type veth peer name wrn1");
    command(pod, &format!("ip link set wrn1 netns {peer}"));
    for (netns, device, last) in [(pod, "wrn0", 2), (&other, "wrn1", 1)] {
        command(
            netns,
            &format!("ip addr add 10.77.0.{last}/24 dev {device}"),
        );
        command(
            netns,
            &format!("ip addr add fd77::{last}/64 dev {device} nodad"),
        );
        command(netns, &format!("ip link set {device} up"));
    }
    command(pod, "ip route add default via 10.77.0.1");
    command(pod, "ip route add default via fd77::1");
    other
}

/// A configuration with the defaults and two workers.
pub fn config() -> Config {
    let mut config = Config::from_environment(String::new()).unwrap();
    config.workers = 2;
    config
}

/// Runs a program inside a namespace and expects it to succeed.
pub fn command(netns: &PodNetns, line: &str) {
    let mut words = line.split_whitespace();
    let mut program = Command::new(words.next().unwrap());
    let output = netns.run(|| program.args(words).output()).unwrap();
    assert!(output.status.success(), "{line}: {output:?}");
}

/// Sets one of a namespace's kernel settings.
pub fn set(netns: &PodNetns, setting: &str, value: &str) {
    let path = format!("/proc/sys/net/{setting}");
    netns.run(|| std::fs::write(path, value)).unwrap();
}

/// Says that a test could not run.
pub fn skip(test: &str) {
    eprintln!("SKIPPED {test}: needs root");
}
