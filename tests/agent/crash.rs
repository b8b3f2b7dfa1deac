//! Agents that are killed: whatever the step, the next one brings the pod to where it should be, whole.

use std::path::Path;

use crate::harness::{Manner, Node, Pod, Told, eventually};

/// Where an agent is when it is killed.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// While it reads what the pod holds.
    Reading,
    /// While it changes the pod's rules.
    Rules,
    /// While the proxy has not answered.
    Proxy,
    /// While the API server has not answered.
    Status,
}

const STEPS: [Step; 4] = [Step::Reading, Step::Rules, Step::Proxy, Step::Status];

/// Makes the agent stop at a step; what comes back must live until it is killed.
struct Stop<'a> {
    node: &'a Node,
    reached: Box<dyn Fn() -> bool + 'a>,
    held: Option<warren::lab::api::Held>,
}

impl<'a> Stop<'a> {
    fn at(step: Step, node: &'a Node, proxy: &'a crate::harness::Proxy, pod: &Pod) -> Self {
        let file = node.root.join("reached");
        let _ = std::fs::remove_file(&file);
        let (text, uid) = (file.to_string_lossy().into_owned(), pod.uid.clone());
        let mut held = None;
        let by_program = |name: &str| {
            // The program hangs with its work undone; the agent's death leaves it an orphan, which ends by itself.
            let real = which(name);
            let script = format!(
                "case \"$*\" in *--version*) exec {real} \"$@\";; esac\ntouch {text}\nexec sleep 20"
            );
            node.program(name, &script);
        };
        let reached: Box<dyn Fn() -> bool> = match step {
            Step::Reading | Step::Rules => {
                let suffix = if matches!(step, Step::Reading) {
                    "-save"
                } else {
                    "-restore"
                };
                by_program(&format!("iptables-nft{suffix}"));
                Box::new(move || file.exists())
            }
            Step::Proxy => {
                *proxy.manner.lock().unwrap() = Manner::Silent;
                proxy.take();
                Box::new(move || {
                    let told = proxy.told.lock().unwrap();
                    told.iter().any(|told| match told {
                        Told::Add { uid: known, .. } | Told::Del(known) => *known == uid,
                        _ => false,
                    })
                })
            }
            Step::Status => {
                let path = format!("/api/v1/namespaces/default/pods/{}/status", pod.name);
                held = Some(node.api.hold("PATCH", &path));
                let waits = held.as_ref().unwrap().clone();
                Box::new(move || waits.waiting() > 0)
            }
        };
        Self {
            node,
            reached,
            held,
        }
    }

    fn wait(&self, step: Step) {
        eventually(&format!("the step {step:?}; {}", self.node.log()), || {
            (self.reached)().then_some(())
        });
    }
}

fn which(name: &str) -> String {
    let path = std::env::var("PATH").unwrap();
    let found = path
        .split(':')
        .map(|folder| Path::new(folder).join(name))
        .find(|file| file.exists());
    found.unwrap().to_string_lossy().into_owned()
}

fn clear(node: &Node, proxy: &crate::harness::Proxy) {
    *proxy.manner.lock().unwrap() = Manner::Serves;
    for entry in std::fs::read_dir(node.root.join("programs")).unwrap() {
        std::fs::remove_file(entry.unwrap().path()).unwrap();
    }
}

fn run(test: &str, adding: bool, step: Step) {
    let Some(mut node) = Node::new(&format!("{test}-{step:?}").to_lowercase()) else {
        return;
    };
    let proxy = node.proxy_in_service();
    let pod = node.running("pod-a");
    if !adding {
        node.label(&pod, "ambient");
        node.wait_status(&pod, Some("enabled"));
    }
    let stop = Stop::at(step, &node, &proxy, &pod);
    node.label(&pod, if adding { "ambient" } else { "none" });
    stop.wait(step);
    let held = stop.held.clone();
    drop(stop);
    node.kill();
    drop(held);
    clear(&node, &proxy);
    // Whichever way it should go by then, it goes there whole.
    for finally in ["ambient", "none", "ambient"] {
        node.label(&pod, finally);
        node.start();
        match finally {
            "ambient" => {
                node.wait_status(&pod, Some("enabled"));
                eventually("the capture", || pod.is_captured().then_some(()));
                eventually("the probes", || {
                    node.probes().contains(&pod.uid).then_some(())
                });
            }
            _ => {
                node.wait_status(&pod, None);
                eventually("a clean pod", || pod.rules().is_empty().then_some(()));
                eventually("no probes", || node.probes().is_empty().then_some(()));
                eventually("nothing noted", || {
                    (!node.root.join("run/pods").join(&pod.uid).exists()).then_some(())
                });
            }
        }
        node.kill();
    }
}

#[test]
fn an_agent_killed_while_it_adds_a_pod_leaves_nothing_half_done() {
    for step in STEPS {
        run("add", true, step);
    }
}

#[test]
fn an_agent_killed_while_it_removes_a_pod_leaves_nothing_half_done() {
    for step in STEPS {
        run("remove", false, step);
    }
}

