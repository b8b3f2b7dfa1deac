//! Routing rules for pods behind an AWS branch interface (Security Groups for Pods).
//!
//! There the node sends what is for such a pod out through the branch interface and gets it back on another; probes
//! with a link-local source would be lost on the way. Two rules per pod lead them, and the answers, straight to it.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::fd::BorrowedFd;
use std::path::Path;

use nix::net::if_::if_nametoindex;

use super::HostError;
use crate::netlink::{Attributes, Netlink, attribute, attribute_bytes};
use crate::netns::within;

/// The switch that the AWS network plugin turns off where branch interfaces are in use.
const SWITCH: &str = "sys/net/ipv4/tcp_early_demux";
/// The place of the rule that leads to a pod.
const PRIORITY: u32 = 512;

// The attributes of linux/rtnetlink.h and linux/fib_rules.h.
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_TABLE: u16 = 15;
const FRA_DST: u16 = 1;
const FRA_IIFNAME: u16 = 3;
const FRA_PRIORITY: u16 = 6;
const FRA_TABLE: u16 = 15;
const FR_ACT_TO_TBL: u8 = 1;

/// The length of struct rtmsg and of struct fib_rule_hdr.
const HEADER: usize = 12;

const EXCLUSIVE: u16 = (libc::NLM_F_CREATE | libc::NLM_F_EXCL) as u16;

/// The rules that were added, as requests, by the address they are for.
#[derive(Debug)]
pub struct BranchRules {
    needed: bool,
    added: BTreeMap<IpAddr, [Vec<u8>; 2]>,
}

impl BranchRules {
    pub fn new(wanted: bool, proc: &Path) -> Self {
        let off = fs::read_to_string(proc.join(SWITCH)).is_ok_and(|text| text.starts_with('0'));
        Self {
            needed: wanted && off,
            added: BTreeMap::new(),
        }
    }

    /// Whether any pod of this node may need them.
    pub fn are_needed(&self) -> bool {
        self.needed
    }

    /// Adds the rules of an address, if it is behind a branch interface.
    pub fn add(&mut self, netns: BorrowedFd<'_>, ip: IpAddr) -> Result<(), HostError> {
        if !self.needed {
            return Ok(());
        }
        let work = || {
            let netlink = Netlink::routing()?;
            let Some(branch) = Branch::of(&netlink, ip)? else {
                return Ok(None);
            };
            let rules = [branch.to_pod(ip), branch.out_of_pod(ip)];
            let is_new = put(&netlink, &rules[0])?;
            if let Err(error) = put(&netlink, &rules[1]) {
                if is_new {
                    let _ = netlink.request(libc::RTM_DELRULE, 0, &rules[0]);
                }
                return Err(error);
            }
            Ok(Some(rules))
        };
        let added = within(netns, work).map_err(|error| HostError::BranchRules { ip, error })?;
        if let Some(added) = added {
            self.added.insert(ip, added);
        }
        Ok(())
    }

    /// Removes the rules of an address, if it had any.
    pub fn remove(&mut self, netns: BorrowedFd<'_>, ip: IpAddr) -> Result<(), HostError> {
        let Some(rules) = self.added.get(&ip) else {
            return Ok(());
        };
        let work = || {
            let netlink = Netlink::routing()?;
            let [to_pod, from_pod] = rules;
            let first = delete(&netlink, to_pod);
            first.and(delete(&netlink, from_pod))
        };
        within(netns, work).map_err(|error| HostError::BranchRules { ip, error })?;
        self.added.remove(&ip);
        Ok(())
    }

    /// Removes the rules of all addresses.
    pub fn remove_all(&mut self, netns: BorrowedFd<'_>) -> Result<(), HostError> {
        let addresses: Vec<_> = self.added.keys().copied().collect();
        let mut first = Ok(());
        for ip in addresses {
            first = first.and(self.remove(netns, ip));
        }
        first
    }
}

/// Adds a rule; says whether it was not there.
fn put(netlink: &Netlink, rule: &[u8]) -> io::Result<bool> {
    match netlink.request(libc::RTM_NEWRULE, EXCLUSIVE, rule) {
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(false),
        done => done.map(|()| true),
    }
}

