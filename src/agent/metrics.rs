//! What the agent counts, in the text format of OpenMetrics.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::version;

/// A counter with one label.
#[derive(Debug, Default)]
pub struct Labelled(Mutex<BTreeMap<String, u64>>);

impl Labelled {
    /// One more of a kind.
    pub fn count(&self, label: impl ToString) {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *counts.entry(label.to_string()).or_default() += 1;
    }
}

/// Everything that is counted.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Attempts to bring a pod to where it should be, by `add`, `update` or `delete`.
    pub reconciles: Labelled,
    /// What the plugin was answered, by status code.
    pub plugin_requests: Labelled,
    /// What installing the plugin came to.
    pub installs: Labelled,
    pub install_ready: AtomicI64,
    /// Proxies that have heard of every pod.
    pub proxies: AtomicI64,
    /// Pods that are captured and served.
    pub captured: AtomicI64,
    /// Pods that hold rules, but that no proxy serves yet.
    pub pending: AtomicI64,
    /// Enrolled pods whose traffic is not captured.
    pub uncaptured: AtomicI64,
    pub repairs: AtomicU64,
    pub self_test_failures: AtomicU64,
}

impl Metrics {
    /// All of it as text.
    pub fn encode(&self) -> String {
        let mut text = String::new();
        let mut family = |name: &str, kind: &str, help: &str, samples: &[(String, i64)]| {
            let _ = writeln!(text, "# HELP {name} {help}.\n# TYPE {name} {kind}");
            let suffix = if kind == "counter" { "_total" } else { "" };
            for (labels, value) in samples {
                let _ = writeln!(text, "{name}{suffix}{labels} {value}");
            }
        };
        let labelled = |counter: &Labelled, label: &str| -> Vec<_> {
            let counts = counter.0.lock().unwrap_or_else(PoisonError::into_inner);
            let sample = |(value, count): (&String, &u64)| {
                let count = i64::try_from(*count).unwrap_or(i64::MAX);
                (format!("{{{label}=\"{value}\"}}"), count)
            };
            counts.iter().map(sample).collect()
        };
        let gauge = |value: &AtomicI64| value.load(Ordering::Relaxed);
        let plain = |value: i64| vec![(String::new(), value)];
        let counter = |value: &AtomicU64| {
            plain(i64::try_from(value.load(Ordering::Relaxed)).unwrap_or(i64::MAX))
        };
        family(
            "nodeagent_reconcile_events",
            "counter",
            "Attempts to bring a pod to where it should be",
            &labelled(&self.reconciles, "type"),
        );
        family(
            "istio_cni_plugin_requests",
            "counter",
            "Requests of the CNI plugin by answer",
            &labelled(&self.plugin_requests, "response_code"),
        );
        family(
            "istio_cni_installs",
            "counter",
            "Installations of the CNI plugin by result",
            &labelled(&self.installs, "result"),
        );
        family(
            "istio_cni_install_ready",
            "gauge",
            "Whether the CNI plugin is installed as it should be",
            &plain(gauge(&self.install_ready)),
        );
        family(
            "ztunnel_connected",
            "gauge",
            "Proxies that have heard of every pod",
            &plain(gauge(&self.proxies)),
        );
        let pods = [
            ("captured", &self.captured),
            ("pending", &self.pending),
            ("uncaptured", &self.uncaptured),
        ];
        let pods = pods.map(|(state, value)| (format!("{{state=\"{state}\"}}"), gauge(value)));
        family(
            "warren_node_agent_pods",
            "gauge",
            "Enrolled pods of the node by state; uncaptured ones talk in clear text",
            &pods,
        );
        family(
            "warren_node_agent_capture_repairs",
            "counter",
            "Captures that were found damaged and put right",
            &counter(&self.repairs),
        );
        family(
            "warren_node_agent_selftest_failures",
            "counter",
            "Pods whose rules were in place and did not capture",
            &counter(&self.self_test_failures),
        );
        let build = format!("{{version=\"{}\"}}", version::VERSION);
        family(
            "warren_node_agent_build",
            "info",
            "The build of this agent",
            &[],
        );
        let _ = writeln!(text, "warren_node_agent_build_info{build} 1\n# EOF");
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_and_gauges_are_told_apart_and_labelled() {
        let metrics = Metrics::default();
        metrics.reconciles.count("add");
        metrics.reconciles.count("add");
        metrics.plugin_requests.count(200);
        metrics.uncaptured.store(3, Ordering::Relaxed);
        let text = metrics.encode();
        for line in [
            "# TYPE nodeagent_reconcile_events counter",
            "nodeagent_reconcile_events_total{type=\"add\"} 2",
            "istio_cni_plugin_requests_total{response_code=\"200\"} 1",
            "ztunnel_connected 0",
            "warren_node_agent_pods{state=\"uncaptured\"} 3",
            "warren_node_agent_capture_repairs_total 0",
        ] {
            assert!(text.contains(&format!("{line}\n")), "{line}\n{text}");
        }
        assert!(text.ends_with("# EOF\n"));
    }
}
