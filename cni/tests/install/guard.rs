//! The loop that keeps the plugin installed, with real notifications.

use std::fs;
use std::os::unix::fs::symlink;
use std::process::Command;
use std::time::Duration;

use cni::install::{Installer, Status};
use serde_json::Value;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

use crate::node::{CA, CALICO, Node, TOKEN};

const LIST: &str = "net.d/10-calico.conflist";
/// Set where the kernel is to refuse notifications.
const BLIND: &str = "WRN_INSTALL_BLIND";
/// Far more than anything here takes.
const LONG: Duration = Duration::from_secs(50);

/// A guard at work.
struct Guard {
    token: watch::Sender<String>,
    statuses: mpsc::UnboundedReceiver<(bool, String)>,
    stop: oneshot::Sender<()>,
    task: JoinHandle<Installer>,
}

impl Guard {
    fn of(node: &Node) -> Self {
        let (token, tokens) = watch::channel(TOKEN.to_string());
        let (sender, statuses) = mpsc::unbounded_channel();
        let (stop, stopped) = oneshot::channel::<()>();
        let tell = move |status: &Status| {
            let _ = sender.send((status.is_ready(), format!("{status:?}")));
        };
        let stopped = async move {
            let _ = stopped.await;
        };
        let task = tokio::spawn(node.installer().run(tokens, tell, stopped));
        Self {
            token,
            statuses,
            stop,
            task,
        }
    }

    /// Waits for the next status that says so; gives it.
    async fn until(&mut self, is_ready: bool, part: &str) -> String {
        let find = async {
            loop {
                let (ready, text) = self.statuses.recv().await.unwrap();
                if ready == is_ready && text.contains(part) {
                    return text;
                }
            }
        };
        let found = timeout(LONG, find).await;
        found.unwrap_or_else(|_| panic!("no status with {part}"))
    }

    async fn ready(&mut self) {
        self.until(true, "").await;
    }

    async fn stop(self) -> Installer {
        self.stop.send(()).unwrap();
        timeout(LONG, self.task).await.unwrap().unwrap()
    }
}

#[tokio::test]
async fn whatever_is_broken_is_noticed_and_healed() {
    if std::env::var_os(BLIND).is_some() {
        let watcher = notify::recommended_watcher(|_: notify::Result<notify::Event>| {});
        assert!(watcher.is_err(), "there are notifications after all");
    }
    let node = Node::with_network("guard-heal");
    let mut guard = Guard::of(&node);
    guard.until(false, "Installed").await;
    guard.ready().await;
    let good = node.text(LIST);

    node.edit(LIST, |plugins| plugins.truncate(1));
    guard.until(false, "EntryMissing").await;
    guard.ready().await;
    assert_eq!(node.types(LIST), ["calico", "warren-cni"]);
    // Written in place, as careless programs do.
    fs::write(node.path(LIST), CALICO).unwrap();
    guard.until(false, "EntryMissing").await;
    guard.ready().await;
    assert_eq!(node.text(LIST), good);

    fs::write(node.path("bin/warren-cni"), "broken").unwrap();
    guard.until(false, "ProgramChanged").await;
    guard.ready().await;
    assert_eq!(node.text("bin/warren-cni"), node.text("image/warren-cni"));

    fs::remove_file(node.path("run/istio-cni-kubeconfig")).unwrap();
    guard.until(false, "Kubeconfig").await;
    guard.ready().await;
    assert!(node.exists("run/istio-cni-kubeconfig"));

    guard.stop().await.uninstall().unwrap();
    let original: Value = serde_json::from_str(CALICO).unwrap();
    assert_eq!(node.json(LIST), original);
    assert!(node.unfinished().is_empty());
}

#[tokio::test]
async fn a_new_token_and_new_certificates_reach_the_kubeconfig() {
    let node = Node::with_network("guard-token");
    // As Kubernetes mounts them: a link to a folder, which is replaced in one step.
    fs::remove_file(node.path("account/ca.crt")).unwrap();
    for (version, ca) in [("..1", CA.to_string()), ("..2", CA.replace("AAAA", "BBBB"))] {
        fs::create_dir(node.path("account").join(version)).unwrap();
        fs::write(node.path("account").join(version).join("ca.crt"), ca).unwrap();
    }
    symlink("..1", node.path("account/..data")).unwrap();
    symlink("..data/ca.crt", node.path("account/ca.crt")).unwrap();
    let mut guard = Guard::of(&node);
    guard.ready().await;
    let first = node.text("run/istio-cni-kubeconfig");

    guard.token.send("second-token".to_string()).unwrap();
    let status = guard.until(false, "Kubeconfig").await;
    assert!(!status.contains("second-token"), "{status}");
    guard.ready().await;
    let second = node.text("run/istio-cni-kubeconfig");
    assert_eq!(second, first.replace("first-token", "second-token"));

    symlink("..2", node.path("account/..data_tmp")).unwrap();
    fs::rename(node.path("account/..data_tmp"), node.path("account/..data")).unwrap();
    guard.until(false, "Kubeconfig").await;
    guard.ready().await;
    assert_ne!(node.text("run/istio-cni-kubeconfig"), second);
    guard.stop().await;
}

