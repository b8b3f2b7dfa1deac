//! A node that is a member of a cluster: its agent has an account, a token and rights, and a kubelet's part is done by
//! the tests.

use std::fs;

use serde_json::{Value, json};

use crate::apiserver::{ADDRESS, ApiServer, PORT};
use crate::harness::{NODE, Node, Pod, eventually};

/// What the agent may do.
const ACCESS: &str = include_str!("access.yaml");
/// The agent's own pod.
pub const AGENT: &str = "/api/v1/namespaces/istio-system/pods/agent-x";
/// Where its account's tokens are made.
const TOKEN: &str = "/api/v1/namespaces/istio-system/serviceaccounts/node-agent/token";
/// The label that decides.
pub const MODE: &str = "istio.io/dataplane-mode";

pub struct Member {
    /// Taken while it is down.
    pub api: Option<ApiServer>,
    pub node: Node,
}

impl Member {
    /// A node with an agent that watches; none, with a line that says so, without root.
    pub fn new(test: &str) -> Option<Self> {
        Self::with_flags(test, &[])
    }

    /// The same, with further flags of the API server.
    pub fn with_flags(test: &str, flags: &[&str]) -> Option<Self> {
        let mut member = Self::without_rights(test, flags)?;
        member.grant();
        member.node.start();
        Some(member)
    }

    /// A node whose agent is not started and may do nothing yet.
    pub fn without_rights(test: &str, flags: &[&str]) -> Option<Self> {
        let mut node = Node::without_agent(&format!("cluster-{test}"))?;
        let api = ApiServer::start(&node, flags);
        // The API server makes this one itself, in its own time.
        eventually("the first namespace", || {
            api.get("/api/v1/namespaces/default")
        });
        api.create_all(&include_str!("beginning.yaml").replace("$NODE", NODE));
        // As a kubelet asks for it: good for as long as the agent's pod is there.
        let agent = api.get(AGENT).unwrap();
        let bound = json!({
            "apiVersion": "v1", "kind": "Pod", "name": "agent-x", "uid": agent["metadata"]["uid"],
        });
        let given = api.create(
            TOKEN,
            &json!({
                "apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
                "spec": {"boundObjectRef": bound},
            }),
        );
        let token = given["status"]["token"].as_str().unwrap();
        fs::write(node.root.join("sa/token"), token).unwrap();
        let authority = node.root.join("apiserver/cluster/ca.crt");
        fs::copy(authority, node.root.join("sa/ca.crt")).unwrap();
        for (name, value) in [
            ("KUBERNETES_SERVICE_PROTOCOL", "https".to_string()),
            ("KUBERNETES_SERVICE_HOST", ADDRESS.to_string()),
            ("KUBERNETES_SERVICE_PORT", PORT.to_string()),
            // The watches tell of every answer that ended them.
            ("RUST_LOG", "info,kube_runtime=debug".to_string()),
        ] {
            node.env.push((name.to_string(), value));
        }
        Some(Self {
            api: Some(api),
            node,
        })
    }

    /// Gives the agent its rights, and waits until the API server has noticed.
    pub fn grant(&self) {
        self.api().create_all(ACCESS);
        let asked =
            json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}});
        eventually("the agent may have a token", || {
            let given = self.api().ask_with(&self.token(), "POST", TOKEN, &asked);
            given.is_ok().then_some(())
        });
    }

    /// The agent's own token.
    pub fn token(&self) -> String {
        fs::read_to_string(self.node.root.join("sa/token")).unwrap()
    }

    pub fn api(&self) -> &ApiServer {
        self.api.as_ref().expect("the API server is up")
    }

    /// A pod that is bound to the node and starts.
    pub fn pending(&self, name: &str, labels: &Value) -> Pod {
        let mut pod = self.node.network(name);
        let object = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "labels": labels},
            "spec": {
                "nodeName": NODE, "serviceAccountName": "sa-a",
                "containers": [{"name": "main", "image": "main"}],
            },
        });
        let created = self
            .api()
            .create("/api/v1/namespaces/default/pods", &object);
        pod.uid = created["metadata"]["uid"].as_str().unwrap().to_string();
        pod
    }

    /// Writes a pod's status as a kubelet does.
    pub fn run(&self, pod: &Pod) {
        let status = json!({"status": {
            "phase": "Running", "podIP": pod.ip, "podIPs": [{"ip": pod.ip}],
            "conditions": [{"type": "Ready", "status": "True"}],
        }});
        self.api().patch(&format!("{}/status", path(pod)), &status);
    }

    /// A pod that runs, whose namespace the agent was told of.
    pub fn running(&self, name: &str, labels: &Value) -> Pod {
        let pod = self.pending(name, labels);
        self.run(&pod);
        eventually("the agent knows the pod", || {
            (self.node.event("/note", &self.node.request(&pod)).0 == 200).then_some(())
        });
        pod
    }

    pub fn label(&self, pod: &Pod, mode: Option<&str>) {
        self.api()
            .patch(&path(pod), &json!({"metadata": {"labels": {MODE: mode}}}));
    }

    pub fn label_namespace(&self, mode: Option<&str>) {
        let patch = json!({"metadata": {"labels": {MODE: mode}}});
        self.api().patch("/api/v1/namespaces/default", &patch);
    }

    /// Deletes a pod as a kubelet does that has ended it.
    pub fn delete(&self, pod: &Pod) {
        self.api()
            .delete(&path(pod), &json!({"gracePeriodSeconds": 0}));
    }

    /// A pod's status annotation.
    pub fn status(&self, pod: &Pod) -> Option<String> {
        let object = self.api().get(&path(pod))?;
        let value = &object["metadata"]["annotations"]["ambient.istio.io/redirection"];
        value.as_str().map(str::to_string)
    }

    pub fn wait_status(&self, pod: &Pod, wanted: Option<&str>) {
        eventually(&format!("status {wanted:?} of {}", pod.name), || {
            (self.status(pod).as_deref() == wanted).then_some(())
        });
    }

    /// Waits for a line of the agent's.
    pub fn wait_log(&self, wanted: &str) {
        eventually(&format!("{wanted:?} in the agent's log"), || {
            self.node.log().contains(wanted).then_some(())
        });
    }
}

/// Where a pod is in the API.
pub fn path(pod: &Pod) -> String {
    format!("/api/v1/namespaces/default/pods/{}", pod.name)
}
