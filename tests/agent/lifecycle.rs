//! Pods that run: labels that come and go, addresses that change, ends, damage, and a watch that breaks.

use serde_json::json;

use crate::harness::{Manner, Node, Pod, Told, eventually};

/// A pod that was captured as it started and runs.
fn captured(node: &Node, name: &str) -> Pod {
    let pod = node.network(name);
    node.api.put(node.object(&pod, false));
    eventually("the addition", || (node.add(&pod).0 == 200).then_some(()));
    let mut object = node.api.object("pods", "default", name).unwrap();
    object["status"] = node.object(&pod, true)["status"].clone();
    node.api.put(object);
    pod
}

fn assert_clean(node: &Node, pod: &Pod) {
    node.wait_status(pod, None);
    assert_eq!(pod.rules(), "");
    assert!(!node.probes().contains(&pod.uid), "{}", node.probes());
}

#[test]
fn a_namespaces_label_captures_and_releases_its_running_pods() {
    let Some(node) = Node::new("label") else {
        return;
    };
    let proxy = node.proxy_in_service();
    let pods = ["pod-a", "pod-b"].map(|name| node.running(name));
    let out = node.running("pod-out");
    node.label(&out, "none");
    node.namespace("default", Some("ambient"));
    for pod in &pods {
        node.wait_status(pod, Some("enabled"));
        assert!(pod.is_captured());
        proxy.wait_added(pod);
        assert!(node.probes().contains(&pod.uid));
    }
    assert_clean(&node, &out);
    // The pod's own label goes before its namespace's.
    node.label(&pods[0], "none");
    proxy.wait_deleted(&pods[0]);
    assert_clean(&node, &pods[0]);
    node.namespace("default", None);
    proxy.wait_deleted(&pods[1]);
    assert_clean(&node, &pods[1]);
    node.label(&out, "ambient");
    node.wait_status(&out, Some("enabled"));
    assert!(
        node.readiness().contains("captured: 1"),
        "{}",
        node.readiness()
    );
}

#[test]
fn pods_of_other_kinds_are_never_captured() {
    let Some(node) = Node::new("kinds") else {
        return;
    };
    let proxy = node.proxy_in_service();
    node.namespace("default", Some("ambient"));
    node.namespace("kube-system", Some("ambient"));
    node.namespace("istio-system", Some("ambient"));
    let pod = node.network("pod");
    let mut objects = Vec::new();
    let mut variant = |name: &str, pointer: &str, value: serde_json::Value| {
        let mut object = node.object(&pod, true);
        object["metadata"]["name"] = name.into();
        object["metadata"]["uid"] = format!("uid-{name}").into();
        object["metadata"]["labels"]["istio.io/dataplane-mode"] = "ambient".into();
        *object.pointer_mut(pointer).unwrap() = value;
        node.api.put(object.clone());
        objects.push(object);
    };
    variant(
        "host",
        "/spec",
        json!({"nodeName": crate::harness::NODE, "hostNetwork": true, "containers": []}),
    );
    variant(
        "sidecar",
        "/metadata/annotations",
        json!({"sidecar.istio.io/status": ""}),
    );
    variant("excluded", "/metadata/namespace", "kube-system".into());
    variant("ended", "/status/phase", "Succeeded".into());
    variant("no-ip", "/status", json!({"phase": "Pending"}));
    variant("elsewhere", "/spec/nodeName", "node-b".into());
    let marker = node.running("marker");
    node.wait_status(&marker, Some("enabled"));
    for object in objects {
        let (namespace, name) = (
            &object["metadata"]["namespace"],
            &object["metadata"]["name"],
        );
        let stored = node
            .api
            .object("pods", namespace.as_str().unwrap(), name.as_str().unwrap())
            .unwrap();
        let status = &stored["metadata"]["annotations"]["ambient.istio.io/redirection"];
        assert!(status.is_null(), "{stored}");
    }
    let uids: Vec<_> = proxy.take();
    assert!(
        uids.iter()
            .all(|told| matches!(told, Told::Add { uid, .. } if *uid == marker.uid)),
        "{uids:?}"
    );
}

#[test]
fn a_pod_that_ends_or_vanishes_is_let_go() {
    let Some(node) = Node::new("ends") else {
        return;
    };
    let proxy = node.proxy_in_service();
    node.namespace("default", Some("ambient"));
    let job = captured(&node, "job");
    let deleted = captured(&node, "deleted");
    // A job that ends may have lost its addresses by then.
    let mut object = node.api.object("pods", "default", "job").unwrap();
    object["status"] = json!({"phase": "Succeeded"});
    node.api.put(object);
    proxy.wait_deleted(&job);
    eventually("the job's probes end", || {
        (!node.probes().contains(&job.uid)).then_some(())
    });
    node.api.delete("pods", "default", "deleted");
    proxy.wait_deleted(&deleted);
    eventually("the pod's probes end", || {
        (!node.probes().contains(&deleted.uid)).then_some(())
    });
    // Even when its namespace has gone first.
    let last = captured(&node, "last");
    node.api.delete("namespaces", "", "default");
    node.api.delete("pods", "default", "last");
    proxy.wait_deleted(&last);
    eventually("nothing is left", || node.probes().is_empty().then_some(()));
    eventually("nothing is noted", || {
        let noted = std::fs::read_dir(node.root.join("run/pods")).unwrap();
        (noted.count() == 0).then_some(())
    });
}

