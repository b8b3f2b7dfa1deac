//! Whether the control plane, the proxies and the node agents are ready, and which pods a proxy has heard of.

use std::collections::BTreeMap;
use std::io::{Read, Result, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

use serde_json::Value;

use super::addresses::control_plane;
use super::family::IpFamily;
use super::topology::Node;

const TIMEOUT: Duration = Duration::from_millis(500);
const READINESS_PORT: u16 = 15021;
const ADMIN_PORT: u16 = 15000;
const AGENT_PORT: u16 = 8000;

/// What a proxy knows of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KnownPod {
    pub healthy: bool,
    /// Whether it takes tunnels.
    pub tunnels: bool,
}

/// Whether the control plane accepts connections.
pub fn control_is_ready(families: IpFamily) -> bool {
    TcpStream::connect_timeout(&control_plane(families), TIMEOUT).is_ok()
}

/// What a node's proxy says of itself.
pub fn proxy_is_ready(node: &Node) -> bool {
    let answer = node
        .namespaces
        .run(|| get(READINESS_PORT, "/healthz/ready"));
    answer.is_ok_and(|(code, _)| code == 200)
}

/// Whether a node's agent has installed its plugin and watches pods.
pub fn agent_is_ready(node: &Node) -> bool {
    let answer = node.namespaces.run(|| get(AGENT_PORT, "/readyz"));
    answer.is_ok_and(|(code, _)| code == 200)
}

/// The pods that a node's proxy has heard of, by namespace and name; none when it does not answer.
pub fn known_pods(node: &Node) -> BTreeMap<(String, String), KnownPod> {
    match node.namespaces.run(|| get(ADMIN_PORT, "/config_dump")) {
        Ok((200, body)) => pods(&serde_json::from_slice(&body).unwrap_or_default()),
        _ => BTreeMap::new(),
    }
}

fn pods(dump: &Value) -> BTreeMap<(String, String), KnownPod> {
    let pod = |workload: &Value| {
        let text = |field: &str| workload[field].as_str();
        let known = KnownPod {
            healthy: text("status") == Some("Healthy"),
            tunnels: text("protocol") == Some("HBONE"),
        };
        Some((
            (text("namespace")?.to_owned(), text("name")?.to_owned()),
            known,
        ))
    };
    dump["workloads"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(pod)
        .collect()
}

/// Status and body of a GET on this namespace's loopback.
fn get(port: u16, path: &str) -> Result<(u16, Vec<u8>)> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let mut socket = TcpStream::connect_timeout(&address, TIMEOUT)?;
    socket.set_read_timeout(Some(TIMEOUT))?;
    write!(
        socket,
        "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    )?;
    let mut answer = Vec::new();
    socket.read_to_end(&mut answer)?;
    let end = answer.windows(4).position(|part| part == b"\r\n\r\n");
    let body = answer.split_off(end.map_or(answer.len(), |end| end + 4));
    let head = String::from_utf8_lossy(&answer);
    let code = head.split(' ').nth(1).and_then(|code| code.parse().ok());
    Ok((code.unwrap_or_default(), body))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn pods_are_read_from_a_dump() {
        let dump = json!({"workloads": [
            {"namespace": "a", "name": "p", "status": "Healthy", "protocol": "HBONE"},
            {"namespace": "a", "name": "q", "status": "Unhealthy", "protocol": "TCP"},
            {"name": "nowhere"}
        ]});
        let known = pods(&dump);
        assert_eq!(known.len(), 2);
        let p = known[&("a".to_owned(), "p".to_owned())];
        assert!(p.healthy && p.tunnels);
        assert!(pods(&json!(null)).is_empty());
    }
}
