//! Pods that a runtime starts: what the plugin is answered, and what is true by then.

use serde_json::json;

use crate::harness::{Manner, Node, Told, eventually};

#[test]
fn a_pod_is_captured_served_and_told_before_it_starts() {
    let Some(node) = Node::new("starting") else {
        return;
    };
    let proxy = node.proxy_in_service();
    node.namespace("default", Some("ambient"));
    let pod = node.network("pod-a");
    node.api.put(node.object(&pod, false));
    assert_eq!(pod.rules(), "");
    assert_eq!(node.add(&pod), (200, String::new()));
    assert!(pod.is_captured());
    let expected = Told::Add {
        uid: pod.uid.clone(),
        name: "default/pod-a".into(),
        account: "sa-a".into(),
        netns: cni::netns::id(&pod.netns.0).unwrap(),
    };
    assert_eq!(proxy.take(), [expected]);
    let entry = format!("{} comment \"{}\"", pod.ip, pod.uid);
    assert!(node.probes().contains(&entry), "{}", node.probes());
    assert_eq!(node.status(&pod).as_deref(), Some("enabled"));
    assert_eq!(node.event("/cmdcheck", &node.request(&pod)).0, 200);
    // Again is the same, and so is what the watch makes of it.
    assert_eq!(node.add(&pod).0, 200);
    node.api.put(with_status(&node, &pod));
    assert!(pod.is_captured());
    assert!(node.log().contains("the self-test came through"));
    let (_, metrics) = node.get(15014, "/metrics");
    assert!(
        metrics.contains("warren_node_agent_pods{state=\"captured\"} 1"),
        "{metrics}"
    );
    assert!(
        metrics.contains("istio_cni_plugin_requests_total{response_code=\"200\"} 3"),
        "{metrics}"
    );
    assert!(metrics.contains("ztunnel_connected 1"), "{metrics}");
}

#[test]
fn a_pod_whose_sandbox_is_made_anew_is_captured_in_the_new_one() {
    let Some(node) = Node::new("anew") else {
        return;
    };
    let proxy = node.proxy_in_service();
    node.namespace("default", Some("ambient"));
    let (pod, sandbox) = (node.network("pod-a"), node.network("again"));
    node.api.put(node.object(&pod, false));
    eventually("the addition", || (node.add(&pod).0 == 200).then_some(()));
    let mut request = node.request(&sandbox);
    request["PodName"] = "pod-a".into();
    proxy.take();
    assert_eq!(node.event("/cmdadd", &request), (200, String::new()));
    assert!(sandbox.is_captured());
    let of_the_new = cni::netns::id(&sandbox.netns.0).unwrap();
    let told = proxy.take();
    assert!(
        matches!(&told[..], [Told::Add { uid, netns, .. }] if (uid, *netns) == (&pod.uid, of_the_new)),
        "{told:?}"
    );
    let probes = node.probes();
    assert!(probes.contains(&sandbox.ip.to_string()), "{probes}");
    assert!(!probes.contains(&pod.ip.to_string()), "{probes}");
}

fn with_status(node: &Node, pod: &crate::harness::Pod) -> serde_json::Value {
    let mut object = node.api.object("pods", "default", &pod.name).unwrap();
    object["status"] = node.object(pod, true)["status"].clone();
    object
}

