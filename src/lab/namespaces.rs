//! A pod's or node's namespaces: made on a thread of their own, kept by file descriptor, entered on demand.

use std::fs::File;
use std::io::{Error, Result};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::family::{Addresses, IpFamily};

/// Files that a namespace shows instead of the machine's own.
#[derive(Clone, Debug, Default)]
pub struct Etc {
    /// Name in `/etc` and content.
    pub files: Vec<(&'static str, String)>,
}

impl Etc {
    /// Name resolution through `servers` with `search`, and `name` in the hosts file.
    pub fn resolver(servers: &Addresses, search: &str, name: &str, addresses: &Addresses) -> Self {
        let mut hosts = "127.0.0.1\tlocalhost\n::1\tlocalhost\n".to_owned();
        for address in addresses.iter() {
            hosts.push_str(&format!("{address}\t{name}\n"));
        }
        let mut resolv = String::new();
        for server in servers.iter() {
            resolv.push_str(&format!("nameserver {server}\n"));
        }
        if !search.is_empty() {
            resolv.push_str(&format!("search {search}\noptions ndots:5\n"));
        }
        Self {
            files: vec![
                ("resolv.conf", resolv),
                ("hosts", hosts),
                (
                    "nsswitch.conf",
                    "passwd: files\ngroup: files\nhosts: files dns\n".to_owned(),
                ),
            ],
        }
    }
}

/// A network and a mount namespace that live as long as this value or a process in them.
#[derive(Clone, Debug)]
pub struct Namespaces {
    network: Arc<OwnedFd>,
    mounts: Arc<OwnedFd>,
}

impl Namespaces {
    /// Makes fresh namespaces; `folder` keeps the files of `etc`.
    ///
    /// # Errors
    /// What the kernel or the file system says, with the step that failed.
    pub fn create(folder: &Path, etc: &Etc, families: IpFamily) -> Result<Self> {
        for (name, content) in &etc.files {
            std::fs::write(folder.join(name), content)?;
        }
        let names: Vec<&'static str> = etc.files.iter().map(|(name, _)| *name).collect();
        on_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS)?;
            private_mounts()?;
            hide_run(&names)?;
            for name in &names {
                match std::fs::canonicalize(Path::new("/etc").join(name)) {
                    Ok(target) => bind(&folder.join(name), &target)?,
                    // Without this file the C library asks files, then DNS, as wanted.
                    Err(_) if *name == "nsswitch.conf" => {}
                    Err(e) => return Err(step(&format!("/etc/{name}"), &e)),
                }
            }
            set("net/ipv4/conf/all/rp_filter", "0")?;
            set("net/ipv4/conf/default/rp_filter", "0")?;
            if families.has_ipv6() {
                allow_ipv6()?;
            } else {
                // Where IPv6 is compiled out there is nothing to switch off.
                let _ = switch_ipv6("1");
            }
            super::links::Links::open()?.up("lo")?;
            Ok(Self {
                network: Arc::new(File::open("/proc/thread-self/ns/net")?.into()),
                mounts: Arc::new(File::open("/proc/thread-self/ns/mnt")?.into()),
            })
        })
    }

    pub fn network(&self) -> BorrowedFd<'_> {
        self.network.as_fd()
    }

    /// Runs `work` on a thread inside the network namespace and waits for it.
    ///
    /// # Errors
    /// Those of `work`, and what the kernel says.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        on_thread(|| {
            setns(self.network(), CloneFlags::CLONE_NEWNET)?;
            work()
        })
    }

    /// Runs `work` on a thread inside both namespaces; what it starts stays in them.
    ///
    /// # Errors
    /// Those of `work`, and what the kernel says.
    pub fn run_inside<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        on_thread(|| {
            // A mount namespace can only be entered by a thread that shares its root with no other.
            unshare(CloneFlags::CLONE_FS)?;
            setns(self.network(), CloneFlags::CLONE_NEWNET)?;
            setns(self.mounts.as_fd(), CloneFlags::CLONE_NEWNS)?;
            work()
        })
    }

    /// Ends every process that is in the network namespace.
    pub fn kill_all(&self) {
        let Ok(own) = nix::sys::stat::fstat(self.network()) else {
            return;
        };
        // Where /proc is the machine's, its numbers mean nothing here.
        let shown = std::fs::read_link("/proc/self").unwrap_or_default();
        if shown.to_str() != Some(std::process::id().to_string().as_str()) {
            return;
        }
        for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Some(pid) = entry
                .file_name()
                .to_str()
                .and_then(|n| n.parse::<i32>().ok())
            else {
                continue;
            };
            let found = std::fs::metadata(entry.path().join("ns/net"));
            if found.is_ok_and(|f| (f.dev(), f.ino()) == (own.st_dev, own.st_ino)) {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
    }

    /// Lets this namespace pass packets on.
    pub fn forward(&self, families: IpFamily) -> Result<()> {
        self.run(|| {
            set("net/ipv4/ip_forward", "1")?;
            if families.has_ipv6() {
                set("net/ipv6/conf/all/forwarding", "1")?;
            }
            Ok(())
        })
    }
}

