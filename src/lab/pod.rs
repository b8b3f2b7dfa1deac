//! A running pod: its namespaces, its processes, and whether it is ready.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::addresses::PodNumber;
use super::container::{Container, Probe};
use super::family::Addresses;
use super::namespaces::Namespaces;
use super::plan::PodPlan;
use super::process::{ProcessSpec, Supervised};
use super::topology::Node;
use super::wire::Capture;

/// The pause between two probes of a pod that is not ready, and of one that is.
const PROBE_SOON: Duration = Duration::from_millis(100);
const PROBE_LATER: Duration = Duration::from_secs(1);
const PROBE_TIMEOUT: Duration = Duration::from_secs(1);
/// The longest answer a probe reads.
const PROBE_ANSWER: usize = 64;

/// A pod of the lab.
#[derive(Debug)]
pub struct Pod {
    pub plan: PodPlan,
    /// The index of its node.
    pub node: usize,
    pub number: PodNumber,
    pub addresses: Addresses,
    pub namespaces: Namespaces,
    /// Whether the network has taken it; before, nothing runs in it and nobody knows its addresses.
    pub connected: bool,
    pub capture: Capture,
    health: Arc<Health>,
    processes: Arc<Vec<Supervised>>,
    folder: PathBuf,
}

#[derive(Debug, Default)]
struct Health {
    ready: AtomicBool,
    stopped: AtomicBool,
}

impl Pod {
    /// Makes the pod's namespaces on its node; nothing runs in them yet.
    ///
    /// # Errors
    /// The step that failed.
    pub fn create(
        plan: PodPlan,
        node: &Node,
        number: PodNumber,
        folder: &Path,
    ) -> std::io::Result<Self> {
        let search = format!(
            "{}.svc.cluster.local svc.cluster.local cluster.local",
            plan.namespace
        );
        let namespaces = node.pod(folder, number, &search, &plan.name)?;
        Ok(Self {
            plan,
            node: node.index,
            number,
            addresses: node.pod_addresses(number),
            namespaces,
            connected: false,
            capture: Capture::Outside,
            health: Arc::default(),
            processes: Arc::default(),
            folder: folder.to_owned(),
        })
    }

    /// The path of its network namespace, for the processes of the lab.
    ///
    /// # Errors
    /// When there is no `/proc`.
    pub fn netns_path(&self) -> std::io::Result<String> {
        // In a container `/proc` may be an outer one, with other numbers.
        let shown = std::fs::read_link("/proc/self")?;
        let fd = self.namespaces.network().as_raw_fd();
        Ok(format!("/proc/{}/fd/{fd}", shown.display()))
    }

    /// Starts the containers, and probes them from the node's network, which is `kubelet`'s; `changed` is called whenever the
    /// pod becomes ready, stops being so, or restarts.
    ///
    /// # Errors
    /// When a thread cannot be made. A command that cannot be started is tried again, as its log says.
    pub fn start(
        &mut self,
        object: &Value,
        base: &[(String, String)],
        kubelet: Namespaces,
        changed: impl Fn() + Send + 'static,
    ) -> std::io::Result<()> {
        let mut processes = Vec::new();
        for container in &self.plan.containers {
            processes.push(Supervised::start(self.process(container, object, base))?);
        }
        self.processes = Arc::new(processes);
        let watch = Watch {
            kubelet,
            address: self.addresses.first(),
            probes: self
                .plan
                .containers
                .iter()
                .map(|c| c.probe.clone())
                .collect(),
            processes: Arc::clone(&self.processes),
            health: Arc::clone(&self.health),
        };
        std::thread::Builder::new()
            .name("prober".into())
            .spawn(move || watch.run(changed))?;
        Ok(())
    }

    fn process(
        &self,
        container: &Container,
        object: &Value,
        base: &[(String, String)],
    ) -> ProcessSpec {
        let environment = environment(container, object, base);
        ProcessSpec {
            command: container.arguments(&environment),
            env: environment,
            directory: container.directory.as_deref().unwrap_or("/").into(),
            log: self.folder.join(format!("{}.log", container.name)),
            namespaces: Some(self.namespaces.clone()),
        }
    }

