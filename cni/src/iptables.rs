//! iptables: which of its programs works here, and running it in a pod's namespace.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::OnceLock;

use thiserror::Error;

use crate::program::{Place, complaint, execute};
use crate::rules::Family;
use crate::saved::Saved;

/// Why rules could not be read or changed.
#[derive(Debug, Error)]
pub enum IptablesError {
    #[error(
        "no usable {program} was found: {reasons}; install iptables (apt-get install iptables), run with the \
         capabilities NET_ADMIN and SYS_ADMIN, and check that the kernel has netfilter's nat table{hint}"
    )]
    NoBinary {
        program: &'static str,
        reasons: String,
        hint: &'static str,
    },
    #[error("FORCE_IPTABLES_BINARY={0} is not known; use legacy or nft")]
    Forced(String),
    #[error("{program} cannot be run: {error}")]
    Run { program: String, error: io::Error },
    #[error("{program} failed: {message}")]
    Failed { program: String, message: String },
    #[error(
        "{program} did not take the rules: {message}; the kernel needs the netfilter modules nf_nat, xt_REDIRECT, \
         xt_mark, xt_connmark and xt_CT"
    )]
    Refused { program: String, message: String },
}

/// One of the variants of iptables for one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Iptables {
    /// `iptables`, `ip6tables-nft` and so on.
    program: String,
    /// Whether writers must wait for each other.
    lock: bool,
}

impl Iptables {
    /// The variant to use for a family: as forced, else legacy if it holds rules already, else nft, else whichever is
    /// there. The first success is remembered.
    ///
    /// # Errors
    /// When none of them works.
    pub fn detect(family: Family) -> Result<Self, IptablesError> {
        static FOUND: [OnceLock<Iptables>; 2] = [OnceLock::new(), OnceLock::new()];
        let known = &FOUND[family as usize];
        if let Some(iptables) = known.get() {
            return Ok(iptables.clone());
        }
        let (program, hint) = match family {
            Family::V4 => ("iptables", ""),
            Family::V6 => ("ip6tables", "; or turn the capture of IPv6 off"),
        };
        let forced = std::env::var("FORCE_IPTABLES_BINARY").unwrap_or_default();
        let found =
            Self::find(program, variants(&forced)?).map_err(|reasons| IptablesError::NoBinary {
                program,
                reasons,
                hint,
            })?;
        Ok(known.get_or_init(|| found).clone())
    }

    /// The first variant that works; otherwise why none does.
    fn find(program: &str, variants: &[Variant]) -> Result<Self, String> {
        let mut reasons = Vec::new();
        for variant in variants {
            let candidate = Self::variant(format!("{program}{}", variant.suffix));
            match candidate.usable(variant.only_with_rules) {
                Ok(true) => return Ok(candidate),
                Ok(false) => reasons.push(format!("{} holds no rules", candidate.program)),
                Err(error) => reasons.push(error.to_string()),
            }
        }
        Err(reasons.join("; "))
    }

    fn variant(program: String) -> Self {
        let mut candidate = Self {
            program,
            lock: false,
        };
        // Those too old to tell their version are legacy.
        let version = candidate.run(Place::Here, "-save", &["--version"], None);
        candidate.lock = !version.is_ok_and(|version| version.contains("nf_tables"));
        candidate
    }

    fn usable(&self, only_with_rules: bool) -> Result<bool, IptablesError> {
        if only_with_rules {
            let saved = self.run(Place::Here, "-save", &[], None)?;
            if saved.lines().count() < 3 {
                return Ok(false);
            }
        }
        // Programs may be there without what they need of the kernel.
        self.run(Place::Fresh, "-save", &[], None)?;
        let rule = "-t nat -A INPUT -p 255 -j RETURN";
        let arguments: Vec<_> = rule.split(' ').collect();
        self.run(Place::Fresh, "", &arguments, None)?;
        Ok(true)
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
        let text = self.run(Place::Pod(netns), "-save", &[], None)?;
        Ok(Saved::parse(&text))
    }

    /// Changes a namespace, all or nothing per table.
    ///
    /// # Errors
    /// What iptables says against it.
    pub fn restore(&self, netns: BorrowedFd<'_>, text: &str) -> Result<(), IptablesError> {
        self.restore_at(Place::Pod(netns), text)
    }

