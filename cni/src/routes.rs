//! The route that brings answers to spoofed connections back to the proxy.
//!
//! `ip rule add fwmark 0x111/0xfff pref 32764 lookup 100` and `ip route add local default dev lo table 100`, for the
//! namespace of the calling thread.

use std::fs;
use std::io;

use crate::netlink::{Attributes, Netlink, attribute};
use crate::rules::{Family, MARK_MASK, SPOOFED_MARK};

/// The routing table of marked packets.
const TABLE: u8 = 100;
/// The place of our rule among the routing rules.
const PRIORITY: u32 = 32_764;
/// The index of the loopback interface, the first of every namespace.
const LOOPBACK: u32 = 1;

const REPLACE: u16 = (libc::NLM_F_CREATE | libc::NLM_F_REPLACE) as u16;
const EXCLUSIVE: u16 = (libc::NLM_F_CREATE | libc::NLM_F_EXCL) as u16;

// The attributes of linux/rtnetlink.h and linux/fib_rules.h.
const RTA_OIF: u16 = 4;
const FRA_PRIORITY: u16 = 6;
const FRA_FWMARK: u16 = 10;
const FRA_TABLE: u16 = 15;
const FRA_FWMASK: u16 = 16;
const FR_ACT_TO_TBL: u8 = 1;

/// Adds what is missing; says whether nothing was.
///
/// # Errors
/// The kernel's error.
pub fn ensure(family: Family) -> io::Result<bool> {
    if missing(family)?.is_none() {
        return Ok(true);
    }
    let netlink = Netlink::routing()?;
    if wants_route(family) {
        netlink.request(libc::RTM_NEWROUTE, REPLACE, &route(family))?;
    }
    match netlink.request(libc::RTM_NEWRULE, EXCLUSIVE, &rule(family)) {
        Err(error) if error.raw_os_error() != Some(libc::EEXIST) => Err(error),
        _ => Ok(false),
    }
}

/// What is not there: the route or the rule.
///
/// # Errors
/// The kernel's error.
pub fn missing(family: Family) -> io::Result<Option<&'static str>> {
    let netlink = Netlink::routing()?;
    let rules = netlink.list(libc::RTM_GETRULE, &rule(family)[..RULE_HEADER])?;
    if !rules.iter().any(|found| is_rule(found)) {
        return Ok(Some("routing rule"));
    }
    let routes = netlink.list(libc::RTM_GETROUTE, &route(family)[..ROUTE_HEADER])?;
    let routed = !wants_route(family) || routes.iter().any(|found| is_route(found));
    Ok((!routed).then_some("route"))
}

/// Removes both; what is not there is no error. Says whether anything was.
///
/// # Errors
/// The kernel's first error.
pub fn remove(family: Family) -> io::Result<bool> {
    const ABSENT: [i32; 5] = [
        libc::ENOENT,
        libc::ESRCH,
        libc::ENODEV,
        libc::EAFNOSUPPORT,
        libc::EOPNOTSUPP,
    ];
    let present = |result: io::Result<()>| match result {
        Err(error)
            if error
                .raw_os_error()
                .is_some_and(|code| ABSENT.contains(&code)) =>
        {
            Ok(false)
        }
        result => result.map(|()| true),
    };
    let netlink = Netlink::routing()?;
    let rule = present(netlink.request(libc::RTM_DELRULE, 0, &rule(family)));
    let route = present(netlink.request(libc::RTM_DELROUTE, 0, &route(family)));
    Ok(rule? | route?)
}

/// A loopback interface without IPv6 takes no IPv6 routes, and needs none.
fn wants_route(family: Family) -> bool {
    const SWITCH: &str = "/proc/sys/net/ipv6/conf/lo/disable_ipv6";
    family == Family::V4 || fs::read_to_string(SWITCH).map_or(true, |text| text.trim() != "1")
}

fn address_family(family: Family) -> u8 {
    match family {
        Family::V4 => libc::AF_INET as u8,
        Family::V6 => libc::AF_INET6 as u8,
    }
}

/// The length of struct rtmsg.
const ROUTE_HEADER: usize = 12;

/// `local default dev lo table 100`: struct rtmsg and one attribute.
fn route(family: Family) -> Vec<u8> {
    let header = [
        address_family(family),
        0, // destination prefix length: everything
        0,
        0,
        TABLE,
        libc::RTPROT_BOOT,
        libc::RT_SCOPE_HOST,
        libc::RTN_LOCAL,
    ];
    let mut body = header.to_vec();
    body.extend(0u32.to_ne_bytes());
    attribute(&mut body, RTA_OIF, LOOPBACK);
    body
}

fn is_route(body: &[u8]) -> bool {
    let Some((header, attributes)) = body.split_at_checked(ROUTE_HEADER) else {
        return false;
    };
    header[1] == 0
        && (header[4], header[7]) == (TABLE, libc::RTN_LOCAL)
        && Attributes(attributes).number(RTA_OIF) == Some(LOOPBACK)
}

/// The length of struct fib_rule_hdr.
const RULE_HEADER: usize = 12;

/// `fwmark 0x111/0xfff pref 32764 lookup 100`: struct fib_rule_hdr and its attributes.
fn rule(family: Family) -> Vec<u8> {
    let mut body = vec![address_family(family), 0, 0, 0, TABLE, 0, 0, FR_ACT_TO_TBL];
    body.extend(0u32.to_ne_bytes());
    for (kind, value) in ATTRIBUTES {
        attribute(&mut body, kind, value);
    }
    body
}

const ATTRIBUTES: [(u16, u32); 4] = [
    (FRA_PRIORITY, PRIORITY),
    (FRA_FWMARK, SPOOFED_MARK),
    (FRA_FWMASK, MARK_MASK),
    (FRA_TABLE, TABLE as u32),
];

fn is_rule(body: &[u8]) -> bool {
    let Some((header, attributes)) = body.split_at_checked(RULE_HEADER) else {
        return false;
    };
    let attributes = Attributes(attributes);
    (header[1], header[2], header[7]) == (0, 0, FR_ACT_TO_TBL)
        && ATTRIBUTES
            .iter()
            .all(|(kind, value)| attributes.number(*kind) == Some(*value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_for_is_recognised_and_other_things_are_not() {
        for family in [Family::V4, Family::V6] {
            let (route, rule) = (route(family), rule(family));
            assert!(is_route(&route) && is_rule(&rule));
            assert!(!is_route(&rule) && !is_rule(&route));
            for index in [1, 4, 7, 16] {
                let mut other = route.clone();
                other[index] ^= 0x10;
                assert!(!is_route(&other), "{index}");
            }
            for index in [1, 2, 7, 16, 24, 32, 40] {
                let mut other = rule.clone();
                other[index] ^= 0x10;
                assert!(!is_rule(&other), "{index}");
            }
            for length in 0..route.len() {
                assert!(!is_route(&route[..length]), "{length}");
            }
        }
    }
}
