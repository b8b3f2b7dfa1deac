//! Agents that are killed in the middle of their work.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use cni::install::Installer;
use serde_json::Value;

use crate::node::{Node, TOKEN, config};

/// Names the root of the node in the process that is to be killed.
const VARIABLE: &str = "WRN_INSTALL_CRASH";
const ROUNDS: usize = 25;

#[test]
fn an_agent_killed_at_any_moment_leaves_a_whole_network_and_its_successor_heals_the_rest() {
    if let Some(root) = std::env::var_os(VARIABLE) {
        work_until_killed(root.as_ref());
    }
    let node = Node::new("crash");
    for round in 0..ROUNDS {
        // A larger program takes longer to copy.
        fs::write(node.path("image/warren-cni"), vec![round as u8; 4 << 20]).unwrap();
        node.conf("10-bridge.conf", r#"{"name":"n","type":"bridge"}"#);
        let _ = fs::remove_file(node.path("net.d/10-bridge.conflist"));
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "--nocapture"])
            .arg("crash::an_agent_killed_at_any_moment_leaves_a_whole_network_and_its_successor_heals_the_rest")
            .env(VARIABLE, &node.root)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let started = lines.any(|line| line.unwrap().contains("at work"));
        let now = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap();
        std::thread::sleep(Duration::from_micros(
            u64::from(now.subsec_nanos()) % 40_000,
        ));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(started);

        let network = first_network(&node);
        assert!(network.contains(r#""bridge""#), "{network}");
        node.installed();
        assert_eq!(node.names("net.d"), ["10-bridge.conflist"]);
        assert!(node.unfinished().is_empty(), "{:?}", node.unfinished());
    }
}

/// What a runtime would read at this moment.
fn first_network(node: &Node) -> String {
    let names = node.names("net.d");
    let first = names.iter().find(|name| !name.contains(".tmp."));
    let text = node.text(&format!("net.d/{}", first.unwrap()));
    serde_json::from_str::<Value>(&text).unwrap();
    text
}

/// Installs and removes, so that the kill comes at any step.
fn work_until_killed(root: &Path) -> ! {
    let mut installer = Installer::new(config(root));
    println!("at work");
    loop {
        installer.install(TOKEN).unwrap();
        installer.uninstall().unwrap();
        let list = root.join("net.d/10-bridge.conflist");
        fs::write(root.join("next"), r#"{"name":"n","type":"bridge"}"#).unwrap();
        fs::rename(root.join("next"), root.join("net.d/10-bridge.conf")).unwrap();
        fs::remove_file(list).unwrap();
    }
}
