//! The state of a lab as a table.

use std::fmt::Write;

use super::cluster::{Cluster, Machine, PodKey};
use super::pod::Pod;
use super::process::Supervised;
use super::services;
use super::topology::Node;
use super::wire::{Capture, NodeStatus, PodStatus, Process, Status};
use super::{addresses, health};

/// The deployment that a pod belongs to.
pub fn deployment(pod: &Pod) -> Option<String> {
    let metadata = &pod.plan.object["metadata"];
    let owner = metadata["ownerReferences"][0]["name"].as_str()?;
    let hash = metadata["labels"]["pod-template-hash"].as_str()?;
    Some(owner.strip_suffix(hash)?.trim_end_matches('-').to_owned())
}

/// Whether `wanted` means the pod: its name, `deploy/NAME` of its deployment, or only that name.
pub fn is_meant(wanted: &str, pod: &str, deployment: Option<&str>) -> bool {
    let deployments = ["deploy/", "deployment/", "deployments/"];
    if let Some(name) = deployments.iter().find_map(|p| wanted.strip_prefix(p)) {
        return deployment == Some(name);
    }
    match ["pod/", "pods/"]
        .iter()
        .find_map(|p| wanted.strip_prefix(p))
    {
        Some(name) => pod == name,
        None => pod == wanted || deployment == Some(wanted),
    }
}

/// Looks at everything.
pub fn collect(cluster: &Cluster) -> Status {
    let process = |process: &Supervised, ready| Process {
        ready,
        restarts: process.state().restarts,
    };
    let node = |machine: &Machine| NodeStatus {
        name: machine.node.name.clone(),
        addresses: machine.node.addresses.clone(),
        proxy: process(&machine.proxy, health::proxy_is_ready(&machine.node)),
        news: news(cluster, &machine.node),
    };
    let pod = |pod: &Pod| PodStatus {
        namespace: pod.plan.namespace.clone(),
        name: pod.plan.name.clone(),
        deployment: deployment(pod),
        node: cluster.machines[pod.node].node.name.clone(),
        addresses: pod.addresses.clone(),
        ready: pod.is_ready(),
        restarts: pod.restarts(),
        capture: pod.capture.clone(),
        containers: pod.plan.containers.iter().map(|c| c.name.clone()).collect(),
    };
    Status {
        families: cluster.families,
        control: process(&cluster.control, health::control_is_ready(cluster.families)),
        nodes: cluster.machines.iter().map(node).collect(),
        pods: cluster.pods.values().map(pod).collect(),
        services: services::status(cluster),
    }
}

/// The ready pods that a node's proxy has not yet heard of as they are.
fn news(cluster: &Cluster, node: &Node) -> Vec<String> {
    let known = health::known_pods(node);
    let is_news = |(key, pod): &(&PodKey, &Pod)| {
        let right =
            |k: &health::KnownPod| k.healthy && k.tunnels == (pod.capture == Capture::Captured);
        pod.is_ready() && !known.get(*key).is_some_and(right)
    };
    let news = cluster.pods.iter().filter(is_news);
    news.map(|((namespace, name), _)| format!("{namespace}/{name}"))
        .collect()
}

/// What is not ready, in words; empty when the lab is up.
pub fn waiting_for(status: &Status) -> Vec<String> {
    let mut waiting = Vec::new();
    if !status.control.ready {
        waiting.push("the control plane".to_owned());
    }
    for node in status.nodes.iter().filter(|n| !n.proxy.ready) {
        waiting.push(format!("the proxy of {}", node.name));
    }
    for node in status
        .nodes
        .iter()
        .filter(|n| n.proxy.ready && !n.news.is_empty())
    {
        waiting.push(format!(
            "the proxy of {} to hear of {}",
            node.name,
            node.news.join(" and ")
        ));
    }
    for pod in &status.pods {
        let name = format!("pod {}/{}", pod.namespace, pod.name);
        match &pod.capture {
            Capture::Failed(reason) => waiting.push(format!("{name} (not captured: {reason})")),
            _ if !pod.ready => waiting.push(name),
            _ => {}
        }
    }
    waiting
}

