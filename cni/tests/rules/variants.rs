//! Everything that a pod's rules depend on.

use cni::{Backend, CaptureConfig, Ipv6Mode};

pub const BACKENDS: [Backend; 2] = [Backend::Iptables, Backend::Nftables];

/// A variant in the backend's hands.
pub fn with(backend: Backend, config: &CaptureConfig) -> CaptureConfig {
    CaptureConfig {
        backend,
        ..config.clone()
    }
}

/// The same, but what is there of others is not to be replaced.
pub fn careful(config: &CaptureConfig) -> CaptureConfig {
    CaptureConfig {
        reconcile: false,
        ..config.clone()
    }
}

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
