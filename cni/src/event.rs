//! What the plugin says to the node agent on its socket, and what the agent answers (`node-agent.md` §1.2).
//!
//! | request | body | answer |
//! |---|---|---|
//! | `POST /cmdadd` | [`AddRequest`] | 200 when the pod is captured; 400, 500 with the reason as text |
//! | `POST /cmdcheck` | [`AddRequest`] | 200 when the pod is captured or not enrolled; 400, 500 as above |
//! | `POST /decide` | [`PodName`] | 200 with a [`Decision`]; 404 when the agent cannot tell |
//! | `POST /note` | [`AddRequest`] | 200 when the place of the pod's namespace is noted; 404, 500 with the reason |
//! | `POST /log`, on the other socket | an array of strings, each a JSON record | 200 |

use std::net::IpAddr;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The agent's socket, in its run directory.
pub const EVENT_SOCKET: &str = "pluginevent.sock";
/// The socket for log records, in the same directory.
pub const LOG_SOCKET: &str = "log.sock";
/// The plugin's way to the API server, in the same directory.
pub const KUBECONFIG: &str = "istio-cni-kubeconfig";

pub const ADD_PATH: &str = "/cmdadd";
pub const CHECK_PATH: &str = "/cmdcheck";
pub const DECIDE_PATH: &str = "/decide";
pub const NOTE_PATH: &str = "/note";
pub const LOG_PATH: &str = "/log";

/// Why a body is not understood.
#[derive(Debug, Error)]
pub enum EventError {
    #[error("the request has no body")]
    Empty,
    #[error("the body is not the JSON that is expected: {0}")]
    Json(#[from] serde_json::Error),
    #[error("the body names no pod: it lacks {0}")]
    NoPod(&'static str),
    #[error("{0:?} is not an IP address")]
    Address(String),
}

/// A pod whose sandbox is being made, or is looked after.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AddRequest {
    /// Where its network namespace is, as the container runtime sees it.
    pub netns: String,
    pub pod_name: String,
    pub pod_namespace: String,
    /// Its addresses; IPv4 is never written as IPv6.
    pub ips: Vec<IpAddr>,
}

/// What a CNI result says of one address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Assigned {
    pub address: IpNet,
    /// The place of its interface in the result's list.
    pub interface: Option<u32>,
    pub gateway: Option<IpAddr>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct AddBody {
    #[serde(default)]
    netns: String,
    #[serde(default)]
    pod_name: String,
    #[serde(default)]
    pod_namespace: String,
    #[serde(rename = "IPs", default)]
    ips: Option<Vec<IpBody>>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct IpBody {
    #[serde(default)]
    interface: Option<u32>,
    address: NetBody,
    #[serde(default)]
    gateway: String,
}

#[derive(Serialize, Deserialize)]
struct NetBody {
    #[serde(rename = "IP")]
    ip: String,
    /// The bytes of the mask in base64.
    #[serde(rename = "Mask", default)]
    mask: Option<String>,
}

impl AddRequest {
    /// The body. Addresses that `assigned` does not speak of are written as single hosts.
    pub fn to_json(&self, assigned: &[Assigned]) -> String {
        let ip = |&ip: &IpAddr| {
            let known = assigned.iter().find(|known| known.address.addr() == ip);
            IpBody {
                interface: known.and_then(|known| known.interface),
                address: NetBody {
                    ip: ip.to_string(),
                    mask: Some(mask(known.map_or(IpNet::from(ip), |known| known.address))),
                },
                gateway: known
                    .and_then(|known| known.gateway)
                    .map_or_else(String::new, |gateway| gateway.to_string()),
            }
        };
        let body = AddBody {
            netns: self.netns.clone(),
            pod_name: self.pod_name.clone(),
            pod_namespace: self.pod_namespace.clone(),
            ips: (!self.ips.is_empty()).then(|| self.ips.iter().map(ip).collect()),
        };
        json(&body)
    }

    /// Reads the body of `/cmdadd` and `/cmdcheck`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn from_json(body: &[u8]) -> Result<Self, EventError> {
        let body: AddBody = parse(body)?;
        check_pod(&body.pod_namespace, &body.pod_name)?;
        let ips = body.ips.unwrap_or_default().into_iter().map(|ip| {
            let text = ip.address.ip;
            match text.parse::<IpAddr>() {
                Ok(ip) => Ok(ip.to_canonical()),
                Err(_) => Err(EventError::Address(text)),
            }
        });
        Ok(Self {
            ips: ips.collect::<Result<_, _>>()?,
            netns: body.netns,
            pod_name: body.pod_name,
            pod_namespace: body.pod_namespace,
        })
    }
}

/// A pod of which the plugin asks whether it is enrolled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodName {
    pub namespace: String,
    pub name: String,
}

impl PodName {
    pub fn to_json(&self) -> String {
        json(self)
    }

    /// Reads the body of `/decide`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn from_json(body: &[u8]) -> Result<Self, EventError> {
        let pod: Self = parse(body)?;
        check_pod(&pod.namespace, &pod.name)?;
        Ok(pod)
    }
}

/// Whether a pod is enrolled, as far as the agent knows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    pub enrolled: bool,
    /// Why, or why not.
    pub reason: String,
}

