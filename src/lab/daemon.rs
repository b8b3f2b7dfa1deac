//! `warren lab daemon`: brings a lab up inside its namespaces, keeps it, takes it down.

use std::path::Path;
use std::process::ExitCode;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};

use super::cluster::{Cluster, Machine, Parts, lock};
use super::components::{self, Files};
use super::family::{Addresses, IpFamily};
use super::live::{self, LiveFolder};
use super::manifest::{Key, Object};
use super::progress::{Progress, step};
use super::state::StateDir;
use super::topology::{self, Node};
use super::{addresses, agent::Agent, dns::Zone, health, process::Supervised};
use super::{server, service_rules, status};

/// How long everything may take to become ready.
const READY: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(50);
/// How often pods that could not be captured are tried again.
const RETRY: Duration = Duration::from_secs(2);
const SETTINGS: &str = "settings.json";

/// What `warren lab up` asks of a new lab.
#[derive(Debug, Serialize, Deserialize)]
pub struct Settings {
    pub nodes: u8,
    pub families: IpFamily,
    /// Further variables of the proxies.
    pub proxy_env: Vec<(String, String)>,
    pub objects: Vec<Object>,
}

impl Settings {
    /// Leaves the settings where the lab will look for them.
    ///
    /// # Errors
    /// What the file system says.
    pub fn save(&self, dir: &StateDir) -> anyhow::Result<()> {
        std::fs::write(dir.join(SETTINGS), serde_json::to_vec(self)?)?;
        Ok(())
    }

    fn load(dir: &StateDir) -> anyhow::Result<Self> {
        let text = std::fs::read(dir.join(SETTINGS))?;
        Ok(serde_json::from_slice(&text)?)
    }
}

/// Runs the lab until it is told to go down.
///
/// # Errors
/// Never: what goes wrong is told to the command that started the lab.
pub fn run(dir: &StateDir) -> anyhow::Result<ExitCode> {
    match up_and_down(dir) {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(reason) => {
            eprintln!("{reason:#}");
            Progress::Failed(format!("{reason:#}")).tell();
            Ok(ExitCode::FAILURE)
        }
    }
}

fn up_and_down(dir: &StateDir) -> anyhow::Result<()> {
    let settings = Settings::load(dir)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?;
    let (down, asked_down) = channel();
    let cluster = start(dir, &settings, runtime.handle())?;
    server::serve(&dir.socket(), Arc::clone(&cluster), down).context("the lab's socket")?;
    if let Err(reason) = lock(&cluster).apply(settings.objects) {
        bail!(reason);
    }
    wait_ready(dir, &cluster)?;
    Progress::Ready.tell();
    while let Err(RecvTimeoutError::Timeout) = asked_down.recv_timeout(RETRY) {
        lock(&cluster).retry_captures();
    }
    lock(&cluster).shut_down();
    std::fs::remove_dir_all(dir.path())?;
    Ok(())
}

/// Builds the network and starts what every lab has; there are no pods yet.
fn start(
    dir: &StateDir,
    settings: &Settings,
    runtime: &tokio::runtime::Handle,
) -> anyhow::Result<Arc<Mutex<Cluster>>> {
    let families = settings.families;
    let files = Files::create(dir)?;
    let nodes = topology::build(dir, settings.nodes, families)?;
    let names: Vec<&str> = nodes.iter().map(|n| n.name.as_str()).collect();
    step(format!(
        "nodes {}, connected by the bridge {}",
        names.join(", "),
        topology::BRIDGE
    ));
    let live = LiveFolder::new(files.live.clone(), dir.folder("scratch")?);
    for node in &nodes {
        service_rules::prepare(&node.namespaces, families)?;
        let key = Key::new("Node", "", &node.name);
        live.write(&key, &live::node(&node.name, &node.addresses))?;
    }
    let control = Supervised::start(components::control(&files, families))?;
    wait(dir, "control.log", "the control plane", || {
        health::control_is_ready(families)
    })?;
    step(format!(
        "control plane at {}",
        addresses::control_plane(families)
    ));
    let zone = Zone::default();
    for address in [addresses::dns, addresses::control] {
        let servers: Vec<_> = Addresses::of(families, address).iter().collect();
        zone.serve(&servers).context("the lab's DNS server")?;
    }
    let machines: anyhow::Result<Vec<Machine>> = nodes
        .into_iter()
        .map(|node| machine(node, &files, settings, runtime))
        .collect();
    let machines = machines?;
    for machine in &machines {
        let log = format!("nodes/{}/proxy.log", machine.node.name);
        let what = format!("the proxy of {}", machine.node.name);
        // It is ready when it has heard from the control plane and from the node agent.
        wait(dir, &log, &what, || health::proxy_is_ready(&machine.node))?;
    }
    step("a proxy on every node");
    let base = components::pod_environment(dir)?;
    Ok(Cluster::new(Parts {
        families,
        dir: dir.clone(),
        live,
        zone,
        machines,
        control,
        base,
    }))
}

fn machine(
    node: Node,
    files: &Files,
    settings: &Settings,
    runtime: &tokio::runtime::Handle,
) -> anyhow::Result<Machine> {
    let ipv6 = settings.families.has_ipv6();
    let agent = Agent::start(&components::zds_socket(&node), ipv6, runtime)?;
    let spec = components::proxy(&node, files, settings.families, &settings.proxy_env);
    Ok(Machine {
        proxy: Supervised::start(spec)?,
        agent,
        node,
    })
}

/// Waits for one part; when it does not come, says the last thing it logged.
fn wait(dir: &StateDir, log: &str, what: &str, ready: impl Fn() -> bool) -> anyhow::Result<()> {
    let deadline = Instant::now() + READY;
    while !ready() {
        if Instant::now() > deadline {
            bail!("{what} did not become ready; {}", last_line(&dir.join(log)));
        }
        std::thread::sleep(LOOK);
    }
    Ok(())
}

fn wait_ready(dir: &StateDir, cluster: &Mutex<Cluster>) -> anyhow::Result<()> {
    let deadline = Instant::now() + READY;
    loop {
        let status = status::collect(&lock(cluster));
        let waiting = status::waiting_for(&status);
        if waiting.is_empty() {
            let captured = status
                .pods
                .iter()
                .filter(|p| p.capture != super::wire::Capture::Outside);
            step(format!(
                "{} pods ready, {} captured",
                status.pods.len(),
                captured.count()
            ));
            return Ok(());
        }
        if Instant::now() > deadline {
            let pod = status.pods.iter().find(|p| !p.ready);
            let log = pod.and_then(|p| {
                let container = p.containers.first()?;
                Some(dir.join(format!("pods/{}/{}/{container}.log", p.namespace, p.name)))
            });
            let said = log
                .map(|log| format!("; {}", last_line(&log)))
                .unwrap_or_default();
            bail!(
                "not ready after {}s: {}{said}",
                READY.as_secs(),
                waiting.join(", ")
            );
        }
        std::thread::sleep(LOOK);
    }
}

fn last_line(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    match text
        .lines()
        .rfind(|l| !l.trim().is_empty() && !l.starts_with("[lab]"))
    {
        Some(line) => format!("its log ends with: {line}"),
        None => "its log is empty".to_owned(),
    }
}
