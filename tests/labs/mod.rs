//! Labs for tests: each with a name of its own, taken down whatever happens.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

const NOBODY: u32 = 65534;

/// What a command said and how it ended.
pub struct Output {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

/// A lab that goes down with this value.
pub struct Lab {
    name: String,
    /// Labs of other tests must not be seen: every new lab removes what dead ones left.
    folder: PathBuf,
    program: PathBuf,
    user: Option<u32>,
    command: Option<Child>,
}

/// Runs the demonstration; `None` where labs are impossible.
pub fn demo(ip_family: &str) -> Option<String> {
    let lab = Lab::new(None);
    let output = lab.run(&["demo", "--ip-family", ip_family]);
    assert!(
        output.code == 0 || refused(&output),
        "{}{}",
        output.stdout,
        output.stderr
    );
    (!refused(&output)).then_some(output.stdout)
}

/// Tries to start a lab where no program can be found.
pub fn up_without_tools(manifests: &str) -> Output {
    let lab = Lab::new(None);
    let mut command = lab.command(&["up", "-d", "-f", "-"]);
    command.env("PATH", "/nonexistent");
    finish(command, manifests)
}

/// Tries to start a lab that cannot be.
pub fn up_refused(manifests: &str, more: &[&str]) -> Output {
    let lab = Lab::new(None);
    let output = lab.start(manifests, more);
    assert_ne!(output.code, 0);
    output
}

/// Whether the kernel has no IPv6, or does not let this user have namespaces; says so.
pub fn refused(output: &Output) -> bool {
    let reasons = ["may not make namespaces", "this kernel has no IPv6"];
    let refused = reasons.iter().any(|reason| output.stderr.contains(reason));
    if refused {
        eprintln!("skipped: {}", output.stderr.trim());
    }
    refused
}

/// Waits for `done`.
pub fn eventually(limit: Duration, what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + limit;
    while !done() {
        assert!(Instant::now() < deadline, "not within {limit:?}: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Whether a process runs.
pub fn is_alive(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

impl Lab {
    /// A lab that runs by itself; `None` where labs are impossible.
    pub fn up(manifests: &str, more: &[&str]) -> Option<Self> {
        Self::new(None).started(manifests, more)
    }

    /// A lab of an ordinary user; `None` where that is impossible.
    pub fn up_as_nobody(manifests: &str, more: &[&str]) -> Option<Self> {
        Self::new(Some(NOBODY)).started(manifests, more)
    }

    /// A lab whose command stays.
    pub fn up_in_foreground(manifests: &str) -> Option<Self> {
        let mut lab = Self::new(None);
        let mut child = lab
            .command(&["up", "-f", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child
            .stdin
            .take()
            .unwrap()
            .write_all(manifests.as_bytes())
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let up = lines
            .map_while(Result::ok)
            .any(|line| line.contains(" is up; "));
        lab.command = Some(child);
        up.then_some(lab)
    }

    fn started(self, manifests: &str, more: &[&str]) -> Option<Self> {
        let output = self.start(manifests, more);
        assert!(
            output.code == 0 || refused(&output),
            "{}{}",
            output.stdout,
            output.stderr
        );
        (output.code == 0).then_some(self)
    }

    /// Starts a lab of the same name.
    pub fn up_again(&self, manifests: &str) -> Output {
        self.start(manifests, &[])
    }

    fn start(&self, manifests: &str, more: &[&str]) -> Output {
        let mut arguments = vec!["up", "-d", "-f", "-"];
        arguments.extend(more);
        finish(self.command(&arguments), manifests)
    }

    fn new(user: Option<u32>) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("wrn-{}-{number}", std::process::id());
        let folder = std::env::temp_dir().join(&name);
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::set_permissions(&folder, PermissionsExt::from_mode(0o1777)).unwrap();
        let built = PathBuf::from(env!("CARGO_BIN_EXE_warren"));
        let user = user.filter(|_| nix::unistd::getuid().is_root());
        let program = match user {
            // The build folder may be closed to others.
            Some(_) => {
                let [copy, plugin] = ["warren", "warren-cni"].map(|name| folder.join(name));
                let built_plugin = Path::new(&built).with_file_name("warren-cni");
                // By another process: what a concurrent test starts would inherit the open copy for a moment, and
                // the kernel runs no file that is open for writing.
                let copied = Command::new("cp")
                    .arg(&built)
                    .arg(built_plugin)
                    .arg(&folder)
                    .status();
                assert!(copied.unwrap().success());
                for program in [&copy, &plugin] {
                    std::fs::set_permissions(program, PermissionsExt::from_mode(0o755)).unwrap();
                }
                copy
            }
            None => built,
        };
        Self {
            name,
            folder,
            program,
            user,
            command: None,
        }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command
            .args(["lab", "--name", &self.name])
            .args(arguments)
            .env("TMPDIR", &self.folder)
            .current_dir("/");
        if let Some(user) = self.user {
            command.uid(user).gid(user);
        }
        command
    }

    /// Runs a lab command.
    pub fn run(&self, arguments: &[&str]) -> Output {
        finish(self.command(arguments), "")
    }

    pub fn apply(&self, manifests: &str) -> Output {
        finish(self.command(&["apply", "-f", "-"]), manifests)
    }

    pub fn delete(&self, manifests: &str) -> Output {
        finish(self.command(&["delete", "-f", "-"]), manifests)
    }

    pub fn status(&self) -> String {
        self.run(&["status"]).stdout
    }

    /// Runs a shell script in a pod.
    pub fn exec(&self, namespace: &str, pod: &str, script: &str) -> Output {
        self.exec_with(namespace, pod, script, "")
    }

    pub fn exec_with(&self, namespace: &str, pod: &str, script: &str, input: &str) -> Output {
        finish(self.exec_command(namespace, pod, script), input)
    }

    /// Starts a shell script in a pod and kills its caller.
    pub fn exec_and_kill(&self, namespace: &str, pod: &str, script: &str) {
        let mut caller = self.exec_command(namespace, pod, script).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(300));
        caller.kill().unwrap();
        caller.wait().unwrap();
    }

    fn exec_command(&self, namespace: &str, pod: &str, script: &str) -> Command {
        self.command(&["exec", "-n", namespace, pod, "--", "sh", "-c", script])
    }

    /// What all proxies logged of flows in one direction.
    pub fn access_lines(&self, direction: &str) -> Vec<String> {
        let direction = format!("direction=\"{direction}\"");
        let log = self.run(&["logs"]).stdout;
        let lines = log.lines().filter(|line| line.contains(&direction));
        lines.map(str::to_owned).collect()
    }

    /// What a pod logged.
    pub fn log(&self, namespace: &str, pod: &str) -> String {
        self.run(&["logs", "-n", namespace, pod]).stdout
    }

    /// The names of a namespace's pods.
    pub fn pods(&self, namespace: &str) -> Vec<String> {
        self.pod_lines()
            .filter(|columns| columns[0] == namespace)
            .map(|columns| columns[1].clone())
            .collect()
    }

    /// Waits until so many pods are ready.
    pub fn wait_ready(&self, count: usize) {
        eventually(Duration::from_secs(20), "the pods are ready", || {
            self.pod_lines()
                .filter(|columns| columns[4] == "yes")
                .count()
                == count
        });
    }

    fn pod_lines(&self) -> impl Iterator<Item = Vec<String>> + use<> {
        let status = self.status();
        let table = status.split("\n\n").nth(1).unwrap_or_default().to_owned();
        let rows: Vec<Vec<String>> = table
            .lines()
            .skip(1)
            .map(|line| line.split_whitespace().map(str::to_owned).collect())
            .collect();
        rows.into_iter()
    }

    pub fn dir(&self) -> PathBuf {
        let user = self.user.unwrap_or_else(|| nix::unistd::getuid().as_raw());
        self.folder.join(format!("warren-lab-{user}/{}", self.name))
    }

    /// Every process that runs in the lab's PID namespace, and those that hold it.
    pub fn processes(&self) -> Vec<u32> {
        let first = self.first_process();
        let namespace = |pid: u32| std::fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
        let wanted = namespace(first);
        assert!(wanted.is_some());
        all_processes()
            .filter(|pid| namespace(*pid) == wanted)
            .collect()
    }

    /// Ends every proxy of the lab by force.
    pub fn kill_proxies(&self) {
        self.send_to("KILL", &["proxy", "ztunnel"]);
    }

    /// Sends a signal to every node agent of the lab.
    pub fn signal_agents(&self, signal: &str) {
        self.send_to(signal, &["node-agent"]);
    }

    fn send_to(&self, signal: &str, arguments: &[&str]) {
        let wanted = format!("\0{}\0", arguments.join("\0"));
        let is_meant = |pid: &u32| {
            let text = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            text.ends_with(wanted.as_bytes())
        };
        let meant: Vec<u32> = self.processes().into_iter().filter(is_meant).collect();
        assert!(!meant.is_empty());
        meant.into_iter().for_each(|pid| send(signal, pid));
    }

    fn first_process(&self) -> u32 {
        let dir = self.dir().display().to_string();
        all_processes()
            .find(|pid| {
                let text = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                let words: Vec<&[u8]> = text.split(|b| *b == 0).collect();
                words.contains(&b"init".as_slice()) && words.contains(&dir.as_bytes())
            })
            .expect("the lab's first process")
    }

    /// Ends the lab's first process by force.
    pub fn kill_first_process(&self) {
        send("KILL", self.first_process());
    }

    /// Sends a signal to the command of a lab in the foreground and waits for its end.
    pub fn signal(&mut self, signal: &str) {
        let mut command = self.command.take().unwrap();
        send(signal, command.id());
        command.wait().unwrap();
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.run(&["down"]);
        if !std::thread::panicking() {
            assert!(
                !self.dir().exists(),
                "{} is left behind",
                self.dir().display()
            );
        }
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

fn all_processes() -> impl Iterator<Item = u32> {
    std::fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

fn send(signal: &str, pid: u32) {
    let signal = format!("SIG{signal}")
        .parse::<nix::sys::signal::Signal>()
        .unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid as i32), signal).unwrap();
}

fn finish(mut command: Command, input: &str) -> Output {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A command that does not read its input may be gone before it is written.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    let output = child.wait_with_output().unwrap();
    Output {
        code: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}