#[test]
fn a_removal_that_fails_is_tried_again_to_its_end() {
    let Some(node) = Node::new("removal") else {
        return;
    };
    let proxy = node.proxy_in_service();
    node.namespace("default", Some("ambient"));
    let pod = captured(&node, "pod-a");
    // The proxy does not answer the removal: the rules are out, but the pod is not told to be until it has.
    *proxy.manner.lock().unwrap() = Manner::Silent;
    node.label(&pod, "none");
    proxy.wait_deleted(&pod);
    assert!(!node.probes().contains(&pod.uid), "{}", node.probes());
    assert_eq!(node.status(&pod).as_deref(), Some("enabled"));
    *proxy.manner.lock().unwrap() = Manner::Serves;
    assert_clean(&node, &pod);
}

#[test]
fn addresses_that_change_are_followed_and_anothers_are_left_alone() {
    let Some(node) = Node::new("addresses") else {
        return;
    };
    let _proxy = node.proxy_in_service();
    node.namespace("default", Some("ambient"));
    let pod = captured(&node, "pod-a");
    let mut object = node.api.object("pods", "default", "pod-a").unwrap();
    object["status"] = json!({"phase": "Running", "podIP": "10.244.0.77", "podIPs": [{"ip": "10.244.0.77"}, {"ip": "fd00::77"}]});
    node.api.put(object);
    eventually("the new addresses", || {
        let probes = node.probes();
        (probes.contains("10.244.0.77")
            && probes.contains("fd00::77")
            && !probes.contains(&format!("{} ", pod.ip)))
        .then_some(())
    });
    // By now the address is another pod's.
    node.netns
        .shell("ipset -exist add istio-inpod-probes-v4 10.244.0.77 comment somebody-else");
    node.api.delete("pods", "default", "pod-a");
    eventually("its own entry goes", || {
        (!node.probes().contains("fd00::77")).then_some(())
    });
    assert!(node.probes().contains("somebody-else"), "{}", node.probes());
}

#[test]
fn annotations_change_the_capture_of_a_running_pod() {
    let Some(node) = Node::new("wishes") else {
        return;
    };
    let _proxy = node.proxy_in_service();
    node.namespace("default", Some("ambient"));
    let pod = captured(&node, "pod-a");
    assert!(pod.rules().contains("--to-ports 15053"));
    let mut object = node.api.object("pods", "default", "pod-a").unwrap();
    object["metadata"]["annotations"]["ambient.istio.io/dns-capture"] = "false".into();
    node.api.put(object);
    eventually("DNS is left alone", || {
        (!pod.rules().contains("15053")).then_some(())
    });
}

#[test]
fn damage_is_told_of_and_put_right() {
    let Some(node) = Node::new("damage") else {
        return;
    };
    let _proxy = node.proxy_in_service();
    node.namespace("default", Some("ambient"));
    let pod = captured(&node, "pod-a");
    pod.netns.shell("iptables -t nat -F ISTIO_OUTPUT");
    eventually("the repair", || pod.is_captured().then_some(()));
    assert!(
        node.log()
            .contains("NOT CAPTURED as it should be: IPv4: chain ISTIO_OUTPUT of table nat"),
        "{}",
        node.log()
    );
    node.netns.shell("iptables -t nat -F POSTROUTING");
    eventually("the repair of the node's rules", || {
        node.netns
            .shell("iptables -t nat -S POSTROUTING")
            .contains("ISTIO_POSTRT")
            .then_some(())
    });
    eventually("the count of repairs", || {
        node.get(15014, "/metrics")
            .1
            .contains("warren_node_agent_capture_repairs_total 2")
            .then_some(())
    });
}

#[test]
fn nothing_is_missed_while_the_watch_is_broken() {
    let Some(node) = Node::new("watch") else {
        return;
    };
    let proxy = node.proxy_in_service();
    let pods = ["pod-a", "pod-b", "pod-c"].map(|name| node.running(name));
    node.label(&pods[2], "ambient");
    node.wait_status(&pods[2], Some("enabled"));
    node.api.drop_connections();
    node.namespace("default", Some("ambient"));
    node.api.delete("pods", "default", "pod-c");
    node.api.compact();
    node.api.drop_connections();
    for pod in &pods[..2] {
        node.wait_status(pod, Some("enabled"));
        assert!(pod.is_captured());
    }
    proxy.wait_deleted(&pods[2]);
}

#[test]
fn a_status_that_cannot_be_written_is_written_later() {
    let Some(node) = Node::new("status") else {
        return;
    };
    let _proxy = node.proxy_in_service();
    let pod = node.running("pod-a");
    node.api.fail(
        "PATCH",
        "/api/v1/namespaces/default/pods/pod-a/status",
        500,
        3,
    );
    node.namespace("default", Some("ambient"));
    node.wait_status(&pod, Some("enabled"));
    assert!(
        node.log().contains("its status cannot be written"),
        "{}",
        node.log()
    );
}

#[test]
fn a_running_pod_is_found_among_the_nodes_processes() {
    let Some(mut node) = Node::without_agent("processes") else {
        return;
    };
    let pod = node.network("pod-a");
    let process = cni::netns::within(std::os::fd::AsFd::as_fd(&pod.netns.0), || {
        std::process::Command::new("sleep").arg("600").spawn()
    });
    let mut process = process.unwrap();
    let shown = node.root.join("proc").join(process.id().to_string());
    std::fs::create_dir_all(&shown).unwrap();
    for name in ["ns", "stat"] {
        std::os::unix::fs::symlink(format!("/proc/{}/{name}", process.id()), shown.join(name))
            .unwrap();
    }
    std::fs::write(
        shown.join("cgroup"),
        format!("0::/kubepods/pod{}/cafe\n", pod.uid),
    )
    .unwrap();
    node.api.put(node.object(&pod, true));
    node.start();
    let proxy = node.proxy_in_service();
    node.namespace("default", Some("ambient"));
    node.wait_status(&pod, Some("enabled"));
    assert!(pod.is_captured());
    proxy.wait_added(&pod);
    process.kill().unwrap();
    process.wait().unwrap();
}
