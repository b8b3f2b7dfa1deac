//! The node's side: probes of the kubelet get a source address by which captured pods know them.
//!
//! Sets in the node's own network namespace hold the addresses of its captured pods, each with the pod's UID. A rule
//! gives connections from the node itself to one of them the probe address as their source (node-agent.md §5, §6.2).
//! All of it blocks; each call works in the node's namespace on a thread of its own.

mod branch_eni;
pub mod ipset;
mod kubelet;
mod with_iptables;
mod with_nftables;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::fcntl::Flock;
use thiserror::Error;

use crate::capture::Outcome;
use crate::iptables::IptablesError;
use crate::netns::{hold, within};
use crate::nftables::NftError;
use crate::rules::{Backend, Family};
use branch_eni::BranchRules;

/// The set of the IPv4 addresses of captured pods.
pub const SET_V4: &str = "istio-inpod-probes-v4";
/// The set of the IPv6 addresses of captured pods.
pub const SET_V6: &str = "istio-inpod-probes-v6";

/// What the node's side is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostConfig {
    pub backend: Backend,
    /// Whether addresses of IPv6 are held; without, they are passed over.
    pub ipv6: bool,
    /// Where probes are to seem to come from.
    pub probe_v4: Ipv4Addr,
    pub probe_v6: Ipv6Addr,
    /// The node's `/proc`, such as `/host/proc`.
    pub proc: PathBuf,
    /// Whether pods behind an AWS branch interface get routing rules of their own.
    pub branch_eni: bool,
}

/// Why the node's side is not as it should be.
#[derive(Debug, Error)]
pub enum HostError {
    #[error(transparent)]
    Iptables(#[from] IptablesError),
    #[error(transparent)]
    Nftables(#[from] NftError),
    #[error("the node's network namespace cannot be used: {0}")]
    Namespace(io::Error),
    #[error(
        "the set {set} of probed addresses cannot be used: {error}; the kernel needs the modules ip_set, \
         ip_set_hash_ip and xt_set, and the process the capability NET_ADMIN"
    )]
    Set { set: &'static str, error: io::Error },
    #[error("nft lists the set {set} of probed addresses in a way that is not understood: {text}")]
    Listing { set: &'static str, text: String },
    #[error(
        "no kubelet was found among the processes in {0} (looked for kubelet, kubelite and k3s), so its probes cannot \
         be told from other traffic; mount the node's /proc there, or use the iptables backend, which need not know"
    )]
    NoKubelet(PathBuf),
    #[error("the processes in {path} cannot be listed: {error}")]
    Processes { path: PathBuf, error: io::Error },
    #[error("{0:?} is not the UID of a pod")]
    Uid(String),
    #[error("the routing rules for {ip} behind a branch interface cannot be changed: {error}")]
    BranchRules { ip: IpAddr, error: io::Error },
}

/// The node's side. Clones are the same thing.
#[derive(Clone, Debug)]
pub struct Host(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    netns: OwnedFd,
    config: HostConfig,
    /// Whose traffic nftables takes for probes; iptables need not know.
    kubelet: u32,
    /// Held by whoever reads and then changes, so that owners do not change in between.
    branch: Mutex<BranchRules>,
}

/// What is held while something is changed: against other threads, and against other processes.
struct Alone<'a> {
    branch: MutexGuard<'a, BranchRules>,
    _process: Flock<std::fs::File>,
}

impl Host {
    /// Makes what is missing and repairs what is wrong; addresses that are held already stay.
    ///
    /// # Errors
    /// Why it cannot be made.
    pub fn open(netns: OwnedFd, config: HostConfig) -> Result<Self, HostError> {
        let kubelet = match config.backend {
            Backend::Iptables => 0,
            Backend::Nftables => kubelet::uid(&config.proc)?,
        };
        let branch = BranchRules::new(config.branch_eni, &config.proc);
        let host = Self(Arc::new(Inner {
            netns,
            config,
            kubelet,
            branch: Mutex::new(branch),
        }));
        host.ensure()?;
        Ok(host)
    }