#[tokio::test]
async fn a_network_that_comes_late_is_waited_for() {
    let node = Node::new("guard-late");
    fs::remove_dir(node.path("net.d")).unwrap();
    let mut guard = Guard::of(&node);
    guard.until(false, "NoFolder").await;
    fs::create_dir(node.path("net.d")).unwrap();
    guard.until(false, "NoNetwork").await;
    fs::write(node.path(LIST), "{").unwrap();
    guard.until(false, "is damaged").await;
    assert_eq!(node.text(LIST), "{");
    node.conf("10-calico.conflist", CALICO);
    guard.ready().await;
    assert_eq!(node.types(LIST), ["calico", "portmap", "warren-cni"]);
    guard.stop().await;
}

#[tokio::test]
async fn a_network_that_goes_and_a_folder_that_is_replaced_are_followed() {
    let node = Node::with_network("guard-replaced");
    let mut guard = Guard::of(&node);
    guard.ready().await;
    fs::remove_file(node.path(LIST)).unwrap();
    guard.until(false, "NoNetwork").await;
    node.conf("10-calico.conflist", CALICO);
    guard.ready().await;

    fs::rename(node.path("net.d"), node.path("old.d")).unwrap();
    fs::create_dir(node.path("net.d")).unwrap();
    node.conf("20-other.conflist", CALICO);
    guard.until(false, "Installed").await;
    guard.ready().await;
    assert_eq!(node.types("net.d/20-other.conflist").len(), 3);
    // The new folder is the one that is watched.
    node.conf("05-first.conflist", CALICO);
    guard.until(false, "05-first").await;
    guard.ready().await;
    guard.stop().await;
}

#[tokio::test]
async fn somebody_who_keeps_undoing_it_is_met_slowly_and_does_not_win() {
    let node = Node::with_network("guard-quarrel");
    let mut guard = Guard::of(&node);
    guard.ready().await;
    let begin = Instant::now();
    let quarrel = async {
        loop {
            node.conf("10-calico.conflist", CALICO);
            sleep(Duration::from_millis(20)).await;
        }
    };
    let repairs = async {
        for _ in 0..4 {
            guard.until(false, "Installed").await;
        }
    };
    tokio::select! {
        () = quarrel => unreachable!("it has no end"),
        () = repairs => {}
    }
    // All but the first repair wait a second.
    assert!(begin.elapsed() >= Duration::from_secs(3));
    guard.ready().await;
    node.conf("10-calico.conflist", CALICO);
    guard.until(false, "EntryMissing").await;
    guard.ready().await;
    assert_eq!(node.types(LIST).last().unwrap(), "warren-cni");
    guard.stop().await;
}

#[tokio::test]
async fn a_lost_source_of_tokens_keeps_the_last_one() {
    let node = Node::with_network("guard-no-source");
    let mut guard = Guard::of(&node);
    guard.ready().await;
    let Guard {
        token,
        mut statuses,
        stop,
        task,
    } = guard;
    drop(token);
    fs::remove_file(node.path("run/istio-cni-kubeconfig")).unwrap();
    let ready = async { while !statuses.recv().await.unwrap().0 {} };
    timeout(LONG, ready).await.unwrap();
    assert!(node.text("run/istio-cni-kubeconfig").contains(TOKEN));
    stop.send(()).unwrap();
    timeout(LONG, task).await.unwrap().unwrap();
}

#[test]
fn without_notifications_the_folders_are_looked_at() {
    let test = "guard::whatever_is_broken_is_noticed_and_healed";
    let script = "echo 0 > /proc/sys/user/max_inotify_instances && exec \"$@\"";
    let run = |arguments: &[&str]| {
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user", "sh", "-c", script, "sh"]);
        command.args(arguments).env(BLIND, "1").output().unwrap()
    };
    if !run(&["true"]).status.success() {
        eprintln!("SKIPPED: no user namespace to take the notifications away in");
        return;
    }
    let program = std::env::current_exe().unwrap();
    let output = run(&[program.to_str().unwrap(), "--exact", "--nocapture", test]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("test result: ok. 1 passed"), "{text}");
}
