//! What the agent may do: what is said when it may not, and the token that it gets for the plugin.

use std::fs;

use serde_json::{Value, json};

use crate::harness::eventually;
use crate::member::{AGENT, MODE, Member};

const NAMESPACE: &str = "/api/v1/namespaces/default";

#[test]
#[ignore = "needs a built API server: make test-cluster"]
fn an_agent_without_rights_says_what_it_lacks_and_works_once_it_has_them() {
    let Some(mut member) = Member::without_rights("rights", &[]) else {
        return;
    };
    member.node.spawn();
    let account = "system:serviceaccount:istio-system:node-agent";
    for what in ["pods", "namespaces"] {
        member.wait_log(&format!("{what} cannot be watched, will be tried again: "));
        let log = member.node.log();
        let refused =
            format!(r#"{what} is forbidden: User \"{account}\" cannot list resource \"{what}\""#);
        let refused = [refused.clone(), refused.replace('\\', "")];
        assert!(refused.iter().any(|text| log.contains(text)), "{log}");
    }
    let (code, text) = member.node.get(8000, "/readyz");
    assert_eq!(code, 503, "{text}");
    member.grant();
    eventually("the agent watches", || {
        member
            .node
            .readiness()
            .contains("pods: watched")
            .then_some(())
    });
    let _proxy = member.node.proxy_in_service();
    let pod = member.running("pod-a", &json!({MODE: "ambient"}));
    member.wait_status(&pod, Some("enabled"));
}

#[test]
#[ignore = "needs a built API server: make test-cluster"]
fn a_status_that_may_not_be_written_is_told_of() {
    let Some(mut member) = Member::without_rights("status", &[]) else {
        return;
    };
    member.grant();
    let role = "/apis/rbac.authorization.k8s.io/v1/clusterroles/warren-node-agent";
    let granted = member.api().get(role).unwrap()["rules"].clone();
    let mut narrowed = granted.clone();
    let rules = narrowed.as_array_mut().unwrap();
    rules.retain(|rule| rule["resources"] != json!(["pods/status"]));
    member.api().patch(role, &json!({"rules": narrowed}));
    // The API server takes its time to notice.
    eventually("the right is gone", || {
        let nothing = json!({"metadata": {}});
        let status = format!("{AGENT}/status");
        let written = member
            .api()
            .ask_with(&member.token(), "PATCH", &status, &nothing);
        matches!(written, Err(kube::Error::Api(status)) if status.code == 403).then_some(())
    });
    member.node.start();
    let _proxy = member.node.proxy_in_service();
    let pod = member.running("pod-a", &json!({MODE: "ambient"}));
    member.wait_log("cannot patch resource");
    assert_eq!(member.status(&pod), None);
    member.api().patch(role, &json!({"rules": granted}));
    member.wait_status(&pod, Some("enabled"));
    assert!(pod.is_captured());
}

#[test]
#[ignore = "needs a built API server: make test-cluster"]
fn the_plugins_token_outlives_the_agents_pod() {
    let Some(mut member) = Member::without_rights("token", &[]) else {
        return;
    };
    member.grant();
    let root = member.node.root.clone();
    for (name, folder) in [
        ("CNI_BIN_SOURCE_DIR", "source"),
        ("MOUNTED_CNI_BIN_DIR", "bin"),
        ("MOUNTED_CNI_NET_DIR", "net.d"),
    ] {
        let folder = root.join(folder);
        fs::create_dir(&folder).unwrap();
        let value = folder.display().to_string();
        member.node.env.push((name.to_string(), value));
    }
    fs::write(root.join("source/warren-cni"), "#!/bin/sh\n").unwrap();
    let network = json!({"cniVersion": "1.0.0", "name": "net", "plugins": [{"type": "bridge"}]});
    fs::write(root.join("net.d/10-net.conflist"), network.to_string()).unwrap();
    let install = ("INSTALL_PLUGIN".to_string(), "true".to_string());
    member.node.env.push(install);
    member.node.start();
    member.running("pod-a", &json!({MODE: "none"}));
    let kubeconfig = root.join("run/istio-cni-kubeconfig");
    eventually("the plugin is installed", || {
        let installed = member.node.readiness().contains("plugin: installed");
        installed.then_some(())
    });
    let own = member.token();
    let api = member.api();
    assert!(api.ask_with(&own, "GET", AGENT, &Value::Null).is_ok());
    api.delete(AGENT, &json!({"gracePeriodSeconds": 0}));
    eventually("the agent's own token ends", || {
        let refused = api.ask_with(&own, "GET", NAMESPACE, &Value::Null).err()?;
        matches!(refused, kube::Error::Api(status) if status.code == 401).then_some(())
    });
    // What the plugin asks for.
    for path in [NAMESPACE, "/api/v1/namespaces/default/pods/pod-a"] {
        let given = api.get_by(&kubeconfig, path).unwrap();
        assert!(given["metadata"]["labels"].is_object(), "{given}");
    }
    let refused = api.get_by(&kubeconfig, "/api/v1/secrets").unwrap_err();
    assert!(matches!(refused, kube::Error::Api(status) if status.code == 403));
}
