//! `warren lab daemon`: brings a lab up inside its namespaces, keeps it, takes it down.

use std::path::Path;
use std::process::ExitCode;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};
use tokio::task::spawn_blocking;

use super::cluster::{Cluster, Machine, Parts, lock};
use super::components::{self, Files};
use super::family::{Addresses, IpFamily};
use super::kube::KubeApi;
use super::live::{self, LiveObjects};
use super::manifest::{Key, Object};
use super::progress::{Progress, step};
use super::runtime::CniFolders;
use super::state::StateDir;
use super::topology::{self, Node};
use super::{addresses, dns::Zone, health, process::Supervised};
use super::{server, service_rules, status};

/// How long everything may take to become ready.
const READY: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(50);
/// How often pods that the network refused are tried again.
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
        lock(&cluster).retry_pods();
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
    let image = components::plugin_image(dir)?;
    let kube = KubeApi::start(dir, families, runtime)?;
    let live = LiveObjects::new(files.live.clone(), dir.folder("scratch")?, kube.clone());
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
        .map(|node| machine(node, &files, settings, &image, &kube))
        .collect();
    let machines = machines?;
    for machine in &machines {
        let log = format!("nodes/{}/proxy.log", machine.node.name);
        let what = format!("the proxy of {}", machine.node.name);
        // It is ready when it has heard from the control plane and from the node agent.
        wait(dir, &log, &what, || health::proxy_is_ready(&machine.node))?;
        let log = format!("nodes/{}/agent.log", machine.node.name);
        let what = format!("the node agent of {}", machine.node.name);
        wait(dir, &log, &what, || {
            health::agent_is_ready(&machine.node) && machine.cni.is_chained()
        })?;
    }
    step("a proxy and a node agent on every node, and the CNI plugin");
    let base = components::pod_environment(dir)?;
    let cluster = Cluster::new(Parts {
        families,
        dir: dir.clone(),
        live,
        zone,
        machines,
        control,
        base,
    });
    runtime.spawn(follow_agents(kube, Arc::downgrade(&cluster)));
    Ok(cluster)
}

/// Takes over what the node agents write into the API, for as long as the lab is there.
async fn follow_agents(kube: KubeApi, cluster: Weak<Mutex<Cluster>>) {
    let mut changes = kube.server.changes();
    while changes.changed().await.is_ok() {
        let Some(cluster) = cluster.upgrade() else {
            return;
        };
        let followed = spawn_blocking(move || lock(&cluster).follow_captures());
        // Whatever went wrong there goes wrong for the next change, too.
        let _ = followed.await;
    }
}

fn machine(
    node: Node,
    files: &Files,
    settings: &Settings,
    image: &Path,
    kube: &KubeApi,
) -> anyhow::Result<Machine> {
    let cni = CniFolders::create(&node)?;
    let agent = components::node_agent(&node, &cni, image, kube, settings.families);
    let proxy = components::proxy(&node, files, settings.families, &settings.proxy_env);
    Ok(Machine {
        agent: Supervised::start(agent)?,
        proxy: Supervised::start(proxy)?,
        cni,
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
