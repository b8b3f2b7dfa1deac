//! An API server that goes away and comes back, and what the agent makes of changes that it could not watch.

use nix::sys::signal::Signal;
use serde_json::json;

use crate::apiserver::ApiServer;
use crate::harness::{Pod, eventually};
use crate::member::{MODE, Member, path};

/// Pods of which one is captured, one is not, and one is captured and will vanish.
struct Pods {
    captured: Pod,
    outside: Pod,
    vanishing: Pod,
}

impl Pods {
    fn of(member: &Member) -> Self {
        let pods = Self {
            captured: member.running("pod-captured", &json!({MODE: "ambient"})),
            outside: member.running("pod-outside", &json!({})),
            vanishing: member.running("pod-vanishing", &json!({MODE: "ambient"})),
        };
        member.wait_status(&pods.captured, Some("enabled"));
        member.wait_status(&pods.vanishing, Some("enabled"));
        pods
    }

    /// Changes all of them while the agent cannot watch: the API server is killed and comes back while the agent is
    /// asleep.
    fn change_unseen(&self, member: &mut Member, flags: &[&str], then: fn(&mut ApiServer)) {
        member.api.take().unwrap().kill();
        member.wait_log("will be tried again");
        // Nothing changes for pods while nobody can say what they should be.
        assert!(self.captured.is_captured() && self.vanishing.is_captured());
        assert_eq!(self.outside.rules(), "");
        member.node.signal(Signal::SIGSTOP);
        member.api = Some(ApiServer::start(&member.node, flags));
        member.label(&self.captured, None);
        member.label(&self.outside, Some("ambient"));
        member.delete(&self.vanishing);
        then(member.api.as_mut().unwrap());
        member.node.signal(Signal::SIGCONT);
    }

    fn assert_changes_are_seen(&self, member: &Member) {
        member.wait_status(&self.outside, Some("enabled"));
        assert!(self.outside.is_captured());
        member.wait_status(&self.captured, None);
        assert_eq!(self.captured.rules(), "");
        eventually("only the captured pod's probes are left", || {
            let probes = member.node.probes();
            let only = probes.lines().count() == 1 && probes.contains(&self.outside.uid);
            only.then_some(())
        });
        assert!(member.api().get(&path(&self.vanishing)).is_none());
        member.wait_log("watching pods again");
    }
}

#[test]
#[ignore = "needs a built API server: make test-cluster"]
fn nothing_is_missed_while_the_api_server_is_away() {
    let Some(mut member) = Member::new("away") else {
        return;
    };
    let proxy = member.node.proxy_in_service();
    let pods = Pods::of(&member);
    proxy.take();
    pods.change_unseen(&mut member, &[], |_| {});
    pods.assert_changes_are_seen(&member);
    proxy.wait_added(&pods.outside);
    proxy.wait_deleted(&pods.captured);
    proxy.wait_deleted(&pods.vanishing);
}

#[test]
#[ignore = "needs a built API server: make test-cluster"]
fn history_that_etcd_has_forgotten_is_listed_anew() {
    // Without the API server's cache, watches are etcd's own.
    let flags = ["--watch-cache=false"];
    let Some(mut member) = Member::with_flags("compaction", &flags) else {
        return;
    };
    let _proxy = member.node.proxy_in_service();
    let pods = Pods::of(&member);
    pods.change_unseen(&mut member, &flags, ApiServer::compact);
    pods.assert_changes_are_seen(&member);
    let log = member.node.log();
    let gone = |line: &&str| line.contains("cannot be watched") && line.contains("Expired");
    assert!(log.lines().any(|line| gone(&line)), "no 410 in the log");
}
