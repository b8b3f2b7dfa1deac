//! nftables: running its program, and asking the kernel which tables there are without it.

pub mod listing;
pub mod render;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::process::Output;
use std::sync::{Mutex, PoisonError};

use thiserror::Error;

use crate::netlink::{Attributes, NETFILTER_HEADER, Netlink, netfilter_header};
use crate::netns;
use crate::program::{Place, complaint, execute};

const PROGRAM: &str = "nft";

/// The family of tables that hold rules for IPv4 and IPv6 alike, NFPROTO_INET.
pub const INET: u8 = 1;

// linux/netfilter/nfnetlink.h and nf_tables.h.
const GET_TABLES: u16 = (10 << 8) | 1;
const TABLE_NAME: u16 = 1;

/// How many reference listings are kept; virtual interfaces make more than the few variants.
const REFERENCES: usize = 64;

/// Why tables could not be read or changed.
#[derive(Debug, Error)]
pub enum NftError {
    #[error(
        "nft cannot be run: {0}; install nftables (apt-get install nftables), or have the rules written by iptables"
    )]
    Run(io::Error),
    #[error("nft failed: {0}")]
    Failed(String),
    #[error(
        "nft did not take the rules: {0}; the kernel needs the netfilter modules nf_tables, nft_chain_nat, nft_redir, \
         nft_ct and nft_reject_inet, and the process the capabilities NET_ADMIN and SYS_ADMIN"
    )]
    Refused(String),
    #[error("the tables of nftables cannot be listed: {0}")]
    Tables(io::Error),
    #[error("no network namespace can be made to try the rules in: {0}")]
    Namespace(io::Error),
}

/// Changes the tables of a namespace: everything or nothing of the script, at once.
///
/// # Errors
/// What nft says against it.
pub fn apply(place: Place<'_>, script: &str) -> Result<(), NftError> {
    let output = execute(PROGRAM, &["-f", "-"], place, Some(script)).map_err(NftError::Run)?;
    outcome(output).map(|_| ()).map_err(NftError::Refused)
}

/// What nft prints for some arguments.
///
/// # Errors
/// What nft says against them.
pub fn print(place: Place<'_>, arguments: &[&str]) -> Result<String, NftError> {
    let output = execute(PROGRAM, arguments, place, None).map_err(NftError::Run)?;
    outcome(output).map_err(NftError::Failed)
}

fn outcome(output: Output) -> Result<String, String> {
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(complaint(&output))
}

/// What nft prints of a script's tables once the kernel has them, found out in a namespace nobody else is in.
///
/// Each nft prints rules in ways of its own, so what a pod holds can only be compared with this.
///
/// # Errors
/// What nft says against the script.
pub fn reference(script: &str, arguments: &[&str]) -> Result<String, NftError> {
    static KNOWN: Mutex<BTreeMap<String, String>> = Mutex::new(BTreeMap::new());
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    let key = format!("{}\n{script}", arguments.join(" "));
    if let Some(text) = known.get(&key) {
        return Ok(text.clone());
    }
    let scratch = netns::fresh().map_err(NftError::Namespace)?;
    let place = Place::Pod(scratch.as_fd());
    apply(place, script)?;
    let text = print(place, arguments)?;
    if known.len() >= REFERENCES {
        known.clear();
    }
    known.insert(key, text.clone());
    Ok(text)
}

/// The family and name of every table that a namespace's nftables hold; none where the kernel has no nftables.
///
/// # Errors
/// When the kernel does not tell.
pub fn tables(netns: BorrowedFd<'_>) -> Result<Vec<(u8, String)>, NftError> {
    const WITHOUT: [i32; 3] = [libc::EINVAL, libc::EOPNOTSUPP, libc::EPROTONOSUPPORT];
    let list = || Netlink::netfilter()?.list(GET_TABLES, &netfilter_header(0));
    match netns::within(netns, list) {
        Ok(list) => Ok(list.iter().filter_map(|body| name(body)).collect()),
        Err(error)
            if error
                .raw_os_error()
                .is_some_and(|code| WITHOUT.contains(&code)) =>
        {
            Ok(Vec::new())
        }
        Err(error) => Err(NftError::Tables(error)),
    }
}

fn name(body: &[u8]) -> Option<(u8, String)> {
    let (header, attributes) = body.split_at_checked(NETFILTER_HEADER)?;
    let name = Attributes(attributes).text(TABLE_NAME)?;
    Some((header[0], name.to_string()))
}
