//! The objects as a cluster would show them: in a folder, which the control plane reads, and in the API server, which the
//! node agents ask.

use std::io::Result;
use std::path::PathBuf;

use serde_json::{Value, json};

use super::family::{Addresses, Family};
use super::kube::{KubeApi, REDIRECTION};
use super::manifest::{Key, Object};
use super::plan::PodPlan;

/// One file and one object of the API for each object, replaced as a whole.
pub struct LiveObjects {
    path: PathBuf,
    scratch: PathBuf,
    pub kube: KubeApi,
}

impl LiveObjects {
    /// `scratch` is on the same file system.
    pub fn new(path: PathBuf, scratch: PathBuf, kube: KubeApi) -> Self {
        Self {
            path,
            scratch,
            kube,
        }
    }

    /// Writes an object; a reader sees the old one or the new one, never a part. What the node agent says of a pod stays.
    pub fn write(&self, key: &Key, object: &Value) -> Result<()> {
        let keep = |before: &Value, object: &mut Value| {
            let said = &before["metadata"]["annotations"][REDIRECTION];
            if !said.is_null() {
                object["metadata"]["annotations"][REDIRECTION] = said.clone();
            }
        };
        // Kinds that the API does not have are the control plane's to complain of.
        let stored = self.kube.server.put_keeping(object.clone(), keep);
        let object = stored.as_ref().unwrap_or(object);
        let name = file_name(key);
        let scratch = self.scratch.join(&name);
        let text = serde_yaml_ng::to_string(object).map_err(std::io::Error::other)?;
        std::fs::write(&scratch, text)?;
        std::fs::rename(scratch, self.path.join(name))
    }

    /// Removes an object; it is no error when it is not there.
    pub fn remove(&self, key: &Key) -> Result<()> {
        self.kube
            .server
            .delete_kind(&key.kind, &key.namespace, &key.name);
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
    pub node_addresses: &'a Addresses,
    pub addresses: &'a Addresses,
    pub connected: bool,
    pub ready: bool,
    pub restarts: u32,
}

/// A pod with its node, address and conditions.
pub fn pod(plan: &PodPlan, status: &PodStatus) -> Value {
    let mut pod = plan.object.clone();
    pod["spec"]["nodeName"] = status.node.into();
    if !status.connected {
        pod["status"] = json!({
            "phase": "Pending",
            "hostIP": status.node_addresses.first(),
            "conditions": [{"type": "PodScheduled", "status": "True"}],
        });
        return pod;
    }
    let ready = if status.ready { "True" } else { "False" };
    let containers: Vec<Value> = plan
        .containers
        .iter()
        .map(|c| json!({"name": c.name, "ready": status.ready, "restartCount": status.restarts}))
        .collect();
    pod["status"] = json!({
        "phase": "Running",
        "hostIP": status.node_addresses.first(),
        "hostIPs": ips(status.node_addresses),
        "podIP": status.addresses.first(),
        "podIPs": ips(status.addresses),
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

fn ips(addresses: &Addresses) -> Value {
    addresses.iter().map(|ip| json!({ "ip": ip })).collect()
}

/// A service with its families and its cluster addresses, if it has any.
pub fn service(object: &Object, addresses: Option<&Addresses>, families: &[Family]) -> Value {
    let mut service = object.value.clone();
    if object.text("/spec/type") == Some("ExternalName") {
        return service;
    }
    let spec = &mut service["spec"];
    spec["ipFamilies"] = families.iter().map(ToString::to_string).collect();
    if spec["ipFamilyPolicy"].is_null() {
        let policy = if families.len() > 1 {
            "RequireDualStack"
        } else {
            "SingleStack"
        };
        spec["ipFamilyPolicy"] = policy.into();
    }
    if let Some(addresses) = addresses {
        spec["clusterIP"] = json!(addresses.first());
        spec["clusterIPs"] = addresses.iter().map(|ip| json!(ip)).collect();
    }
    service
}

/// A node.
pub fn node(name: &str, addresses: &Addresses) -> Value {
    let mut entries: Vec<Value> = addresses
        .iter()
        .map(|ip| json!({"type": "InternalIP", "address": ip}))
        .collect();
    entries.push(json!({"type": "Hostname", "address": name}));
    json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": {
            "kubernetes.io/hostname": name,
            "topology.kubernetes.io/region": "lab",
            "topology.kubernetes.io/zone": format!("lab-{name}"),
        }},
        "status": {
            "addresses": entries,
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    })
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::super::family::IpFamily;
    use super::super::{manifest, plan};
    use super::*;

    fn addresses(last: u8) -> Addresses {
        Addresses::of(IpFamily::Dual, |family| match family {
            Family::V4 => IpAddr::from([10, 42, 1, last]),
            Family::V6 => IpAddr::from([0xfd42, 0, 0, 0, 0, 0, 0, last.into()]),
        })
    }

    #[test]
    fn a_live_pod_says_where_it_runs_and_that_it_is_ready() {
        let text = "apiVersion: v1\nkind: Pod\nmetadata: {name: p, labels: {app: p}}\n\
                    spec: {containers: [{name: c, command: [x]}]}\n";
        let plan = plan::pods(manifest::parse("f", text).unwrap().iter()).unwrap();
        let status = PodStatus {
            node: "node-1",
            node_addresses: &addresses(1),
            addresses: &addresses(9),
            connected: true,
            ready: true,
            restarts: 0,
        };
        let live = pod(&plan[0], &status);
        assert_eq!(live["spec"]["nodeName"], "node-1");
        assert_eq!(live["status"]["podIP"], "10.42.1.9");
        let both = json!([{"ip": "10.42.1.9"}, {"ip": "fd42::9"}]);
        assert_eq!(live["status"]["podIPs"], both);
        assert_eq!(live["status"]["hostIPs"][1]["ip"], "fd42::1");
        assert_eq!(live["status"]["conditions"][3]["status"], "True");
        assert_eq!(live["metadata"]["labels"]["app"], "p");
        let waiting = PodStatus {
            connected: false,
            ..status
        };
        let live = pod(&plan[0], &waiting);
        assert_eq!(live["spec"]["nodeName"], "node-1");
        assert_eq!(live["status"]["phase"], "Pending");
        assert!(live["status"]["podIP"].is_null());
    }

    #[test]
    fn a_live_service_says_its_families_and_addresses() {
        let text = "apiVersion: v1\nkind: Service\nmetadata: {name: s}\nspec: {}\n";
        let object = &manifest::parse("f", text).unwrap()[0];
        let both = service(object, Some(&addresses(7)), IpFamily::Dual.families());
        assert_eq!(
            both["spec"],
            json!({"clusterIP": "10.42.1.7", "clusterIPs": ["10.42.1.7", "fd42::7"],
                "ipFamilies": ["IPv4", "IPv6"], "ipFamilyPolicy": "RequireDualStack"})
        );
        let headless = service(object, None, IpFamily::Ipv6.families());
        assert_eq!(
            headless["spec"],
            json!({"ipFamilies": ["IPv6"], "ipFamilyPolicy": "SingleStack"})
        );
    }
}
