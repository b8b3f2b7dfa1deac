//! Network namespaces: telling them apart, entering them for a piece of work, having one to oneself.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::Path;

use nix::fcntl::{Flock, FlockArg};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::stat::fstat;

/// Opens a network namespace by its path, such as `/proc/1/ns/net`.
///
/// # Errors
/// When nothing is there, or something else.
pub fn open(path: &Path) -> io::Result<File> {
    let file = File::open(path)?;
    // SAFETY: the request takes no argument and only tells the kind of a namespace.
    let kind = unsafe { libc::ioctl(file.as_raw_fd(), libc::NS_GET_NSTYPE as _) };
    if kind == libc::CLONE_NEWNET {
        return Ok(file);
    }
    let text = format!("{} is not a network namespace", path.display());
    Err(io::Error::new(io::ErrorKind::InvalidInput, text))
}

/// Makes a network namespace; it goes with the last descriptor of it.
///
/// # Errors
/// When this process may not make one.
pub fn fresh() -> io::Result<File> {
    let make = || {
        unshare(CloneFlags::CLONE_NEWNET)?;
        File::open("/proc/thread-self/ns/net")
    };
    std::thread::scope(|scope| on_thread(scope, make))
}

/// Runs something in a network namespace, on a thread of its own so that no other is ever in the wrong place.
///
/// # Errors
/// When the namespace cannot be entered, or those of `work`.
pub fn within<T: Send>(
    netns: BorrowedFd<'_>,
    work: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    let run = move || {
        setns(netns, CloneFlags::CLONE_NEWNET).map_err(|error| {
            io::Error::new(
                io::Error::from(error).kind(),
                format!("cannot enter the network namespace: {error}"),
            )
        })?;
        work()
    };
    std::thread::scope(|scope| on_thread(scope, run))
}

/// Where a thread went stays its own, so it does nothing else.
fn on_thread<'scope, T: Send + 'scope>(
    scope: &'scope std::thread::Scope<'scope, '_>,
    work: impl FnOnce() -> io::Result<T> + Send + 'scope,
) -> io::Result<T> {
    let thread = std::thread::Builder::new()
        .name("netns".to_string())
        .spawn_scoped(scope, work)?;
    thread.join().unwrap_or_else(|_| {
        let text = "the work in the network namespace panicked";
        Err(io::Error::other(text))
    })
}

/// What tells namespaces apart: device and inode.
///
/// # Errors
/// When the descriptor cannot be examined.
pub fn id(netns: impl AsFd) -> io::Result<(u64, u64)> {
    let status = fstat(netns)?;
    Ok((status.st_dev, status.st_ino))
}

/// Waits until nobody else holds the namespace, in this or any other process, and holds it until dropped.
///
/// # Errors
/// When `/proc` is not there.
pub fn hold(netns: BorrowedFd<'_>) -> io::Result<Flock<File>> {
    // Locks go with an opening of a file, so each holder needs one of its own.
    let file = File::open(format!("/proc/self/fd/{}", netns.as_raw_fd()))?;
    Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, error)| error.into())
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    #[test]
    fn only_a_network_namespace_is_opened_as_one() {
        let own = open(Path::new("/proc/self/ns/net")).unwrap();
        let again = open(Path::new("/proc/thread-self/ns/net")).unwrap();
        assert_eq!(id(&own).unwrap(), id(&again).unwrap());
        for (path, part) in [
            ("/proc/self/ns/mnt", "is not a network namespace"),
            ("/proc/self/status", "is not a network namespace"),
            ("/proc/self/ns/nothing", "No such file"),
        ] {
            let error = open(Path::new(path)).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn a_held_namespace_is_waited_for() {
        let own = open(Path::new("/proc/self/ns/net")).unwrap();
        let held = hold(own.as_fd()).unwrap();
        let (sender, receiver) = mpsc::channel();
        let other = std::thread::spawn(move || {
            let _held = hold(own.as_fd()).unwrap();
            sender.send(()).unwrap();
        });
        let early = receiver.recv_timeout(Duration::from_millis(100));
        assert!(early.is_err());
        drop(held);
        receiver.recv_timeout(Duration::from_secs(10)).unwrap();
        other.join().unwrap();
    }

    #[test]
    fn what_is_no_namespace_is_not_entered() {
        let file = File::open("/proc/self/status").unwrap();
        let refused = within(file.as_fd(), || Ok(())).unwrap_err().to_string();
        assert!(refused.starts_with("cannot enter the network namespace: "));
    }
}
