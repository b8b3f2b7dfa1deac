//! Capture of a pod's traffic, by the same rules that a node agent uses in a cluster.

use std::os::fd::BorrowedFd;

use cni::{CaptureConfig, Ipv6Mode};
use serde_json::Value;

/// Installs the rules that a pod's annotations ask for, or repairs them; those of IPv6 only where the lab has it.
///
/// # Errors
/// Why the pod is not captured.
pub fn install(netns: BorrowedFd, pod: &Value, ipv6: bool) -> Result<(), String> {
    cni::capture(netns, &config(pod, ipv6))
        .map(|_| ())
        .map_err(|e| e.to_string())
}

/// Takes the rules out.
///
/// # Errors
/// Why some of them stay.
pub fn remove(netns: BorrowedFd) -> Result<(), String> {
    cni::remove(netns).map_err(|e| e.to_string())
}

fn config(pod: &Value, ipv6: bool) -> CaptureConfig {
    let annotation = |name: &str| pod["metadata"]["annotations"][name].as_str();
    let switch = |name: &str| match annotation(name)? {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    };
    let interfaces = annotation("istio.io/reroute-virtual-interfaces").unwrap_or_default();
    CaptureConfig {
        ipv6: if ipv6 {
            Ipv6Mode::Capture
        } else {
            Ipv6Mode::Pass
        },
        dns: switch("ambient.istio.io/dns-capture").unwrap_or(true),
        bypass_inbound: switch("ambient.istio.io/bypass-inbound-capture").unwrap_or(false),
        virtual_interfaces: interfaces
            .split(',')
            .map(str::trim)
            .filter(|name| !name.is_empty())
            .map(str::to_owned)
            .collect(),
        ..CaptureConfig::default()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn annotations_change_what_is_captured() {
        let with = |name: &str, value: &str| {
            config(&json!({"metadata": {"annotations": {name: value}}}), true)
        };
        assert!(config(&json!({}), true).dns);
        assert!(!with("ambient.istio.io/dns-capture", "False").dns);
        assert!(with("ambient.istio.io/dns-capture", "nonsense").dns);
        assert!(with("ambient.istio.io/bypass-inbound-capture", "1").bypass_inbound);
        let interfaces = with("istio.io/reroute-virtual-interfaces", "a, ,b").virtual_interfaces;
        assert_eq!(interfaces, ["a", "b"]);
    }
}
