//! Whole labs, on real namespaces: they come up, do as their manifests say, and leave nothing behind.
//!
//! Needs root or unprivileged user namespaces, iptables and curl; where the kernel refuses namespaces, a test says
//! so and passes.

mod labs;

use std::time::Duration;

use labs::{Lab, eventually};

const NAMESPACES: &str = "apiVersion: v1\nkind: Namespace\nmetadata: {name: default, labels: {istio.io/dataplane-mode: ambient}}\n---\n\
                          apiVersion: v1\nkind: Namespace\nmetadata: {name: outside}\n";

/// A pod that runs `command`, in YAML's flow style.
fn pod(namespace: &str, name: &str, command: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}, labels: {{app: {name}}}}}\n\
         spec: {{containers: [{{name: main, command: {command}}}]}}\n"
    )
}

/// A deployment of ratings with a service `ratings` on port 80.
fn ratings(replicas: u8) -> String {
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: ratings}}\n\
         spec: {{selector: {{app: ratings}}, ports: [{{port: 80, targetPort: http}}]}}\n\
         ---\napiVersion: apps/v1\nkind: Deployment\nmetadata: {{name: ratings}}\n\
         spec:\n  replicas: {replicas}\n  template:\n    metadata: {{labels: {{app: ratings}}}}\n    spec:\n      \
         containers:\n      - name: main\n        command: [warren, lab, serve, ratings]\n        \
         ports: [{{name: http, containerPort: 9080}}]\n        \
         readinessProbe: {{httpGet: {{path: /health, port: http}}}}\n"
    )
}

#[test]
fn the_demonstration_meets_every_expectation() {
    let Some(output) = labs::demo() else { return };
    assert!(output.contains("0 of 13 expectations failed"), "{output}");
}

#[test]
fn two_labs_side_by_side_do_not_see_each_other() {
    let text = format!(
        "{NAMESPACES}{}",
        pod("outside", "only", "[sleep, infinity]")
    );
    let Some(one) = Lab::up(&text, &["--nodes", "1"]) else {
        return;
    };
    let Some(other) = Lab::up(&text, &["--nodes", "1"]) else {
        return;
    };
    let mark = "touch /run/mark && hostname -I 2>/dev/null; cat /proc/net/dev";
    assert_eq!(one.exec("outside", "only", mark).code, 0);
    let seen = other.exec("outside", "only", "ls /run; ls /proc | grep -c '^[0-9]'");
    assert!(!seen.stdout.contains("mark"), "{}", seen.stdout);
    // Ten processes at most: the other lab's and the machine's are not shown.
    let processes: u32 = seen.stdout.trim().lines().last().unwrap().parse().unwrap();
    assert!(processes < 15, "{processes} processes");
    assert!(!std::path::Path::new("/sys/class/net/wbr0").exists());
}

#[test]
fn nothing_outlives_the_first_process_of_a_lab() {
    let text = format!("{NAMESPACES}{}", pod("default", "p", "[sleep, infinity]"));
    let Some(lab) = Lab::up(&text, &[]) else {
        return;
    };
    let processes = lab.processes();
    assert!(processes.len() >= 5, "{processes:?}");
    lab.kill_first_process();
    eventually(
        Duration::from_secs(5),
        "the lab's processes are gone",
        || processes.iter().all(|pid| !labs::is_alive(*pid)),
    );
    assert!(lab.dir().exists());
    assert!(lab.run(&["status"]).stderr.contains("no running lab"));
    let output = lab.up_again(&text);
    assert_eq!(output.code, 0, "{}", output.stderr);
    assert!(
        output.stdout.contains("removed what lab"),
        "{}",
        output.stdout
    );
}

#[test]
fn a_lab_in_the_foreground_ends_with_its_command() {
    let text = format!("{NAMESPACES}{}", pod("default", "p", "[sleep, infinity]"));
    for signal in ["INT", "KILL"] {
        let Some(mut lab) = Lab::up_in_foreground(&text) else {
            return;
        };
        let processes = lab.processes();
        lab.signal(signal);
        eventually(Duration::from_secs(10), "the lab is gone", || {
            processes.iter().all(|pid| !labs::is_alive(*pid))
        });
        // Killed outright, the command cannot tidy up; the next one does.
        assert_eq!(lab.dir().exists(), signal == "KILL");
    }
}

#[test]
fn applied_objects_start_change_and_stop_pods() {
    let client = pod("outside", "client", "[sleep, infinity]");
    let Some(lab) = Lab::up(&format!("{NAMESPACES}{}{client}", ratings(1)), &[]) else {
        return;
    };
    let before = lab.pods("default");
    assert_eq!(before.len(), 1);
    assert!(
        lab.apply(&ratings(3))
            .stdout
            .contains("deployment/ratings in default configured")
    );
    lab.wait_ready(4);
    let after = lab.pods("default");
    assert_eq!(after.len(), 3);
    assert!(after.contains(&before[0]), "{before:?} {after:?}");
    let call = "for i in 1 2 3 4 5 6 7 8 9 10 11 12; do curl -sS -m 5 http://ratings.default/ratings/0 || exit 1; done";
    assert_eq!(lab.exec("outside", "client", call).code, 0);
    let served = after
        .iter()
        .filter(|pod| lab.log("default", pod).contains("GET /ratings/0 200"));
    assert!(served.count() >= 2, "requests are shared among the pods");
    let refused = lab.apply(&ratings(1).replace("command:", "image:"));
    assert_ne!(refused.code, 0);
    assert!(
        refused
            .stderr
            .contains("deployment/ratings in default: container main"),
        "{}",
        refused.stderr
    );
    assert_eq!(lab.pods("default").len(), 3);
    assert!(
        lab.delete(&ratings(3))
            .stdout
            .contains("service/ratings in default deleted")
    );
    assert!(lab.pods("default").is_empty());
    assert_ne!(lab.exec("outside", "client", call).code, 0);
}

