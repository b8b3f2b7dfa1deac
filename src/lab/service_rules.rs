//! Cluster addresses for pods outside the mesh: what kube-proxy does in a cluster, as rules of each node.

use std::fmt::Write as _;
use std::io::{Error, ErrorKind, Result, Write as _};
use std::net::Ipv4Addr;
use std::process::{Command, Stdio};

use super::namespaces::Namespaces;

/// A port of a service and where it leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    pub address: Ipv4Addr,
    pub port: u16,
    pub endpoints: Vec<(Ipv4Addr, u16)>,
}

/// The rules as `iptables-restore` reads them; they replace all rules of this kind.
pub fn render(ports: &[ServicePort]) -> String {
    let mut rules = String::from("*nat\n:LAB_SERVICES - [0:0]\n");
    for service in ports {
        let to = format!(
            "-d {}/32 -p tcp -m tcp --dport {}",
            service.address, service.port
        );
        let count = service.endpoints.len();
        for (index, (address, port)) in service.endpoints.iter().enumerate() {
            let share = match count - index {
                1 => String::new(),
                left => format!(
                    " -m statistic --mode random --probability {:.5}",
                    1.0 / left as f64
                ),
            };
            let _ = writeln!(
                rules,
                "-A LAB_SERVICES {to}{share} -j DNAT --to-destination {address}:{port}"
            );
        }
    }
    rules.push_str("COMMIT\n");
    rules
}

/// Makes the chain known to a new node.
///
/// # Errors
/// When iptables is missing or refuses.
pub fn prepare(node: &Namespaces) -> Result<()> {
    let jumps = "-A PREROUTING -j LAB_SERVICES\n-A OUTPUT -j LAB_SERVICES\n";
    run(
        node,
        &format!("*nat\n:LAB_SERVICES - [0:0]\n{jumps}COMMIT\n"),
    )
}

/// Makes a node send each service port to its endpoints.
///
/// # Errors
/// When iptables is missing or refuses.
pub fn apply(node: &Namespaces, ports: &[ServicePort]) -> Result<()> {
    run(node, &render(ports))
}

fn run(node: &Namespaces, text: &str) -> Result<()> {
    node.run(|| {
        let mut child = Command::new("iptables-restore")
            .args(["--noflush", "--wait", "10"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|e| missing(&e))?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(text.as_bytes())?;
        }
        let output = child.wait_with_output()?;
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr);
        Err(Error::other(format!("iptables-restore: {}", said.trim())))
    })
}

fn missing(reason: &Error) -> Error {
    let text = if reason.kind() == ErrorKind::NotFound {
        "iptables is missing; install it with: sudo apt-get install iptables".to_owned()
    } else {
        format!("iptables-restore: {reason}")
    };
    Error::new(reason.kind(), text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_share_a_port_evenly() {
        let pod = |last| (Ipv4Addr::new(10, 42, 0, last), 9080);
        let rules = render(&[ServicePort {
            address: Ipv4Addr::new(10, 96, 1, 1),
            port: 80,
            endpoints: vec![pod(2), pod(3)],
        }]);
        assert_eq!(
            rules,
            "*nat\n:LAB_SERVICES - [0:0]\n\
             -A LAB_SERVICES -d 10.96.1.1/32 -p tcp -m tcp --dport 80 -m statistic --mode random --probability 0.50000 -j DNAT --to-destination 10.42.0.2:9080\n\
             -A LAB_SERVICES -d 10.96.1.1/32 -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.42.0.3:9080\n\
             COMMIT\n"
        );
    }
}
