//! The machine that a node believes to be: PID, mount and network namespaces that end together, with all that is in them.
//!
//! Whatever runs inside, daemons that left their parents too, ends with the first process there, and that one ends with
//! the test. So a crashed test leaves no process, mount, network namespace or interface behind.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Tells its process ID outside, puts fresh file systems where a container runtime writes whatever it is told, and
/// stays, so that processes whose parents left are waited for. Its arguments are folders to be private, too.
const FIRST_PROCESS: &str = r#"
read -r pid _ < /proc/self/stat
mount -t proc proc /proc
mount -t tmpfs tmpfs /run
mkdir /run/upper /run/work
mount -t overlay -o lowerdir=/var/lib,upperdir=/run/upper,workdir=/run/work overlay /var/lib
for folder; do mount -t tmpfs tmpfs "$folder"; done
ip link set lo up
echo "$pid"
while :; do sleep 1000000; done
"#;

/// The namespaces; they end with it.
pub struct Space {
    /// Waits for the first process inside.
    keeper: Child,
    /// The first process, as seen from outside.
    first: u32,
}

impl Space {
    /// Makes them; each of `private` becomes an empty folder that is not seen outside.
    pub fn new(private: &[&Path]) -> Self {
        let mut command = Command::new("unshare");
        command
            .args(["--pid", "--fork", "--kill-child", "--mount", "--net"])
            .args(["sh", "-euc", FIRST_PROCESS, "node"])
            .args(private)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        // SAFETY: between fork and exec only one system call is made.
        unsafe {
            command.pre_exec(|| Ok(nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?));
        }
        let mut keeper = command.spawn().unwrap();
        let mut line = String::new();
        let mut output = BufReader::new(keeper.stdout.take().unwrap());
        output.read_line(&mut line).unwrap();
        let Ok(first) = line.trim().parse() else {
            let mut reason = String::new();
            let mut errors = keeper.stderr.take().unwrap();
            errors.read_to_string(&mut reason).unwrap();
            panic!("a node's namespaces could not be made: {reason}");
        };
        Self { keeper, first }
    }

    /// A path as the processes inside see it, for those outside.
    pub fn path(&self, inside: impl AsRef<Path>) -> PathBuf {
        let inside = inside.as_ref();
        let inside = inside.strip_prefix("/").unwrap_or(inside);
        Path::new(&format!("/proc/{}/root", self.first)).join(inside)
    }

    /// The network namespace.
    pub fn netns(&self) -> File {
        self.namespace("net").unwrap()
    }

    fn namespace(&self, kind: &str) -> io::Result<File> {
        File::open(format!("/proc/{}/ns/{kind}", self.first))
    }

    /// Starts a process inside.
    pub fn spawn(&self, command: &mut Command) -> io::Result<Child> {
        let [pid, net, mount] = ["pid", "net", "mnt"].map(|kind| self.namespace(kind));
        let (pid, net, mount) = (pid?, net?, mount?);
        // SAFETY: between fork and exec only system calls are made, on descriptors that the closure owns.
        unsafe {
            command.pre_exec(move || {
                setns(net.as_fd(), CloneFlags::CLONE_NEWNET)?;
                Ok(setns(mount.as_fd(), CloneFlags::CLONE_NEWNS)?)
            });
        }
        // Only children enter a PID namespace, and those of this thread alone.
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                setns(pid, CloneFlags::CLONE_NEWPID)?;
                command.spawn()
            });
            thread.join().unwrap()
        })
    }

    /// Starts a process inside that writes to a log.
    pub fn spawn_logged(&self, command: &mut Command, log: &Path) -> Child {
        let log = File::options().create(true).append(true).open(log).unwrap();
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        self.spawn(command).unwrap()
    }

    /// Runs a shell command inside; gives what it printed. It must succeed.
    pub fn shell(&self, text: &str) -> String {
        let output = self.output(Command::new("sh").args(["-euc", text]));
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{text}: {errors}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs a command inside to its end.
    pub fn output(&self, command: &mut Command) -> Output {
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        self.spawn(command).unwrap().wait_with_output().unwrap()
    }
}

impl Space {
    /// Ends every process inside; returns when none is left.
    pub fn end(&mut self) {
        // While its parent lives, the number is still that of the first process.
        if let Ok(None) = self.keeper.try_wait() {
            let _ = kill(Pid::from_raw(self.first as i32), Signal::SIGKILL);
        }
        // The first process is gone only when all others are.
        let _ = self.keeper.wait();
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        self.end();
    }
}
