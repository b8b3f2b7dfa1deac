//! The plugin's entry in the configuration of the cluster's network.

use std::fs;

use cni::install::{ConfigError, Drift, InstallError};
use serde_json::{Value, json};

use crate::node::{CALICO, Node, TOKEN};

const LIST: &str = "net.d/10-calico.conflist";

fn entry(node: &Node) -> Value {
    json!({
        "name": "warren-cni",
        "type": "warren-cni",
        "ipam": {},
        "dns": {},
        "plugin_log_level": "info",
        "cni_agent_run_dir": node.path("run").to_str().unwrap(),
        "ambient_enabled": true,
        "enablement_selectors": [
            {"podSelector": {"matchLabels": {"istio.io/dataplane-mode": "ambient"}}, "namespaceSelector": {}},
            {
                "podSelector": {"matchExpressions": [
                    {"key": "istio.io/dataplane-mode", "operator": "NotIn", "values": ["none"]}
                ]},
                "namespaceSelector": {"matchLabels": {"istio.io/dataplane-mode": "ambient"}}
            }
        ],
        "exclude_namespaces": ["kube-system"],
        "pod_namespace": "istio-system",
        "agent_pod_prefix": "warren-node-agent-",
        "native_nftables": false,
        "enable_ambient_detection_retry": false,
    })
}