#[test]
fn what_is_not_to_be_captured_is_refused_by_reason_and_left_alone() {
    let Some(node) = Node::new("refusing") else {
        return;
    };
    let _proxy = node.proxy_in_service();
    let pod = node.network("pod-a");
    let (code, text) = node.add(&pod);
    assert_eq!(code, 500);
    assert!(
        text.contains("pod default/pod-a has not been heard of on this node yet"),
        "{text}"
    );
    node.api.put(node.object(&pod, false));
    let (code, text) = node.add(&pod);
    assert_eq!(code, 500);
    assert!(
        text.contains("neither it nor its namespace asks for the mesh"),
        "{text}"
    );
    assert_eq!(node.event("/cmdcheck", &node.request(&pod)).0, 200);
    let asked = json!({"namespace": "default", "name": "pod-a"});
    let (code, text) = node.event("/decide", &asked);
    assert_eq!(code, 200);
    assert!(text.contains("\"enrolled\":false"), "{text}");
    assert_eq!(
        node.event("/decide", &json!({"namespace": "default", "name": "x"}))
            .0,
        404
    );
    node.namespace("default", Some("ambient"));
    eventually("the namespace's label", || {
        node.event("/decide", &asked)
            .1
            .contains("\"enrolled\":true")
            .then_some(())
    });
    // Enrolled, and nobody has told of it yet: that is a difference.
    assert_eq!(node.event("/cmdcheck", &node.request(&pod)).0, 500);
    let mut elsewhere = node.request(&pod);
    elsewhere["Netns"] = "/netns/nowhere".into();
    let (code, text) = node.event("/cmdadd", &elsewhere);
    assert_eq!(code, 500);
    assert!(text.contains("cannot be opened"), "{text}");
    // The node's own network is never a pod's.
    std::os::unix::fs::symlink(node.netns.path(), node.root.join("netns/host")).unwrap();
    elsewhere["Netns"] = "/netns/host".into();
    let (code, text) = node.event("/cmdadd", &elsewhere);
    assert_eq!(code, 500);
    assert!(
        text.contains("the network namespace of the node itself"),
        "{text}"
    );
    assert_eq!(pod.rules(), "");
    for (body, expected) in [
        (&b""[..], 400),
        (b"{", 400),
        (b"[]", 400),
        (b"{\"Netns\":\"/x\"} trailing", 400),
        (&[0xff; 100], 400),
    ] {
        assert_eq!(node.raw_event("/cmdadd", body).0, expected, "{body:?}");
    }
    assert_eq!(node.raw_event("/cmdadd", &vec![b' '; 2 << 20]).0, 400);
    assert_eq!(node.raw_event("/nothing", b"{}").0, 404);
    assert_eq!(node.add(&pod).0, 200);
}

#[test]
fn without_a_proxy_a_pod_waits_and_cannot_talk() {
    let Some(node) = Node::new("waiting") else {
        return;
    };
    node.namespace("default", Some("ambient"));
    let pod = node.network("pod-a");
    node.api.put(node.object(&pod, false));
    eventually("a refusal for want of a proxy", || {
        let (code, text) = node.add(&pod);
        (code == 500 && text.contains("no proxy is connected")).then_some(())
    });
    assert_eq!(node.status(&pod).as_deref(), Some("pending"));
    assert!(pod.is_captured());
    assert!(
        node.readiness().contains("pending: default/pod-a"),
        "{}",
        node.readiness()
    );
    assert!(!node.probes().contains(&pod.uid));
    let proxy = node.proxy();
    proxy.wait_added(&pod);
    // Its sandbox stands, so the watch finishes what the plugin began.
    node.api.put(with_status(&node, &pod));
    node.wait_status(&pod, Some("enabled"));
    assert!(node.probes().contains(&pod.uid));
}

#[test]
fn a_proxy_that_refuses_or_is_silent_keeps_the_pod_from_starting() {
    let Some(node) = Node::new("unwilling") else {
        return;
    };
    let proxy = node.proxy_in_service();
    node.namespace("default", Some("ambient"));
    let pod = node.network("pod-a");
    node.api.put(node.object(&pod, false));
    *proxy.manner.lock().unwrap() = Manner::Refuses("no room".into());
    let (code, text) = eventually("the refusal", || {
        let answer = node.add(&pod);
        answer.1.contains("no room").then_some(answer)
    });
    assert_eq!(code, 500, "{text}");
    assert_eq!(node.status(&pod).as_deref(), Some("pending"));
    *proxy.manner.lock().unwrap() = Manner::Silent;
    let (code, text) = node.add(&pod);
    assert_eq!(code, 500);
    assert!(text.contains("did not answer"), "{text}");
    // It was disconnected for that, so nothing is taken for a late answer; it comes back and serves.
    *proxy.manner.lock().unwrap() = Manner::Serves;
    eventually("the addition", || (node.add(&pod).0 == 200).then_some(()));
    assert_eq!(node.status(&pod).as_deref(), Some("enabled"));
}

