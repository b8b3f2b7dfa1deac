//! Agents that are told to end: what stays for the next one and what goes.

use serde_json::json;

use crate::harness::{NODE, Node, eventually};

fn daemonset(node: &Node, more: serde_json::Value) {
    let mut object = json!({
        "apiVersion": "apps/v1", "kind": "DaemonSet",
        "metadata": {"name": "warren-node-agent", "namespace": "istio-system"},
        "spec": {"selector": {}, "template": {"metadata": {}, "spec": {"containers": []}}},
    });
    for (pointer, value) in more.as_object().unwrap() {
        let (parent, key) = pointer.rsplit_once('/').unwrap();
        object.pointer_mut(parent).unwrap()[key] = value.clone();
    }
    node.api.put(object);
}

fn has_rules(node: &Node) -> bool {
    let rules = node
        .netns
        .shell("iptables -t nat -S; ipset list -n 2>/dev/null || true");
    let (chain, set) = (
        rules.contains("ISTIO_POSTRT"),
        rules.contains("istio-inpod-probes"),
    );
    assert_eq!(chain, set, "{rules}");
    chain
}

/// A node with a captured pod, whose agent ends; says whether the node's rules stayed.
fn stays(test: &str, env: &[(&str, &str)], prepare: impl Fn(&Node)) -> Option<bool> {
    let mut node = Node::without_agent(test)?;
    node.env = env
        .iter()
        .map(|(name, value)| (name.to_string(), value.to_string()))
        .collect();
    node.start();
    let _proxy = node.proxy_in_service();
    node.namespace("default", Some("ambient"));
    let pod = node.running("pod-a");
    node.wait_status(&pod, Some("enabled"));
    assert!(has_rules(&node));
    prepare(&node);
    node.stop();
    // Running pods keep their rules in any case.
    assert!(pod.is_captured());
    Some(has_rules(&node))
}

#[test]
fn everything_stays_while_the_daemonset_is_there_for_this_node() {
    let expected = Some(true);
    let kept = stays("upgrade", &[], |node| daemonset(node, json!({})));
    if kept.is_none() {
        return;
    }
    assert_eq!(kept, expected);
    let kept = stays("affinity", &[], |node| {
        node.api.put(json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE, "labels": {"mesh": "yes"}},
        }));
        let terms =
            json!([{"matchExpressions": [{"key": "mesh", "operator": "In", "values": ["yes"]}]}]);
        let affinity = json!({"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}});
        daemonset(node, json!({"/spec/template/spec/affinity": affinity}));
    });
    assert_eq!(kept, expected);
}

#[test]
fn everything_goes_when_the_daemonset_does() {
    let Some(kept) = stays("uninstall", &[], |_| {}) else {
        return;
    };
    assert!(!kept);
    let deleted = json!({"/metadata/deletionTimestamp": "2026-01-01T00:00:00Z"});
    assert_eq!(
        stays("deleting", &[], |node| daemonset(node, deleted.clone())),
        Some(false)
    );
    let moved = stays("moved", &[], |node| {
        node.api
            .put(json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}}));
        let terms = json!([{"matchExpressions": [{"key": "mesh", "operator": "Exists"}]}]);
        let affinity = json!({"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}});
        daemonset(node, json!({"/spec/template/spec/affinity": affinity}));
    });
    assert_eq!(moved, Some(false));
    let path = "/apis/apps/v1/namespaces/istio-system/daemonsets/warren-node-agent";
    let unauthorised = stays("unauthorised", &[], |node| {
        daemonset(node, json!({}));
        node.api.fail("GET", path, 401, 10);
    });
    assert_eq!(unauthorised, Some(false));
    let always = [("AMBIENT_DISABLE_SAFE_UPGRADE", "true")];
    assert_eq!(
        stays("always", &always, |node| daemonset(node, json!({}))),
        Some(false)
    );
}

#[test]
fn in_doubt_everything_goes_unless_the_configuration_is_our_own() {
    let path = "/apis/apps/v1/namespaces/istio-system/daemonsets/warren-node-agent";
    let forbidden = |node: &Node| {
        daemonset(node, json!({}));
        node.api.fail("GET", path, 403, 10);
    };
    let Some(kept) = stays("forbidden", &[], forbidden) else {
        return;
    };
    assert!(!kept);
    let owned = [("ISTIO_OWNED_CNI_CONFIG", "true")];
    assert_eq!(stays("owned", &owned, forbidden), Some(true));
}

#[test]
fn an_agent_that_cannot_work_says_why() {
    let Some(mut node) = Node::without_agent("unable") else {
        return;
    };
    for (name, value, part) in [
        ("NODE_NAME", "", "NODE_NAME is not set"),
        (
            "AMBIENT_IPV6",
            "maybe",
            "AMBIENT_IPV6=maybe is not understood",
        ),
        (
            "KUBERNETES_SERVICE_HOST",
            "",
            "KUBERNETES_SERVICE_HOST is not set",
        ),
    ] {
        node.env = vec![(name.to_string(), value.to_string())];
        node.spawn();
        eventually(part, || node.log().contains(part).then_some(()));
        node.kill();
    }
}
