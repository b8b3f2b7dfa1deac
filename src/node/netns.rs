//! Network namespaces of pods: entered only to make sockets, which then stay in them.

use std::cell::{Cell, OnceCell};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::rc::Rc;

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

    /// Enters the namespace that the thread is in, which only shows that it may.
    ///
    /// # Errors
    /// When it may not.
    pub fn probe(&self) -> io::Result<()> {
        enter(self.file.as_fd())
    }

    /// Runs something in the namespace, on this thread, and returns to where the thread was.
    ///
    /// `work` must not wait for anything but the kernel. If the thread cannot return, the process ends: a thread in a
    /// foreign namespace would send one pod's traffic as another's. Where a thread was when it first did this is where
    /// it belongs; it must not move by itself.
    ///
    /// # Errors
    /// Those of `work`, or when the namespace cannot be entered.
    pub fn run<T>(&self, work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let stay = Stay::begin()?;
        if stay.0.id == self.id {
            return work();
        }
        enter(self.file.as_fd()).map_err(|error| {
            io::Error::new(
                error.kind(),
                format!("cannot enter the pod's network namespace: {error}"),
            )
        })?;
        // Only now is there a way back to go.
        let _home = GoHome(stay);
        work()
    }
}

thread_local! {
    /// The namespace that the thread belongs to, opened when it first leaves it.
    static HOME: OnceCell<Rc<PodNetns>> = const { OnceCell::new() };
    static AWAY: Cell<bool> = const { Cell::new(false) };
}

/// A thread's stay in a pod; one at a time.
struct Stay(Rc<PodNetns>);

impl Stay {
    fn begin() -> io::Result<Self> {
        if AWAY.get() {
            return Err(io::Error::other(
                "a pod's network namespace is not entered from within another's",
            ));
        }
        let home = HOME.with(|home| match home.get() {
            Some(home) => Ok::<_, io::Error>(home.clone()),
            None => {
                let opened = PodNetns::current()?;
                Ok(home.get_or_init(|| Rc::new(opened)).clone())
            }
        })?;
        AWAY.set(true);
        Ok(Self(home))
    }
}

impl Drop for Stay {
    fn drop(&mut self) {
        AWAY.set(false);
    }
}

/// Brings the thread back when dropped, also by a panic.
struct GoHome(Stay);

impl Drop for GoHome {
    fn drop(&mut self) {
        if let Err(error) = enter(self.0.0.as_fd()) {
            eprintln!("warren: a thread cannot leave a pod's network namespace: {error}");
            std::process::abort();
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::testing::{namespace, skip};

    #[test]
    fn work_happens_in_the_pod_and_the_thread_comes_back() {
        let Some(pod) = namespace() else {
            return skip("work_happens_in_the_pod_and_the_thread_comes_back");
        };
        let home = PodNetns::current().unwrap().id();
        let inside = pod.run(|| Ok(PodNetns::current()?.id())).unwrap();
        assert_eq!(inside, pod.id());
        assert_ne!(inside, home);
        let failed = pod.run(|| Err::<(), _>(io::ErrorKind::AddrInUse.into()));
        assert_eq!(failed.unwrap_err().kind(), io::ErrorKind::AddrInUse);
        assert_eq!(PodNetns::current().unwrap().id(), home);
    }

    #[test]
    fn a_panic_does_not_leave_the_thread_in_the_pod() {
        let Some(pod) = namespace() else {
            return skip("a_panic_does_not_leave_the_thread_in_the_pod");
        };
        let home = PodNetns::current().unwrap().id();
        let work = || pod.run(|| -> io::Result<()> { panic!("in the pod") });
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).is_err());
        assert_eq!(PodNetns::current().unwrap().id(), home);
    }

    #[test]
    fn a_pod_is_not_entered_from_within_another() {
        let (Some(pod), Some(other)) = (namespace(), namespace()) else {
            return skip("a_pod_is_not_entered_from_within_another");
        };
        let home = PodNetns::current().unwrap().id();
        let nested = pod.run(|| {
            assert!(other.run(|| Ok(())).is_err());
            Ok(PodNetns::current()?.id())
        });
        assert_eq!(nested.unwrap(), pod.id());
        assert_eq!(PodNetns::current().unwrap().id(), home);
        other.run(|| Ok(())).unwrap();
    }

    #[test]
    fn what_is_no_namespace_is_not_entered() {
        let file = File::open("/proc/self/status").unwrap();
        let error = PodNetns::new(file.into())
            .unwrap()
            .run(|| Ok(()))
            .unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("cannot enter the pod's network namespace: "),
            "{error}"
        );
    }
}
