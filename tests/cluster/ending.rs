//! An agent that is told to end, and what it reads of its DaemonSet.

use serde_json::{Value, json};

use crate::member::{MODE, Member};

const SETS: &str = "/apis/apps/v1/namespaces/istio-system/daemonsets";

fn daemonset(affinity: &Value) -> Value {
    let labels = json!({"app": "agent"});
    json!({
        "apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": {"name": "warren-node-agent"},
        "spec": {
            "selector": {"matchLabels": labels},
            "template": {
                "metadata": {"labels": labels},
                "spec": {"affinity": affinity, "containers": [{"name": "agent", "image": "warren"}]},
            },
        },
    })
}

fn for_nodes_with(label: &str) -> Value {
    let term = json!({"matchExpressions": [{"key": label, "operator": "Exists"}]});
    let required = json!({"nodeSelectorTerms": [term]});
    json!({"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": required}})
}

#[test]
#[ignore = "needs a built API server: make test-cluster"]
fn the_end_depends_on_the_daemonset() {
    let Some(mut member) = Member::new("end") else {
        return;
    };
    let pod = {
        let _proxy = member.node.proxy_in_service();
        let pod = member.running("pod-a", &json!({MODE: "ambient"}));
        member.wait_status(&pod, Some("enabled"));
        pod
    };
    let endings = [
        (
            for_nodes_with("kubernetes.io/os"),
            "everything stays in place: the DaemonSet is still there",
        ),
        (
            for_nodes_with("gpu"),
            "cleaning up: the DaemonSet is no longer for this node",
        ),
    ];
    for (affinity, ending) in endings {
        member.api().create(SETS, &daemonset(&affinity));
        member.node.stop();
        assert!(member.node.log().contains(ending), "{}", member.node.log());
        let path = format!("{SETS}/warren-node-agent");
        member.api().delete(&path, &json!({}));
        member.node.start();
    }
    member.node.stop();
    let ending = "cleaning up: the DaemonSet is gone";
    assert!(member.node.log().contains(ending), "{}", member.node.log());
    assert!(pod.is_captured());
}
