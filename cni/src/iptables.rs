//! iptables: which of its programs works here, what it holds, and changing that.

use std::ffi::OsStr;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;

use nix::sched::{CloneFlags, setns};
use thiserror::Error;

use crate::render::CHAIN_PREFIX;
use crate::rules::Family;

/// Why rules could not be read or changed.
#[derive(Debug, Error)]
pub enum IptablesError {
    #[error(
        "no usable iptables was found: {0}; install the iptables package (apt-get install iptables) and check that the kernel allows it"
    )]
    NoBinary(String),
    #[error("FORCE_IPTABLES_BINARY={0} is not known; use legacy or nft")]
    Forced(String),
    #[error("{program} cannot be run: {error}")]
    Run { program: String, error: io::Error },
    #[error("{program} failed: {message}")]
    Failed { program: String, message: String },
}

/// One of the variants of iptables for one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Iptables {
    /// `iptables`, `ip6tables-nft` and so on.
    program: String,
    /// Whether writers must wait for each other.
    lock: bool,
}

type Detected = Result<Iptables, String>;

impl Iptables {
    /// The variant to use for a family: as forced, else the one that holds rules already, else nft. Looked up once.
    ///
    /// # Errors
    /// When none of them works.
    pub fn detect(family: Family) -> Result<Self, IptablesError> {
        static FOUND: [OnceLock<Detected>; 2] = [OnceLock::new(), OnceLock::new()];
        let forced = std::env::var("FORCE_IPTABLES_BINARY").unwrap_or_default();
        let variants: &[&str] = match &*forced {
            "" => &["-legacy", "-nft", ""],
            "legacy" => &["-legacy"],
            "nft" => &["-nft"],
            other => return Err(IptablesError::Forced(other.to_string())),
        };
        let found =
            FOUND[family as usize].get_or_init(|| Self::find(family, variants, forced.is_empty()));
        found.clone().map_err(IptablesError::NoBinary)
    }

    fn find(family: Family, variants: &[&str], only_used_legacy: bool) -> Detected {
        let base = if family == Family::V4 {
            "iptables"
        } else {
            "ip6tables"
        };
        let mut reasons = Vec::new();
        for variant in variants {
            let mut candidate = Self {
                program: format!("{base}{variant}"),
                lock: false,
            };
            match candidate.probe() {
                Ok(saved)
                    if *variant == "-legacy" && only_used_legacy && saved.lines().count() < 3 => {}
                Ok(_) => {
                    candidate.lock = !candidate.is_nft();
                    return Ok(candidate);
                }
                Err(error) => reasons.push(error.to_string()),
            }
        }
        Err(reasons.join("; "))
    }

    fn probe(&self) -> Result<String, IptablesError> {
        self.run(None, "-save", &[], None)
    }

    fn is_nft(&self) -> bool {
        self.run(None, "-save", &["--version"], None)
            .is_ok_and(|version| version.contains("nf_tables"))
    }

    /// The name of the program.
    pub fn program(&self) -> &str {
        &self.program
    }