    /// The first thing that is wrong with the sets or rules.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn verify(&self) -> Result<Option<String>, HostError> {
        let _alone = self.alone()?;
        match self.0.config.backend {
            Backend::Iptables => with_iptables::difference(self.netns(), &self.0.config),
            Backend::Nftables => {
                with_nftables::difference(self.netns(), &self.0.config, self.0.kubelet)
            }
        }
    }

    /// Makes what is missing and repairs what is wrong; addresses that are held already stay.
    ///
    /// # Errors
    /// Why it cannot be made.
    pub fn ensure(&self) -> Result<Outcome, HostError> {
        let mut alone = self.alone()?;
        let outcome = match self.0.config.backend {
            Backend::Iptables => with_iptables::ensure(self.netns(), &self.0.config)?,
            Backend::Nftables => {
                with_nftables::ensure(self.netns(), &self.0.config, self.0.kubelet)?
            }
        };
        if alone.branch.are_needed() {
            for (ip, _) in self.held()? {
                alone.branch.add(self.netns(), ip)?;
            }
        }
        Ok(outcome)
    }

    /// Holds a pod's address, whoever's it was before. One of IPv6 is passed over where IPv6 is off.
    ///
    /// # Errors
    /// Why it is not held; probes of the pod would then be taken for anybody's traffic.
    pub fn add(&self, ip: IpAddr, uid: &str) -> Result<(), HostError> {
        check_uid(uid)?;
        let Some(family) = self.family(ip) else {
            return Ok(());
        };
        let mut alone = self.alone()?;
        match self.0.config.backend {
            Backend::Iptables => with_iptables::add(self.netns(), family, ip, uid)?,
            Backend::Nftables => with_nftables::add(self.netns(), family, ip, uid)?,
        }
        alone.branch.add(self.netns(), ip)
    }

    /// Lets go of a pod's address, if it is still that pod's; says whether it was.
    ///
    /// # Errors
    /// Why it is still held.
    pub fn remove(&self, ip: IpAddr, uid: &str) -> Result<bool, HostError> {
        let Some(family) = self.family(ip) else {
            return Ok(false);
        };
        let mut alone = self.alone()?;
        let held = self.held_of(family)?;
        let owner = held.iter().find(|(held, _)| *held == ip);
        match owner {
            Some((_, owner)) if owner != uid => return Ok(false),
            Some(_) => match self.0.config.backend {
                Backend::Iptables => with_iptables::remove(self.netns(), family, ip)?,
                Backend::Nftables => with_nftables::remove(self.netns(), family, ip)?,
            },
            None => {}
        }
        alone.branch.remove(self.netns(), ip)?;
        Ok(owner.is_some())
    }

    /// Every address that is held, and the UID of its pod.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn entries(&self) -> Result<Vec<(IpAddr, String)>, HostError> {
        let _alone = self.alone()?;
        self.held()
    }

    /// Takes everything out, however much of it is there and whichever backend it is of.
    ///
    /// # Errors
    /// The first failure; the rest is taken out all the same.
    pub fn remove_all(&self) -> Result<(), HostError> {
        let mut alone = self.alone()?;
        let branch = alone.branch.remove_all(self.netns());
        let iptables = with_iptables::remove_all(self.netns());
        let nftables = with_nftables::remove_all(self.netns());
        branch.and(iptables).and(nftables)
    }

    fn alone(&self) -> Result<Alone<'_>, HostError> {
        let branch = self.0.branch.lock();
        Ok(Alone {
            branch: branch.unwrap_or_else(PoisonError::into_inner),
            _process: hold(self.netns()).map_err(HostError::Namespace)?,
        })
    }

    fn held(&self) -> Result<Vec<(IpAddr, String)>, HostError> {
        let mut held = Vec::new();
        for &family in families(&self.0.config) {
            held.extend(self.held_of(family)?);
        }
        Ok(held)
    }

    fn held_of(&self, family: Family) -> Result<Vec<(IpAddr, String)>, HostError> {
        match self.0.config.backend {
            Backend::Iptables => with_iptables::entries(self.netns(), family),
            Backend::Nftables => with_nftables::entries(self.netns(), family),
        }
    }

    fn netns(&self) -> BorrowedFd<'_> {
        self.0.netns.as_fd()
    }

    /// The family of an address, if such addresses are held.
    fn family(&self, ip: IpAddr) -> Option<Family> {
        match ip {
            IpAddr::V4(_) => Some(Family::V4),
            IpAddr::V6(_) => self.0.config.ipv6.then_some(Family::V6),
        }
    }
}

fn families(config: &HostConfig) -> &'static [Family] {
    if config.ipv6 {
        &[Family::V4, Family::V6]
    } else {
        &[Family::V4]
    }
}

fn set(family: Family) -> &'static str {
    match family {
        Family::V4 => SET_V4,
        Family::V6 => SET_V6,
    }
}

fn probe(family: Family, config: &HostConfig) -> IpAddr {
    match family {
        Family::V4 => config.probe_v4.into(),
        Family::V6 => config.probe_v6.into(),
    }
}

/// Does something with a set in the node's namespace.
fn with_set<T: Send>(
    netns: BorrowedFd<'_>,
    family: Family,
    work: impl FnOnce(&'static str) -> io::Result<T> + Send,
) -> Result<T, HostError> {
    let set = set(family);
    within(netns, || work(set)).map_err(|error| HostError::Set { set, error })
}

/// UIDs are written into scripts, so none may be more than one.
fn check_uid(uid: &str) -> Result<(), HostError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if (1..=128).contains(&uid.len()) && uid.chars().all(plain) {
        return Ok(());
    }
    Err(HostError::Uid(uid.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_uids_are_written_into_scripts() {
        for uid in ["2cf6e2a1-1f0d-4b6a-9d0e-000000000001", "a", "mirror_0.1"] {
            assert!(check_uid(uid).is_ok(), "{uid}");
        }
        for uid in ["", "a b", "a\"", "a\n", "é", &"a".repeat(129)] {
            assert!(check_uid(uid).is_err(), "{uid}");
        }
    }
}
