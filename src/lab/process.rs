//! A process of the lab in its namespaces: started, watched, started again when it ends, and stopped.

use std::fs::OpenOptions;
use std::io::Result;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use super::namespaces::Namespaces;

/// The pause before the first restart; it doubles up to `LONGEST_PAUSE`.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// A process that ran this long is not in a crash loop.
const STEADY: Duration = Duration::from_secs(10);

/// What to run and where.
#[derive(Clone, Debug)]
pub struct ProcessSpec {
    pub command: Vec<String>,
    pub env: Vec<(String, String)>,
    pub directory: PathBuf,
    /// Gets standard output and standard error; appended to.
    pub log: PathBuf,
    /// `None`: those of the lab itself.
    pub namespaces: Option<Namespaces>,
}

impl ProcessSpec {
    /// Starts the process once, in a process group of its own.
    pub fn spawn(&self, stdin: Stdio, stdout: Stdio, stderr: Stdio) -> Result<Child> {
        let mut words = self.command.iter();
        let program = words
            .next()
            .ok_or_else(|| std::io::Error::other("an empty command"))?;
        let mut command = Command::new(program);
        command
            .args(words)
            .env_clear()
            .envs(self.env.iter().map(|(k, v)| (k, v)))
            .current_dir(&self.directory)
            .process_group(0)
            .stdin(stdin)
            .stdout(stdout)
            .stderr(stderr);
        let started = match &self.namespaces {
            Some(namespaces) => namespaces.run_inside(|| command.spawn()),
            None => command.spawn(),
        };
        started.map_err(|e| std::io::Error::new(e.kind(), format!("{program}: {e}")))
    }

    fn spawn_logged(&self) -> Result<Child> {
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&self.log)?;
        self.spawn(Stdio::null(), log.try_clone()?.into(), log.into())
    }

    fn note(&self, text: &str) {
        use std::io::Write;
        if let Ok(mut log) = OpenOptions::new().create(true).append(true).open(&self.log) {
            let _ = writeln!(log, "{text}");
        }
    }
}

/// How a process is.
#[derive(Clone, Debug, Default)]
pub struct ProcessState {
    /// The process group while it runs.
    pub group: Option<i32>,
    pub restarts: u32,
    /// How it ended last.
    pub last_end: Option<String>,
    stopping: bool,
    finished: bool,
}

/// A process that is kept running.
#[derive(Debug)]
pub struct Supervised {
    shared: Arc<(Mutex<ProcessState>, Condvar)>,
}

impl Supervised {
    /// Starts the process and a thread that watches it.
    ///
    /// # Errors
    /// When there can be no thread.
    pub fn start(spec: ProcessSpec) -> Result<Self> {
        let shared = Arc::new((Mutex::default(), Condvar::new()));
        let watched = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("supervisor".into())
            .spawn(move || supervise(&spec, &watched))?;
        Ok(Self { shared })
    }

    pub fn state(&self) -> ProcessState {
        lock(&self.shared.0).clone()
    }

    /// Asks the process to end; it is not started again.
    pub fn ask_to_stop(&self) {
        let mut state = lock(&self.shared.0);
        state.stopping = true;
        signal(&state, Signal::SIGTERM);
        self.shared.1.notify_all();
    }

    /// Waits for the end until `deadline`, then ends the process by force.
    pub fn wait_stopped(&self, deadline: Instant) {
        let mut state = lock(&self.shared.0);
        while !state.finished {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                signal(&state, Signal::SIGKILL);
                return;
            }
            state = self
                .shared
                .1
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

fn supervise(spec: &ProcessSpec, shared: &(Mutex<ProcessState>, Condvar)) {
    let mut pause = FIRST_PAUSE;
    loop {
        let started = Instant::now();
        let end = match run_once(spec, shared) {
            Ok(status) => status.to_string(),
            Err(reason) => format!("cannot start {reason}"),
        };
        let mut state = lock(&shared.0);
        state.group = None;
        state.last_end = Some(end.clone());
        if state.stopping {
            state.finished = true;
            shared.1.notify_all();
            return;
        }
        pause = if started.elapsed() > STEADY {
            FIRST_PAUSE
        } else {
            (pause * 2).min(LONGEST_PAUSE)
        };
        spec.note(&format!("[lab] {end}; starting again in {pause:?}"));
        let (mut state, _) = shared
            .1
            .wait_timeout_while(state, pause, |state| !state.stopping)
            .unwrap_or_else(PoisonError::into_inner);
        if state.stopping {
            state.finished = true;
            shared.1.notify_all();
            return;
        }
        state.restarts += 1;
    }
}

fn run_once(spec: &ProcessSpec, shared: &(Mutex<ProcessState>, Condvar)) -> Result<ExitStatus> {
    let mut child = {
        let mut state = lock(&shared.0);
        if state.stopping {
            return Err(std::io::Error::other("a stopped process"));
        }
        let child = spec.spawn_logged()?;
        state.group = i32::try_from(child.id()).ok();
        child
    };
    child.wait()
}

fn signal(state: &ProcessState, signal: Signal) {
    if let Some(group) = state.group {
        // It may have ended by itself a moment ago.
        let _ = killpg(Pid::from_raw(group), signal);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, name: &str) -> ProcessSpec {
        let log = std::env::temp_dir().join(format!("wrn-process-{}-{name}", std::process::id()));
        let _ = std::fs::remove_file(&log);
        ProcessSpec {
            command: ["/bin/sh", "-c", script].map(str::to_owned).to_vec(),
            env: vec![("WORD".into(), "word".into())],
            directory: "/".into(),
            log,
            namespaces: None,
        }
    }

    #[test]
    fn a_process_that_ends_is_started_again_and_a_stopped_one_is_not() {
        let spec = shell("echo $WORD", "restart");
        let process = Supervised::start(spec.clone()).unwrap();
        while process.state().restarts == 0 {
            std::thread::sleep(Duration::from_millis(20));
        }
        process.ask_to_stop();
        process.wait_stopped(Instant::now() + Duration::from_secs(5));
        let restarts = process.state().restarts;
        let log = std::fs::read_to_string(&spec.log).unwrap();
        std::fs::remove_file(&spec.log).unwrap();
        assert!(log.matches("word\n").count() >= 1, "{log}");
        assert!(
            log.contains("[lab] exit status: 0; starting again"),
            "{log}"
        );
        assert_eq!(restarts, process.state().restarts);
    }

    #[test]
    fn a_process_that_ignores_the_request_is_ended_by_force() {
        let spec = shell(
            "trap '' TERM; echo up; while :; do sleep 0.05; done",
            "force",
        );
        let process = Supervised::start(spec.clone()).unwrap();
        while !std::fs::read_to_string(&spec.log).is_ok_and(|log| log.contains("up")) {
            std::thread::sleep(Duration::from_millis(5));
        }
        process.ask_to_stop();
        process.wait_stopped(Instant::now());
        process.wait_stopped(Instant::now() + Duration::from_secs(5));
        let end = process.state().last_end.unwrap();
        let _ = std::fs::remove_file(&spec.log);
        assert!(end.contains("signal: 9"), "{end}");
    }
}
