//! What is left when the plugin is removed.

use std::fs;

use serde_json::{Value, json};

use crate::node::{CALICO, Node, TOKEN};

const LIST: &str = "net.d/10-calico.conflist";

#[test]
fn removal_restores_the_network_and_takes_what_was_brought() {
    let node = Node::with_network("removal");
    fs::write(node.path("bin/bridge"), "theirs").unwrap();
    let installer = node.installed();
    installer.uninstall().unwrap();
    let original: Value = serde_json::from_str(CALICO).unwrap();
    assert_eq!((node.json(LIST), node.mode(LIST)), (original, 0o644));
    assert_eq!(node.names("net.d"), ["10-calico.conflist"]);
    assert_eq!(node.names("bin"), ["bridge"]);
    assert!(node.names("bin2").is_empty() && node.names("run").is_empty());
    let before = node.inode(LIST);
    installer.uninstall().unwrap();
    assert_eq!(node.inode(LIST), before);
}

#[test]
fn a_list_made_of_a_single_plugin_stays_a_list_of_that_plugin() {
    let node = Node::new("removal-single");
    node.conf(
        "10-bridge.conf",
        r#"{"cniVersion":"0.3.1","name":"n","type":"bridge"}"#,
    );
    node.installed().uninstall().unwrap();
    let expected = json!({
        "name": "n", "cniVersion": "0.3.1", "plugins": [{"name": "n", "type": "bridge"}],
    });
    assert_eq!(node.names("net.d"), ["10-bridge.conflist"]);
    assert_eq!(node.json("net.d/10-bridge.conflist"), expected);
}

#[test]
fn every_file_that_names_the_plugin_is_cleaned_also_by_an_agent_that_never_installed() {
    let node = Node::with_network("removal-all");
    let mut installer = node.installed();
    node.conf("05-early.conflist", CALICO);
    installer.install(TOKEN).unwrap();
    node.conf("YYY-istio-cni.conf", r#"{"type":"warren-cni"}"#);
    node.installer().uninstall().unwrap();
    assert_eq!(
        node.names("net.d"),
        ["05-early.conflist", "10-calico.conflist"]
    );
    for list in [LIST, "net.d/05-early.conflist"] {
        assert_eq!(node.types(list), ["calico", "portmap"]);
    }
}

#[test]
fn files_of_our_own_are_removed_whole() {
    let mut node = Node::with_network("removal-own");
    node.config.owned = Some("02-istio-cni.conflist".into());
    node.installed().uninstall().unwrap();
    assert_eq!(node.names("net.d"), ["10-calico.conflist"]);
    node.config.owned = None;
    node.config.chained = false;
    node.installed().uninstall().unwrap();
    assert_eq!(node.names("net.d"), ["10-calico.conflist"]);
    assert_eq!(node.text(LIST), CALICO);
}

#[test]
fn a_damaged_file_that_names_the_plugin_is_reported_and_everything_else_is_done() {
    let node = Node::with_network("removal-damaged");
    let installer = node.installed();
    let half = "{\"plugins\": [{\"type\": \"warren-cni\"";
    node.conf("20-half.conflist", half);
    node.conf("30-other.conflist", "{");
    // Cannot be removed as a file.
    fs::remove_file(node.path("bin/warren-cni")).unwrap();
    fs::create_dir(node.path("bin/warren-cni")).unwrap();
    let error = installer.uninstall().unwrap_err();
    assert_eq!(error.0.len(), 2, "{error}");
    let text = error.to_string();
    assert!(
        text.contains("20-half.conflist") && text.contains("bin/warren-cni"),
        "{text}"
    );
    assert_eq!(node.text("net.d/20-half.conflist"), half);
    assert_eq!(node.types(LIST), ["calico", "portmap"]);
    assert!(node.names("bin2").is_empty() && node.names("run").is_empty());
}

#[test]
fn nothing_to_remove_from_is_no_failure() {
    let node = Node::new("removal-nothing");
    for folder in ["bin", "net.d", "run"] {
        fs::remove_dir(node.path(folder)).unwrap();
    }
    node.installer().uninstall().unwrap();
}
