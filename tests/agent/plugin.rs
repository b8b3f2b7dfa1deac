//! The plugin as a runtime calls it: installed by the agent, asking the API server over TLS, with each of the two away.

use std::fs;
use std::io::Write;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use cni::netns::within;
use serde_json::{Value, json};
use warren::lab::api::Options;

use crate::harness::{Node, Pod, eventually};

/// A token of the account `node-agent` of the namespace `mesh`, by its claims.
const TOKEN: &str = "e30.eyJrdWJlcm5ldGVzLmlvIjp7Im5hbWVzcGFjZSI6Im1lc2giLCJzZXJ2aWNlYWNjb3VudCI6eyJuYW1lIjoibm9kZS1hZ2VudCIsInVpZCI6IjEifX19.c2ln";

/// The plugin's program, which is built with the workspace.
fn program() -> PathBuf {
    let folder = Path::new(env!("CARGO_BIN_EXE_warren")).parent().unwrap();
    let plugin = folder.join("warren-cni");
    assert!(
        plugin.exists(),
        "{} is missing: build it with `cargo build -p cni`",
        plugin.display()
    );
    plugin
}

/// A node on which the agent has installed the plugin.
struct Runtime {
    node: Node,
    conf: PathBuf,
}

/// What the plugin said, and whether it failed.
#[derive(Debug)]
struct Said {
    ok: bool,
    value: Value,
}

impl Said {
    fn failure(&self) -> &str {
        assert!(!self.ok, "{self:?}");
        self.value["msg"].as_str().unwrap()
    }
}

impl Runtime {
    fn new(test: &str) -> Option<Self> {
        let options = Options {
            tokens: Some(vec![TOKEN.to_string(), "plugin-token".to_string()]),
            issue_token: Some(Box::new(|namespace, name| {
                assert_eq!((namespace, name), ("mesh", "node-agent"));
                "plugin-token".to_string()
            })),
            ..Options::default()
        };
        let mut node = Node::with_api(test, options)?;
        node.api.put(json!({
            "apiVersion": "v1", "kind": "ServiceAccount",
            "metadata": {"name": "node-agent", "namespace": "mesh"},
        }));
        let certificate = node.secure();
        fs::write(node.root.join("sa/ca.crt"), certificate).unwrap();
        fs::write(node.root.join("sa/token"), TOKEN).unwrap();
        let [conf, bin, image] = ["net.d", "bin", "image"].map(|name| node.root.join(name));
        for folder in [&conf, &bin, &image] {
            fs::create_dir_all(folder).unwrap();
        }
        fs::copy(program(), image.join("warren-cni")).unwrap();
        let list = json!({"cniVersion": "1.0.0", "name": "net", "plugins": [{"type": "bridge"}]});
        fs::write(conf.join("10-net.conflist"), list.to_string()).unwrap();
        let text = |path: &Path| path.display().to_string();
        node.set("INSTALL_PLUGIN", "true");
        node.set("HOST_ROOT", "/");
        node.set("MOUNTED_CNI_NET_DIR", &text(&conf));
        node.set("MOUNTED_CNI_BIN_DIR", &text(&bin));
        node.set("CNI_BIN_SOURCE_DIR", &text(&image));
        node.set("PLUGIN_LOG_LEVEL", "debug");
        node.start();
        let runtime = Self { node, conf };
        eventually("the plugin is installed", || {
            let ready = runtime.node.get(8000, "/readyz").0 == 200;
            ready.then_some(())
        });
        Some(runtime)
    }

    /// The plugin's entry as a runtime hands it over.
    fn entry(&self) -> Value {
        let text = fs::read_to_string(self.conf.join("10-net.conflist")).unwrap();
        let list: Value = serde_json::from_str(&text).unwrap();
        let mut entry = list["plugins"][1].clone();
        assert_eq!(entry["type"], "warren-cni");
        entry["cniVersion"] = list["cniVersion"].clone();
        entry
    }

    fn call(&self, command: &str, pod: &Pod) -> Said {
        self.call_as(command, &pod.netns.path(), "default", pod)
    }

