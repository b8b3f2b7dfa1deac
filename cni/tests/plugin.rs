//! What the plugin answers a runtime by itself: versions, refusals, and commands that never fail. How it captures is tested
//! with the agent.

use std::io::Write;
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

/// A call with everything that a command may need; `changes` replaces variables, or with an empty value takes them out.
fn call(command: &str, input: &str, changes: &[(&str, &str)]) -> Output {
    let mut plugin = Command::new(env!("CARGO_BIN_EXE_warren-cni"));
    plugin
        .env_clear()
        .env("CNI_COMMAND", command)
        .env("CNI_CONTAINERID", "c")
        .env("CNI_NETNS", "/proc/1/ns/net")
        .env("CNI_IFNAME", "eth0")
        .env("CNI_PATH", "/opt/cni/bin")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    for (name, value) in changes {
        match value.is_empty() {
            true => plugin.env_remove(name),
            false => plugin.env(name, value),
        };
    }
    let mut plugin = plugin.spawn().unwrap();
    // A plugin that needs no input may have ended already.
    let _ = plugin.stdin.take().unwrap().write_all(input.as_bytes());
    plugin.wait_with_output().unwrap()
}

fn json_of(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{output:?}: {error}"))
}

fn entry(version: &str, more: &Value) -> String {
    let mut entry = json!({
        "cniVersion": version, "name": "warren-cni", "type": "warren-cni",
        "cni_agent_run_dir": "/nonexistent/warren", "ambient_enabled": true, "exclude_namespaces": ["free"],
        "pod_namespace": "mesh", "agent_pod_prefix": "warren-node-agent-",
    });
    for (key, value) in more.as_object().into_iter().flatten() {
        entry[key] = value.clone();
    }
    entry.to_string()
}

const POD: (&str, &str) = (
    "CNI_ARGS",
    "IgnoreUnknown=1;K8S_POD_NAMESPACE=demo;K8S_POD_NAME=a;K8S_POD_UID=u",
);

#[test]
fn the_versions_are_told() {
    let output = call("VERSION", "", &[]);
    assert!(output.status.success());
    assert_eq!(
        json_of(&output),
        json!({
            "cniVersion": "1.1.0",
            "supportedVersions": ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"],
        })
    );
}

#[test]
fn what_is_none_of_its_business_passes_in_every_version() {
    let versions = [
        "", "0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0",
    ];
    let others = [
        ("CNI_ARGS", ""),
        ("CNI_ARGS", "K8S_POD_NAMESPACE=free;K8S_POD_NAME=a"),
        (
            "CNI_ARGS",
            "K8S_POD_NAMESPACE=mesh;K8S_POD_NAME=warren-node-agent-x",
        ),
    ];
    for version in versions {
        for other in others {
            let output = call("ADD", &entry(version, &json!(null)), &[other]);
            assert!(output.status.success(), "{version} {other:?}: {output:?}");
            let expected = if version.is_empty() { "0.1.0" } else { version };
            assert_eq!(json_of(&output), json!({"cniVersion": expected, "dns": {}}));
        }
    }
    let off = entry(
        "1.0.0",
        &json!({"ambient_enabled": false, "prevResult": {"ips": []}}),
    );
    let output = call("ADD", &off, &[POD]);
    assert_eq!(json_of(&output), json!({"cniVersion": "1.0.0", "ips": []}));
}

#[test]
fn a_pod_of_which_nobody_can_tell_does_not_start() {
    let output = call("ADD", &entry("0.4.0", &json!(null)), &[POD]);
    assert_eq!(output.status.code(), Some(1));
    let failure = json_of(&output);
    assert_eq!(failure["code"], 11);
    assert_eq!(failure["cniVersion"], "0.4.0");
    let details = failure["details"].as_str().unwrap();
    for part in ["istio-cni-kubeconfig", "pluginevent.sock"] {
        assert!(details.contains(part), "{details}");
    }
    // Standard error is a log, not an answer.
    let log = String::from_utf8(output.stderr).unwrap();
    let last: Value = serde_json::from_str(log.lines().last().unwrap()).unwrap();
    assert_eq!(last["level"], "error");
    assert_eq!(last["pod"], "demo/a");
}

