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
    for ip_family in ["ipv4", "ipv6", "dual"] {
        let Some(output) = labs::demo(ip_family) else {
            return;
        };
        assert!(output.contains("0 of 13 expectations failed"), "{output}");
    }
}

/// A captured client, one outside the mesh, and ratings on another node than the captured one.
fn clients_and_ratings() -> String {
    let client = pod("default", "client", "[sleep, infinity]");
    let outside = pod("outside", "client", "[sleep, infinity]");
    format!("{NAMESPACES}{}{client}{outside}", ratings(1))
}

/// Sees that ratings answers over one family, through tunnels where it should, until a policy forbids it.
fn ratings_is_reached_and_refused(lab: &Lab, curl_option: &str, prefix: &str) {
    let url = "http://ratings.default.svc.cluster.local/ratings/0";
    let call = format!("curl -sS -m 10 {curl_option} {url}");
    let tunnelled: Vec<String> = ["src.addr=", "dst.addr=", "dst.hbone_addr="]
        .iter()
        .map(|field| format!("{field}{prefix}"))
        .chain(["src.identity=\"spiffe://cluster.local/ns/default/sa/default\"".to_owned()])
        .collect();
    let told = |direction: &str, parts: &[String]| {
        eventually(Duration::from_secs(5), "the flow is logged", || {
            let lines = lab.access_lines(direction);
            lines
                .iter()
                .any(|line| parts.iter().all(|part| line.contains(part)))
        });
    };
    for namespace in ["default", "outside"] {
        let output = lab.exec(namespace, "client", &call);
        assert!(
            output.stdout.contains("Reviewer1"),
            "{namespace} {curl_option}: {}",
            output.stderr
        );
    }
    for direction in ["outbound", "inbound"] {
        told(direction, &tunnelled);
    }
    let policy = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
                  metadata: {name: nobody}\nspec: {selector: {matchLabels: {app: ratings}}}\n";
    assert_eq!(lab.apply(policy).code, 0);
    for namespace in ["default", "outside"] {
        eventually(Duration::from_secs(5), "the flow is refused", || {
            lab.exec(namespace, "client", &call).code != 0
        });
    }
    let reason = "error=\"connection closed due to policy rejection".to_owned();
    told("inbound", &[tunnelled.as_slice(), &[reason]].concat());
    assert_eq!(lab.delete(policy).code, 0);
    eventually(Duration::from_secs(5), "the flow is let through", || {
        lab.exec("default", "client", &call).code == 0
    });
}

/// The first addresses that the pods of both kinds find behind a name; the same for both.
fn resolved(lab: &Lab, kind: &str, name: &str) -> Vec<String> {
    let question = format!("getent {kind} {name}.default.svc.cluster.local | grep STREAM; true");
    let [captured, outside] = ["default", "outside"].map(|namespace| {
        let answer = lab.exec(namespace, "client", &question).stdout;
        let first = |line: &str| line.split_whitespace().next().map(str::to_owned);
        answer.lines().filter_map(first).collect::<Vec<_>>()
    });
    assert_eq!(captured, outside, "{kind} {name}");
    captured
}

#[test]
fn a_lab_of_ipv6_has_nothing_else() {
    let Some(lab) = Lab::up(&clients_and_ratings(), &["--ip-family", "ipv6"]) else {
        return;
    };
    let status = lab.status();
    assert!(status.contains("[fd42:10:42:ff::1]:15012"), "{status}");
    assert!(status.contains("  fd42:10:42:1::2  "), "{status}");
    assert!(
        !status.contains("10.42.") && !status.contains("10.96."),
        "{status}"
    );
    let found = resolved(&lab, "ahostsv6", "ratings");
    assert!(
        found.len() == 1 && found[0].starts_with("fd42:10:96::"),
        "{found:?}"
    );
    assert!(resolved(&lab, "ahostsv4", "ratings").is_empty());
    ratings_is_reached_and_refused(&lab, "", "[fd42:10:42:");
}

