//! What a container runtime does with the network of a pod: reads the node's CNI configuration and runs its plugins.
//!
//! The lab itself is the first plugin, which makes the interface; those behind it are programs.

use std::io::Write;
use std::path::PathBuf;
use std::process::Stdio;

use serde_json::{Value, json};

use super::pod::Pod;
use super::process::ProcessSpec;
use super::topology::Node;

/// The type of the lab's own part.
const OWN: &str = "warren-lab";
/// The CNI version of the configuration.
const VERSION: &str = "1.0.0";

/// The folders of a node that its runtime and its agent share.
#[derive(Clone, Debug)]
pub struct CniFolders {
    /// Configurations.
    pub conf: PathBuf,
    /// Programs.
    pub bin: PathBuf,
}

impl CniFolders {
    /// Makes the folders of a node, with a configuration that only makes interfaces.
    ///
    /// # Errors
    /// What the file system says.
    pub fn create(node: &Node) -> std::io::Result<Self> {
        let folders = Self {
            conf: node.folder.join("net.d"),
            bin: node.folder.join("bin"),
        };
        std::fs::create_dir_all(&folders.conf)?;
        std::fs::create_dir_all(&folders.bin)?;
        let list = json!({"cniVersion": VERSION, "name": "lab", "plugins": [{"type": OWN}]});
        std::fs::write(folders.file(), format!("{list:#}\n"))?;
        Ok(folders)
    }

    fn file(&self) -> PathBuf {
        self.conf.join("10-lab.conflist")
    }

    /// The plugins behind the lab's own, as they stand in the configuration.
    fn plugins(&self) -> Result<Vec<Value>, String> {
        let file = self.file();
        let text = std::fs::read(&file).map_err(|e| format!("{}: {e}", file.display()))?;
        let list: Value =
            serde_json::from_slice(&text).map_err(|e| format!("{}: {e}", file.display()))?;
        let plugins = list["plugins"].as_array().cloned().unwrap_or_default();
        Ok(plugins.into_iter().filter(|p| p["type"] != OWN).collect())
    }

    /// Whether the agent has put its plugin into the configuration.
    pub fn is_chained(&self) -> bool {
        self.plugins().is_ok_and(|plugins| !plugins.is_empty())
    }

    /// Adds a pod, whose interface is made already, to the network.
    ///
    /// # Errors
    /// What a plugin says against it; the pod must not start then.
    pub fn add(&self, node: &Node, pod: &Pod) -> Result<(), String> {
        let ips: Vec<_> = pod
            .addresses
            .iter()
            .map(|address| json!({"address": ipnet::IpNet::from(address).to_string(), "interface": 0}))
            .collect();
        let netns = pod.netns_path().map_err(|e| format!("/proc: {e}"))?;
        let interface = json!({"name": "eth0", "sandbox": netns});
        let result =
            json!({"cniVersion": VERSION, "interfaces": [interface], "ips": ips, "dns": {}});
        for plugin in self.plugins()? {
            self.run(node, pod, "ADD", plugin, &result)?;
        }
        Ok(())
    }

    /// Takes a pod out of the network.
    ///
    /// # Errors
    /// What a plugin says against it.
    pub fn remove(&self, node: &Node, pod: &Pod) -> Result<(), String> {
        for plugin in self.plugins()?.into_iter().rev() {
            self.run(node, pod, "DEL", plugin, &Value::Null)?;
        }
        Ok(())
    }

    fn run(
        &self,
        node: &Node,
        pod: &Pod,
        verb: &str,
        mut conf: Value,
        result: &Value,
    ) -> Result<(), String> {
        let name = conf["type"].as_str().unwrap_or_default().to_owned();
        conf["cniVersion"] = VERSION.into();
        conf["name"] = "lab".into();
        if !result.is_null() {
            conf["prevResult"] = result.clone();
        }
        let plan = &pod.plan;
        let netns = pod.netns_path().map_err(|e| format!("/proc: {e}"))?;
        let arguments = format!(
            "IgnoreUnknown=1;K8S_POD_NAMESPACE={};K8S_POD_NAME={};K8S_POD_UID={};K8S_POD_INFRA_CONTAINER_ID={}",
            plan.namespace, plan.name, plan.uid, plan.uid
        );
        let env = [
            ("PATH", super::components::search_path()),
            ("CNI_COMMAND", verb.to_owned()),
            ("CNI_CONTAINERID", plan.uid.clone()),
            ("CNI_NETNS", netns),
            ("CNI_IFNAME", "eth0".to_owned()),
            ("CNI_ARGS", arguments),
            ("CNI_PATH", self.bin.to_string_lossy().into_owned()),
        ];
        let spec = ProcessSpec {
            command: vec![self.bin.join(&name).to_string_lossy().into_owned()],
            env: env.map(|(name, value)| (name.to_owned(), value)).to_vec(),
            directory: node.folder.clone(),
            log: node.folder.join("cni.log"),
            namespaces: Some(node.namespaces.clone()),
        };
        let failed = |reason: std::io::Error| format!("the CNI plugin {name}: {reason}");
        let spawned = spec.spawn(Stdio::piped(), Stdio::piped(), Stdio::piped());
        let mut child = spawned.map_err(failed)?;
        if let Some(mut stdin) = child.stdin.take() {
            // A plugin that reads nothing says what is wrong by itself.
            let _ = stdin.write_all(conf.to_string().as_bytes());
        }
        let output = child.wait_with_output().map_err(failed)?;
        if output.status.success() {
            return Ok(());
        }
        let told: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        let text = [&told["msg"], &told["details"]].map(|part| part.as_str().unwrap_or_default());
        let text = match text.concat().is_empty() {
            true => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
            false => text.join("; ").trim_end_matches("; ").to_owned(),
        };
        Err(format!("the CNI plugin {name} refused: {text}"))
    }
}
