//! Everything that a pod's rules depend on.

use cni::{CaptureConfig, Ipv6Mode};

/// Every variant with its name.
pub fn variants() -> Vec<(&'static str, CaptureConfig)> {
    let plain = CaptureConfig::default();
    let interfaces = vec!["vif0".to_string(), "vif1".to_string()];
    let bypass = CaptureConfig {
        bypass_inbound: true,
        ..plain.clone()
    };
    let virtual_interfaces = CaptureConfig {
        virtual_interfaces: interfaces.clone(),
        ..plain.clone()
    };
    let bypass_and_virtual = CaptureConfig {
        virtual_interfaces: interfaces,
        ..bypass.clone()
    };
    let dns_off = CaptureConfig {
        dns: false,
        ..plain.clone()
    };
    let refused = CaptureConfig {
        ipv6: Ipv6Mode::Refuse,
        ..virtual_interfaces.clone()
    };
    let passed = CaptureConfig {
        ipv6: Ipv6Mode::Pass,
        ..virtual_interfaces.clone()
    };
    vec![
        ("default", plain),
        ("dns-off", dns_off),
        ("virtual-interfaces", virtual_interfaces),
        ("bypass", bypass),
        ("bypass-and-virtual-interfaces", bypass_and_virtual),
        ("ipv6-refused", refused),
        ("ipv6-passed", passed),
    ]
}
