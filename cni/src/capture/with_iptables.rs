//! The rules of a pod as iptables holds them.

use std::fs;
use std::os::fd::BorrowedFd;

use super::{CaptureError, Standing};
use crate::compare;
use crate::iptables::{Iptables, IptablesError};
use crate::netns::within;
use crate::nftables;
use crate::render;
use crate::rules::{CaptureConfig, Family, tables};
use crate::saved::Saved;

/// What each family holds.
pub struct Rules(Vec<Held>);

struct Held {
    family: Family,
    iptables: Iptables,
    saved: Saved,
    difference: Option<String>,
}

impl Rules {
    pub fn read(
        netns: BorrowedFd<'_>,
        families: &[Family],
        config: &CaptureConfig,
    ) -> Result<Self, CaptureError> {
        let mut rules = Vec::new();
        for &family in families {
            let unplanned = tables(family, config).is_empty();
            // What is left of a family that is let alone is no reason to refuse the pod.
            if unplanned && (!config.reconcile || !present(netns)?) {
                continue;
            }
            let iptables = match Iptables::detect(family) {
                Err(IptablesError::NoBinary { .. }) if unplanned => continue,
                found => found?,
            };
            let saved = iptables.save(netns)?;
            let has = |table: &str, rule: &str| iptables.has(netns, table, rule);
            let difference = compare::difference(&saved, family, config, has)?;
            rules.push(Held {
                family,
                difference: difference.map(|found| format!("{family}: {found}")),
                iptables,
                saved,
            });
        }
        Ok(Self(rules))
    }

    fn put(
        &self,
        netns: BorrowedFd<'_>,
        config: &CaptureConfig,
        fresh: &mut Vec<Family>,
    ) -> Result<(), CaptureError> {
        for held in self.0.iter().filter(|held| held.difference.is_some()) {
            let text = if held.saved.has_chains() {
                render::replacement(&held.saved, held.family, config)
            } else {
                fresh.push(held.family);
                render::restore(held.family, config)
            };
            held.iptables.restore(netns, &text)?;
        }
        Ok(())
    }
}

impl Standing for Rules {
    fn difference(&self) -> Option<&str> {
        self.0.iter().find_map(|held| held.difference.as_deref())
    }

    fn conflict(&self) -> Option<&str> {
        let held = self.0.iter().filter(|held| held.saved.has_chains());
        held.filter_map(|held| held.difference.as_deref()).next()
    }

    fn is_fresh(&self) -> bool {
        !self.0.iter().any(|held| held.saved.has_chains())
    }

    fn apply(&self, netns: BorrowedFd<'_>, config: &CaptureConfig) -> Result<(), CaptureError> {
        let mut fresh = Vec::new();
        let put = self.put(netns, config, &mut fresh);
        if put.is_err() {
            // Half captured, a part of the traffic would go where nobody listens.
            for family in fresh {
                let _ = remove_family(netns, family);
            }
        }
        put
    }
}

/// Whether there are rules of ours.
pub fn holds(netns: BorrowedFd<'_>) -> Result<bool, CaptureError> {
    if !present(netns)? {
        return Ok(false);
    }
    for family in [Family::V4, Family::V6] {
        match Iptables::detect(family) {
            Ok(iptables) if iptables.save(netns)?.has_chains() => return Ok(true),
            // Whoever cannot read rules cannot have written any.
            Ok(_) | Err(IptablesError::NoBinary { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(false)
}

/// Takes out whatever is there of ours.
pub fn remove(netns: BorrowedFd<'_>) -> Result<(), CaptureError> {
    if !present(netns)? {
        return Ok(());
    }
    let v4 = remove_family(netns, Family::V4);
    v4.and(remove_family(netns, Family::V6))
}

fn remove_family(netns: BorrowedFd<'_>, family: Family) -> Result<(), CaptureError> {
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

/// Whether iptables of either variant has any table here; the kernel tells without a program.
fn present(netns: BorrowedFd<'_>) -> Result<bool, CaptureError> {
    const LEGACY: [&str; 2] = [
        "/proc/thread-self/net/ip_tables_names",
        "/proc/thread-self/net/ip6_tables_names",
    ];
    const FAMILIES: [i32; 2] = [libc::AF_INET, libc::AF_INET6];
    let of_iptables = |family: u8| FAMILIES.contains(&i32::from(family));
    let tables = nftables::tables(netns)?;
    if tables.iter().any(|(family, _)| of_iptables(*family)) {
        return Ok(true);
    }
    let named = |path: &str| fs::read(path).is_ok_and(|names| !names.is_empty());
    within(netns, || Ok(LEGACY.into_iter().any(named))).map_err(CaptureError::Namespace)
}