    /// Everything a namespace holds.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn save(&self, netns: BorrowedFd<'_>) -> Result<Saved, IptablesError> {
        Ok(Saved::parse(&self.run(Some(netns), "-save", &[], None)?))
    }

    /// Changes a namespace, all or nothing per table.
    ///
    /// # Errors
    /// What iptables says against it.
    pub fn restore(&self, netns: BorrowedFd<'_>, text: &str) -> Result<(), IptablesError> {
        let wait: &[&str] = if self.lock {
            &["--noflush", "--wait=30"]
        } else {
            &["--noflush"]
        };
        self.run(Some(netns), "-restore", wait, Some(text))
            .map(|_| ())
    }

    /// Whether a namespace holds a rule, given as it stands behind `-C`.
    ///
    /// # Errors
    /// When the program cannot be run.
    pub fn has(
        &self,
        netns: BorrowedFd<'_>,
        table: &str,
        rule: &str,
    ) -> Result<bool, IptablesError> {
        let mut arguments = vec!["-t", table, "-C"];
        arguments.extend(rule.split(' '));
        match self.run(Some(netns), "", &arguments, None) {
            Ok(_) => Ok(true),
            Err(IptablesError::Failed { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn run(
        &self,
        netns: Option<BorrowedFd<'_>>,
        suffix: &str,
        arguments: &[&str],
        input: Option<&str>,
    ) -> Result<String, IptablesError> {
        let program = format!("{}{suffix}", self.program);
        let failed = |error| IptablesError::Run {
            program: program.clone(),
            error,
        };
        let output = execute(&program, arguments, netns, input).map_err(failed)?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let message = String::from_utf8_lossy(&output.stderr)
            .trim()
            .replace('\n', "; ");
        Err(IptablesError::Failed { program, message })
    }
}

fn execute(
    program: &str,
    arguments: &[impl AsRef<OsStr>],
    netns: Option<BorrowedFd<'_>>,
    input: Option<&str>,
) -> io::Result<Output> {
    let mut command = Command::new(program);
    command
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    if let Some(netns) = netns {
        let raw = netns.as_raw_fd();
        // SAFETY: between fork and exec only setns is called, on a descriptor that stays open until the child runs.
        unsafe {
            command.pre_exec(move || {
                Ok(setns(
                    BorrowedFd::borrow_raw(raw),
                    CloneFlags::CLONE_NEWNET,
                )?)
            });
        }
    }
    let mut child = command.spawn()?;
    if let (Some(mut stdin), Some(input)) = (child.stdin.take(), input) {
        // A program that ends early says why on its error output.
        let _ = stdin.write_all(input.as_bytes());
    }
    child.wait_with_output()
}

/// A table as `iptables-save` prints it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SavedTable {
    pub name: String,
    /// Our own chains, and those that look like ours.
    pub chains: Vec<String>,
    /// Every rule, beginning with its chain.
    pub rules: Vec<String>,
}

impl SavedTable {
    /// How many rules a chain has.
    pub fn count(&self, chain: &str) -> usize {
        self.rules
            .iter()
            .filter(|rule| rule.split(' ').next() == Some(chain))
            .count()
    }
}

/// The tables of a namespace that capture may have to do with.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Saved {
    pub tables: Vec<SavedTable>,
}

impl Saved {
    fn parse(text: &str) -> Self {
        let mut saved = Self::default();
        for line in text.lines() {
            if let Some(name) = line.strip_prefix('*') {
                saved.tables.push(SavedTable {
                    name: name.trim().to_string(),
                    ..Default::default()
                });
            } else if let Some(table) = saved.tables.last_mut() {
                if let Some(chain) = line.strip_prefix(':') {
                    let name = chain.split(' ').next().unwrap_or_default();
                    if name.starts_with(CHAIN_PREFIX) {
                        table.chains.push(name.to_string());
                    }
                } else if let Some(rule) = line.strip_prefix("-A ") {
                    table.rules.push(rule.to_string());
                }
            }
        }
        saved
            .tables
            .retain(|table| matches!(&*table.name, "filter" | "nat" | "mangle" | "raw"));
        saved
    }

    /// A table by name.
    pub fn table(&self, name: &str) -> Option<&SavedTable> {
        self.tables.iter().find(|table| table.name == name)
    }

    /// Whether there is nothing at all.
    pub fn is_empty(&self) -> bool {
        self.tables
            .iter()
            .all(|table| table.chains.is_empty() && table.rules.is_empty())
    }

    /// The input for `iptables-restore` that removes every chain of ours and every jump to one.
    pub fn removal(&self) -> Option<String> {
        let mut text = String::new();
        for table in self.tables.iter().filter(|table| !table.chains.is_empty()) {
            text.push_str(&format!("*{}\n", table.name));
            for rule in &table.rules {
                let ours = rule.starts_with(CHAIN_PREFIX);
                let jumps = rule.split(' ').skip_while(|word| *word != "-j").nth(1);
                if !ours
                    && jumps.is_some_and(|target| table.chains.iter().any(|chain| chain == target))
                {
                    text.push_str(&format!("-D {rule}\n"));
                }
            }
            for command in ["-F", "-X"] {
                for chain in &table.chains {
                    text.push_str(&format!("{command} {chain}\n"));
                }
            }
            text.push_str("COMMIT\n");
        }
        (!text.is_empty()).then_some(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_saved_is_read_and_only_ours_is_removed() {
        let text = "\
# Generated
*filter
:INPUT ACCEPT [0:0]
-A INPUT -p tcp -j DROP
COMMIT
*nat
:PREROUTING ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:OTHER - [0:0]
:ISTIO_OUTPUT - [0:0]
:ISTIO_TEST - [0:0]
-A OUTPUT -j OTHER
-A OUTPUT -j ISTIO_OUTPUT
-A ISTIO_OUTPUT -p tcp -j ISTIO_TEST
COMMIT
*security
:INPUT ACCEPT [0:0]
-A INPUT -j ACCEPT
COMMIT
";
        let saved = Saved::parse(text);
        assert!(!saved.is_empty());
        assert_eq!(saved.tables.len(), 2);
        assert_eq!(saved.table("nat").map(|nat| nat.count("OUTPUT")), Some(2));
        let removal = "*nat\n-D OUTPUT -j ISTIO_OUTPUT\n-F ISTIO_OUTPUT\n-F ISTIO_TEST\n-X ISTIO_OUTPUT\n-X ISTIO_TEST\nCOMMIT\n";
        assert_eq!(saved.removal().as_deref(), Some(removal));
        assert!(Saved::parse("*nat\n:OUTPUT ACCEPT [0:0]\nCOMMIT\n").is_empty());
        assert_eq!(Saved::parse("garbage\n-A x\n"), Saved::default());
    }
}