fn refused(node: &Node) -> ConfigError {
    match node.installer().install(TOKEN) {
        Err(InstallError::Config(error)) => error,
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_entry_comes_last_and_the_networks_own_keys_stay() {
    let node = Node::with_network("entry");
    node.installed();
    let mut expected: Value = serde_json::from_str(CALICO).unwrap();
    expected["plugins"]
        .as_array_mut()
        .unwrap()
        .push(entry(&node));
    assert_eq!(node.json(LIST), expected);
    assert_eq!(node.mode(LIST), 0o644);
    // Sorted keys, two spaces, a newline at the end.
    assert_eq!(node.text(LIST), format!("{expected:#}\n"));
}

#[test]
fn of_all_files_the_first_usable_one_is_edited() {
    let node = Node::with_network("first");
    node.conf("00-half.conflist", "{\"name\": \"x\", \"plu");
    node.conf("01-none.conflist", r#"{"name":"x","plugins":[]}"#);
    node.conf("02-other.json", CALICO);
    node.conf("03-calico.conflist.bak", CALICO);
    node.conf("99-later.conflist", CALICO);
    let others = || {
        let mut all = node.names("net.d");
        all.retain(|name| name != "10-calico.conflist");
        let text = |name: &String| node.text(&format!("net.d/{name}"));
        all.iter().map(text).collect::<Vec<_>>()
    };
    let before = others();
    let installed = node.installer().install(TOKEN).unwrap();
    assert_eq!(installed.conf, node.path(LIST));
    assert_eq!(others(), before);
    assert_eq!(node.types(LIST), ["calico", "portmap", "warren-cni"]);
    let damaged = installed.warnings.join("\n");
    assert!(damaged.contains("00-half.conflist") && damaged.contains("01-none.conflist"));
}

#[test]
fn a_single_plugin_becomes_a_list_in_a_file_of_that_kind() {
    let node = Node::new("single");
    let single =
        r#"{"cniVersion":"0.3.0","name":"mynet","type":"bridge","ipam":{"type":"host-local"}}"#;
    node.conf("10-bridge.conf", single);
    let installed = node.installer().install(TOKEN).unwrap();
    assert_eq!(node.names("net.d"), ["10-bridge.conflist"]);
    assert_eq!(installed.conf, node.path("net.d/10-bridge.conflist"));
    let expected = json!({
        "name": "mynet",
        "cniVersion": "0.3.1",
        "plugins": [
            {"name": "mynet", "type": "bridge", "ipam": {"type": "host-local"}},
            entry(&node),
        ],
    });
    assert_eq!(node.json("net.d/10-bridge.conflist"), expected);
    assert_eq!(node.mode("net.d/10-bridge.conflist"), 0o644);
}

#[test]
fn a_single_plugin_that_is_written_again_beside_its_list_becomes_the_list_again() {
    let node = Node::new("single-again");
    node.conf("10-bridge.conf", r#"{"name":"n","type":"bridge"}"#);
    let mut installer = node.installed();
    // The same state as after a kill between the list and the removal, with newer content.
    node.conf(
        "10-bridge.conf",
        r#"{"name":"n","type":"bridge","mtu":9000}"#,
    );
    let drift = installer.check().unwrap_err();
    assert!(matches!(drift, Drift::EntryMissing(_)), "{drift}");
    installer.install(TOKEN).unwrap();
    installer.check().unwrap();
    assert_eq!(node.names("net.d"), ["10-bridge.conflist"]);
    assert_eq!(
        node.json("net.d/10-bridge.conflist")["plugins"][0]["mtu"],
        9000
    );
}

#[test]
fn a_list_that_somebody_else_wrote_is_not_overwritten_by_a_single_plugin() {
    let node = Node::with_network("twins");
    node.conf("10-calico.conf", r#"{"name":"n","type":"bridge"}"#);
    let error = refused(&node);
    assert!(matches!(error, ConfigError::Twins { .. }), "{error}");
    assert_eq!(node.text(LIST), CALICO);
    assert!(node.exists("net.d/10-calico.conf"));
}

#[test]
fn an_entry_that_was_removed_moved_or_changed_is_noticed_and_put_right() {
    let node = Node::with_network("entry-drift");
    let mut installer = node.installed();
    let good = node.text(LIST);
    type Damage = (fn(&mut Vec<Value>), fn(&Drift) -> bool);
    let damages: [Damage; 6] = [
        (
            |plugins| plugins.truncate(2),
            |drift| matches!(drift, Drift::EntryMissing(_)),
        ),
        (
            |plugins| plugins.swap(1, 2),
            |drift| matches!(drift, Drift::EntryMisplaced(_)),
        ),
        (
            |plugins| plugins[2]["exclude_namespaces"] = json!([]),
            |drift| matches!(drift, Drift::EntryChanged(_)),
        ),
        (
            |plugins| plugins[2]["unheard_of"] = json!(1),
            |drift| matches!(drift, Drift::EntryChanged(_)),
        ),
        (
            |plugins| plugins.insert(0, json!({"type": "istio-cni"})),
            |drift| matches!(drift, Drift::EntryChanged(_)),
        ),
        (
            |plugins| plugins.insert(0, plugins[2].clone()),
            |drift| matches!(drift, Drift::EntryMisplaced(_)),
        ),
    ];
    for (number, (damage, is_expected)) in damages.into_iter().enumerate() {
        node.edit(LIST, damage);
        let drift = installer.check().unwrap_err();
        assert!(is_expected(&drift), "{number}: {drift}");
        installer.install(TOKEN).unwrap();
        installer.check().unwrap();
        assert_eq!(node.text(LIST), good, "{number}");
    }
}

#[test]
fn what_the_network_changes_in_its_own_plugins_stays() {
    let node = Node::with_network("network-change");
    let installer = node.installed();
    node.edit(LIST, |plugins| plugins[0]["mtu"] = json!(9000));
    installer.check().unwrap();
    assert_eq!(node.json(LIST)["plugins"][0]["mtu"], 9000);
}

#[test]
fn the_incumbents_entry_gives_way_to_ours() {
    let node = Node::new("incumbent");
    let text =
        r#"{"name":"k8s","plugins":[{"type":"calico"},{"type":"istio-cni","name":"istio-cni"}]}"#;
    node.conf("10-calico.conflist", text);
    node.installed();
    assert_eq!(node.types(LIST), ["calico", "warren-cni"]);
}

#[test]
fn an_earlier_file_takes_over_and_gets_the_entry() {
    let node = Node::with_network("preempted");
    let mut installer = node.installed();
    node.conf(
        "05-cilium.conflist",
        r#"{"name":"c","plugins":[{"type":"cilium-cni"}]}"#,
    );
    let drift = installer.check().unwrap_err();
    assert!(matches!(&drift, Drift::EntryMissing(path) if path.ends_with("05-cilium.conflist")));
    installer.install(TOKEN).unwrap();
    installer.check().unwrap();
    assert_eq!(
        node.types("net.d/05-cilium.conflist"),
        ["cilium-cni", "warren-cni"]
    );
}

#[test]
fn before_a_named_file_an_earlier_one_is_only_worth_a_warning() {
    let mut node = Node::with_network("named");
    node.config.conf_name = Some("10-calico.conflist".into());
    let mut installer = node.installed();
    node.conf("05-early.conf", r#"{"type":"bridge"}"#);
    installer.check().unwrap();
    let installed = installer.install(TOKEN).unwrap();
    assert!(
        installed.warnings[0].contains("05-early.conf"),
        "{:?}",
        installed.warnings
    );
    assert_eq!(node.text("net.d/05-early.conf"), r#"{"type":"bridge"}"#);
}

#[test]
fn a_named_file_is_found_under_its_twins_name_and_waited_for() {
    let mut node = Node::with_network("named-twin");
    node.config.conf_name = Some("10-calico.conf".into());
    node.installed();
    assert_eq!(node.types(LIST), ["calico", "portmap", "warren-cni"]);
    node.config.conf_name = Some("20-other.conf".into());
    let error = InstallError::Config(refused(&node));
    assert!(
        error.is_waiting() && error.to_string().contains("20-other.conf"),
        "{error}"
    );
}

#[test]
fn damaged_files_are_left_alone_and_reported() {
    let half = r#"{"name":"k8s","plugins":[{"type":"cal"#;
    let mut node = Node::new("damaged");
    node.conf("10-calico.conflist", half);
    let error = refused(&node);
    assert!(matches!(error, ConfigError::NoNetwork { .. }));
    assert!(
        error
            .to_string()
            .contains("10-calico.conflist is damaged: EOF"),
        "{error}"
    );
    node.config.conf_name = Some("10-calico.conflist".into());
    let error = refused(&node);
    assert!(matches!(&error, ConfigError::Damaged { .. }), "{error}");
    node.conf("20-ours.conf", half);
    node.config.chained = false;
    node.config.conf_name = Some("20-ours.conf".into());
    let error = InstallError::Config(refused(&node));
    assert_eq!(
        (error.result(), error.is_waiting()),
        ("CREATE_CNI_CONFIG_FAILURE", false)
    );
    assert_eq!(
        (node.text(LIST), node.text("net.d/20-ours.conf")),
        (half.into(), half.into())
    );
    assert_eq!(node.names("net.d"), ["10-calico.conflist", "20-ours.conf"]);
}

#[test]
fn a_missing_folder_and_a_missing_network_are_waited_for() {
    let node = Node::new("missing");
    let error = InstallError::Config(refused(&node));
    assert!(
        error.is_waiting() && error.to_string().contains("net.d yet"),
        "{error}"
    );
    fs::remove_dir(node.path("net.d")).unwrap();
    let error = InstallError::Config(refused(&node));
    assert!(
        error.is_waiting() && error.to_string().contains("there is no folder"),
        "{error}"
    );
}

#[test]
fn alone_the_plugin_has_a_file_of_its_own() {
    let mut node = Node::with_network("alone");
    node.config.chained = false;
    node.config.group_read = true;
    let mut installer = node.installed();
    let mut expected = entry(&node);
    expected["cniVersion"] = json!("0.3.1");
    assert_eq!(node.json("net.d/YYY-istio-cni.conf"), expected);
    assert_eq!(node.mode("net.d/YYY-istio-cni.conf"), 0o640);
    assert_eq!(node.text(LIST), CALICO);
    node.conf("YYY-istio-cni.conf", r#"{"type":"istio-cni"}"#);
    assert!(matches!(installer.check(), Err(Drift::FileChanged(_))));
    installer.install(TOKEN).unwrap();
    fs::remove_file(node.path("net.d/YYY-istio-cni.conf")).unwrap();
    assert!(matches!(installer.check(), Err(Drift::FileMissing(_))));
    installer.install(TOKEN).unwrap();
    installer.check().unwrap();
}

#[test]
fn alone_the_plugin_does_not_take_the_networks_file() {
    let mut node = Node::new("alone-foreign");
    let single = r#"{"name":"n","type":"bridge"}"#;
    node.conf("10-bridge.conf", single);
    node.config.chained = false;
    node.config.conf_name = Some("10-bridge.conf".into());
    let error = refused(&node);
    assert!(matches!(&error, ConfigError::Foreign { plugin, .. } if plugin == "bridge"));
    assert_eq!(node.text("net.d/10-bridge.conf"), single);
}

#[test]
fn names_that_no_runtime_would_read_are_refused() {
    let mut node = Node::with_network("names");
    for (chained, name) in [
        (true, "10-calico.json"),
        (true, "/etc/cni/net.d/10-calico.conflist"),
        (false, "10-calico.conflist"),
        (false, "../ours.conf"),
    ] {
        node.config.chained = chained;
        node.config.conf_name = Some(name.into());
        let error = InstallError::Config(refused(&node));
        assert!(
            error
                .to_string()
                .contains(&format!("CNI_CONF_NAME is {name:?}")),
            "{error}"
        );
        assert!(!error.is_waiting());
    }
    assert_eq!(node.text(LIST), CALICO);
}

#[test]
fn an_owned_file_is_a_copy_that_follows_the_network_and_outlives_it() {
    let mut node = Node::with_network("owned");
    node.config.owned = Some("02-istio-cni.conflist".into());
    let own = "net.d/02-istio-cni.conflist";
    let mut installer = node.installed();
    let mut expected: Value = serde_json::from_str(CALICO).unwrap();
    expected["plugins"]
        .as_array_mut()
        .unwrap()
        .push(entry(&node));
    assert_eq!((node.json(own), node.mode(own)), (expected, 0o600));
    assert_eq!(node.text(LIST), CALICO);

    for damage in [r#"{"name":"k8s","plugins":[{"type":"calico"}]}"#, "", "{"] {
        node.conf("02-istio-cni.conflist", damage);
        assert!(installer.check().is_err(), "{damage}");
        installer.install(TOKEN).unwrap();
        installer.check().unwrap();
    }
    node.edit(LIST, |plugins| plugins.push(json!({"type": "bandwidth"})));
    assert!(matches!(installer.check(), Err(Drift::FileChanged(_))));
    installer.install(TOKEN).unwrap();
    assert_eq!(
        node.types(own),
        ["calico", "portmap", "bandwidth", "warren-cni"]
    );

    fs::remove_file(node.path(LIST)).unwrap();
    installer.check().unwrap();
    installer.install(TOKEN).unwrap();
    assert_eq!(
        node.types(own),
        ["calico", "portmap", "bandwidth", "warren-cni"]
    );
}

#[test]
fn an_owned_file_must_sort_first_and_be_a_list() {
    let mut node = Node::with_network("owned-order");
    node.config.owned = Some("20-ours.conflist".into());
    let error = refused(&node);
    assert!(matches!(error, ConfigError::NotFirst { .. }), "{error}");
    node.config.owned = Some("02-ours.conf".into());
    let error = refused(&node);
    assert!(matches!(error, ConfigError::BadName { .. }), "{error}");
    assert_eq!(node.names("net.d"), ["10-calico.conflist"]);
}