    fn call_as(&self, command: &str, netns: &str, namespace: &str, pod: &Pod) -> Said {
        let mut entry = self.entry();
        entry["prevResult"] = previous(pod);
        let spawned = within(self.node.netns.0.as_fd(), || {
            Command::new(self.node.root.join("bin/warren-cni"))
                .env_clear()
                .env("CNI_COMMAND", command)
                .env("CNI_CONTAINERID", "sandbox")
                .env("CNI_NETNS", netns)
                .env("CNI_IFNAME", "eth0")
                .env("CNI_PATH", self.node.root.join("bin"))
                .env(
                    "CNI_ARGS",
                    format!(
                        "IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={}",
                        pod.name
                    ),
                )
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
        });
        let mut plugin = spawned.unwrap();
        let mut input = plugin.stdin.take().unwrap();
        input.write_all(entry.to_string().as_bytes()).unwrap();
        drop(input);
        let output = plugin.wait_with_output().unwrap();
        let said = Said {
            ok: output.status.success(),
            value: serde_json::from_slice(&output.stdout).unwrap_or_default(),
        };
        let log = String::from_utf8_lossy(&output.stderr);
        assert!(
            log.lines()
                .all(|line| serde_json::from_str::<Value>(line).is_ok()),
            "{log}"
        );
        said
    }

    /// A pod of which only the API server knows.
    fn pod(&self, name: &str, mode: Option<&str>) -> Pod {
        let pod = self.node.network(name);
        let mut object = self.node.object(&pod, false);
        if let Some(mode) = mode {
            object["metadata"]["labels"]["istio.io/dataplane-mode"] = mode.into();
        }
        self.node.api.put(object);
        pod
    }

    /// The API server refuses everything of pods.
    fn api_is_gone(&self) {
        self.node
            .api
            .fail("GET", "/api/v1/namespaces/default/pods/", 503, usize::MAX);
    }
}

/// What the plugins before have made of a pod.
fn previous(pod: &Pod) -> Value {
    json!({
        "cniVersion": "1.0.0",
        "interfaces": [{"name": "eth0", "sandbox": pod.netns.path(), "mac": "02:00:00:00:00:01"}],
        "ips": [{"interface": 0, "address": format!("{}/32", pod.ip), "gateway": "10.244.0.1"}],
        "routes": [{"dst": "0.0.0.0/0"}],
        "dns": {},
    })
}

#[test]
fn a_pod_of_the_mesh_is_captured_and_the_result_of_the_others_passed_on() {
    let Some(runtime) = Runtime::new("plugin-add") else {
        return;
    };
    let node = &runtime.node;
    let proxy = node.proxy_in_service();
    let pod = runtime.pod("a", Some("ambient"));
    let said = runtime.call("ADD", &pod);
    assert!(said.ok, "{said:?}");
    assert_eq!(said.value, previous(&pod));
    assert!(pod.is_captured());
    proxy.wait_added(&pod);
    assert_eq!(node.status(&pod).as_deref(), Some("enabled"));
    let entry = format!("{} comment \"{}\"", pod.ip, pod.uid);
    assert!(node.probes().contains(&entry), "{}", node.probes());
    // With the token that outlives the agent's pod.
    let kubeconfig = fs::read_to_string(node.root.join("run/istio-cni-kubeconfig")).unwrap();
    assert!(kubeconfig.contains("plugin-token"), "{kubeconfig}");

    assert!(runtime.call("CHECK", &pod).ok);
    pod.netns.shell("iptables -t nat -F ISTIO_OUTPUT");
    let said = runtime.call("CHECK", &pod);
    // The agent may have repaired it in between; then it is there again.
    assert!(!said.ok || pod.is_captured());
    if !said.ok {
        assert!(said.failure().contains("is not captured"), "{said:?}");
    }
    eventually("the repair", || pod.is_captured().then_some(()));
    assert!(runtime.call("CHECK", &pod).ok);
    let said = runtime.call("DEL", &pod);
    assert!(said.ok && said.value.is_null(), "{said:?}");

    let log = fs::read_to_string(node.root.join("run/istio-cni.log")).unwrap();
    assert!(
        log.contains("captured: it or its namespace asks for the mesh"),
        "{log}"
    );
    eventually("the record in the agent's log", || {
        node.log().contains("\"pod\":\"default/a\"").then_some(())
    });
}

