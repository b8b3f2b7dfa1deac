//! The harness itself: pods on a plain bridge, and what is left of them.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};

use serde_json::json;

use crate::containerd::{BRIDGE, Containerd, Options};
use crate::cri::proto::{PodSandbox, PodSandboxState};
use crate::leftovers;

/// Tells this program, run once more, that it is the node that is going to be killed, and where to write its name.
const VICTIM: &str = "WARREN_TEST_RUNTIME_VICTIM";

#[test]
fn pods_reach_each_other_over_both_families() {
    let options = Options {
        dual_stack: true,
        ..Options::default()
    };
    let Some(node) = Containerd::start_with("pods", options) else {
        return;
    };
    let a = node.pod("demo", "pod-a").run();
    let b = node.pod("demo", "pod-b").run();
    assert_eq!(a.ips().len(), 2);
    for ip in b.ips() {
        assert_eq!(a.ask(*ip).stdout, "hello from pod-b\n");
    }
    for ip in a.ips() {
        assert_eq!(b.ask(*ip).stdout, "hello from pod-a\n");
    }
    let refused = a.exec(&["wget", "-qO-", &format!("http://{}:81/", b.ip())]);
    assert!(refused.stderr.contains("Connection refused"), "{refused:?}");
}

#[test]
fn containers_of_a_pod_share_its_network_and_the_node_reaches_it() {
    let Some(node) = Containerd::start("containers") else {
        return;
    };
    let pod = node.pod("demo", "pod-a").run();
    let script = "mkdir /www; echo second >/www/index.html; exec httpd -f -p 81 -h /www";
    pod.start("second", &["sh", "-c", script]);
    node.eventually("the second container answers", || {
        pod.exec(&["wget", "-qO-", "http://127.0.0.1:81/"]).stdout == "second\n"
    });
    let page = node
        .space()
        .shell(&format!("busybox wget -qO- http://{}:8080/", pod.ip()));
    assert_eq!(page, "hello from pod-a\n");
}

#[test]
fn a_pod_in_the_nodes_network_meets_no_network_plugin() {
    let options = Options {
        chained: vec![json!({"type": "nowhere"})],
        ..Options::default()
    };
    let Some(node) = Containerd::start_with("host-network", options) else {
        return;
    };
    let pod = node.pod("demo", "pod-a").host_network().run();
    assert!(pod.ips().is_empty());
    let page = node
        .space()
        .shell("busybox wget -qO- http://127.0.0.1:8080/");
    assert_eq!(page, "hello from pod-a\n");
}

#[test]
fn network_plugins_can_be_changed_and_are_heard_when_they_fail() {
    let Some(mut node) = Containerd::start("changed") else {
        return;
    };
    let setting = ["cat", "/proc/sys/net/core/somaxconn"];
    let plain = node.pod("demo", "plain").run().exec(&setting);
    let tuning = json!({"type": "tuning", "sysctl": {"net.core.somaxconn": "77"}});
    node.chain(vec![tuning]);
    let tuned = node.pod("demo", "tuned").run().exec(&setting);
    assert_ne!(plain.stdout, tuned.stdout);
    assert_eq!(tuned.stdout, "77\n");

    node.chain(vec![json!({"type": "nowhere"})]);
    let refused = node.pod("demo", "later").sandbox().err().unwrap();
    let reason = "failed to setup network for sandbox";
    assert!(refused.contains(reason), "{refused}");
    assert!(
        refused.contains("failed to find plugin \"nowhere\""),
        "{refused}"
    );
    node.chain(Vec::new());
    // The plugin that was not there could not be asked to clean up either.
    let sandboxes = node.cri().sandboxes().unwrap().into_iter();
    let unready = |sandbox: &PodSandbox| sandbox.state() == PodSandboxState::SandboxNotready;
    let half: Vec<_> = sandboxes.filter(unready).collect();
    assert_eq!(half.len(), 1, "{half:?}");
    node.cri().stop_sandbox(&half[0].id).unwrap();
    node.cri().remove_sandbox(&half[0].id).unwrap();
    node.pod("demo", "later").run();
}

#[test]
fn a_removed_pod_leaves_nothing_on_its_node() {
    let Some(node) = Containerd::start("removed") else {
        return;
    };
    let stays = node.pod("demo", "stays").run();
    let before = traces(&node);
    let pod = node.pod("demo", "goes").run();
    let netns = pod.netns().metadata().unwrap().ino();
    assert!(namespaces(&node).contains(&netns));
    assert_ne!(traces(&node), before);
    pod.remove().unwrap();
    drop(pod);
    node.eventually("its namespace is gone", || {
        !namespaces(&node).contains(&netns)
    });
    node.eventually("all of it is gone", || traces(&node) == before);
    assert_eq!(stays.exec(&["true"]).code, 0);
}

