//! Finding the network namespaces of pods that already run, through the processes in `/proc`.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use nix::ifaddrs::getifaddrs;

use crate::netns::{id, open, within};

/// A pod whose namespace is looked for.
#[derive(Clone, Debug)]
pub struct Wanted {
    pub uid: String,
    /// Without an address no namespace is known to be the pod's.
    pub ips: Vec<IpAddr>,
}

/// A pod's namespace.
#[derive(Debug)]
pub struct Found {
    pub netns: File,
    /// The path it was opened by.
    pub path: PathBuf,
    /// When the process that it was found through began, in clock ticks since boot.
    began: u64,
}

/// Looks for the namespaces of pods; those of `foreign` (device and inode), such as the node's, are never taken.
///
/// A process counts as a pod's if its control group names the pod, and its namespace as the pod's if it holds one of
/// the pod's addresses. Of two namespaces the one of the older process wins.
///
/// # Errors
/// When `proc` cannot be listed. Processes that cannot be examined are passed over.
pub fn scan(
    proc: &Path,
    wanted: &[Wanted],
    foreign: &HashSet<(u64, u64)>,
) -> io::Result<HashMap<String, Found>> {
    let wanted: HashMap<_, _> = wanted.iter().map(|pod| (pod.uid.as_str(), pod)).collect();
    let mut found: HashMap<String, Found> = HashMap::new();
    let mut claimed = foreign.clone();
    if wanted.is_empty() {
        return Ok(found);
    }
    for entry in fs::read_dir(proc)? {
        let Ok(entry) = entry else { continue };
        let name = entry.file_name();
        if !name.as_encoded_bytes().iter().all(u8::is_ascii_digit) {
            continue;
        }
        match examine(&entry.path(), &wanted, &mut claimed) {
            Ok(Some((uid, candidate))) => {
                let older = found
                    .get(&uid)
                    .is_none_or(|known| candidate.began < known.began);
                if older {
                    found.insert(uid, candidate);
                }
            }
            Ok(None) => {}
            Err(error) => tracing::debug!("{} is passed over: {error}", entry.path().display()),
        }
    }
    Ok(found)
}

/// The pod that a process belongs to, with its namespace, if it is one of the wanted.
fn examine(
    process: &Path,
    wanted: &HashMap<&str, &Wanted>,
    claimed: &mut HashSet<(u64, u64)>,
) -> io::Result<Option<(String, Found)>> {
    let path = process.join("ns/net");
    let began = start_time(&fs::read_to_string(process.join("stat"))?)
        .ok_or_else(|| io::Error::other("its start time cannot be read"))?;
    let groups = fs::read_to_string(process.join("cgroup"))?;
    let uid = match pod_of(&groups) {
        Ok(Some(uid)) => uid,
        Ok(None) => return Ok(None),
        Err(reason) => return Err(io::Error::other(reason)),
    };
    let Some(pod) = wanted.get(uid.as_str()) else {
        return Ok(None);
    };
    let netns = open(&path)?;
    let identity = id(&netns)?;
    // Claimed only when it is sure whose it is: a foreign process in it must not hide the rightful one.
    if claimed.contains(&identity) || !holds_any(&netns, &pod.ips)? {
        return Ok(None);
    }
    claimed.insert(identity);
    Ok(Some((uid, Found { netns, path, began })))
}

/// Whether a namespace has one of the addresses on any of its interfaces.
///
/// # Errors
/// When it cannot be entered.
pub fn holds_any(netns: &File, ips: &[IpAddr]) -> io::Result<bool> {
    if ips.is_empty() {
        return Ok(false);
    }
    within(netns.as_fd(), || {
        let held = getifaddrs()?.filter_map(|interface| {
            let address = interface.address?;
            let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
            v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
        });
        let ips: Vec<_> = ips.iter().map(IpAddr::to_canonical).collect();
        Ok(held
            .map(|held| held.to_canonical())
            .any(|held| ips.contains(&held)))
    })
}

/// The start time in `/proc/<pid>/stat`: field 22, counted behind the command, which may hold anything (proc(5)).
fn start_time(stat: &str) -> Option<u64> {
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// The pod that control groups name, in `/proc/<pid>/cgroup`.
///
/// # Errors
/// When they name two pods or two containers.
fn pod_of(groups: &str) -> Result<Option<String>, &'static str> {
    let (mut pod, mut container) = (None, None);
    for line in groups.lines() {
        let Some(path) = line.splitn(3, ':').nth(2) else {
            continue;
        };
        let Some((uid, id)) = pod_in(path.strip_suffix(".scope").unwrap_or(path)) else {
            continue;
        };
        if pod.as_ref().is_some_and(|known| *known != uid) {
            return Err("its control groups name two pods");
        }
        if container.as_ref().is_some_and(|known| *known != id) {
            return Err("its control groups name two containers");
        }
        (pod, container) = (Some(uid), Some(id));
    }
    Ok(pod)
}