/// Keeps mounts of this namespace to itself.
pub fn private_mounts() -> Result<()> {
    let flags = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, flags, None::<&str>)
        .map_err(|e| step("making mounts private", &e.into()))
}

/// Puts an empty `/run` over the machine's, so that no resolver or name service cache answers by its socket.
fn hide_run(etc: &[&str]) -> Result<()> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(
        Some("tmpfs"),
        "/run",
        Some("tmpfs"),
        flags,
        Some("mode=755,size=4m"),
    )
    .map_err(|e| step("hiding /run", &e.into()))?;
    for name in etc {
        // resolv.conf is often a link into /run, which now leads nowhere.
        let path = Path::new("/etc").join(name);
        if let Ok(link) = std::fs::read_link(&path) {
            let target = Path::new("/etc").join(link);
            if !target.exists() {
                if let Some(folder) = target.parent() {
                    std::fs::create_dir_all(folder).map_err(|e| step("/etc link", &e))?;
                }
                File::create(&target).map_err(|e| step(&target.display().to_string(), &e))?;
            }
        }
    }
    Ok(())
}

fn bind(source: &Path, target: &Path) -> Result<()> {
    mount(
        Some(source),
        target,
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    )
    .map_err(|e| step(&format!("mounting over {}", target.display()), &e.into()))
}

/// Lets the calling thread's network namespace have IPv6 at once, whatever the machine's defaults are.
///
/// # Errors
/// When the kernel has none, with the remedy.
pub fn allow_ipv6() -> Result<()> {
    switch_ipv6("0").map_err(|e| {
        let text = format!(
            "this kernel has no IPv6 ({e}); start it without ipv6.disable=1, or use --ip-family ipv4"
        );
        Error::new(e.kind(), text)
    })?;
    for scope in ["all", "default"] {
        // Before its link-local address is known to be unique, a node asks for no neighbour: seconds for each.
        set(&format!("net/ipv6/conf/{scope}/accept_dad"), "0")?;
    }
    Ok(())
}

fn switch_ipv6(disable: &str) -> Result<()> {
    set("net/ipv6/conf/all/disable_ipv6", disable)?;
    set("net/ipv6/conf/default/disable_ipv6", disable)
}

/// Writes a kernel setting of the calling thread's namespaces.
pub fn set(name: &str, value: &str) -> Result<()> {
    std::fs::write(Path::new("/proc/sys").join(name), value).map_err(|e| step(name, &e))
}

fn step(what: &str, reason: &Error) -> Error {
    Error::new(reason.kind(), format!("{what}: {reason}"))
}

/// Runs `work` on a thread of its own, whose namespaces it may change.
fn on_thread<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        std::thread::Builder::new()
            .name("namespace".into())
            .spawn_scoped(scope, work)?
            .join()
            .map_err(|_| Error::other("a thread in a namespace panicked"))?
    })
}