#[test]
fn pods_outlive_a_killed_containerd() {
    let Some(mut node) = Containerd::start("outlive") else {
        return;
    };
    let (ip, id) = {
        let pod = node.pod("demo", "pod-a").run();
        (pod.ip(), pod.id().to_string())
    };
    node.kill();
    let page = format!("busybox wget -qO- http://{ip}:8080/");
    assert_eq!(node.space().shell(&page), "hello from pod-a\n");
    node.restart();
    let known = node.cri().sandboxes().unwrap();
    assert_eq!(known.len(), 1);
    assert_eq!(known[0].id, id);
}

#[test]
fn an_ended_node_leaves_nothing_on_the_machine() {
    let Some(node) = Containerd::start("ended") else {
        return;
    };
    node.pod("demo", "pod-a").run();
    let name = node.name().to_string();
    assert!(!remains(&name).is_empty());
    drop(node);
    assert_eq!(remains(&name), BTreeSet::new());
}

#[test]
fn a_killed_test_leaves_nothing_once_the_next_has_started() {
    if let Some(file) = std::env::var_os(VICTIM) {
        let Some(node) = Containerd::start("victim") else {
            return;
        };
        let _pod = node.pod("demo", "pod-a").run();
        let scratch = node.folder("name");
        fs::write(&scratch, node.name()).unwrap();
        fs::copy(scratch, file).unwrap();
        loop {
            std::thread::park();
        }
    }
    let Some(node) = Containerd::start("killed") else {
        return;
    };
    let file = node.folder("victim");
    let mut victim = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "bridge::a_killed_test_leaves_nothing_once_the_next_has_started",
        ])
        .env(VICTIM, &file)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut name = String::new();
    node.eventually("the other node has a pod", || {
        name = fs::read_to_string(&file).unwrap_or_default();
        !name.is_empty()
    });
    victim.kill().unwrap();
    assert_eq!(victim.wait().unwrap().signal(), Some(9));
    node.eventually("its processes are gone", || {
        let remains = remains(&name);
        !remains.is_empty() && !remains.iter().any(|what| what.starts_with("process"))
    });
    leftovers::sweep();
    assert_eq!(remains(&name), BTreeSet::new());
    // This one is nobody's leftover.
    assert_eq!(node.pod("demo", "pod-a").run().exec(&["true"]).code, 0);
}

/// What of pods is to be seen on a node: interfaces, mounts, addresses, control groups, files, processes.
fn traces(node: &Containerd) -> BTreeSet<String> {
    let space = node.space();
    let seen = space.shell(&format!(
        "ip -o link show master {BRIDGE} | cut -d: -f2; cut -d' ' -f5 /proc/self/mountinfo; \
         find /run /var/lib/cni {0}/root/addresses {0}/state ! -name 'last_reserved_ip*'",
        node.folder("").display()
    ));
    let mut traces: BTreeSet<_> = seen.lines().map(str::to_string).collect();
    for group in leftovers::control_groups(node.name()) {
        let inside = fs::read_dir(group).unwrap().flatten();
        let groups = inside.filter(|entry| entry.file_type().unwrap().is_dir());
        traces.extend(groups.map(|entry| entry.path().display().to_string()));
    }
    let shims = remains(node.name()).into_iter();
    traces.extend(shims.filter(|what| what.starts_with("process") && what.contains(" -id ")));
    traces
}

/// The network namespaces of a node's processes and mounts.
fn namespaces(node: &Containerd) -> BTreeSet<u64> {
    let seen = node.space().shell(
        // Processes come and go.
        "stat -L -c %i /proc/[0-9]*/ns/net /run/netns/* 2>/dev/null || true",
    );
    seen.lines().map(|line| line.parse().unwrap()).collect()
}

/// What on this machine bears a node's name: mounts, processes, control groups, folders.
fn remains(node: &str) -> BTreeSet<String> {
    let mut remains = BTreeSet::new();
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let mounts = mounts.lines().filter(|line| line.contains(node));
    remains.extend(mounts.map(|line| format!("mount {line}")));
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        // They come and go.
        let read = |file: &str| fs::read(entry.path().join(file)).unwrap_or_default();
        let text = [read("cmdline"), read("cgroup")].concat();
        let text = String::from_utf8_lossy(&text).replace('\0', " ");
        if text.contains(node) && entry.file_name() != "self" && entry.file_name() != "thread-self"
        {
            remains.insert(format!("process {text}"));
        }
    }
    let groups = leftovers::control_groups(node).into_iter();
    let places = groups.chain(Some(leftovers::folder(node)).filter(|folder| folder.exists()));
    remains.extend(places.map(|place| place.display().to_string()));
    remains
}