impl Decision {
    pub fn to_json(&self) -> String {
        json(self)
    }

    /// Reads the answer of `/decide`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn from_json(body: &[u8]) -> Result<Self, EventError> {
        parse(body)
    }
}

fn parse<T: for<'a> Deserialize<'a>>(body: &[u8]) -> Result<T, EventError> {
    if body.iter().all(u8::is_ascii_whitespace) {
        return Err(EventError::Empty);
    }
    Ok(serde_json::from_slice(body)?)
}

fn json(value: &impl Serialize) -> String {
    // Strings, numbers and lists are always writable.
    serde_json::to_string(value).unwrap_or_default()
}

fn check_pod(namespace: &str, name: &str) -> Result<(), EventError> {
    match (namespace.is_empty(), name.is_empty()) {
        (true, _) => Err(EventError::NoPod("the pod's namespace")),
        (_, true) => Err(EventError::NoPod("the pod's name")),
        _ => Ok(()),
    }
}

fn mask(net: IpNet) -> String {
    match net.netmask() {
        IpAddr::V4(mask) => STANDARD.encode(mask.octets()),
        IpAddr::V6(mask) => STANDARD.encode(mask.octets()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(ips: &[&str]) -> AddRequest {
        AddRequest {
            netns: "/var/run/netns/cni-1".to_string(),
            pod_name: "pod-a".to_string(),
            pod_namespace: "demo".to_string(),
            ips: ips.iter().map(|ip| ip.parse().unwrap()).collect(),
        }
    }

    #[test]
    fn the_body_is_the_one_of_the_contract() {
        let assigned = [
            Assigned {
                address: "10.1.2.3/24".parse().unwrap(),
                interface: Some(0),
                gateway: Some("10.1.2.1".parse().unwrap()),
            },
            Assigned {
                address: "fd00::3/64".parse().unwrap(),
                interface: None,
                gateway: None,
            },
        ];
        let request = request(&["10.1.2.3", "fd00::3", "10.9.9.9"]);
        let body = request.to_json(&assigned);
        assert_eq!(
            body,
            concat!(
                r#"{"Netns":"/var/run/netns/cni-1","PodName":"pod-a","PodNamespace":"demo","IPs":["#,
                r#"{"Interface":0,"Address":{"IP":"10.1.2.3","Mask":"////AA=="},"Gateway":"10.1.2.1"},"#,
                r#"{"Interface":null,"Address":{"IP":"fd00::3","Mask":"//////////8AAAAAAAAAAA=="},"Gateway":""},"#,
                r#"{"Interface":null,"Address":{"IP":"10.9.9.9","Mask":"/////w=="},"Gateway":""}]}"#
            )
        );
        assert_eq!(AddRequest::from_json(body.as_bytes()).unwrap(), request);
    }

    #[test]
    fn a_pod_without_addresses_has_a_null_list() {
        let body = request(&[]).to_json(&[]);
        assert!(body.ends_with(r#""IPs":null}"#), "{body}");
        let read = AddRequest::from_json(body.as_bytes()).unwrap();
        assert_eq!(read, request(&[]));
        let without = br#"{"Netns":"n","PodName":"a","PodNamespace":"b"}"#;
        assert!(AddRequest::from_json(without).unwrap().ips.is_empty());
    }

    #[test]
    fn ipv4_addresses_written_as_ipv6_are_ipv4() {
        let body = br#"{"PodName":"a","PodNamespace":"b","IPs":[{"Address":{"IP":"::ffff:10.1.2.3","Mask":null}}]} "#;
        let request = AddRequest::from_json(body).unwrap();
        assert_eq!(request.ips, ["10.1.2.3".parse::<IpAddr>().unwrap()]);
    }

    #[test]
    fn bodies_that_say_no_pod_are_refused() {
        for (body, part) in [
            ("", "no body"),
            (" \n", "no body"),
            ("{", "EOF"),
            ("1", "not the JSON"),
            ("{}", "lacks the pod's namespace"),
            (r#"{"PodNamespace":"b"}"#, "lacks the pod's name"),
            (r#"{"PodName":"a","PodNamespace":"b"}x"#, "trailing"),
            (r#"{"PodName":"a","PodNamespace":"b"}{}"#, "trailing"),
            (
                r#"{"PodName":"a","PodNamespace":"b","IPs":[{"Address":{"IP":"10.1.2"}}]}"#,
                r#""10.1.2" is not an IP address"#,
            ),
        ] {
            let error = AddRequest::from_json(body.as_bytes()).unwrap_err();
            assert!(error.to_string().contains(part), "{body}: {error}");
        }
        assert!(AddRequest::from_json(b"\xff\xfe").is_err());
    }

    #[test]
    fn questions_and_decisions_come_back_as_they_went() {
        let pod = PodName {
            namespace: "demo".to_string(),
            name: "pod-a".to_string(),
        };
        assert_eq!(PodName::from_json(pod.to_json().as_bytes()).unwrap(), pod);
        assert!(PodName::from_json(br#"{"namespace":"demo","name":""}"#).is_err());
        let decision = Decision {
            enrolled: true,
            reason: "its namespace asks for the mesh".to_string(),
        };
        let read = Decision::from_json(decision.to_json().as_bytes()).unwrap();
        assert_eq!(read, decision);
    }
}
