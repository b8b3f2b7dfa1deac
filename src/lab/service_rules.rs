//! Cluster addresses for pods outside the mesh: what kube-proxy does in a cluster, as rules of each node.

use std::fmt::Write as _;
use std::io::{Error, ErrorKind, Result, Write as _};
use std::net::{IpAddr, SocketAddr};
use std::process::{Command, Stdio};

use ipnet::IpNet;

use super::family::{Family, IpFamily};
use super::namespaces::Namespaces;

/// A port of a service and where it leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    pub address: IpAddr,
    pub port: u16,
    /// Of the family of the address.
    pub endpoints: Vec<SocketAddr>,
}

/// The rules of a family as `iptables-restore` reads them; they replace all rules of this kind.
fn render(family: Family, ports: &[ServicePort]) -> String {
    let mut rules = String::from("*nat\n:LAB_SERVICES - [0:0]\n");
    let of_family = |service: &&ServicePort| Family::of(service.address) == family;
    for service in ports.iter().filter(of_family) {
        let to = format!(
            "-d {} -p tcp -m tcp --dport {}",
            IpNet::from(service.address),
            service.port
        );
        let count = service.endpoints.len();
        for (index, endpoint) in service.endpoints.iter().enumerate() {
            let share = match count - index {
                1 => String::new(),
                left => format!(
                    " -m statistic --mode random --probability {:.5}",
                    1.0 / left as f64
                ),
            };
            let _ = writeln!(
                rules,
                "-A LAB_SERVICES {to}{share} -j DNAT --to-destination {endpoint}"
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
pub fn prepare(node: &Namespaces, families: IpFamily) -> Result<()> {
    let jumps = "-A PREROUTING -j LAB_SERVICES\n-A OUTPUT -j LAB_SERVICES\n";
    let text = format!("*nat\n:LAB_SERVICES - [0:0]\n{jumps}COMMIT\n");
    for family in families.families() {
        run(node, *family, &text)?;
    }
    Ok(())
}

/// Makes a node send each service port to its endpoints.
///
/// # Errors
/// When iptables is missing or refuses.
pub fn apply(node: &Namespaces, families: IpFamily, ports: &[ServicePort]) -> Result<()> {
    for family in families.families() {
        run(node, *family, &render(*family, ports))?;
    }
    Ok(())
}

fn run(node: &Namespaces, family: Family, text: &str) -> Result<()> {
    let tool = match family {
        Family::V4 => "iptables",
        Family::V6 => "ip6tables",
    };
    node.run(|| {
        let mut child = Command::new(format!("{tool}-restore"))
            .args(["--noflush", "--wait", "10"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|e| missing(tool, &e))?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(text.as_bytes())?;
        }
        let output = child.wait_with_output()?;
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr);
        Err(Error::other(format!("{tool}-restore: {}", said.trim())))
    })
}

fn missing(tool: &str, reason: &Error) -> Error {
    let text = if reason.kind() == ErrorKind::NotFound {
        format!("{tool} is missing; install it with: sudo apt-get install iptables")
    } else {
        format!("{tool}-restore: {reason}")
    };
    Error::new(reason.kind(), text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_share_a_port_evenly() {
        let service = |address: &str, endpoints: [&str; 2]| ServicePort {
            address: address.parse().unwrap(),
            port: 80,
            endpoints: endpoints.map(|e| e.parse().unwrap()).to_vec(),
        };
        let ports = [
            service("10.96.1.1", ["10.42.0.2:9080", "10.42.0.3:9080"]),
            service("fd42::1", ["[fd42::2]:9080", "[fd42::3]:9080"]),
        ];
        assert_eq!(
            render(Family::V4, &ports),
            "*nat\n:LAB_SERVICES - [0:0]\n\
             -A LAB_SERVICES -d 10.96.1.1/32 -p tcp -m tcp --dport 80 -m statistic --mode random --probability 0.50000 -j DNAT --to-destination 10.42.0.2:9080\n\
             -A LAB_SERVICES -d 10.96.1.1/32 -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.42.0.3:9080\n\
             COMMIT\n"
        );
        let v6 = render(Family::V6, &ports);
        assert!(v6.ends_with(
            "-A LAB_SERVICES -d fd42::1/128 -p tcp -m tcp --dport 80 -j DNAT --to-destination [fd42::3]:9080\nCOMMIT\n"
        ));
        assert_eq!(v6.lines().count(), 5, "{v6}");
    }
}
