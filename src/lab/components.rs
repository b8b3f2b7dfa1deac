//! The parts of a lab that are real Warren processes: the control plane, and on every node a proxy and a node agent.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

use super::addresses::control_plane;
use super::family::IpFamily;
use super::kube::{KubeApi, SYSTEM_NAMESPACE};
use super::process::ProcessSpec;
use super::runtime::CniFolders;
use super::state::StateDir;
use super::topology::Node;

const THIS_PROGRAM: &str = "/proc/self/exe";
const PLUGIN: &str = "warren-cni";
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Where the parts meet.
#[derive(Clone, Debug)]
pub struct Files {
    /// The objects for the control plane.
    pub live: PathBuf,
    /// The control plane's own: root certificate, key, the nodes' tokens.
    control: PathBuf,
    log: PathBuf,
}

impl Files {
    pub fn create(dir: &StateDir) -> std::io::Result<Self> {
        Ok(Self {
            live: dir.folder("live")?,
            control: dir.folder("control")?,
            log: dir.join("control.log"),
        })
    }

    /// By what a node's proxy shows that it is the proxy of that node.
    fn token(&self, node: &Node) -> PathBuf {
        self.control.join("tokens").join(&node.name)
    }

    fn root(&self) -> PathBuf {
        self.control.join("root-cert.pem")
    }
}

/// The socket on a node where its agent serves its proxy.
fn zds_socket(node: &Node) -> PathBuf {
    node.folder.join("zds.sock")
}

/// Puts the CNI plugin into a folder of its own, for the agents to install it from.
///
/// # Errors
/// When it is not beside this program.
pub fn plugin_image(dir: &StateDir) -> anyhow::Result<PathBuf> {
    let program = std::fs::read_link(THIS_PROGRAM)?;
    let plugin = program.with_file_name(PLUGIN);
    if !plugin.exists() {
        bail!(
            "{} is missing: it is built together with warren, by: cargo build --release --workspace",
            plugin.display()
        );
    }
    let image = dir.folder("image")?;
    std::fs::copy(&plugin, image.join(PLUGIN))
        .with_context(|| format!("cannot copy {}", plugin.display()))?;
    Ok(image)
}

/// The agent of a node.
pub fn node_agent(
    node: &Node,
    cni: &CniFolders,
    image: &Path,
    kube: &KubeApi,
    families: IpFamily,
) -> ProcessSpec {
    let own = [
        ("NODE_NAME", node.name.clone()),
        ("POD_NAME", format!("warren-node-agent-{}", node.name)),
        ("POD_NAMESPACE", SYSTEM_NAMESPACE.to_owned()),
        ("HOST_ROOT", "/".to_owned()),
        ("MOUNTED_CNI_NET_DIR", text(&cni.conf)),
        ("MOUNTED_CNI_BIN_DIR", text(&cni.bin)),
        ("CNI_BIN_SOURCE_DIR", text(image)),
        ("CNI_AGENT_RUN_DIR", text(&node.folder.join("run"))),
        ("ZTUNNEL_UDS_ADDRESS", text(&zds_socket(node))),
        ("AMBIENT_IPV6", families.has_ipv6().to_string()),
        // Where a lab has no IPv6 it is switched off in every namespace, and some kernels have no rules for it.
        ("AMBIENT_IPV6_OFF", "pass".to_owned()),
        ("RUST_LOG", "info".to_owned()),
    ];
    let mut env = base_environment();
    let found = kube.environment().into_iter().chain(own);
    env.extend(found.map(|(name, value)| (name.to_owned(), value)));
    ProcessSpec {
        command: [THIS_PROGRAM, "node-agent"].map(str::to_owned).to_vec(),
        env,
        directory: node.folder.clone(),
        log: node.folder.join("agent.log"),
        namespaces: Some(node.namespaces.clone()),
    }
}

/// The control plane, on the bridge.
pub fn control(files: &Files, families: IpFamily) -> ProcessSpec {
    let listen = control_plane(families).to_string();
    let words = [
        THIS_PROGRAM,
        "control",
        "--manifests",
        &text(&files.live),
        "--listen",
        &listen,
        "--state-dir",
        &text(&files.control),
    ];
    ProcessSpec {
        command: words.map(str::to_owned).to_vec(),
        env: base_environment(),
        directory: files.control.clone(),
        log: files.log.clone(),
        namespaces: None,
    }
}

/// The proxy of a node.
pub fn proxy(
    node: &Node,
    files: &Files,
    families: IpFamily,
    more: &[(String, String)],
) -> ProcessSpec {
    let token = files.token(node);
    let server = format!("https://{}", control_plane(families));
    let (name, root) = (&node.name, text(&files.root()));
    let own = [
        ("NODE_NAME", name.clone()),
        ("POD_NAME", proxy_name(node)),
        ("POD_NAMESPACE", SYSTEM_NAMESPACE.to_owned()),
        ("SERVICE_ACCOUNT", "ztunnel".to_owned()),
        ("INSTANCE_IP", node.addresses.first().to_string()),
        ("PROXY_MODE", "shared".to_owned()),
        ("INPOD_UDS", text(&zds_socket(node))),
        ("XDS_ADDRESS", server.clone()),
        ("CA_ADDRESS", server),
        ("XDS_ROOT_CA", root.clone()),
        ("CA_ROOT_CA", root),
        ("AUTH_TOKEN", text(&token)),
        ("CLUSTER_ID", "Kubernetes".to_owned()),
        ("RUST_LOG", "info".to_owned()),
        ("ISTIO_META_DNS_CAPTURE", "true".to_owned()),
        ("IPV6_ENABLED", families.has_ipv6().to_string()),
    ];
    let mut env = base_environment();
    env.extend(own.map(|(name, value)| (name.to_owned(), value)));
    for (name, value) in more {
        env.retain(|(known, _)| known != name);
        env.push((name.clone(), value.clone()));
    }
    ProcessSpec {
        command: [THIS_PROGRAM, "proxy", "ztunnel"]
            .map(str::to_owned)
            .to_vec(),
        env,
        directory: node.folder.clone(),
        log: node.folder.join("proxy.log"),
        namespaces: Some(node.namespaces.clone()),
    }
}

fn proxy_name(node: &Node) -> String {
    format!("ztunnel-{}", node.name)
}

/// The variables every pod's process starts from; `warren` is found by its name.
///
/// # Errors
/// What the file system says.
pub fn pod_environment(dir: &StateDir) -> std::io::Result<Vec<(String, String)>> {
    let bin = dir.folder("bin")?;
    std::os::unix::fs::symlink(std::fs::read_link(THIS_PROGRAM)?, bin.join("warren"))?;
    let mut environment = base_environment();
    for (name, value) in &mut environment {
        if name == "PATH" {
            *value = format!("{}:{value}", bin.display());
        }
    }
    Ok(environment)
}

/// Where every process looks for programs.
pub fn search_path() -> String {
    let mut path = std::env::var("PATH").unwrap_or_default();
    for folder in DEFAULT_PATH.split(':') {
        if !path.split(':').any(|known| known == folder) {
            path = format!("{path}:{folder}");
        }
    }
    path.trim_start_matches(':').to_owned()
}

fn base_environment() -> Vec<(String, String)> {
    vec![
        ("PATH".into(), search_path()),
        ("HOME".into(), "/".into()),
        ("LANG".into(), "C.UTF-8".into()),
    ]
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
