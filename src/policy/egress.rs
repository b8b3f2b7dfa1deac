//! Where pods may connect to: decided at the source, before anything is dialled.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use ipnet::IpNet;
use thiserror::Error;

/// The process's rules for outbound flows; by default everything is allowed.
#[derive(Clone, Debug, Default)]
pub struct Egress {
    /// Only destinations that the mesh knows, and those of `allow`.
    pub registry_only: bool,
    /// Destinations that nobody reaches, known or not.
    pub deny: Vec<Destinations>,
    /// Destinations that may be reached without being known.
    pub allow: Vec<Destinations>,
}

/// Why an outbound flow is refused.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Refusal {
    #[error("outbound to {0} is denied by OUTBOUND_DENY={1}")]
    Denied(SocketAddr, Destinations),
    #[error("outbound to {0} is not known to the mesh (OUTBOUND_TRAFFIC_POLICY=REGISTRY_ONLY)")]
    Unknown(SocketAddr),
}

impl Egress {
    /// Judges a flow to `target`; `known` tells whether the mesh has a service or workload there.
    ///
    /// # Errors
    /// Why it is refused.
    pub fn judge(&self, target: SocketAddr, known: impl FnOnce() -> bool) -> Result<(), Refusal> {
        let of =
            |rules: &'_ [Destinations]| rules.iter().find(|rule| rule.contain(target)).copied();
        if let Some(rule) = of(&self.deny) {
            return Err(Refusal::Denied(target, rule));
        }
        if self.registry_only && of(&self.allow).is_none() && !known() {
            return Err(Refusal::Unknown(target));
        }
        Ok(())
    }
}

/// A range of addresses and a range of ports: `10.0.0.0/8`, `10.0.0.1:443`, `[fd00::/8]:8000-8099`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Destinations {
    net: IpNet,
    /// First and last port.
    ports: (u16, u16),
}

impl Destinations {
    fn contain(&self, target: SocketAddr) -> bool {
        let (first, last) = self.ports;
        self.net.contains(&target.ip().to_canonical()) && (first..=last).contains(&target.port())
    }
}

impl FromStr for Destinations {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "{text:?} is no destination; write 10.0.0.0/8, 10.0.0.1:443 or [fd00::/8]:8000-8099"
            )
        };
        let (net, ports) = match text.strip_prefix('[') {
            Some(rest) => {
                let (net, rest) = rest.split_once(']').ok_or_else(wrong)?;
                match rest {
                    "" => (net, None),
                    _ => (net, Some(rest.strip_prefix(':').ok_or_else(wrong)?)),
                }
            }
            None if text.matches(':').count() == 1 => text
                .split_once(':')
                .map_or((text, None), |(net, ports)| (net, Some(ports))),
            None => (text, None),
        };
        let net = net
            .parse()
            .or_else(|_| net.parse::<IpAddr>().map(IpNet::from))
            .map_err(|_| wrong())?;
        let port = |text: &str| text.parse::<u16>().map_err(|_| wrong());
        let ports = match ports.map(|ports| ports.split_once('-').unwrap_or((ports, ports))) {
            None => (0, u16::MAX),
            Some((first, last)) => (port(first)?, port(last)?),
        };
        if ports.0 > ports.1 {
            return Err(wrong());
        }
        Ok(Self { net, ports })
    }
}

impl fmt::Display for Destinations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.net, self.ports) {
            (net, (0, u16::MAX)) => write!(f, "{net}"),
            (IpNet::V4(net), (first, last)) if first == last => write!(f, "{net}:{first}"),
            (IpNet::V4(net), (first, last)) => write!(f, "{net}:{first}-{last}"),
            (IpNet::V6(net), (first, last)) if first == last => write!(f, "[{net}]:{first}"),
            (IpNet::V6(net), (first, last)) => write!(f, "[{net}]:{first}-{last}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(texts: &[&str]) -> Vec<Destinations> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn what_is_written_is_read_and_shown_again() {
        let cases = [
            ("10.0.0.0/8", "10.0.0.0/8"),
            ("10.0.0.1", "10.0.0.1/32"),
            ("10.0.0.1:443", "10.0.0.1/32:443"),
            ("10.0.0.0/8:8000-8099", "10.0.0.0/8:8000-8099"),
            ("fd00::/8", "fd00::/8"),
            ("fd00::1", "fd00::1/128"),
            ("[fd00::/8]", "fd00::/8"),
            ("[fd00::/8]:443", "[fd00::/8]:443"),
            ("[fd00::1]:1-2", "[fd00::1/128]:1-2"),
        ];
        for (text, shown) in cases {
            let rule: Destinations = text.parse().unwrap();
            assert_eq!(rule.to_string(), shown, "{text}");
            assert_eq!(shown.parse(), Ok(rule), "{text}");
        }
        let wrong = [
            "",
            "x",
            "10.0.0.0/33",
            "10.0.0.1:",
            "10.0.0.1:x",
            "10.0.0.1:70000",
            "10.0.0.1:2-1",
            "[fd00::1",
            "[fd00::1]443",
            "fd00::1:x",
        ];
        for text in wrong {
            assert!(text.parse::<Destinations>().is_err(), "{text}");
        }
    }

    #[test]
    fn denial_comes_first_and_the_unknown_need_an_exception() {
        let egress = Egress {
            registry_only: true,
            deny: rules(&["192.0.2.0/24:22", "198.51.100.1"]),
            allow: rules(&["192.0.2.0/24", "[2001:db8::/32]:443"]),
        };
        let open = Egress::default();
        // target, known to the mesh, what is said with those rules
        let cases = [
            ("10.0.0.1:80", true, None),
            ("10.0.0.1:80", false, Some("is not known to the mesh")),
            ("192.0.2.9:443", false, None),
            ("192.0.2.9:22", true, Some("OUTBOUND_DENY=192.0.2.0/24:22")),
            (
                "198.51.100.1:80",
                true,
                Some("OUTBOUND_DENY=198.51.100.1/32"),
            ),
            ("[2001:db8::1]:443", false, None),
            ("[2001:db8::1]:80", false, Some("REGISTRY_ONLY")),
        ];
        for (target, known, expected) in cases {
            let target = target.parse().unwrap();
            let said = egress
                .judge(target, || known)
                .err()
                .map(|refusal| refusal.to_string());
            match expected {
                None => assert_eq!(said, None, "{target}"),
                Some(part) => assert!(said.unwrap().contains(part), "{target}"),
            }
            assert_eq!(open.judge(target, || known), Ok(()));
        }
    }
}