/// The tables of `warren lab status`.
pub fn render(status: &Status) -> String {
    let ready = |ready| if ready { "ready" } else { "not ready" }.to_owned();
    let mut nodes = vec![
        ["NODE", "ADDRESS", "PROXY", "RESTARTS", "PODS KNOWN"]
            .map(str::to_owned)
            .to_vec(),
    ];
    let control = addresses::control_plane(status.families).to_string();
    nodes.push(vec![
        "control".into(),
        control,
        ready(status.control.ready),
        status.control.restarts.to_string(),
        String::new(),
    ]);
    let count = status.pods.iter().filter(|p| p.ready).count();
    for node in &status.nodes {
        nodes.push(vec![
            node.name.clone(),
            node.addresses.to_string(),
            ready(node.proxy.ready),
            node.proxy.restarts.to_string(),
            format!("{}/{count}", count.saturating_sub(node.news.len())),
        ]);
    }
    let head = [
        "NAMESPACE",
        "POD",
        "NODE",
        "ADDRESS",
        "READY",
        "RESTARTS",
        "CAPTURED",
    ];
    let mut pods = vec![head.map(str::to_owned).to_vec()];
    for pod in &status.pods {
        pods.push(vec![
            pod.namespace.clone(),
            pod.name.clone(),
            pod.node.clone(),
            pod.addresses.to_string(),
            if pod.ready { "yes" } else { "no" }.into(),
            pod.restarts.to_string(),
            match &pod.capture {
                Capture::Outside => "no".into(),
                Capture::Captured => "yes".into(),
                Capture::Failed(reason) => format!("failed: {reason}"),
            },
        ]);
    }
    let mut services = vec![
        ["NAMESPACE", "SERVICE", "ADDRESS", "PORTS"]
            .map(str::to_owned)
            .to_vec(),
    ];
    for service in &status.services {
        let ports: Vec<String> = service.ports.iter().map(ToString::to_string).collect();
        services.push(vec![
            service.namespace.clone(),
            service.name.clone(),
            match &service.addresses {
                Some(addresses) => addresses.to_string(),
                None => "none".into(),
            },
            ports.join(","),
        ]);
    }
    [table(&nodes), table(&pods), table(&services)].join("\n")
}

/// Columns as wide as their widest cell.
fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.first().map_or(0, Vec::len);
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            let _ = write!(line, "{cell:width$}  ");
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::family::{Addresses, IpFamily};
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = [["A", "BB"], ["ccc", "d"]].map(|row| row.map(str::to_owned).to_vec());
        assert_eq!(table(&rows), "A    BB\nccc  d\n");
    }

    #[test]
    fn a_pod_is_meant_by_its_name_or_its_deployments() {
        for wanted in ["p-1", "pod/p-1", "deploy/p", "deployment/p", "p"] {
            assert!(is_meant(wanted, "p-1", Some("p")), "{wanted}");
        }
        for wanted in ["p-2", "pod/p", "deploy/p-1", ""] {
            assert!(!is_meant(wanted, "p-1", Some("p")), "{wanted}");
        }
    }

    #[test]
    fn what_is_not_ready_is_named() {
        let status = Status {
            control: Process {
                ready: true,
                restarts: 0,
            },
            pods: vec![PodStatus {
                namespace: "a".into(),
                name: "p".into(),
                deployment: None,
                node: "node-0".into(),
                addresses: Addresses::of(IpFamily::Ipv4, |_| [10, 42, 0, 2].into()),
                ready: false,
                restarts: 0,
                capture: Capture::Outside,
                containers: vec![],
            }],
            ..Status::default()
        };
        assert_eq!(waiting_for(&status), ["pod a/p"]);
        assert!(render(&status).contains("a          p    node-0  10.42.0.2  no"));
    }
}
