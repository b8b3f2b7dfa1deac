//! The plugin's entry in a CNI configuration: how the agent tells the plugin what to do.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::eligibility::Selectors;

/// The plugin's name: of its program, of its `type` and of its entry.
pub const PLUGIN: &str = "warren-cni";
/// The plugin whose place ours takes.
pub const INCUMBENT: &str = "istio-cni";

/// A JSON object.
pub type Object = Map<String, Value>;

/// What the plugin is told (node-agent.md §1.1).
#[derive(Clone, Debug)]
pub struct PluginEntry {
    pub log_level: String,
    /// Whether pods are captured at all.
    pub ambient_enabled: bool,
    pub enablement_selectors: Selectors,
    pub exclude_namespaces: Vec<String>,
    /// The agent's own namespace, whose agent pods are let through.
    pub pod_namespace: String,
    /// How the names of those pods begin.
    pub agent_pod_prefix: String,
    pub native_nftables: bool,
    /// Whether a pod waits long for an API server that cannot be asked whether the pod is to be captured.
    pub enable_ambient_detection_retry: bool,
}

impl PluginEntry {
    /// The entry as it stands in a list of plugins, without a `cniVersion`.
    pub(super) fn object(&self, run_dir: &Path) -> Object {
        let entry = json!({
            "name": PLUGIN,
            "type": PLUGIN,
            "ipam": {},
            "dns": {},
            "plugin_log_level": self.log_level,
            "cni_agent_run_dir": run_dir.to_string_lossy(),
            "ambient_enabled": self.ambient_enabled,
            "enablement_selectors": self.enablement_selectors,
            "exclude_namespaces": self.exclude_namespaces,
            "pod_namespace": self.pod_namespace,
            "agent_pod_prefix": self.agent_pod_prefix,
            "native_nftables": self.native_nftables,
            "enable_ambient_detection_retry": self.enable_ambient_detection_retry,
        });
        match entry {
            Value::Object(entry) => entry,
            _ => Object::new(),
        }
    }
}
