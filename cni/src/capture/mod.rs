//! Capturing a pod: rules and routes put into its namespace, checked, repaired, taken out.

mod with_iptables;
mod with_nftables;

use std::fs;
use std::io;
use std::os::fd::BorrowedFd;

use thiserror::Error;

use crate::iptables::IptablesError;
use crate::netns::{hold, within};
use crate::nftables::NftError;
use crate::routes;
use crate::rules::{Backend, CaptureConfig, Family, Ipv6Mode};

/// What capturing a pod took.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    /// Everything was there already.
    Unchanged,
    /// The pod held no rules of ours; now it does.
    Applied,
    /// Something was missing or different; it was put right.
    Repaired,
}

/// Why a pod is not captured.
#[derive(Debug, Error)]
pub enum CaptureError {
    #[error(transparent)]
    Iptables(#[from] IptablesError),
    #[error(transparent)]
    Nftables(#[from] NftError),
    #[error(
        "the route for answers to the proxy cannot be set: {0} (is the pod's interface lo up?)"
    )]
    Route(io::Error),
    #[error("the pod's network namespace cannot be used: {0}")]
    Namespace(io::Error),
    #[error("{name} is not the name of a network interface")]
    Interface { name: String },
    #[error("the pod holds other rules ({0}) and they are not to be replaced")]
    Foreign(String),
}