#[test]
fn a_lab_of_both_families_serves_either() {
    let only = "---\napiVersion: v1\nkind: Service\nmetadata: {name: only}\n\
                spec: {selector: {app: ratings}, ports: [{port: 80, targetPort: http}], ipFamilies: [IPv6]}\n";
    let text = clients_and_ratings() + only;
    let Some(lab) = Lab::up(&text, &["--ip-family", "dual"]) else {
        return;
    };
    let status = lab.status();
    assert!(status.contains("10.42.1.2,fd42:10:42:1::2"), "{status}");
    for (kind, prefix) in [("ahostsv4", "10.96."), ("ahostsv6", "fd42:10:96::")] {
        let found = resolved(&lab, kind, "ratings");
        assert!(
            found.len() == 1 && found[0].starts_with(prefix),
            "{found:?}"
        );
    }
    assert!(resolved(&lab, "ahostsv4", "only").is_empty());
    assert_eq!(resolved(&lab, "ahostsv6", "only").len(), 1);
    ratings_is_reached_and_refused(&lab, "-4", "10.42.");
    ratings_is_reached_and_refused(&lab, "-6", "[fd42:10:42:");
}

#[test]
fn a_lab_of_ipv4_needs_no_ipv6_of_the_kernel() {
    for proxy in ["IPV6_ENABLED=false", "IPV6_ENABLED=true"] {
        let Some(lab) = Lab::up(&clients_and_ratings(), &["--proxy-env", proxy]) else {
            return;
        };
        let is_off = "cat /proc/sys/net/ipv6/conf/*/disable_ipv6 2>/dev/null | sort -u";
        for place in ["client", "node/node-0", "node/node-1"] {
            let seen = lab.exec("default", place, is_off).stdout;
            assert!(matches!(seen.trim(), "1" | ""), "{place}: {seen}");
        }
        ratings_is_reached_and_refused(&lab, "", "10.42.");
    }
}

#[test]
fn what_does_not_fit_the_families_of_a_lab_is_refused() {
    let service =
        "apiVersion: v1\nkind: Service\nmetadata: {name: s}\nspec: {clusterIP: 10.96.7.7}\n";
    let output = labs::up_refused(service, &["--ip-family", "ipv6"]);
    assert_eq!(
        output.stderr.trim(),
        "warren: service default/s: clusterIP 10.96.7.7 is no IPv6 address; take it out, or start the lab with \
         another --ip-family"
    );
    let output = labs::up_refused(service, &["--ip-family", "ipv5"]);
    assert!(
        output
            .stderr
            .contains("[possible values: ipv4, ipv6, dual]"),
        "{}",
        output.stderr
    );
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
fn without_its_agent_a_node_starts_all_pods_but_those_of_the_mesh() {
    let client = pod("default", "client", "[sleep, infinity]");
    let text = format!("{NAMESPACES}{}{client}", ratings(1));
    let Some(lab) = Lab::up(&text, &["--nodes", "1"]) else {
        return;
    };
    lab.signal_agents("STOP");
    let late = pod("default", "late", "[sleep, infinity]");
    let plain = pod("outside", "plain", "[sleep, infinity]");
    lab.apply(&format!("{late}{plain}"));
    let told = |pod: &str, part: &str| {
        let status = lab.status();
        let mut lines = status.lines();
        lines.any(|line| line.contains(&format!(" {pod} ")) && line.contains(part))
    };
    assert!(told(
        "late",
        "the node agent that captures it does not answer"
    ));
    assert_ne!(lab.exec("default", "late", "true").code, 0);
    assert_eq!(lab.exec("outside", "plain", "true").code, 0);
    let call = "curl -sS -m 5 http://ratings/ratings/0";
    assert_eq!(lab.exec("default", "client", call).code, 0);
    // Another takes its place.
    lab.signal_agents("KILL");
    eventually(Duration::from_secs(20), "the pod starts", || {
        told("late", " yes ") && lab.exec("default", "late", call).code == 0
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
    for ip_family in ["ipv4", "dual"] {
        let more = ["--ip-family", ip_family];
        let Some(lab) = Lab::up_as_nobody(&clients_and_ratings(), &more) else {
            return;
        };
        let call = lab.exec(
            "default",
            "client",
            "curl -sS -m 5 http://ratings/ratings/0",
        );
        assert!(
            call.stdout.contains("Reviewer1"),
            "{ip_family}: {} {}",
            call.stdout,
            call.stderr
        );
    }
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