#[test]
fn a_pod_can_always_end() {
    for input in [
        "",
        "{",
        "[]",
        &entry("1.0.0", &json!(null)),
        &entry("9", &json!(null)),
    ] {
        for netns in ["", "/nowhere"] {
            let output = call("DEL", input, &[POD, ("CNI_NETNS", netns)]);
            assert!(output.status.success(), "{output:?}");
            assert!(output.stdout.is_empty(), "{output:?}");
        }
    }
}

#[test]
fn a_node_is_usable_and_keeps_nothing_per_attachment() {
    for command in ["STATUS", "GC"] {
        let output = call(command, &entry("1.1.0", &json!(null)), &[]);
        assert!(output.status.success(), "{output:?}");
        assert!(output.stdout.is_empty(), "{output:?}");
        let failure = json_of(&call(command, &entry("1.0.0", &json!(null)), &[]));
        let text = format!("config version does not allow {command}");
        assert_eq!(failure["msg"], text);
        assert_eq!(failure["code"], 1);
    }
    let failure = json_of(&call("CHECK", &entry("0.3.1", &json!(null)), &[]));
    assert_eq!(failure["msg"], "config version does not allow CHECK");
}

#[test]
fn bad_calls_are_refused_by_the_codes_of_the_specification() {
    let good = entry("1.0.0", &json!(null));
    type Changes<'a> = &'a [(&'a str, &'a str)];
    let cases: [(&str, &str, Changes, u64, &str); 9] = [
        ("ADD", "", &[], 6, "standard input"),
        ("ADD", "{\"a\":", &[], 6, "standard input"),
        ("ADD", "\u{0}\u{1}", &[], 6, "standard input"),
        ("ADD", "7", &[], 7, "standard input"),
        (
            "ADD",
            "{\"exclude_namespaces\":7}",
            &[],
            7,
            "expected a sequence",
        ),
        (
            "ADD",
            "{\"cniVersion\":\"3.0\"}",
            &[],
            1,
            "\"3.0\" is not supported",
        ),
        (
            "ADD",
            &good,
            &[("CNI_NETNS", ""), ("CNI_IFNAME", "")],
            4,
            "lacks CNI_NETNS, CNI_IFNAME",
        ),
        (
            "ADD",
            &good,
            &[("CNI_ARGS", "K8S_POD_NAME")],
            4,
            "K8S_POD_NAME",
        ),
        ("EVAPORATE", &good, &[], 4, "EVAPORATE"),
    ];
    for (command, input, changes, code, text) in cases {
        let output = call(command, input, changes);
        assert_eq!(output.status.code(), Some(1), "{input}");
        let failure = json_of(&output);
        assert_eq!(failure["code"], code, "{failure}");
        let said = format!("{} {}", failure["msg"], failure["details"]).replace('\\', "");
        assert!(said.contains(text), "{said}");
    }
    let bad = entry("1.0.0", &json!({"prevResult": "x"}));
    let failure = json_of(&call("ADD", &bad, &[]));
    assert_eq!(failure["code"], 6, "{failure}");
}

#[test]
fn people_who_call_it_by_hand_are_told_what_it_is() {
    let by_hand = |arguments: &[&str]| {
        let mut plugin = Command::new(env!("CARGO_BIN_EXE_warren-cni"));
        plugin.env_clear().args(arguments).stdin(Stdio::null());
        plugin.output().unwrap()
    };
    let help = by_hand(&["--help"]);
    assert!(help.status.success());
    assert!(String::from_utf8_lossy(&help.stdout).contains("warren node-agent"));
    let nothing = by_hand(&[]);
    assert_eq!(nothing.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&nothing.stderr).contains("CNI_COMMAND"));
}