    /// The same for the node's own namespace.
    ///
    /// # Errors
    /// What iptables says against it.
    pub fn restore_host(&self, netns: BorrowedFd<'_>, text: &str) -> Result<(), IptablesError> {
        self.restore_at(Place::Host(netns), text)
    }

    fn restore_at(&self, place: Place<'_>, text: &str) -> Result<(), IptablesError> {
        let wait: &[&str] = if self.lock {
            &["--noflush", "--wait=30"]
        } else {
            &["--noflush"]
        };
        match self.run(place, "-restore", wait, Some(text)) {
            Err(IptablesError::Failed { program, message }) => {
                Err(IptablesError::Refused { program, message })
            }
            result => result.map(|_| ()),
        }
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
        let found = self.run(Place::Pod(netns), "", &arguments, None);
        Ok(unless_failed(found)?.is_some())
    }

    /// The same for the node's own namespace.
    ///
    /// # Errors
    /// When the program cannot be run.
    pub fn host_has(
        &self,
        netns: BorrowedFd<'_>,
        table: &str,
        rule: &str,
    ) -> Result<bool, IptablesError> {
        let mut arguments = self.waiting(table);
        arguments.push("-C");
        arguments.extend(rule.split(' '));
        let found = self.run(Place::Host(netns), "", &arguments, None);
        Ok(unless_failed(found)?.is_some())
    }

    /// The rules of a chain in the node's own namespace, as they are printed; none if there is no such chain.
    ///
    /// Only this chain is read, for others may hold tens of thousands of rules.
    ///
    /// # Errors
    /// When the program cannot be run.
    pub fn chain_of_host(
        &self,
        netns: BorrowedFd<'_>,
        table: &str,
        chain: &str,
    ) -> Result<Option<Vec<String>>, IptablesError> {
        let mut arguments = self.waiting(table);
        arguments.extend(["-S", chain]);
        let printed = unless_failed(self.run(Place::Host(netns), "", &arguments, None))?;
        let rules = |text: String| {
            let rules = text.lines().filter(|line| line.starts_with("-A "));
            rules.map(str::to_string).collect()
        };
        Ok(printed.map(rules))
    }

    /// A command on a table; legacy iptables takes its lock even to read.
    fn waiting<'a>(&self, table: &'a str) -> Vec<&'a str> {
        let mut arguments = vec!["-t", table];
        if self.lock {
            arguments.push("--wait=30");
        }
        arguments
    }

    fn run(
        &self,
        place: Place<'_>,
        suffix: &str,
        arguments: &[&str],
        input: Option<&str>,
    ) -> Result<String, IptablesError> {
        let program = format!("{}{suffix}", self.program);
        let output = match execute(&program, arguments, place, input) {
            Ok(output) => output,
            Err(error) => return Err(IptablesError::Run { program, error }),
        };
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let message = complaint(&output);
        Err(IptablesError::Failed { program, message })
    }
}

