//! The node's side written with nftables: one table that holds both the sets and the rules.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::net::IpAddr;
use std::os::fd::BorrowedFd;

use serde_json::Value;

use super::{HostConfig, HostError, families, probe, set};
use crate::capture::Outcome;
use crate::nftables::listing::Listing;
use crate::nftables::{self, INET};
use crate::program::Place;
use crate::rules::Family;

const TABLE: &str = "istio-ambient-nat";
/// What prints the table without what the sets hold.
const LIST: [&str; 5] = ["-stn", "list", "table", "inet", TABLE];

/// The first thing that is wrong.
pub fn difference(
    netns: BorrowedFd<'_>,
    config: &HostConfig,
    kubelet: u32,
) -> Result<Option<String>, HostError> {
    if !is_there(netns)? {
        return Ok(Some(format!("table {TABLE} is missing")));
    }
    let parse = |text: &str| Listing::parse(text, &[TABLE]);
    let wanted = parse(&nftables::reference(&script(config, kubelet, &[]), &LIST)?);
    let held = parse(&nftables::print(Place::Host(netns), &LIST)?);
    Ok(held.difference(&wanted))
}

/// Makes what is missing and repairs what is wrong, in one transaction that keeps the addresses.
pub fn ensure(
    netns: BorrowedFd<'_>,
    config: &HostConfig,
    kubelet: u32,
) -> Result<Outcome, HostError> {
    if difference(netns, config, kubelet)?.is_none() {
        return Ok(Outcome::Unchanged);
    }
    let was_there = is_there(netns)?;
    let mut kept = Vec::new();
    for &family in families(config) {
        // A set that is missing or of another kind has nothing to keep.
        kept.extend(entries(netns, family).unwrap_or_default());
    }
    nftables::apply(Place::Host(netns), &script(config, kubelet, &kept))?;
    Ok(match was_there {
        true => Outcome::Repaired,
        false => Outcome::Applied,
    })
}

/// Adding what is there already changes nothing, not even the comment; so it goes first, in the same transaction.
pub fn add(netns: BorrowedFd<'_>, family: Family, ip: IpAddr, uid: &str) -> Result<(), HostError> {
    let set = set(family);
    let element = format!("element inet {TABLE} {set}");
    let script = format!(
        "add {element} {{ {ip} }}\ndelete {element} {{ {ip} }}\nadd {element} {{ {ip} comment \"{uid}\" }}\n"
    );
    Ok(nftables::apply(Place::Host(netns), &script)?)
}

pub fn remove(netns: BorrowedFd<'_>, family: Family, ip: IpAddr) -> Result<(), HostError> {
    let script = format!("delete element inet {TABLE} {} {{ {ip} }}\n", set(family));
    Ok(nftables::apply(Place::Host(netns), &script)?)
}

pub fn entries(netns: BorrowedFd<'_>, family: Family) -> Result<Vec<(IpAddr, String)>, HostError> {
    if !is_there(netns)? {
        return Ok(Vec::new());
    }
    let set = set(family);
    let arguments = ["--json", "list", "set", "inet", TABLE, set];
    let text = nftables::print(Place::Host(netns), &arguments)?;
    elements(&text).ok_or(HostError::Listing { set, text })
}

/// Takes out the table.
pub fn remove_all(netns: BorrowedFd<'_>) -> Result<(), HostError> {
    if is_there(netns)? {
        let script = format!("add table inet {TABLE}\ndelete table inet {TABLE}\n");
        nftables::apply(Place::Host(netns), &script)?;
    }
    Ok(())
}

fn is_there(netns: BorrowedFd<'_>) -> Result<bool, HostError> {
    let tables = nftables::tables(netns)?;
    Ok(tables
        .iter()
        .any(|(family, name)| *family == INET && name == TABLE))
}

/// The whole table anew, with the addresses it is to hold.
fn script(config: &HostConfig, kubelet: u32, kept: &[(IpAddr, String)]) -> String {
    let mut text = format!(
        "add table inet {TABLE}\ndelete table inet {TABLE}\nadd table inet {TABLE}\n\
         add chain inet {TABLE} postrouting {{ type nat hook postrouting priority 100 ; policy accept ; }}\n"
    );
    for &family in families(config) {
        let (kind, network) = match family {
            Family::V4 => ("ipv4_addr", "ip"),
            Family::V6 => ("ipv6_addr", "ip6"),
        };
        let (set, probe) = (set(family), probe(family, config));
        let _ = writeln!(
            text,
            "add set inet {TABLE} {set} {{ type {kind} ; }}\n\
             add rule inet {TABLE} postrouting meta l4proto tcp meta skuid {kubelet} {network} daddr @{set} counter \
             snat {network} to {probe}"
        );
    }
    let mut known = BTreeSet::new();
    for (ip, uid) in kept.iter().filter(|(ip, _)| known.insert(*ip)) {
        let set = set(if ip.is_ipv4() { Family::V4 } else { Family::V6 });
        let comment = match super::check_uid(uid) {
            Ok(()) => format!(" comment \"{uid}\""),
            // Whoever wrote it, it is no UID and nobody's to remove.
            Err(_) => String::new(),
        };
        let _ = writeln!(text, "add element inet {TABLE} {set} {{ {ip}{comment} }}");
    }
    text
}

/// The elements of the set in what nft prints as JSON; those without a comment are a bare address.
fn elements(text: &str) -> Option<Vec<(IpAddr, String)>> {
    let printed: Value = serde_json::from_str(text).ok()?;
    let objects = printed["nftables"].as_array()?;
    let set = objects.iter().find_map(|object| object.get("set"))?;
    let Some(elements) = set.get("elem") else {
        return Some(Vec::new());
    };
    let one = |element: &Value| {
        let (value, comment) = match element.get("elem") {
            Some(inner) => (&inner["val"], inner["comment"].as_str()),
            None => (element, None),
        };
        let ip = value.as_str()?.parse().ok()?;
        Some((ip, comment.unwrap_or_default().to_string()))
    };
    elements.as_array()?.iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_are_read_with_and_without_a_comment() {
        let text = r#"{"nftables": [{"metainfo": {}}, {"set": {"name": "s", "elem": [
            "10.0.0.1", {"elem": {"val": "fd00::1", "comment": "uid"}}]}}]}"#;
        let (plain, owned) = ("10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap());
        let expected = vec![(plain, String::new()), (owned, "uid".to_string())];
        assert_eq!(elements(text), Some(expected));
        let empty = r#"{"nftables": [{"set": {"name": "s"}}]}"#;
        assert_eq!(elements(empty), Some(Vec::new()));
        for broken in [
            "",
            "{}",
            r#"{"nftables": []}"#,
            r#"{"nftables": [{"set": {"elem": ["x"]}}]}"#,
            r#"{"nftables": [{"set": {"elem": [{"range": [1, 2]}]}}]}"#,
        ] {
            assert_eq!(elements(broken), None, "{broken}");
        }
    }
}
