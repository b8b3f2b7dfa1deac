//! The namespaces around a whole lab, and the two small processes that hold them.
//!
//! `hold` leaves the machine's namespaces and starts `init`, the first process of the new PID
//! namespace; `init` starts the lab itself. When `init` ends, by whatever signal, the kernel ends every
//! process of the lab, and with the last of them its network and its mounts are gone.

use std::fs::File;
use std::io::{BufReader, Error};
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{getgid, getppid, getuid, setsid};

use super::namespaces::private_mounts;
use super::progress::Progress;
use super::state::StateDir;

const THIS_PROGRAM: &str = "/proc/self/exe";

/// How often a caller that waits for a lab is asked whether it still wants to.
const LOOK: Duration = Duration::from_millis(50);

/// A lab that is coming up or running.
#[derive(Debug)]
pub struct Launched {
    holder: Child,
    says: Receiver<Progress>,
}

/// Starts a lab on the folder that `lock` belongs to. A lab that is not `detached` ends with the calling thread.
///
/// # Errors
/// When the process cannot be started.
pub fn launch(dir: &StateDir, lock: File, detached: bool) -> anyhow::Result<Launched> {
    let log = File::create(dir.join("lab.log"))?;
    let mut command = Command::new(THIS_PROGRAM);
    command.args(["lab", "hold", "--state"]).arg(dir.path());
    if !detached {
        command.args(["--parent", &std::process::id().to_string()]);
    }
    let mut holder = command
        .stdin(Stdio::from(lock))
        .stdout(Stdio::piped())
        .stderr(log)
        .spawn()
        .context("cannot start the lab's process")?;
    let pipe = holder.stdout.take().context("no pipe from the lab")?;
    let (sender, says) = channel();
    std::thread::spawn(move || {
        let mut pipe = BufReader::new(pipe);
        while let Some(line) = Progress::next(&mut pipe) {
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    Ok(Launched { holder, says })
}

impl Launched {
    /// Passes what the lab says to `show` until it is ready, unless the caller does not want it any more.
    ///
    /// # Errors
    /// The sentence with which the lab gave up.
    pub fn wait_ready(
        &mut self,
        mut unwanted: impl FnMut() -> anyhow::Result<bool>,
        mut show: impl FnMut(&str),
    ) -> anyhow::Result<()> {
        loop {
            match self.says.recv_timeout(LOOK) {
                Ok(Progress::Step(text)) => show(&text),
                Ok(Progress::Ready) => return Ok(()),
                Ok(Progress::Failed(reason)) => bail!(reason),
                Err(RecvTimeoutError::Timeout) if unwanted()? => bail!("interrupted"),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => bail!("the lab ended while it came up"),
            }
        }
    }

    /// Waits for the end of the lab.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn wait(&mut self) -> std::io::Result<()> {
        self.holder.wait().map(|_| ())
    }

    /// Whether the lab has ended.
    pub fn has_ended(&mut self) -> bool {
        !matches!(self.holder.try_wait(), Ok(None))
    }

    /// Ends the lab at once.
    pub fn kill(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

/// `warren lab hold`: makes the namespaces, starts `init` in them and waits for its end. Ends with `parent`.
///
/// # Errors
/// One sentence with the remedy when the kernel refuses.
pub fn hold(dir: &StateDir, parent: Option<i32>) -> anyhow::Result<ExitCode> {
    if let Some(parent) = parent {
        set_pdeathsig(Signal::SIGKILL)?;
        if getppid().as_raw() != parent {
            bail!("the command that started the lab is gone");
        }
    }
    // The command that started this one keeps signals back, and that is inherited.
    SigSet::all().thread_unblock()?;
    let _ = setsid();
    if let Err(reason) = enter_namespaces() {
        Progress::Failed(reason.to_string()).tell();
        return Ok(ExitCode::FAILURE);
    }
    let status = Command::new(THIS_PROGRAM)
        .args(["lab", "init", "--state"])
        .arg(dir.path())
        .status()
        .context("cannot start the lab's first process")?;
    Ok(if status.success() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn enter_namespaces() -> anyhow::Result<()> {
    let own = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWIPC;
    let (uid, gid) = (getuid(), getgid());
    match unshare(own) {
        Ok(()) => return Ok(()),
        Err(nix::Error::EPERM) => {}
        Err(e) => return Err(refused(&e.into())),
    }
    unshare(own | CloneFlags::CLONE_NEWUSER).map_err(|e| refused(&e.into()))?;
    // The kernel wants setgroups gone before it lets an ordinary user map a group.
    let write = |file: &str, text: String| {
        std::fs::write(Path::new("/proc/self").join(file), text).map_err(|e| refused(&e))
    };
    write("setgroups", "deny".to_owned())?;
    write("uid_map", format!("0 {uid} 1"))?;
    write("gid_map", format!("0 {gid} 1"))
}

/// Why the kernel did not give namespaces, and what helps.
fn refused(reason: &Error) -> anyhow::Error {
    match reason.raw_os_error() {
        Some(libc::ENOSPC | libc::EUSERS) => anyhow!(
            "the kernel has no namespaces left for this user; raise them with: sudo sysctl user.max_user_namespaces=10000 user.max_net_namespaces=10000"
        ),
        Some(libc::EINVAL) => anyhow!(
            "this kernel was built without the namespaces that a lab needs (user, PID, network, mount, IPC); use a distribution's standard kernel"
        ),
        _ => anyhow!(
            "this user may not make namespaces ({reason}); run it as root (sudo), or allow it with: sudo sysctl kernel.unprivileged_userns_clone=1 kernel.apparmor_restrict_unprivileged_userns=0"
        ),
    }
}

/// `warren lab init`: the first process of the lab; starts it, buries the dead, ends with it.
///
/// # Errors
/// When the lab's mounts or its main process cannot be made.
pub fn init(dir: &StateDir) -> anyhow::Result<ExitCode> {
    set_pdeathsig(Signal::SIGKILL)?;
    if std::process::id() != 1 {
        bail!("warren lab init is started by warren lab up");
    }
    if let Err(reason) = private_mounts() {
        Progress::Failed(refused(&reason).to_string()).tell();
        return Ok(ExitCode::FAILURE);
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    // Inside some containers the kernel refuses this; the outer /proc works as well, only less tidily.
    let _ = mount(Some("proc"), "/proc", Some("proc"), flags, None::<&str>);
    let daemon = Command::new(THIS_PROGRAM)
        .args(["lab", "daemon", "--state"])
        .arg(dir.path())
        // iptables of the legacy kind wants to write its lock, which only root can in /run.
        .env("XTABLES_LOCKFILE", dir.join("xtables.lock"))
        .stdin(Stdio::null())
        .spawn()
        .context("cannot start the lab's main process")?;
    loop {
        match waitpid(None, None) {
            Ok(WaitStatus::Exited(pid, code)) if pid.as_raw() == daemon.id() as i32 => {
                return Ok(ExitCode::from(u8::from(code != 0)));
            }
            Ok(WaitStatus::Signaled(pid, ..)) if pid.as_raw() == daemon.id() as i32 => {
                return Ok(ExitCode::FAILURE);
            }
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}