/// A program that says no is an answer too.
fn unless_failed(result: Result<String, IptablesError>) -> Result<Option<String>, IptablesError> {
    match result {
        Ok(text) => Ok(Some(text)),
        Err(IptablesError::Failed { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// A kind of iptables that may be installed.
#[derive(Clone, Copy)]
struct Variant {
    suffix: &'static str,
    /// Whether it counts only where it holds rules.
    only_with_rules: bool,
}

/// Which variants to try, in this order.
fn variants(forced: &str) -> Result<&'static [Variant], IptablesError> {
    const fn variant(suffix: &'static str, only_with_rules: bool) -> Variant {
        Variant {
            suffix,
            only_with_rules,
        }
    }
    const ANY: [Variant; 3] = [
        variant("-legacy", true),
        variant("-nft", false),
        variant("", false),
    ];
    match forced {
        "" => Ok(&ANY),
        "legacy" => Ok(const { &[variant("-legacy", false)] }),
        "nft" => Ok(const { &[variant("-nft", false)] }),
        other => Err(IptablesError::Forced(other.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::path::PathBuf;
    use std::sync::{Mutex, MutexGuard, PoisonError};

    use super::*;

    /// A folder of programs that pretend to be iptables.
    ///
    /// Only one at a time: a program cannot run while a child of another test has its file open for writing.
    struct Programs {
        folder: PathBuf,
        _alone: MutexGuard<'static, ()>,
    }

    impl Programs {
        fn new(name: &str) -> Self {
            let folder =
                std::env::temp_dir().join(format!("wrn-iptables-{}-{name}", std::process::id()));
            static ONE: Mutex<()> = Mutex::new(());
            let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
            fs::create_dir_all(&folder).unwrap();
            Self {
                folder,
                _alone: one,
            }
        }

        /// One variant: what its version is called, how many lines it saves, whether it can add rules.
        fn with(self, suffix: &str, version: &str, lines: usize, adds: bool) -> Self {
            let save = format!(
                "case \"$1\" in --version) echo 'iptables-save v1.8 {version}';; *) seq {lines};; esac"
            );
            let add = if adds {
                "exit 0"
            } else {
                "printf 'no nat\\n\\nat all\\n' >&2; exit 3"
            };
            for (name, body) in [
                (format!("iptables{suffix}-save"), save.as_str()),
                (format!("iptables{suffix}"), add),
            ] {
                let path = self.folder.join(name);
                fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
                fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
            }
            self
        }

        fn find(&self, forced: &str) -> Result<(String, bool), String> {
            let program = self.folder.join("iptables").to_string_lossy().into_owned();
            let found = Iptables::find(&program, variants(forced).unwrap());
            let prefix = format!("{}/", self.folder.display());
            found
                .map(|found| (found.program.replace(&prefix, ""), found.lock))
                .map_err(|reasons| reasons.replace(&prefix, ""))
        }
    }

    impl Drop for Programs {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.folder);
        }
    }

    fn found(program: &str, lock: bool) -> Result<(String, bool), String> {
        Ok((program.to_string(), lock))
    }

    fn is_root() -> bool {
        let root = nix::unistd::geteuid().is_root();
        if !root {
            eprintln!("SKIPPED finding iptables: it needs root");
        }
        root
    }

    #[test]
    fn legacy_is_used_only_where_it_holds_rules_or_is_forced() {
        if !is_root() {
            return;
        }
        let idle = Programs::new("idle")
            .with("-legacy", "(legacy)", 2, true)
            .with("-nft", "(nf_tables)", 0, true);
        assert_eq!(idle.find(""), found("iptables-nft", false));
        assert_eq!(idle.find("legacy"), found("iptables-legacy", true));
        drop(idle);
        let busy = Programs::new("busy")
            .with("-legacy", "(legacy)", 3, true)
            .with("-nft", "(nf_tables)", 0, true);
        assert_eq!(busy.find(""), found("iptables-legacy", true));
        assert_eq!(busy.find("nft"), found("iptables-nft", false));
    }

    #[test]
    fn the_plain_name_is_the_last_resort_and_says_itself_what_it_is() {
        if !is_root() {
            return;
        }
        let plain = Programs::new("plain-nft").with("", "(nf_tables)", 0, true);
        assert_eq!(plain.find(""), found("iptables", false));
        drop(plain);
        let plain = Programs::new("plain-legacy").with("", "", 0, true);
        assert_eq!(plain.find(""), found("iptables", true));
    }

    #[test]
    fn when_nothing_works_each_reason_is_told() {
        if !is_root() {
            return;
        }
        let broken = Programs::new("broken")
            .with("-legacy", "(legacy)", 0, true)
            .with("-nft", "(nf_tables)", 0, false);
        let reasons = "iptables-legacy holds no rules; iptables-nft failed: no nat; at all; \
                       iptables-save cannot be run: No such file or directory (os error 2)";
        assert_eq!(broken.find(""), Err(reasons.to_string()));
        let error = IptablesError::NoBinary {
            program: "iptables",
            reasons: reasons.to_string(),
            hint: "",
        };
        assert!(error.to_string().contains("apt-get install iptables"));
    }

    #[test]
    fn an_unknown_variant_is_refused_by_name() {
        let error = variants("nftables").err().map(|error| error.to_string());
        let expected = "FORCE_IPTABLES_BINARY=nftables is not known; use legacy or nft";
        assert_eq!(error.as_deref(), Some(expected));
    }
}
