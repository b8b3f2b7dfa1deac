//! What the kernel does not take back by itself when a test is killed: folders and control groups.
//!
//! Both bear the node's name, which says whose they are; each node that starts removes those of processes that are no more.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const PREFIX: &str = "wrn-cri-";
/// How long the kernel may keep a control group after its last process.
const SOON: Duration = Duration::from_secs(10);

/// A name that no other node on this machine has, and that tells its process.
pub fn unique(name: &str) -> String {
    let pid = std::process::id();
    let started = started(pid).expect("/proc must be there");
    format!("{PREFIX}{pid}-{started}-{name}")
}

/// A node's folder.
pub fn folder(node: &str) -> PathBuf {
    std::env::temp_dir().join(node)
}

/// A node's control groups, one in each hierarchy at most.
pub fn control_groups(node: &str) -> Vec<PathBuf> {
    let groups = hierarchies().into_iter().map(|root| root.join(node));
    groups.filter(|group| group.exists()).collect()
}

/// Removes everything that bears a node's name; no process may be in its groups any more.
pub fn remove(node: &str) -> io::Result<()> {
    for group in control_groups(node) {
        remove_group(&group)?;
    }
    match fs::remove_dir_all(folder(node)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Removes what nodes of killed processes left.
pub fn sweep() {
    let mut places = hierarchies();
    places.push(std::env::temp_dir());
    for place in places {
        for entry in fs::read_dir(place).into_iter().flatten().flatten() {
            let name = entry.file_name();
            if let Some(name) = name.to_str().filter(|name| is_orphan(name)) {
                // Another test may be doing the same.
                let _ = remove(name);
            }
        }
    }
}

fn is_orphan(name: &str) -> bool {
    let Some(owner) = name.strip_prefix(PREFIX) else {
        return false;
    };
    let mut parts = owner.splitn(3, '-').map(str::parse::<u64>);
    match (parts.next(), parts.next()) {
        (Some(Ok(pid)), Some(Ok(since))) => {
            u32::try_from(pid).ok().and_then(started) != Some(since)
        }
        _ => false,
    }
}

/// When a process started, in the kernel's ticks; none if it is not there.
fn started(pid: u32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the program's name, which may hold anything.
    let (_, fields) = text.rsplit_once(')')?;
    fields.split_whitespace().nth(19)?.parse().ok()
}

/// Where control groups are mounted.
fn hierarchies() -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let mounts = mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let (place, kind) = (fields.next()?, fields.next()?);
        kind.starts_with("cgroup").then(|| PathBuf::from(place))
    });
    mounts.collect()
}

/// Removes a control group and those below it.
pub fn remove_group(group: &Path) -> io::Result<()> {
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_group(&entry.path())?;
        }
    }
    let deadline = Instant::now() + SOON;
    loop {
        match fs::remove_dir(group) {
            Err(error)
                if error.kind() == io::ErrorKind::ResourceBusy && Instant::now() < deadline =>
            {
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => return Ok(()),
        }
    }
}
