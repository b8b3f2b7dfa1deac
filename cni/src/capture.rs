//! Capturing a pod: rules and routes put into its namespace, checked, repaired, taken out.

use std::fs;
use std::io;
use std::os::fd::BorrowedFd;

use thiserror::Error;

use crate::iptables::{Iptables, IptablesError, Saved};
use crate::netns::within;
use crate::render;
use crate::routes;
use crate::rules::{CaptureConfig, Family, Hook, plan, tables};

/// What capturing a pod took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The pod held no rules; now it holds ours.
    Applied,
    /// Ours were there already.
    Unchanged,
    /// Something else was there; it was replaced.
    Repaired,
}

/// Why a pod is not captured.
#[derive(Debug, Error)]
pub enum CaptureError {
    #[error(transparent)]
    Iptables(#[from] IptablesError),
    #[error("the route for answers to the proxy cannot be set: {0}")]
    Route(io::Error),
    #[error("{name} is not the name of a network interface")]
    Interface { name: String },
    #[error("the pod holds other rules ({0}) and they are not to be replaced")]
    Foreign(String),
}

/// Captures the pod of a network namespace. Doing it again changes nothing.
///
/// # Errors
/// Why it is not captured; the pod's traffic then goes as it did before.
pub fn capture(netns: BorrowedFd<'_>, config: &CaptureConfig) -> Result<Outcome, CaptureError> {
    for name in &config.virtual_interfaces {
        let plain = |c: char| c.is_ascii_graphic() && c != '/';
        if name.is_empty() || name.len() > 15 || !name.chars().all(plain) {
            return Err(CaptureError::Interface { name: name.clone() });
        }
    }
    let mut outcome = Outcome::Unchanged;
    for family in families(netns, config) {
        within(netns, || routes::add(family)).map_err(CaptureError::Route)?;
        let iptables = Iptables::detect(family)?;
        let saved = iptables.save(netns)?;
        let difference = difference(&iptables, netns, family, config, &saved)?;
        let done = match difference {
            None => Outcome::Unchanged,
            Some(_) if saved.tables.iter().all(|table| table.chains.is_empty()) => {
                iptables.restore(netns, &render::restore(family, config))?;
                Outcome::Applied
            }
            Some(difference) if !config.reconcile => return Err(CaptureError::Foreign(difference)),
            Some(_) => {
                repair(&iptables, netns, family, config, &saved)?;
                Outcome::Repaired
            }
        };
        if done != Outcome::Unchanged && outcome != Outcome::Repaired {
            outcome = done;
        }
    }
    Ok(outcome)
}

/// What is wrong with a pod's rules; none when it is captured as it should be.
///
/// # Errors
/// When the rules cannot be read.
pub fn verify(
    netns: BorrowedFd<'_>,
    config: &CaptureConfig,
) -> Result<Option<String>, CaptureError> {
    for family in families(netns, config) {
        let iptables = Iptables::detect(family)?;
        let saved = iptables.save(netns)?;
        if let Some(difference) = difference(&iptables, netns, family, config, &saved)? {
            return Ok(Some(difference));
        }
    }
    Ok(None)
}

/// Takes everything out of a pod again, however much of it is there.
///
/// # Errors
/// The first failure; the rest is taken out all the same.
pub fn remove(netns: BorrowedFd<'_>) -> Result<(), CaptureError> {
    let mut result = Ok(());
    for family in [Family::V4, Family::V6] {
        let cleared = clear(netns, family)
            .and_then(|()| within(netns, || routes::remove(family)).map_err(CaptureError::Route));
        result = result.and(cleared);
    }
    result
}

fn clear(netns: BorrowedFd<'_>, family: Family) -> Result<(), CaptureError> {
    let iptables = match Iptables::detect(family) {
        Ok(iptables) => iptables,
        // Without a program for it nothing of ours can be there.
        Err(_) if family == Family::V6 => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    match iptables.save(netns)?.removal() {
        Some(removal) => Ok(iptables.restore(netns, &removal)?),
        None => Ok(()),
    }
}

/// IPv6 is left out where the pod has none.
fn families(netns: BorrowedFd<'_>, config: &CaptureConfig) -> Vec<Family> {
    const SWITCH: &str = "/proc/thread-self/net/if_inet6";
    let has_ipv6 = || within(netns, || Ok(fs::metadata(SWITCH).is_ok())).unwrap_or(true);
    if config.ipv6 && has_ipv6() {
        vec![Family::V4, Family::V6]
    } else {
        vec![Family::V4]
    }
}

/// The first thing in which a namespace differs from the plan.
fn difference(
    iptables: &Iptables,
    netns: BorrowedFd<'_>,
    family: Family,
    config: &CaptureConfig,
    saved: &Saved,
) -> Result<Option<String>, CaptureError> {
    let rules = plan(config);
    let chains = [Hook::Prerouting, Hook::Output].map(render::chain);
    for known in &saved.tables {
        let ours = tables(config)
            .iter()
            .any(|table| render::table(*table) == known.name);
        let unexpected = known
            .chains
            .iter()
            .find(|chain| !ours || !chains.contains(&&***chain));
        if let Some(chain) = unexpected {
            return Ok(Some(format!(
                "unexpected chain {chain} in table {}",
                known.name
            )));
        }
    }
    for table in tables(config) {
        let name = render::table(*table);
        let Some(known) = saved.table(name) else {
            return Ok(Some(format!("table {name} is missing")));
        };
        for hook in [Hook::Prerouting, Hook::Output] {
            let chain = render::chain(hook);
            if !known.chains.iter().any(|known| known == chain) {
                return Ok(Some(format!("chain {chain} of table {name} is missing")));
            }
            let planned = rules
                .iter()
                .map(|rule| (rule.table(), render::rule(rule, family, config)));
            let planned =
                planned.filter(|(at, rule)| at == table && rule.split(' ').next() == Some(chain));
            let (planned, found) = (planned.count(), known.count(chain));
            if planned != found {
                return Ok(Some(format!(
                    "chain {chain} of table {name} has {found} rules instead of {planned}"
                )));
            }
        }
    }
    for rule in &rules {
        let text = render::rule(rule, family, config);
        let table = render::table(rule.table());
        if !iptables.has(netns, table, &text)? {
            return Ok(Some(format!("rule {text} of table {table} is missing")));
        }
    }
    Ok(None)
}

/// Replaces what is there; meanwhile nothing passes, so that nothing passes uncaptured.
fn repair(
    iptables: &Iptables,
    netns: BorrowedFd<'_>,
    family: Family,
    config: &CaptureConfig,
    saved: &Saved,
) -> Result<(), CaptureError> {
    iptables.restore(netns, &guards("-I"))?;
    let replaced = match saved.removal() {
        Some(removal) => iptables.restore(netns, &removal),
        None => Ok(()),
    };
    let replaced =
        replaced.and_then(|()| iptables.restore(netns, &render::restore(family, config)));
    let opened = iptables.restore(netns, &guards("-D"));
    Ok(replaced.and(opened)?)
}

fn guards(command: &str) -> String {
    let mut text = "*filter\n".to_string();
    for chain in ["INPUT", "FORWARD", "OUTPUT"] {
        for protocol in ["tcp", "udp"] {
            text.push_str(&format!("{command} {chain} -p {protocol} -j DROP\n"));
        }
    }
    text + "COMMIT\n"
}