#[test]
fn a_label_brings_a_running_pod_into_the_mesh_and_out_of_it() {
    let text = format!("{NAMESPACES}{}", pod("outside", "p", "[sleep, infinity]"));
    let Some(lab) = Lab::up(&text, &["--nodes", "1"]) else {
        return;
    };
    let rules = "iptables-save | grep -c 15001; true";
    assert_eq!(lab.exec("outside", "p", rules).stdout.trim(), "0");
    let label = |mode: &str| {
        format!(
            "apiVersion: v1\nkind: Namespace\nmetadata: {{name: outside, labels: {{istio.io/dataplane-mode: {mode}}}}}\n"
        )
    };
    lab.apply(&label("ambient"));
    assert!(
        lab.status()
            .lines()
            .any(|l| l.starts_with("outside") && l.ends_with("yes"))
    );
    assert_eq!(lab.exec("outside", "p", rules).stdout.trim(), "1");
    lab.apply(&label("none"));
    assert_eq!(lab.exec("outside", "p", rules).stdout.trim(), "0");
}

#[test]
fn exec_passes_streams_and_exit_codes_and_ends_with_its_caller() {
    let text = format!("{NAMESPACES}{}", pod("outside", "p", "[sleep, infinity]"));
    let Some(lab) = Lab::up(&text, &["--nodes", "1"]) else {
        return;
    };
    let output = lab.exec_with("outside", "p", "cat; echo err >&2; exit 3", "through\n");
    assert_eq!(
        (output.stdout.as_str(), output.stderr.as_str(), output.code),
        ("through\n", "err\n", 3)
    );
    assert_eq!(lab.exec("outside", "p", "kill -9 $$").code, 137);
    assert!(
        lab.exec("outside", "nobody", "true")
            .stderr
            .contains("there is no nobody in namespace outside")
    );
    lab.exec_and_kill("outside", "p", "sleep 4711");
    let count = "pgrep -cf '[s]leep 4711'; true";
    eventually(Duration::from_secs(5), "the command has ended", || {
        lab.exec("outside", "p", count).stdout.trim() == "0"
    });
}

#[test]
fn a_container_that_ends_is_started_again() {
    let text = format!(
        "{NAMESPACES}{}",
        pod("outside", "p", "[sh, -c, 'echo word; sleep 0.1; exit 4']")
    );
    let Some(lab) = Lab::up(&text, &["--nodes", "1"]) else {
        return;
    };
    eventually(Duration::from_secs(10), "the container ran twice", || {
        lab.log("outside", "p").matches("word").count() >= 2
    });
    assert!(
        lab.log("outside", "p")
            .contains("[lab] exit status: 4; starting again in")
    );
}

#[test]
fn flows_go_on_after_the_proxies_were_killed() {
    let client = pod("default", "client", "[sleep, infinity]");
    let Some(lab) = Lab::up(&format!("{NAMESPACES}{}{client}", ratings(1)), &[]) else {
        return;
    };
    let call = "curl -sS -m 5 http://ratings/ratings/0";
    assert_eq!(lab.exec("default", "client", call).code, 0);
    lab.kill_proxies();
    eventually(Duration::from_secs(20), "a flow is carried again", || {
        lab.exec("default", "client", call).code == 0
    });
}

#[test]
fn what_the_control_plane_refuses_is_told() {
    let text = format!("{NAMESPACES}{}", pod("outside", "p", "[sleep, infinity]"));
    let Some(lab) = Lab::up(&text, &["--nodes", "1"]) else {
        return;
    };
    let policy = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
                  metadata: {name: odd}\nspec: {action: PERHAPS}\n";
    let output = lab.apply(policy);
    assert_ne!(output.code, 0);
    assert!(output.stdout.contains("PERHAPS"), "{}", output.stdout);
}

#[test]
fn an_ordinary_user_can_have_a_lab() {
    let text = format!(
        "{NAMESPACES}{}{}",
        ratings(1),
        pod("default", "client", "[sleep, infinity]")
    );
    let Some(lab) = Lab::up_as_nobody(&text) else {
        return;
    };
    let call = lab.exec(
        "default",
        "client",
        "curl -sS -m 5 http://ratings/ratings/0",
    );
    assert!(
        call.stdout.contains("Reviewer1"),
        "{} {}",
        call.stdout,
        call.stderr
    );
}

#[test]
fn what_is_missing_is_told_with_the_remedy() {
    let output = labs::up_without_tools(NAMESPACES);
    if labs::refused(&output) {
        return;
    }
    assert_ne!(output.code, 0);
    assert_eq!(
        output.stderr.trim(),
        "warren: iptables is missing; install it with: sudo apt-get install iptables"
    );
}