    /// Starts `command` in the pod with the environment of its first container.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn exec(
        &self,
        command: Vec<String>,
        object: &Value,
        base: &[(String, String)],
        [stdin, stdout, stderr]: [Stdio; 3],
    ) -> std::io::Result<Child> {
        let Some(container) = self.plan.containers.first() else {
            return Err(std::io::Error::other("the pod has no containers"));
        };
        let mut spec = self.process(container, object, base);
        spec.command = command;
        spec.spawn(stdin, stdout, stderr)
    }

    pub fn is_ready(&self) -> bool {
        self.health.ready.load(Ordering::Relaxed)
    }

    pub fn restarts(&self) -> u32 {
        self.processes.iter().map(|p| p.state().restarts).sum()
    }

    /// Asks every process to end.
    pub fn ask_to_stop(&self) {
        self.health.stopped.store(true, Ordering::Relaxed);
        self.health.ready.store(false, Ordering::Relaxed);
        for process in self.processes.iter() {
            process.ask_to_stop();
        }
    }

    /// Waits for the processes until `deadline`, then ends by force whatever is in the pod's network.
    pub fn wait_stopped(&self, deadline: Instant) {
        for process in self.processes.iter() {
            process.wait_stopped(deadline);
        }
        self.namespaces.kill_all();
    }
}

fn environment(
    container: &Container,
    object: &Value,
    base: &[(String, String)],
) -> Vec<(String, String)> {
    let mut environment = base.to_vec();
    let name = object["metadata"]["name"].as_str().unwrap_or_default();
    environment.push(("HOSTNAME".into(), name.into()));
    environment.extend(container.environment(object));
    environment
}

/// Everything the thread that probes a pod needs.
struct Watch {
    kubelet: Namespaces,
    address: IpAddr,
    /// One for each process.
    probes: Vec<Option<Probe>>,
    processes: Arc<Vec<Supervised>>,
    health: Arc<Health>,
}

impl Watch {
    fn run(self, changed: impl Fn()) {
        let mut restarts = 0;
        while !self.health.stopped.load(Ordering::Relaxed) {
            let running = |p: &Supervised| p.state().group.is_some();
            let ready = self.processes.iter().all(running)
                && self.kubelet.run(|| Ok(self.probe())).unwrap_or(false);
            let now: u32 = self.processes.iter().map(|p| p.state().restarts).sum();
            let before = self.health.ready.swap(ready, Ordering::Relaxed);
            if self.health.stopped.load(Ordering::Relaxed) {
                return;
            }
            if before != ready || now != restarts {
                restarts = now;
                changed();
            }
            std::thread::sleep(if ready { PROBE_LATER } else { PROBE_SOON });
        }
    }

    fn probe(&self) -> bool {
        self.probes.iter().flatten().all(|probe| match probe {
            Probe::Tcp(port) => self.connect(*port).is_ok(),
            Probe::Http { port, path } => self.http(*port, path).unwrap_or(false),
        })
    }

    fn connect(&self, port: u16) -> std::io::Result<TcpStream> {
        TcpStream::connect_timeout(&SocketAddr::from((self.address, port)), PROBE_TIMEOUT)
    }

    fn http(&self, port: u16, path: &str) -> std::io::Result<bool> {
        let mut socket = self.connect(port)?;
        socket.set_read_timeout(Some(PROBE_TIMEOUT))?;
        let host = SocketAddr::from((self.address, port));
        write!(
            socket,
            "GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
        )?;
        let mut answer = [0; PROBE_ANSWER];
        let read = socket.read(&mut answer)?;
        let line = String::from_utf8_lossy(&answer[..read]);
        let code = line.split(' ').nth(1).and_then(|c| c.parse::<u16>().ok());
        Ok(code.is_some_and(|code| (200..400).contains(&code)))
    }
}
