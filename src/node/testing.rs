//! Network namespaces for tests: without a name, gone with their last descriptor.

use std::process::Command;

use nix::sched::{CloneFlags, unshare};

use super::netns::PodNetns;

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

/// Runs a program inside a namespace and expects it to succeed.
pub fn command(netns: &PodNetns, line: &str) {
    let mut words = line.split_whitespace();
    let mut program = Command::new(words.next().unwrap());
    let output = netns.run(|| program.args(words).output()).unwrap();
    assert!(output.status.success(), "{line}: {output:?}");
}

/// Says that a test could not run.
pub fn skip(test: &str) {
    eprintln!("SKIPPED {test}: needs root");
}
