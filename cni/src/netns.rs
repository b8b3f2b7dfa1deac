//! Entering a network namespace for a piece of work.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use nix::sched::{CloneFlags, setns};

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
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("netns".to_string())
            .spawn_scoped(scope, run)?;
        thread.join().unwrap_or_else(|_| {
            Err(io::Error::other(
                "the work in the network namespace panicked",
            ))
        })
    })
}

/// Opens the network namespace of a process.
///
/// # Errors
/// When the process is gone.
pub fn of_process(pid: u32) -> io::Result<File> {
    File::open(format!("/proc/{pid}/ns/net"))
}

/// What tells namespaces apart: device and inode.
///
/// # Errors
/// When the descriptor cannot be examined.
pub fn id(netns: impl AsFd) -> io::Result<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    let metadata = File::from(netns.as_fd().try_clone_to_owned()?).metadata()?;
    Ok((metadata.dev(), metadata.ino()))
}