fn delete(netlink: &Netlink, rule: &[u8]) -> io::Result<()> {
    match netlink.request(libc::RTM_DELRULE, 0, rule) {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        done => done,
    }
}

/// A rule of the AWS network plugin by which what comes from a pod's interface is looked up in a table of the branch.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Branch {
    interface: String,
    priority: u32,
    table: u32,
}

impl Branch {
    /// The branch whose table has a route to just this address over the same interface.
    fn of(netlink: &Netlink, ip: IpAddr) -> io::Result<Option<Self>> {
        let mut header = [0; HEADER];
        header[0] = family(ip);
        let rules = netlink.list(libc::RTM_GETRULE, &header)?;
        let branches: Vec<_> = rules.iter().filter_map(|rule| Self::parse(rule)).collect();
        if branches.is_empty() {
            return Ok(None);
        }
        let routes = netlink.list(libc::RTM_GETROUTE, &header)?;
        let leads = |branch: &Self| {
            let interface = CString::new(branch.interface.as_str()).ok();
            let index = interface.and_then(|name| if_nametoindex(name.as_c_str()).ok());
            index.is_some_and(|index| {
                let mut routes = routes.iter();
                routes.any(|route| is_route(route, branch.table, ip, index))
            })
        };
        Ok(branches.into_iter().find(leads))
    }

    fn parse(rule: &[u8]) -> Option<Self> {
        let (header, attributes) = rule.split_at_checked(HEADER)?;
        let attributes = Attributes(attributes);
        let table = attributes.number(FRA_TABLE);
        let table = table.unwrap_or_else(|| u32::from(header[4]));
        let own = [libc::RT_TABLE_MAIN, libc::RT_TABLE_LOCAL].map(u32::from);
        let leads = header[7] == FR_ACT_TO_TBL && !own.contains(&table);
        leads.then_some(Self {
            interface: attributes.text(FRA_IIFNAME)?.to_string(),
            priority: attributes.number(FRA_PRIORITY).unwrap_or_default(),
            table,
        })
    }

    /// `to <ip> lookup <table> pref 512`.
    fn to_pod(&self, ip: IpAddr) -> Vec<u8> {
        let mut rule = vec![
            family(ip),
            length(ip),
            0,
            0,
            0,
            0,
            0,
            FR_ACT_TO_TBL,
            0,
            0,
            0,
            0,
        ];
        attribute_bytes(&mut rule, FRA_DST, &octets(ip));
        attribute(&mut rule, FRA_PRIORITY, PRIORITY);
        attribute(&mut rule, FRA_TABLE, self.table);
        rule
    }

    /// `iif <interface> lookup local`, just before the rule that sends it to the branch.
    fn out_of_pod(&self, ip: IpAddr) -> Vec<u8> {
        let mut rule = vec![family(ip), 0, 0, 0, 0, 0, 0, FR_ACT_TO_TBL, 0, 0, 0, 0];
        let name = [self.interface.as_bytes(), &[0]].concat();
        attribute_bytes(&mut rule, FRA_IIFNAME, &name);
        attribute(&mut rule, FRA_PRIORITY, self.priority.saturating_sub(1));
        attribute(&mut rule, FRA_TABLE, u32::from(libc::RT_TABLE_LOCAL));
        rule
    }
}

fn is_route(route: &[u8], table: u32, ip: IpAddr, interface: u32) -> bool {
    let Some((header, attributes)) = route.split_at_checked(HEADER) else {
        return false;
    };
    let attributes = Attributes(attributes);
    let of = attributes.number(RTA_TABLE);
    header[1] == length(ip)
        && of.unwrap_or_else(|| u32::from(header[4])) == table
        && attributes.get(RTA_DST) == Some(&octets(ip))
        && attributes.number(RTA_OIF) == Some(interface)
}

fn family(ip: IpAddr) -> u8 {
    match ip {
        IpAddr::V4(_) => libc::AF_INET as u8,
        IpAddr::V6(_) => libc::AF_INET6 as u8,
    }
}

/// The length of the prefix that is just this address.
fn length(ip: IpAddr) -> u8 {
    match ip {
        IpAddr::V4(_) => 32,
        IpAddr::V6(_) => 128,
    }
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}
