//! Which backend a node's rules are written in.

use std::os::fd::BorrowedFd;
use std::time::Duration;

use crate::host::{SET_V4, SET_V6, ipset};
use crate::netns::within;
use crate::program::{Place, complaint, execute_within};
use crate::rules::{Backend, Family};

/// How long nft may take to say that it works.
const LIMIT: Duration = Duration::from_secs(5);
/// What an nft says that was built without JSON.
const WITHOUT_JSON: &str = "JSON support not compiled-in";

/// A backend, and what an operator should hear about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    pub backend: Backend,
    pub note: Option<String>,
}

/// The backend to use from now on (node-agent.md §6.3).
///
/// Where sets of ipset say that pods are captured by iptables already, nftables waits until the node restarts: two
/// backends on one node would each miss what the other holds.
pub fn choose(host: BorrowedFd<'_>, nftables: bool) -> Choice {
    if !nftables {
        return Choice {
            backend: Backend::Iptables,
            note: None,
        };
    }
    let mut notes = Vec::new();
    for (set, family) in [(SET_V4, Family::V4), (SET_V6, Family::V6)] {
        match within(host, || ipset::read(set, family)) {
            Ok(Some(_)) => {
                return iptables(format!(
                    "nftables was asked for, but the ipset {set} shows that this node uses iptables: staying with \
                     iptables until the node restarts"
                ));
            }
            Ok(None) => {}
            Err(error) => notes.push(format!("cannot look for the ipset {set}: {error}")),
        }
    }
    match execute_within(
        LIMIT,
        "nft",
        &["--json", "list", "tables"],
        Place::Host(host),
    ) {
        Ok(output) => {
            let said = [&output.stdout[..], &output.stderr[..]].concat();
            if String::from_utf8_lossy(&said).contains(WITHOUT_JSON) {
                return iptables(
                    "nftables was asked for, but this nft was built without JSON: using iptables"
                        .to_string(),
                );
            }
            if !output.status.success() {
                notes.push(format!(
                    "nft --json list tables failed: {}",
                    complaint(&output)
                ));
            }
        }
        Err(error) => notes.push(format!(
            "nft cannot be run: {error}; install nftables (apt-get install nftables)"
        )),
    }
    Choice {
        backend: Backend::Nftables,
        note: (!notes.is_empty()).then(|| notes.join("; ")),
    }
}

fn iptables(note: String) -> Choice {
    Choice {
        backend: Backend::Iptables,
        note: Some(note),
    }
}