#[test]
fn a_pod_outside_the_mesh_starts_whoever_is_away() {
    let Some(mut runtime) = Runtime::new("plugin-outside") else {
        return;
    };
    let pod = runtime.pod("a", None);
    let said = runtime.call("ADD", &pod);
    assert!(said.ok, "{said:?}");
    assert_eq!(said.value, previous(&pod));
    assert!(!pod.is_captured());
    assert!(runtime.call("CHECK", &pod).ok);
    // The agent knows the pod's namespace from now on, although no process is in it.
    let proxy = runtime.node.proxy_in_service();
    runtime.node.api.put(runtime.node.object(&pod, true));
    runtime.node.label(&pod, "ambient");
    runtime.node.wait_status(&pod, Some("enabled"));
    assert!(pod.is_captured());
    drop(proxy);

    runtime.api_is_gone();
    let other = runtime.pod("b", None);
    eventually("the agent has heard of the pod", || {
        let asked = json!({"namespace": "default", "name": "b"});
        (runtime.node.event("/decide", &asked).0 == 200).then_some(())
    });
    let said = runtime.call("ADD", &other);
    assert!(said.ok, "the agent can tell: {said:?}");
    runtime.node.kill();
    let said = runtime.call("ADD", &other);
    let text = "neither the API server nor the node agent can tell";
    assert!(said.failure().contains(text), "{said:?}");
    assert_eq!(said.value["code"], 11);
    // What is never enrolled need not be asked for.
    let netns = other.netns.path();
    assert!(runtime.call_as("ADD", &netns, "kube-system", &other).ok);
    let mut agent = runtime.node.network("c");
    agent.name = "warren-node-agent-x".to_string();
    assert!(
        runtime
            .call_as("ADD", &agent.netns.path(), "istio-system", &agent)
            .ok
    );
    assert!(
        !runtime
            .call_as("ADD", &agent.netns.path(), "default", &agent)
            .ok
    );
    runtime.node.api.recover();
    let said = runtime.call("ADD", &other);
    assert!(said.ok, "the API server can tell: {said:?}");
}

#[test]
fn a_pod_of_the_mesh_waits_for_an_agent() {
    let Some(mut runtime) = Runtime::new("plugin-waits") else {
        return;
    };
    runtime.node.namespace("default", Some("ambient"));
    let proxy = runtime.node.proxy_in_service();
    runtime.node.kill();
    let pod = runtime.pod("a", None);
    let said = runtime.call("ADD", &pod);
    assert!(
        said.failure()
            .contains("the node agent that captures it does not answer"),
        "{said:?}"
    );
    assert_eq!(said.value["code"], 11);
    assert!(!pod.is_captured());
    assert!(!runtime.call("CHECK", &pod).ok);
    assert!(runtime.call("DEL", &pod).ok);
    runtime.node.start();
    drop(proxy);
    let proxy = runtime.node.proxy_in_service();
    let said = runtime.call("ADD", &pod);
    assert!(said.ok, "{said:?}");
    proxy.wait_added(&pod);
    // The API server goes, the agent knows.
    runtime.api_is_gone();
    let said = runtime.call("ADD", &pod);
    assert!(said.ok, "{said:?}");
}

#[test]
fn what_cannot_be_captured_does_not_start() {
    let Some(runtime) = Runtime::new("plugin-refused") else {
        return;
    };
    let node = &runtime.node;
    let _proxy = node.proxy_in_service();
    let pod = runtime.pod("a", Some("ambient"));
    let said = runtime.call_as("ADD", "/nowhere", "default", &pod);
    assert!(
        said.failure().contains("/nowhere cannot be found"),
        "{said:?}"
    );
    let said = runtime.call_as("ADD", &node.netns.path(), "default", &pod);
    assert!(
        said.failure()
            .contains("the plugin's own network namespace"),
        "{said:?}"
    );
    node.program("iptables-restore", "echo broken >&2; exit 1");
    node.program("iptables-nft-restore", "echo broken >&2; exit 1");
    let said = runtime.call("ADD", &pod);
    assert!(said.failure().contains("is not captured"), "{said:?}");
    assert!(
        said.value["details"].as_str().unwrap().contains("broken"),
        "{said:?}"
    );
    assert_eq!(said.value["code"], 100);
    assert!(!pod.is_captured());
}

#[test]
fn the_proxy_itself_is_never_held_up() {
    let Some(runtime) = Runtime::new("plugin-proxy") else {
        return;
    };
    let node = &runtime.node;
    node.namespace("istio-system", Some("ambient"));
    let pod = node.network("ztunnel-x");
    let mut object = node.object(&pod, false);
    object["metadata"]["namespace"] = "istio-system".into();
    object["metadata"]["labels"]["app"] = "ztunnel".into();
    node.api.put(object);
    let said = runtime.call_as("ADD", &pod.netns.path(), "istio-system", &pod);
    assert!(said.ok, "{said:?}");
    assert_eq!(pod.rules(), "");
}
