//! The node's side written with iptables and ipset.

use std::fmt::Write;
use std::net::IpAddr;
use std::os::fd::BorrowedFd;

use super::ipset;
use super::{HostConfig, HostError, families, probe, set, with_set};
use crate::capture::Outcome;
use crate::iptables::{Iptables, IptablesError};
use crate::rules::Family;

const TABLE: &str = "nat";
const BUILT_IN: &str = "POSTROUTING";
const CHAIN: &str = "ISTIO_POSTRT";
const JUMP: &str = "-A POSTROUTING -j ISTIO_POSTRT";

/// What a family's chains hold, as iptables prints it.
struct Held {
    iptables: Iptables,
    /// The jumps to our chain; the first is where it should be if it is the first rule of all.
    jumps: Vec<String>,
    is_first: bool,
    /// Our chain, if it is there.
    chain: Option<Vec<String>>,
}

/// The first thing that is wrong.
pub fn difference(netns: BorrowedFd<'_>, config: &HostConfig) -> Result<Option<String>, HostError> {
    for &family in families(config) {
        let found = with_set(netns, family, |set| ipset::read(set, family))?;
        let wrong = match found {
            None => Some(format!("the set {} is missing", set(family))),
            Some(found) if !found.fits => {
                Some(format!("the set {} is of another kind", set(family)))
            }
            Some(_) => Held::read(netns, family)?.difference(netns, family, config)?,
        };
        if wrong.is_some() {
            return Ok(wrong);
        }
    }
    Ok(None)
}

/// Makes what is missing and repairs what is wrong.
pub fn ensure(netns: BorrowedFd<'_>, config: &HostConfig) -> Result<Outcome, HostError> {
    let mut outcome = Outcome::Unchanged;
    for &family in families(config) {
        let held = Held::read(netns, family)?;
        let was_there = held.chain.is_some();
        let found = with_set(netns, family, |set| ipset::read(set, family))?;
        let has_set = match &found {
            Some(found) if !found.fits => {
                // Rules keep a set from being removed.
                held.remove(netns)?;
                with_set(netns, family, ipset::destroy)?;
                false
            }
            found => found.is_some(),
        };
        if !has_set {
            with_set(netns, family, |set| ipset::create(set, family))?;
        }
        let held = Held::read(netns, family)?;
        let wrong = held.difference(netns, family, config)?.is_some();
        if wrong {
            held.replace(netns, family, config)?;
        }
        if wrong || !has_set {
            let done = match was_there || found.is_some() {
                true => Outcome::Repaired,
                false => Outcome::Applied,
            };
            outcome = outcome.max(done);
        }
    }
    Ok(outcome)
}

pub fn add(netns: BorrowedFd<'_>, family: Family, ip: IpAddr, uid: &str) -> Result<(), HostError> {
    with_set(netns, family, |set| ipset::add(set, ip, uid))
}

pub fn remove(netns: BorrowedFd<'_>, family: Family, ip: IpAddr) -> Result<(), HostError> {
    with_set(netns, family, |set| ipset::delete(set, ip))
}

pub fn entries(netns: BorrowedFd<'_>, family: Family) -> Result<Vec<(IpAddr, String)>, HostError> {
    let found = with_set(netns, family, |set| ipset::read(set, family))?;
    Ok(found.map(|set| set.entries).unwrap_or_default())
}

/// Takes out the rules and sets of both families.
pub fn remove_all(netns: BorrowedFd<'_>) -> Result<(), HostError> {
    let one = |family| {
        match Held::read(netns, family) {
            // Without a program for them there can be no rules of ours.
            Err(HostError::Iptables(IptablesError::NoBinary { .. })) => {}
            held => held?.remove(netns)?,
        }
        with_set(netns, family, ipset::destroy).map(|_| ())
    };
    let v4 = one(Family::V4);
    v4.and(one(Family::V6))
}

/// Our rule, as iptables prints it.
fn rule(family: Family, config: &HostConfig) -> String {
    format!(
        "-A {CHAIN} -p tcp -m owner --socket-exists -m set --match-set {} dst -j SNAT --to-source {}",
        set(family),
        probe(family, config)
    )
}

impl Held {
    fn read(netns: BorrowedFd<'_>, family: Family) -> Result<Self, HostError> {
        let iptables = Iptables::detect(family)?;
        let built_in = iptables.chain_of_host(netns, TABLE, BUILT_IN)?;
        let built_in = built_in.unwrap_or_default();
        let is_jump = |rule: &&String| rule.ends_with(" -j ISTIO_POSTRT");
        Ok(Self {
            is_first: built_in.first().is_some_and(|rule| rule == JUMP),
            jumps: built_in.iter().filter(is_jump).cloned().collect(),
            chain: iptables.chain_of_host(netns, TABLE, CHAIN)?,
            iptables,
        })
    }

    fn difference(
        &self,
        netns: BorrowedFd<'_>,
        family: Family,
        config: &HostConfig,
    ) -> Result<Option<String>, HostError> {
        let rule = rule(family, config);
        let wrong = match &self.chain {
            None => format!("chain {CHAIN} of table {TABLE} is missing"),
            Some(_) if self.jumps.is_empty() => format!("the jump to chain {CHAIN} is missing"),
            Some(_) if !self.is_first => {
                format!("the jump to chain {CHAIN} is not the first rule of {BUILT_IN}")
            }
            Some(_) if self.jumps.len() > 1 => format!("there are more jumps to chain {CHAIN}"),
            Some(held) if held.len() != 1 => {
                format!("chain {CHAIN} has {} rules instead of 1", held.len())
            }
            Some(held)
                if held[0] != rule && !self.iptables.host_has(netns, TABLE, &rule[3..])? =>
            {
                format!("chain {CHAIN} holds another rule: {}", held[0])
            }
            Some(_) => return Ok(None),
        };
        Ok(Some(format!("{family}: {wrong}")))
    }

    /// Makes the chain and the jump to it anew, in one transaction.
    fn replace(
        &self,
        netns: BorrowedFd<'_>,
        family: Family,
        config: &HostConfig,
    ) -> Result<(), HostError> {
        // Declaring the chain empties it.
        let mut text = format!("*{TABLE}\n:{CHAIN} - [0:0]\n");
        self.delete_jumps(&mut text);
        let _ = writeln!(
            text,
            "-I {BUILT_IN} 1 -j {CHAIN}\n{}\nCOMMIT",
            rule(family, config)
        );
        Ok(self.iptables.restore_host(netns, &text)?)
    }

    fn remove(&self, netns: BorrowedFd<'_>) -> Result<(), HostError> {
        if self.chain.is_none() {
            return Ok(());
        }
        let mut text = format!("*{TABLE}\n");
        self.delete_jumps(&mut text);
        let _ = writeln!(text, "-F {CHAIN}\n-X {CHAIN}\nCOMMIT");
        Ok(self.iptables.restore_host(netns, &text)?)
    }

    fn delete_jumps(&self, text: &mut String) {
        for jump in &self.jumps {
            let _ = writeln!(text, "{}", jump.replacen("-A", "-D", 1));
        }
    }
}
