//! Running the programs that change a namespace's rules.

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns, unshare};

/// Where legacy iptables is to take its lock within a pod. Only writers in the same namespace get in each other's way,
/// and those have other locks in other containers; so nobody is waited for, and the usual place need not be writable.
const LOCK: (&str, &str) = ("XTABLES_LOCKFILE", "/dev/null");

/// How often a program under a time limit is looked after.
const LOOK: Duration = Duration::from_millis(10);

/// Where a program runs.
#[derive(Clone, Copy)]
pub enum Place<'a> {
    Here,
    /// A namespace that others write rules in too, under the usual lock.
    Host(BorrowedFd<'a>),
    Pod(BorrowedFd<'a>),
    /// A namespace that nobody else is in and that goes with the program.
    Fresh,
}

/// Runs a program to its end, with or without something to read.
///
/// # Errors
/// When it cannot be started.
pub fn execute(
    program: &str,
    arguments: &[&str],
    place: Place<'_>,
    input: Option<&str>,
) -> io::Result<Output> {
    let mut child = start(program, arguments, place)?;
    if let (Some(mut stdin), Some(input)) = (child.stdin.take(), input) {
        // A program that ends early says why on its error output.
        let _ = stdin.write_all(input.as_bytes());
    }
    child.wait_with_output()
}

/// Runs a program that reads nothing, and ends it when it takes too long.
///
/// # Errors
/// When it cannot be started, or had to be ended.
pub fn execute_within(
    limit: Duration,
    program: &str,
    arguments: &[&str],
    place: Place<'_>,
) -> io::Result<Output> {
    let mut child = start(program, arguments, place)?;
    drop(child.stdin.take());
    let (stdout, stderr) = (read(child.stdout.take()), read(child.stderr.take()));
    let deadline = Instant::now() + limit;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if Instant::now() >= deadline {
            child.kill()?;
            child.wait()?;
            let text = format!("it was still running after {} s", limit.as_secs());
            return Err(io::Error::new(io::ErrorKind::TimedOut, text));
        }
        thread::sleep(LOOK);
    };
    Ok(Output {
        status,
        stdout: stdout.join().unwrap_or_default(),
        stderr: stderr.join().unwrap_or_default(),
    })
}

/// Reads to the end while others wait for the program.
fn read(source: Option<impl Read + Send + 'static>) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut text = Vec::new();
        if let Some(mut source) = source {
            let _ = source.read_to_end(&mut text);
        }
        text
    })
}

fn start(program: &str, arguments: &[&str], place: Place<'_>) -> io::Result<Child> {
    let mut command = Command::new(program);
    command
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let enter: Box<dyn Fn() -> nix::Result<()> + Send + Sync> = match place {
        Place::Here => Box::new(|| Ok(())),
        Place::Fresh => Box::new(|| unshare(CloneFlags::CLONE_NEWNET)),
        Place::Pod(netns) | Place::Host(netns) => {
            let raw = netns.as_raw_fd();
            // SAFETY: the descriptor is borrowed for longer than the child takes to start.
            Box::new(move || {
                setns(
                    unsafe { BorrowedFd::borrow_raw(raw) },
                    CloneFlags::CLONE_NEWNET,
                )
            })
        }
    };
    if matches!(place, Place::Pod(_) | Place::Fresh) {
        command.env(LOCK.0, LOCK.1);
    }
    // SAFETY: between fork and exec nothing happens but one system call.
    unsafe {
        command.pre_exec(move || Ok(enter()?));
    }
    command.spawn()
}

/// What a program that failed says about it, in one line.
pub fn complaint(output: &Output) -> String {
    let told = String::from_utf8_lossy(&output.stderr);
    let lines = told.lines().map(str::trim).filter(|line| !line.is_empty());
    match lines.collect::<Vec<_>>().join("; ") {
        nothing if nothing.is_empty() => output.status.to_string(),
        message => message,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_hangs_is_ended_and_one_that_does_not_is_heard() {
        let limit = Duration::from_millis(200);
        let hung = execute_within(limit, "sleep", &["600"], Place::Here).unwrap_err();
        assert_eq!(hung.kind(), io::ErrorKind::TimedOut);
        let limit = Duration::from_secs(60);
        // More than a pipe holds.
        let script = "head -c 300000 /dev/zero; echo no >&2; echo way >&2; exit 3";
        let output = execute_within(limit, "sh", &["-c", script], Place::Here).unwrap();
        assert_eq!(output.stdout.len(), 300_000);
        assert_eq!(complaint(&output), "no; way");
    }
}
