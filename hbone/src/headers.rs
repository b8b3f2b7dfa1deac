//! The CONNECT authority and the headers that ride along with it.

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;

use thiserror::Error;

/// Where a CONNECT goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Authority {
    Addr(SocketAddr),
    Host(String, u16),
}

/// An authority without a host or a port.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("no valid authority pseudo header: {0}")]
pub struct AuthorityError(pub String);

impl FromStr for Authority {
    type Err = AuthorityError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Ok(address) = text.parse() {
            return Ok(Self::Addr(address));
        }
        let invalid = || AuthorityError(text.to_string());
        let (host, port) = text.rsplit_once(':').ok_or_else(invalid)?;
        let port: u16 = port.parse().map_err(|_| invalid())?;
        let named = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | '*');
        if host.is_empty() || host.len() > 253 || !host.chars().all(named) {
            return Err(invalid());
        }
        Ok(Self::Host(host.to_string(), port))
    }
}

/// What a peer says of a workload; telemetry only, never grounds for a verdict.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Baggage {
    pub cluster: Option<String>,
    pub namespace: Option<String>,
    /// `deployment`, `cronjob`, `pod` or `job`.
    pub workload_type: Option<String>,
    pub workload_name: Option<String>,
    pub service_name: Option<String>,
    pub revision: Option<String>,
    pub region: Option<String>,
    pub zone: Option<String>,
}

impl Baggage {
    /// Reads a baggage header; unknown keys and broken items are passed over.
    pub fn parse(text: &str) -> Self {
        let mut baggage = Self::default();
        for item in text.split(',') {
            let mut pieces = item.split('=');
            let (Some(key), Some(value)) = (pieces.next(), pieces.next()) else {
                continue;
            };
            let value = (!value.is_empty()).then(|| value.to_string());
            match key {
                "k8s.cluster.name" => baggage.cluster = value,
                "k8s.namespace.name" => baggage.namespace = value,
                "service.name" => baggage.service_name = value,
                "service.version" => baggage.revision = value,
                "cloud.region" => baggage.region = value,
                "cloud.availability_zone" => baggage.zone = value,
                _ => {
                    let kind = key
                        .strip_prefix("k8s.")
                        .and_then(|rest| rest.strip_suffix(".name"));
                    if let Some(kind @ ("deployment" | "cronjob" | "pod" | "job")) = kind {
                        baggage.workload_type = Some(kind.to_string());
                        baggage.workload_name = value;
                    }
                }
            }
        }
        baggage
    }
}

impl fmt::Display for Baggage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let workload_key = format!(
            "k8s.{}.name",
            self.workload_type.as_deref().unwrap_or("deployment")
        );
        let items = [
            ("k8s.cluster.name", &self.cluster),
            ("k8s.namespace.name", &self.namespace),
            (&workload_key, &self.workload_name),
            ("service.name", &self.service_name),
            ("service.version", &self.revision),
            ("cloud.region", &self.region),
            ("cloud.availability_zone", &self.zone),
        ];
        let mut separator = "";
        for (key, value) in items {
            if let Some(value) = value.as_deref().filter(|value| !value.is_empty()) {
                write!(f, "{separator}{key}={value}")?;
                separator = ",";
            }
        }
        Ok(())
    }
}

/// The `host=` part of a `forwarded` header, without its quotes.
pub fn forwarded_host(forwarded: &str) -> Option<&str> {
    let host = forwarded
        .split(';')
        .find_map(|part| part.trim().strip_prefix("host="))?;
    let host = host
        .strip_prefix('"')
        .and_then(|host| host.strip_suffix('"'))
        .unwrap_or(host);
    (!host.is_empty()).then_some(host)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn authorities_are_addresses_or_names_with_a_port() {
        let parse = |text: &str| text.parse::<Authority>();
        assert_eq!(
            parse("10.0.0.1:80"),
            Ok(Authority::Addr("10.0.0.1:80".parse().unwrap()))
        );
        assert_eq!(
            parse("[fd00::1]:80"),
            Ok(Authority::Addr("[fd00::1]:80".parse().unwrap()))
        );
        assert_eq!(
            parse("a.b.svc:80"),
            Ok(Authority::Host("a.b.svc".to_string(), 80))
        );
        for garbage in [
            "",
            ":",
            ":80",
            "host",
            "host:",
            "host:99999",
            "fd00::1:80x",
            "a/b:80",
            "a b:80",
            "[::1:80",
        ] {
            assert!(parse(garbage).is_err(), "{garbage}");
        }
    }

    #[test]
    fn baggage_survives_its_text() {
        let text = "k8s.cluster.name=c1,k8s.namespace.name=ns,k8s.job.name=w,service.name=s,service.version=v1,cloud.region=r,cloud.availability_zone=z";
        assert_eq!(Baggage::parse(text).to_string(), text);
        let odd = Baggage::parse("nothing,service.name=a=b,k8s.cluster.name=,other=x");
        assert_eq!(
            odd,
            Baggage {
                service_name: Some("a".to_string()),
                ..Default::default()
            }
        );
    }

    #[test]
    fn the_forwarded_host_is_found_quoted_or_not() {
        assert_eq!(
            forwarded_host("for=\"1.2.3.4:5\";host=a.svc"),
            Some("a.svc")
        );
        assert_eq!(forwarded_host("for=x; host=\"a.svc\""), Some("a.svc"));
        assert_eq!(forwarded_host("for=x;host="), None);
        assert_eq!(forwarded_host("for=x"), None);
    }
}
