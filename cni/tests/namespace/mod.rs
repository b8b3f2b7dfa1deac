//! Network namespaces of the tests' own; they go when the tests do.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::process::Command;

use cni::iptables::Iptables;
use cni::netns::{fresh, within};
use cni::rules::Family;

/// A network namespace that lives as long as this does, with an address on its loopback that is not loopback.
pub struct Namespace(File);

impl Namespace {
    /// None, with a line that says so, where this process may not make namespaces or has no iptables.
    pub fn new(test: &str) -> Option<Self> {
        match Self::make() {
            Ok(namespace) => Some(namespace),
            Err(reason) => {
                // Past the harness, which hides what passing tests print.
                let _ = writeln!(io::stderr(), "SKIPPED {test}: {reason}");
                None
            }
        }
    }

    fn make() -> Result<Self, String> {
        if !nix::unistd::geteuid().is_root() {
            return Err("it needs root".to_string());
        }
        for family in [Family::V4, Family::V6] {
            Iptables::detect(family).map_err(|error| error.to_string())?;
        }
        let namespace = Self(fresh().map_err(|error| error.to_string())?);
        namespace.shell(
            "ip link set lo up; ip addr add 240.240.240.240/32 dev lo; ip -6 addr add fd00::240/128 dev lo",
        );
        Ok(namespace)
    }

    pub fn within<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        within(self.0.as_fd(), work)
    }

    /// Runs a command line inside; gives its output. `$4` and `$6` are the iptables of each family.
    pub fn shell(&self, line: &str) -> String {
        let [v4, v6] = [Family::V4, Family::V6].map(|family| Iptables::detect(family).unwrap());
        let line = line.replace("$4", v4.program()).replace("$6", v6.program());
        let output = self.within(|| Command::new("sh").args(["-ec", &line]).output());
        let output = output.unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{line}: {errors}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// A path by which other programs can name the namespace while this lives.
    #[allow(dead_code, reason = "not every test joins namespaces")]
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }

    /// Every rule of either backend and every route, with what tells a rule from one that was written anew. Numbers of
    /// packets do not count.
    #[allow(dead_code, reason = "not every test looks at rules")]
    pub fn dump(&self) -> String {
        let text = self.shell(
            "$4-save; $6-save; nft -sa list ruleset; ip rule; ip -6 rule; \
             ip route show table 100 2>/dev/null || true; ip -6 route show table 100 2>/dev/null || true",
        );
        let told = text.lines().filter(|line| !line.starts_with('#'));
        let told = told.map(|line| line.split(" [").next().unwrap_or_default());
        told.collect::<Vec<_>>().join("\n")
    }

    /// Every rule of either backend and every route, as if each had been written just now.
    #[allow(dead_code, reason = "not every test looks at rules")]
    pub fn rules(&self) -> String {
        self.state().join("\n") + &self.shell("nft -s list ruleset inet")
    }

    /// Every rule and route, sorted; tables without rules stay behind once they were used and do not count.
    #[allow(dead_code, reason = "not every test looks at rules")]
    pub fn state(&self) -> Vec<String> {
        let text = self.shell(
            "$4-save; $6-save; ip rule; ip -6 rule; ip route show table 100 2>/dev/null || true; \
             ip -6 route show table 100 2>/dev/null || true",
        );
        let counts = |line: &&str| !line.starts_with(['*', '#']) && *line != "COMMIT";
        let built_in = |line: &&str| !line.starts_with(':') || line.starts_with(":ISTIO");
        let mut lines: Vec<_> = text
            .lines()
            .filter(counts)
            .filter(built_in)
            .map(str::to_string)
            .collect();
        lines.sort();
        lines
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Runs the tests of this program that match again in another process, with other variables; what it says if that
/// goes wrong.
#[allow(dead_code, reason = "not every test needs other variables")]
pub fn again(variables: &[(&str, &str)], arguments: &[&str]) -> Result<usize, String> {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(arguments)
        .arg("--nocapture")
        .envs(variables.iter().copied())
        .output()
        .unwrap();
    let (told, errors) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    for line in errors.lines().filter(|line| line.contains("SKIPPED")) {
        let _ = writeln!(io::stderr(), "{line}");
    }
    let passed = told.split("test result: ok. ").nth(1);
    let passed = passed.and_then(|rest| rest.split(' ').next()?.parse().ok());
    match passed.filter(|_| output.status.success()) {
        Some(passed) => Ok(passed),
        None => Err(format!("{told}\n{errors}")),
    }
}
