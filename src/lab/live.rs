//! The folder of objects as a cluster would show them, which the control plane reads.

use std::io::Result;
use std::net::Ipv4Addr;
use std::path::PathBuf;

use serde_json::{Value, json};

use super::manifest::{Key, Object};
use super::plan::PodPlan;

/// One file for each object, replaced as a whole.
#[derive(Debug)]
pub struct LiveFolder {
    path: PathBuf,
    scratch: PathBuf,
}

impl LiveFolder {
    /// `scratch` is on the same file system.
    pub fn new(path: PathBuf, scratch: PathBuf) -> Self {
        Self { path, scratch }
    }

    /// Writes an object; a reader sees the old one or the new one, never a part.
    pub fn write(&self, key: &Key, object: &Value) -> Result<()> {
        let name = file_name(key);
        let scratch = self.scratch.join(&name);
        let text = serde_yaml_ng::to_string(object).map_err(std::io::Error::other)?;
        std::fs::write(&scratch, text)?;
        std::fs::rename(scratch, self.path.join(name))
    }

    /// Removes an object; it is no error when it is not there.
    pub fn remove(&self, key: &Key) -> Result<()> {
        match std::fs::remove_file(self.path.join(file_name(key))) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }
}

fn file_name(key: &Key) -> String {
    let kind = key.kind.to_lowercase();
    format!("{kind}_{}_{}.yaml", key.namespace, key.name)
}

/// Where a pod runs and how it is.
#[derive(Clone, Debug, PartialEq)]
pub struct PodStatus<'a> {
    pub node: &'a str,
    pub node_address: Ipv4Addr,
    pub address: Ipv4Addr,
    pub ready: bool,
    pub enrolled: bool,
    pub restarts: u32,
}

/// A pod with its node, address and conditions.
pub fn pod(plan: &PodPlan, status: &PodStatus) -> Value {
    let mut pod = plan.object.clone();
    pod["spec"]["nodeName"] = status.node.into();
    if status.enrolled {
        pod["metadata"]["annotations"]["ambient.istio.io/redirection"] = "enabled".into();
    }
    let address = status.address.to_string();
    let ready = if status.ready { "True" } else { "False" };
    let containers: Vec<Value> = plan
        .containers
        .iter()
        .map(|c| json!({"name": c.name, "ready": status.ready, "restartCount": status.restarts}))
        .collect();
    pod["status"] = json!({
        "phase": "Running",
        "hostIP": status.node_address.to_string(),
        "podIP": address,
        "podIPs": [{"ip": address}],
        "conditions": [
            {"type": "PodScheduled", "status": "True"},
            {"type": "Initialized", "status": "True"},
            {"type": "ContainersReady", "status": ready},
            {"type": "Ready", "status": ready},
        ],
        "containerStatuses": containers,
    });
    pod
}

/// A service with its cluster address.
pub fn service(object: &Object, address: Option<Ipv4Addr>) -> Value {
    let mut service = object.value.clone();
    if let Some(address) = address {
        service["spec"]["clusterIP"] = address.to_string().into();
        service["spec"]["clusterIPs"] = json!([address.to_string()]);
    }
    service
}

/// A node.
pub fn node(name: &str, address: Ipv4Addr) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": {
            "kubernetes.io/hostname": name,
            "topology.kubernetes.io/region": "lab",
            "topology.kubernetes.io/zone": format!("lab-{name}"),
        }},
        "status": {
            "addresses": [
                {"type": "InternalIP", "address": address.to_string()},
                {"type": "Hostname", "address": name},
            ],
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    })
}

#[cfg(test)]
mod tests {
    use super::super::{manifest, plan};
    use super::*;

    #[test]
    fn a_live_pod_says_where_it_runs_and_that_it_is_captured() {
        let text = "apiVersion: v1\nkind: Pod\nmetadata: {name: p, labels: {app: p}}\n\
                    spec: {containers: [{name: c, command: [x]}]}\n";
        let plan = plan::pods(manifest::parse("f", text).unwrap().iter()).unwrap();
        let status = PodStatus {
            node: "node-1",
            node_address: Ipv4Addr::new(10, 42, 255, 11),
            address: Ipv4Addr::new(10, 42, 1, 9),
            ready: true,
            enrolled: true,
            restarts: 0,
        };
        let live = pod(&plan[0], &status);
        assert_eq!(live["spec"]["nodeName"], "node-1");
        assert_eq!(live["status"]["podIP"], "10.42.1.9");
        assert_eq!(live["status"]["conditions"][3]["status"], "True");
        assert_eq!(live["metadata"]["labels"]["app"], "p");
        assert_eq!(
            live["metadata"]["annotations"]["ambient.istio.io/redirection"],
            "enabled"
        );
    }
}
