//! Capturing a pod: rules and routes put into its namespace, checked, repaired, taken out.

use std::fs;
use std::io;
use std::os::fd::BorrowedFd;

use thiserror::Error;

use crate::compare;
use crate::iptables::{Iptables, IptablesError};
use crate::netns::{hold, within};
use crate::render;
use crate::routes;
use crate::rules::{CaptureConfig, Family};
use crate::saved::Saved;

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

/// Captures the pod of a network namespace. Doing it again changes nothing.
///
/// # Errors
/// Why it is not captured. Unless there were rules of ours before, the pod's traffic then goes as it did.
pub fn capture(netns: BorrowedFd<'_>, config: &CaptureConfig) -> Result<Outcome, CaptureError> {
    for name in &config.virtual_interfaces {
        check_interface(name)?;
    }
    let _held = hold(netns).map_err(CaptureError::Namespace)?;
    let mut fresh = Vec::new();
    let mut outcome = Outcome::Unchanged;
    for &family in families(netns, config)? {
        match capture_family(netns, family, config, &mut fresh) {
            Ok(done) => outcome = outcome.max(done),
            Err(error) => {
                // Half captured, a part of the traffic would go where nobody listens.
                for family in fresh {
                    let _ = clear(netns, family);
                }
                return Err(error);
            }
        }
    }
    Ok(outcome)
}

/// Captures one family; one that had nothing of ours before is added to `fresh`.
fn capture_family(
    netns: BorrowedFd<'_>,
    family: Family,
    config: &CaptureConfig,
    fresh: &mut Vec<Family>,
) -> Result<Outcome, CaptureError> {
    let iptables = Iptables::detect(family)?;
    let saved = iptables.save(netns)?;
    let difference = difference(&iptables, netns, &saved, family, config)?;
    let is_fresh = !saved.has_chains();
    match &difference {
        _ if is_fresh => fresh.push(family),
        Some(difference) if !config.reconcile => {
            return Err(CaptureError::Foreign(difference.clone()));
        }
        _ => {}
    }
    let routed = within(netns, || routes::ensure(family)).map_err(CaptureError::Route)?;
    match difference {
        None if routed => Ok(Outcome::Unchanged),
        None => Ok(Outcome::Repaired),
        Some(_) if is_fresh => {
            iptables.restore(netns, &render::restore(family, config))?;
            Ok(Outcome::Applied)
        }
        Some(_) => {
            iptables.restore(netns, &render::replacement(&saved, family, config))?;
            Ok(Outcome::Repaired)
        }
    }
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
    for &family in families(netns, config)? {
        let iptables = Iptables::detect(family)?;
        let saved = iptables.save(netns)?;
        let mut found = difference(&iptables, netns, &saved, family, config)?;
        if found.is_none() {
            let missing = within(netns, || routes::missing(family)).map_err(CaptureError::Route)?;
            found = missing.map(|what| format!("the {what} for answers to the proxy is missing"));
        }
        if let Some(found) = found {
            return Ok(Some(format!("{family}: {found}")));
        }
    }
    Ok(None)
}

/// Takes everything out of a pod again, however much of it is there.
///
/// # Errors
/// The first failure; the rest is taken out all the same.
pub fn remove(netns: BorrowedFd<'_>) -> Result<(), CaptureError> {
    let _held = hold(netns).map_err(CaptureError::Namespace)?;
    let v4 = clear(netns, Family::V4);
    let v6 = clear(netns, Family::V6);
    v4.and(v6)
}

fn clear(netns: BorrowedFd<'_>, family: Family) -> Result<(), CaptureError> {
    let rules = clear_rules(netns, family);
    let routes = within(netns, || routes::remove(family)).map_err(CaptureError::Route);
    rules.and(routes)
}

fn clear_rules(netns: BorrowedFd<'_>, family: Family) -> Result<(), CaptureError> {
    let iptables = match Iptables::detect(family) {
        Ok(iptables) => iptables,
        // Without a program for it nothing of ours can be there.
        Err(IptablesError::NoBinary { .. }) if family == Family::V6 => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    match render::removal(&iptables.save(netns)?) {
        Some(removal) => Ok(iptables.restore(netns, &removal)?),
        None => Ok(()),
    }
}

fn difference(
    iptables: &Iptables,
    netns: BorrowedFd<'_>,
    saved: &Saved,
    family: Family,
    config: &CaptureConfig,
) -> Result<Option<String>, IptablesError> {
    compare::difference(saved, family, config, |table, rule| {
        iptables.has(netns, table, rule)
    })
}

/// IPv6 is left out where the pod has none.
fn families(
    netns: BorrowedFd<'_>,
    config: &CaptureConfig,
) -> Result<&'static [Family], CaptureError> {
    const ADDRESSES: &str = "/proc/thread-self/net/if_inet6";
    let has_ipv6 = within(netns, || fs::exists(ADDRESSES)).map_err(CaptureError::Namespace)?;
    Ok(if config.ipv6 && has_ipv6 {
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
