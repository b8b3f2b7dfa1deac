//! Pods of a real API server: captured and let go as their labels, and those of their namespace, say.

use serde_json::json;

use crate::harness::{Pod, Told};
use crate::member::{MODE, Member, path};

fn assert_released(member: &Member, pod: &Pod) {
    member.wait_status(pod, None);
    assert_eq!(pod.rules(), "");
    assert!(!member.node.probes().contains(&pod.uid));
}

#[test]
#[ignore = "needs a built API server: make test-cluster"]
fn a_running_pod_is_captured_and_let_go_by_its_label() {
    let Some(member) = Member::new("label") else {
        return;
    };
    let proxy = member.node.proxy_in_service();
    let pod = member.running("pod-a", &json!({MODE: "ambient"}));
    let out = member.running("pod-out", &json!({}));
    member.wait_status(&pod, Some("enabled"));
    assert!(pod.is_captured());
    let expected = Told::Add {
        uid: pod.uid.clone(),
        name: "default/pod-a".into(),
        account: "sa-a".into(),
        netns: cni::netns::id(&pod.netns.0).unwrap(),
    };
    assert_eq!(proxy.take(), [expected]);
    assert!(member.node.probes().contains(&pod.uid));
    assert_released(&member, &out);
    // A kubelet's status leaves the agent's annotation alone.
    member.run(&pod);
    assert_eq!(member.status(&pod).as_deref(), Some("enabled"));
    member.label(&pod, Some("none"));
    proxy.wait_deleted(&pod);
    assert_released(&member, &pod);
    member.label(&pod, None);
    member.label(&out, Some("ambient"));
    member.wait_status(&out, Some("enabled"));
    assert_released(&member, &pod);
}

#[test]
#[ignore = "needs a built API server: make test-cluster"]
fn a_namespaces_label_captures_and_releases_its_pods() {
    let Some(member) = Member::new("namespace") else {
        return;
    };
    let proxy = member.node.proxy_in_service();
    let pod = member.running("pod-a", &json!({}));
    let out = member.running("pod-out", &json!({MODE: "none"}));
    member.label_namespace(Some("ambient"));
    member.wait_status(&pod, Some("enabled"));
    assert!(pod.is_captured());
    assert_released(&member, &out);
    member.label_namespace(None);
    proxy.wait_deleted(&pod);
    assert_released(&member, &pod);
}

#[test]
#[ignore = "needs a built API server: make test-cluster"]
fn a_pod_is_captured_before_it_starts_and_let_go_when_it_is_deleted() {
    let Some(member) = Member::new("start") else {
        return;
    };
    let proxy = member.node.proxy_in_service();
    member.label_namespace(Some("ambient"));
    let pod = member.pending("pod-a", &json!({}));
    crate::harness::eventually("the plugin's request is granted", || {
        (member.node.add(&pod).0 == 200).then_some(())
    });
    assert!(pod.is_captured());
    assert_eq!(member.status(&pod).as_deref(), Some("enabled"));
    member.run(&pod);
    // Asked to go, a pod stays captured while it ends: its last words go through the mesh too.
    let deleted = member
        .api()
        .delete(&path(&pod), &json!({"gracePeriodSeconds": 30}));
    assert!(deleted["metadata"]["deletionTimestamp"].is_string());
    let marker = member.running("marker", &json!({}));
    member.wait_status(&marker, Some("enabled"));
    assert!(pod.is_captured());
    assert!(!proxy.take().contains(&Told::Del(pod.uid.clone())));
    member.delete(&pod);
    proxy.wait_deleted(&pod);
    crate::harness::eventually("its probes end", || {
        (!member.node.probes().contains(&pod.uid)).then_some(())
    });
    // Another pod of the same name is another pod.
    let other = member.running("pod-b", &json!({}));
    member.wait_status(&other, Some("enabled"));
}
