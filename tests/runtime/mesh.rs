//! Warren on a node with a container runtime: its control plane and its proxy, both real.

use std::fs;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, Command};

use cni::CaptureConfig;
use cni::zds::{WorkloadInfo, ZdsServer};
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::containerd::Containerd;
use crate::pod::Pod;

const WARREN: &str = env!("CARGO_BIN_EXE_warren");
const NODE: &str = "n1";
const CONTROL: &str = "127.0.0.1:15012";
/// The annotation by which a control plane knows pods whose node wraps their traffic.
const REDIRECTION: &str = "ambient.istio.io/redirection";

/// The mesh of one node; it must end before the node.
pub struct Mesh<'n> {
    node: &'n Containerd,
    control: Child,
    proxy: Child,
    agent: ZdsServer,
    runtime: Runtime,
}

impl<'n> Mesh<'n> {
    /// Starts it without pods.
    pub fn start(node: &'n Containerd) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let (manifests, state) = (node.folder("manifests"), node.folder("control"));
        fs::create_dir_all(&manifests).unwrap();
        let mut control = Command::new(WARREN);
        control.args(["control", "--listen", CONTROL, "--node", NODE]);
        control.arg("--manifests").arg(&manifests);
        control.arg("--state-dir").arg(&state);
        let control = node
            .space()
            .spawn_logged(&mut control, &node.folder("control.log"));
        let (root, token) = (state.join("root-cert.pem"), state.join("tokens").join(NODE));
        node.eventually("the control plane has made a token", || {
            root.exists() && token.exists()
        });
        let socket = node.folder("zds.sock");
        let agent = {
            let _inside = runtime.enter();
            ZdsServer::bind(&socket).unwrap()
        };
        let mut proxy = proxy(&root, &token, &socket);
        let proxy = node
            .space()
            .spawn_logged(&mut proxy, &node.folder("proxy.log"));
        let mesh = Self {
            node,
            control,
            proxy,
            agent,
            runtime,
        };
        node.eventually("the proxy has connected", || {
            *mesh.agent.connected().borrow() > 0
        });
        mesh
    }

    /// Tells the control plane of an object.
    pub fn apply(&self, object: &Value) {
        let metadata = &object["metadata"];
        let name = format!(
            "{}-{}-{}.json",
            object["kind"].as_str().unwrap(),
            metadata["namespace"].as_str().unwrap_or_default(),
            metadata["name"].as_str().unwrap()
        );
        let scratch = self.node.folder("scratch");
        fs::write(&scratch, object.to_string()).unwrap();
        fs::rename(scratch, self.node.folder("manifests").join(name)).unwrap();
    }

    /// Tells the control plane of a pod that runs and is not captured.
    pub fn announce(&self, pod: &Pod) {
        self.apply(&object(pod, json!({})));
    }

    /// Captures a pod that runs, and waits until the proxy serves it.
    pub fn enroll(&self, pod: &Pod) {
        self.apply(&object(pod, json!({REDIRECTION: "enabled"})));
        let netns = pod.netns();
        cni::capture(netns.as_fd(), &CaptureConfig::default()).unwrap();
        let info = WorkloadInfo {
            name: pod.name().to_string(),
            namespace: pod.namespace().to_string(),
            service_account: pod.name().to_string(),
        };
        self.runtime
            .block_on(self.agent.add(pod.uid(), info, netns.into()))
            .unwrap();
    }

    /// Waits until the proxy knows pods as the control plane does.
    pub fn knows(&self, pods: &[&Pod]) {
        let words = "busybox wget -qO- http://127.0.0.1:15000/config_dump";
        self.node.eventually("the proxy knows the pods", || {
            let dump: Value = serde_json::from_str(&self.node.space().shell(words)).unwrap();
            let workloads = dump["workloads"].as_array().cloned().unwrap_or_default();
            pods.iter().all(|pod| {
                workloads
                    .iter()
                    .any(|workload| workload["name"] == pod.name())
            })
        });
    }

    /// Waits until the proxy has logged a line that holds all of the texts.
    pub fn logged(&self, texts: &[&str]) {
        let log = self.node.folder("proxy.log");
        self.node
            .eventually(&format!("a line of the proxy with {texts:?}"), || {
                let log = fs::read_to_string(&log).unwrap_or_default();
                log.lines()
                    .any(|line| texts.iter().all(|text| line.contains(text)))
            });
    }
}

impl Drop for Mesh<'_> {
    fn drop(&mut self) {
        for process in [&mut self.proxy, &mut self.control] {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

fn proxy(root: &Path, token: &Path, zds: &Path) -> Command {
    let mut command = Command::new(WARREN);
    command
        .args(["proxy", "ztunnel"])
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default());
    for kind in ["XDS", "CA"] {
        command
            .env(format!("{kind}_ADDRESS"), format!("https://{CONTROL}"))
            .env(format!("{kind}_ROOT_CA"), root);
    }
    command
        .env("AUTH_TOKEN", token)
        .env("INPOD_UDS", zds)
        .env("NODE_NAME", NODE)
        .env("ZTUNNEL_WORKER_THREADS", "1");
    command
}

/// A running pod as an API server would show it.
fn object(pod: &Pod, annotations: Value) -> Value {
    let ips: Vec<Value> = pod.ips().iter().map(|ip| json!({"ip": ip})).collect();
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": pod.name(),
            "namespace": pod.namespace(),
            "uid": pod.uid(),
            "labels": {"app": pod.name()},
            "annotations": annotations,
        },
        "spec": {"nodeName": NODE, "serviceAccountName": pod.name()},
        "status": {
            "phase": "Running",
            "podIP": pod.ip(),
            "podIPs": ips,
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    })
}
