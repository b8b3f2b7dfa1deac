//! Network namespaces of pods: entered only to make sockets, which then stay in them.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use nix::sched::{CloneFlags, setns};

/// A pod's network namespace, held open.
#[derive(Debug)]
pub struct PodNetns {
    file: File,
    id: (u64, u64),
}

impl PodNetns {
    /// Takes over a descriptor of the namespace.
    ///
    /// # Errors
    /// When it cannot be examined.
    pub fn new(descriptor: OwnedFd) -> io::Result<Self> {
        let file = File::from(descriptor);
        let metadata = file.metadata()?;
        Ok(Self {
            file,
            id: (metadata.dev(), metadata.ino()),
        })
    }

    /// The namespace of the calling thread.
    ///
    /// # Errors
    /// When `/proc` is not there.
    pub fn current() -> io::Result<Self> {
        Self::new(File::open("/proc/thread-self/ns/net")?.into())
    }

    /// What tells namespaces apart: device and inode.
    pub fn id(&self) -> (u64, u64) {
        self.id
    }

    /// Runs something in the namespace, on this thread, and returns to where the thread was.
    ///
    /// `work` must not wait for anything but the kernel. If the thread cannot return, the process ends: a thread in a
    /// foreign namespace would send one pod's traffic as another's.
    ///
    /// # Errors
    /// Those of `work`, or when the namespace cannot be entered.
    pub fn run<T>(&self, work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let home = File::open("/proc/thread-self/ns/net")?;
        enter(self.file.as_fd()).map_err(|error| {
            io::Error::other(format!("cannot enter the pod's network namespace: {error}"))
        })?;
        let result = work();
        if let Err(error) = enter(home.as_fd()) {
            eprintln!("warren: a thread cannot leave a pod's network namespace: {error}");
            std::process::abort();
        }
        result
    }
}

impl AsFd for PodNetns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn enter(namespace: BorrowedFd<'_>) -> io::Result<()> {
    Ok(setns(namespace, CloneFlags::CLONE_NEWNET)?)
}