#[test]
fn a_pod_whose_rules_do_not_work_does_not_start_and_is_an_alarm() {
    let Some(node) = Node::new("useless") else {
        return;
    };
    let proxy = node.proxy_in_service();
    node.namespace("default", Some("ambient"));
    let pod = node.network("pod-a");
    node.api.put(node.object(&pod, false));
    // Somebody else's rule comes first.
    pod.netns
        .shell("iptables -t nat -A OUTPUT -p tcp -j ACCEPT");
    let (code, text) = eventually("the refusal", || {
        let answer = node.add(&pod);
        answer
            .1
            .contains("do not come to port 15001")
            .then_some(answer)
    });
    assert_eq!(code, 500, "{text}");
    assert_eq!(node.status(&pod), None);
    assert_eq!(proxy.take(), []);
    assert!(
        node.readiness().contains("NOT CAPTURED: default/pod-a"),
        "{}",
        node.readiness()
    );
    let (_, metrics) = node.get(15014, "/metrics");
    assert!(
        metrics.contains("warren_node_agent_pods{state=\"uncaptured\"} 1"),
        "{metrics}"
    );
    assert!(
        !metrics.contains("warren_node_agent_selftest_failures_total 0"),
        "{metrics}"
    );
    pod.netns
        .shell("iptables -t nat -D OUTPUT -p tcp -j ACCEPT");
    assert_eq!(node.add(&pod).0, 200);
    assert!(
        node.readiness().contains("captured: 1"),
        "{}",
        node.readiness()
    );
}

#[test]
fn many_pods_start_at_once() {
    let Some(node) = Node::new("many") else {
        return;
    };
    let proxy = node.proxy_in_service();
    node.namespace("default", Some("ambient"));
    let pods: Vec<_> = (0..20)
        .map(|number| node.network(&format!("pod-{number}")))
        .collect();
    for pod in &pods {
        node.api.put(node.object(pod, false));
    }
    std::thread::scope(|scope| {
        let adding = pods.iter().map(|pod| scope.spawn(|| node.add(pod)));
        for added in adding.collect::<Vec<_>>() {
            assert_eq!(added.join().unwrap(), (200, String::new()));
        }
    });
    for pod in &pods {
        proxy.wait_added(pod);
        assert!(pod.is_captured());
        assert_eq!(node.status(pod).as_deref(), Some("enabled"));
    }
    assert_eq!(node.probes().lines().count(), 20);
}

#[test]
fn what_the_plugin_logs_stands_in_the_agents_log() {
    use std::io::{Read, Write};
    let Some(node) = Node::new("log") else {
        return;
    };
    let lines = json!([
        "{\"level\":\"warn\",\"time\":\"t\",\"msg\":\"pod refused\",\"pod\":\"a/b\"}",
        "plain"
    ]);
    let body = lines.to_string();
    let mut socket =
        std::os::unix::net::UnixStream::connect(node.root.join("run/log.sock")).unwrap();
    write!(
        socket,
        "POST /log HTTP/1.1\r\nHost: unix\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    let mut text = String::new();
    socket.read_to_string(&mut text).unwrap();
    assert!(text.starts_with("HTTP/1.1 200"), "{text}");
    eventually("the plugin's lines", || {
        let log = node.log();
        let line = log.lines().find(|line| line.contains("pod refused"))?;
        assert!(
            line.contains("warn") && line.contains("cni-plugin") && line.contains("a/b"),
            "{line}"
        );
        log.contains("plain").then_some(())
    });
}
