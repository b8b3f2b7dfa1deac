//! The parts of a lab that are real Warren processes: the control plane and a proxy on every node.

use std::path::{Path, PathBuf};

use super::addresses::control_plane;
use super::family::IpFamily;
use super::process::ProcessSpec;
use super::state::StateDir;
use super::topology::Node;

const THIS_PROGRAM: &str = "/proc/self/exe";
const SYSTEM_NAMESPACE: &str = "istio-system";
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

/// The node agent's socket on a node.
pub fn zds_socket(node: &Node) -> PathBuf {
    node.folder.join("zds.sock")
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

fn base_environment() -> Vec<(String, String)> {
    let mut path = std::env::var("PATH").unwrap_or_default();
    for folder in DEFAULT_PATH.split(':') {
        if !path.split(':').any(|known| known == folder) {
            path = format!("{path}:{folder}");
        }
    }
    vec![
        ("PATH".into(), path.trim_start_matches(':').to_owned()),
        ("HOME".into(), "/".into()),
        ("LANG".into(), "C.UTF-8".into()),
    ]
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