/// The rules that a pod holds in one backend, held against those that it should hold.
trait Standing {
    /// The first thing that is wrong with them.
    fn difference(&self) -> Option<&str>;
    /// The first thing in which rules that are there already are others.
    fn conflict(&self) -> Option<&str>;
    /// Whether there are none yet.
    fn is_fresh(&self) -> bool;
    /// Makes them what they should be. When that fails, rules are left only where some were before.
    fn apply(&self, netns: BorrowedFd<'_>, config: &CaptureConfig) -> Result<(), CaptureError>;
}

/// Captures the pod of a network namespace. Doing it again changes nothing.
///
/// # Errors
/// Why it is not captured. Unless there were rules of ours before, the pod's traffic then goes as it did.
pub fn capture(netns: BorrowedFd<'_>, config: &CaptureConfig) -> Result<Outcome, CaptureError> {
    for name in &config.virtual_interfaces {
        check_interface(name)?;
    }
    let _held = hold(netns).map_err(CaptureError::Namespace)?;
    let families = families(netns)?;
    let rules = standing(netns, families, config)?;
    let left_over = left_over(netns, config.backend)?;
    if !config.reconcile {
        let conflict = rules.conflict().or(left_over.as_deref());
        if let Some(conflict) = conflict {
            return Err(CaptureError::Foreign(conflict.to_string()));
        }
    }
    let mut routed = Vec::new();
    let put = route(netns, families, config, &mut routed).and_then(|done| {
        if rules.difference().is_some() {
            rules.apply(netns, config)?;
        }
        Ok(done)
    });
    let routes = match put {
        Ok(done) => done,
        Err(error) => {
            for family in routed {
                let _ = within(netns, || routes::remove(family));
            }
            return Err(error);
        }
    };
    if left_over.is_some() {
        // Only now, so that there is no moment without rules.
        clear(netns, config.backend.other())?;
    }
    Ok(match rules.difference() {
        None if left_over.is_none() && routes == Outcome::Unchanged => Outcome::Unchanged,
        Some(_) if left_over.is_none() && rules.is_fresh() => Outcome::Applied,
        _ => Outcome::Repaired,
    })
}

/// What is wrong with a pod's rules and routes; none when it is captured as it should be.
///
/// # Errors
/// When they cannot be read.
pub fn verify(
    netns: BorrowedFd<'_>,
    config: &CaptureConfig,
) -> Result<Option<String>, CaptureError> {
    let _held = hold(netns).map_err(CaptureError::Namespace)?;
    let families = families(netns)?;
    let rules = standing(netns, families, config)?;
    if let Some(found) = rules.difference() {
        return Ok(Some(found.to_string()));
    }
    for &family in families.iter().filter(|family| captured(**family, config)) {
        let missing = within(netns, || routes::missing(family)).map_err(CaptureError::Route)?;
        if let Some(what) = missing {
            let found = format!("{family}: the {what} for answers to the proxy is missing");
            return Ok(Some(found));
        }
    }
    left_over(netns, config.backend)
}

/// Takes everything out of a pod again, however much of it is there and whatever wrote it.
///
/// # Errors
/// The first failure; the rest is taken out all the same.
pub fn remove(netns: BorrowedFd<'_>) -> Result<(), CaptureError> {
    let _held = hold(netns).map_err(CaptureError::Namespace)?;
    let iptables = clear(netns, Backend::Iptables);
    let nftables = clear(netns, Backend::Nftables);
    let unroute = |family| within(netns, || routes::remove(family)).map_err(CaptureError::Route);
    let (v4, v6) = (unroute(Family::V4), unroute(Family::V6));
    iptables.and(nftables).and(v4).and(v6).map(|_| ())
}

fn standing(
    netns: BorrowedFd<'_>,
    families: &[Family],
    config: &CaptureConfig,
) -> Result<Box<dyn Standing>, CaptureError> {
    Ok(match config.backend {
        Backend::Iptables => Box::new(with_iptables::Rules::read(netns, families, config)?),
        Backend::Nftables => Box::new(with_nftables::Rules::read(netns, config)?),
    })
}

/// What is there of the backend that is not asked for.
fn left_over(netns: BorrowedFd<'_>, asked: Backend) -> Result<Option<String>, CaptureError> {
    let other = asked.other();
    let holds = match other {
        Backend::Iptables => with_iptables::holds(netns)?,
        Backend::Nftables => with_nftables::holds(netns)?,
    };
    Ok(holds.then(|| format!("there are rules of {other} besides those of {asked}")))
}

fn clear(netns: BorrowedFd<'_>, backend: Backend) -> Result<(), CaptureError> {
    match backend {
        Backend::Iptables => with_iptables::remove(netns),
        Backend::Nftables => with_nftables::remove(netns),
    }
}

/// Sets the routes that are missing, whose families are added to `routed`, and removes those of no use.
fn route(
    netns: BorrowedFd<'_>,
    families: &[Family],
    config: &CaptureConfig,
    routed: &mut Vec<Family>,
) -> Result<Outcome, CaptureError> {
    let mut outcome = Outcome::Unchanged;
    for &family in families {
        let work = || {
            if captured(family, config) {
                return routes::ensure(family);
            }
            Ok(!config.reconcile || !routes::remove(family)?)
        };
        if !within(netns, work).map_err(CaptureError::Route)? {
            outcome = Outcome::Repaired;
            if captured(family, config) {
                routed.push(family);
            }
        }
    }
    Ok(outcome)
}

fn captured(family: Family, config: &CaptureConfig) -> bool {
    family == Family::V4 || config.ipv6 == Ipv6Mode::Capture
}

/// IPv6 is left out where the pod has none.
fn families(netns: BorrowedFd<'_>) -> Result<&'static [Family], CaptureError> {
    const ADDRESSES: &str = "/proc/thread-self/net/if_inet6";
    let has_ipv6 = within(netns, || fs::exists(ADDRESSES)).map_err(CaptureError::Namespace)?;
    Ok(if has_ipv6 {
        &[Family::V4, Family::V6]
    } else {
        &[Family::V4]
    })
}

/// Names are written into rules, so none may be more than a name.
fn check_interface(name: &str) -> Result<(), CaptureError> {
    let plain = |c: char| c.is_ascii_graphic() && !"/:\"'\\!".contains(c);
    if (1..=15).contains(&name.len()) && name.chars().all(plain) && !name.starts_with('-') {
        return Ok(());
    }
    let name = name.to_string();
    Err(CaptureError::Interface { name })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_interfaces_are_written_into_rules() {
        for name in ["eth0", "vif0.1", "tap-a_b", "vnet+", "a23456789012345"] {
            assert!(check_interface(name).is_ok(), "{name}");
        }
        for name in [
            "",
            "-j",
            "a b",
            "a\n-A",
            "a\"",
            "a'",
            "a\\",
            "!a",
            "a/b",
            "eth0:1",
            "a234567890123456",
        ] {
            assert!(check_interface(name).is_err(), "{name}");
        }
    }
}