/// The UID of a pod and the container's ID in the path of a control group, such as
/// `/kubepods/besteffort/pod2c48913c-b29f-11e7-9350-020968147796/9bca8d63` or
/// `/kubepods.slice/kubepods-pod2c48913c_b29f_11e7_9350_020968147796.slice/cri-containerd-9bca8d63`.
fn pod_in(path: &str) -> Option<(String, &str)> {
    let at = path
        .match_indices("pod")
        .find_map(|(at, _)| uid_at(path, at + 3).map(|uid| (at, uid)));
    let (at, (uid, end)) = at?;
    let punctuated = at > 0 && path.as_bytes()[at - 1].is_ascii_punctuation();
    let rest = path.get(end..)?;
    let container = rest.rsplit(|c: char| c.is_ascii_punctuation()).next()?;
    let separated = rest.starts_with(|c: char| c.is_ascii_punctuation());
    (punctuated && separated && !container.is_empty()).then_some((uid, container))
}

/// A UID whose five groups of hexadecimal digits may be joined by any punctuation or none, and where it ends.
fn uid_at(path: &str, start: usize) -> Option<(String, usize)> {
    let bytes = path.as_bytes();
    let mut at = start;
    let mut groups = Vec::with_capacity(5);
    for (index, length) in [8, 4, 4, 4, 12].into_iter().enumerate() {
        if index > 0 && bytes.get(at).is_some_and(u8::is_ascii_punctuation) {
            at += 1;
        }
        let group = path.get(at..at + length)?;
        if !group.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return None;
        }
        groups.push(group);
        at += length;
    }
    Some((groups.join("-"), at))
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "2c48913c-b29f-11e7-9350-020968147796";
    const UNDERSCORED: &str = "2c48913c_b29f_11e7_9350_020968147796";

    #[test]
    fn control_groups_name_the_pod() {
        let other = "3c48913c-b29f-11e7-9350-020968147796";
        for (groups, expected) in [
            (
                format!(
                    "1:memory:/kubepods/besteffort/pod{UID}/9bca8d63d5fa610783847915bcff0ecac1273e5b4bed3f6fa1b07350e0135961\n"
                ),
                Ok(Some(UID.to_string())),
            ),
            (
                format!(
                    "0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{UNDERSCORED}.slice/cri-containerd-9bca.scope\n"
                ),
                Ok(Some(UID.to_string())),
            ),
            (
                format!("0::/kubepods.slice/kubepods-pod{UNDERSCORED}.slice:cri-containerd:9bca\n"),
                Ok(Some(UID.to_string())),
            ),
            (
                format!("0::/kubepods/pod{}/9bca\n", UID.replace('-', "")),
                Ok(Some(UID.to_string())),
            ),
            // Nobody's, or nobody's by its name.
            ("0::/\n".to_string(), Ok(None)),
            ("0::/system.slice/podman.service\n".to_string(), Ok(None)),
            (format!("0::/kubepods/pod{UID}\n"), Ok(None)),
            (format!("0::/kubepods/pod{UID}/\n"), Ok(None)),
            ("0::/kubepods.slice/crio-9bca.scope\n".to_string(), Ok(None)),
            (format!("0::/kubepods/{UID}/9bca\n"), Ok(None)),
            ("rubbish".to_string(), Ok(None)),
            (String::new(), Ok(None)),
            // The same said by several hierarchies, and contradictions.
            (
                format!("2:cpu:/kubepods/pod{UID}/9bca\n1:memory:/kubepods/pod{UID}/9bca\n0::/\n"),
                Ok(Some(UID.to_string())),
            ),
            (
                format!("2:cpu:/kubepods/pod{UID}/9bca\n1:memory:/kubepods/pod{UID}/77ca\n"),
                Err("its control groups name two containers"),
            ),
            (
                format!("2:cpu:/kubepods/pod{UID}/9bca\n1:memory:/kubepods/pod{other}/9bca\n"),
                Err("its control groups name two pods"),
            ),
        ] {
            assert_eq!(pod_of(&groups), expected, "{groups}");
        }
    }

    #[test]
    fn the_start_time_stands_behind_whatever_the_command_is_called() {
        let fields: Vec<_> = (3..=52).map(|field| field.to_string()).collect();
        let stat = format!("77 (a) b (c)) {}", fields.join(" "));
        assert_eq!(start_time(&stat), Some(22));
        assert_eq!(start_time("77 (a) S 1 2 3"), None);
        assert_eq!(start_time("rubbish"), None);
    }
}