#[test]
fn a_pod_that_left_the_mesh_while_its_agent_died_before_telling_anybody_is_cleaned() {
    let Some(mut node) = Node::new("untold") else {
        return;
    };
    let proxy = node.proxy_in_service();
    let pod = node.running("pod-a");
    let stop = Stop::at(Step::Proxy, &node, &proxy, &pod);
    node.label(&pod, "ambient");
    stop.wait(Step::Proxy);
    drop(stop);
    node.kill();
    clear(&node, &proxy);
    // It holds rules, and nothing at the API server says so.
    assert!(pod.is_captured());
    assert_eq!(node.status(&pod), None);
    node.label(&pod, "none");
    node.start();
    eventually("a clean pod", || pod.rules().is_empty().then_some(()));
}

#[test]
fn a_new_agent_takes_over_what_the_old_one_captured() {
    let Some(mut node) = Node::new("takeover") else {
        return;
    };
    let proxy = node.proxy_in_service();
    node.namespace("default", Some("ambient"));
    let [stays, leaves, gone, lost] = ["stays", "leaves", "gone", "lost"].map(|name| {
        let pod = node.running(name);
        node.wait_status(&pod, Some("enabled"));
        pod
    });
    node.kill();
    node.label(&leaves, "none");
    node.api.delete("pods", "default", "gone");
    std::fs::remove_file(node.root.join("run/pods").join(&lost.uid)).unwrap();
    std::fs::remove_file(node.root.join("run/netns").join(&lost.uid)).unwrap();
    stays.netns.shell("iptables -t mangle -F ISTIO_PRERT");
    proxy.take();
    node.start();
    eventually("the snapshot", || {
        proxy
            .told
            .lock()
            .unwrap()
            .contains(&Told::Snapshot)
            .then_some(())
    });
    let told = proxy.take();
    let adds: Vec<_> = told
        .iter()
        .filter_map(|told| match told {
            Told::Add { uid, .. } => Some(uid.clone()),
            _ => None,
        })
        .collect();
    assert!(adds.contains(&stays.uid), "{told:?}");
    // Its namespace is not at hand, so a proxy that has it is to keep it.
    assert!(told.contains(&Told::Keep(lost.uid.clone())), "{told:?}");
    assert!(!adds.contains(&gone.uid), "{told:?}");
    assert!(stays.is_captured());
    eventually("the pod that left", || {
        leaves.rules().is_empty().then_some(())
    });
    node.wait_status(&leaves, None);
    let probes = node.probes();
    assert!(
        probes.contains(&stays.uid) && probes.contains(&lost.uid),
        "{probes}"
    );
    assert!(!probes.contains(&gone.uid), "{probes}");
}

#[test]
fn no_address_is_let_go_of_while_those_of_a_captured_pod_are_not_known() {
    let Some(mut node) = Node::new("unknown") else {
        return;
    };
    let proxy = node.proxy_in_service();
    node.namespace("default", Some("ambient"));
    let [gone, vague] = ["gone", "vague"].map(|name| {
        let pod = node.running(name);
        node.wait_status(&pod, Some("enabled"));
        pod
    });
    node.kill();
    node.api.delete("pods", "default", "gone");
    let mut object = node.api.object("pods", "default", "vague").unwrap();
    object["status"] = serde_json::json!({"phase": "Running"});
    node.api.put(object);
    let restart = |node: &mut Node| {
        proxy.take();
        node.start();
        proxy.wait("the snapshot", |told| *told == Told::Snapshot);
    };
    restart(&mut node);
    let probes = node.probes();
    assert!(probes.contains(&gone.uid), "{probes}");
    assert!(probes.contains(&vague.uid), "{probes}");
    node.kill();
    node.api.put({
        let mut object = node.api.object("pods", "default", "vague").unwrap();
        object["status"] = node.object(&vague, true)["status"].clone();
        object
    });
    restart(&mut node);
    let probes = node.probes();
    assert!(!probes.contains(&gone.uid), "{probes}");
    assert!(probes.contains(&vague.uid), "{probes}");
}

#[test]
fn probes_are_let_through_while_there_is_no_agent() {
    let Some(mut node) = Node::new("probes") else {
        return;
    };
    let _proxy = node.proxy_in_service();
    node.namespace("default", Some("ambient"));
    let pod = node.running("pod-a");
    node.wait_status(&pod, Some("enabled"));
    let address = (pod.ip, 8080);
    let application = cni::netns::within(std::os::fd::AsFd::as_fd(&pod.netns.0), || {
        std::net::TcpListener::bind(("0.0.0.0", 8080))
    });
    let application = application.unwrap();
    let probe = || {
        let dialled = cni::netns::within(std::os::fd::AsFd::as_fd(&node.netns.0), || {
            std::net::TcpStream::connect(address)
        });
        let _open = dialled.unwrap();
        application.accept().unwrap().1.ip().to_string()
    };
    assert_eq!(probe(), "169.254.7.127");
    node.kill();
    let dialled = cni::netns::within(std::os::fd::AsFd::as_fd(&node.netns.0), || {
        std::net::TcpStream::connect(address)
    });
    let _open = dialled.unwrap();
    assert_eq!(
        application.accept().unwrap().1.ip().to_string(),
        "169.254.7.127"
    );
    node.start();
    assert!(node.probes().contains(&pod.uid));
}
