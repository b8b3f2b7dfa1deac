//! Capture: the rules in a pod's network namespace, and the protocol that hands pods to the proxy.

pub mod backend;
pub mod capture;
mod compare;
pub mod eligibility;
pub mod event;
pub mod host;
pub mod install;
pub mod iptables;
mod netlink;
pub mod netns;
pub mod nftables;
pub mod plugin;
mod program;
pub mod render;
mod routes;
pub mod rules;
pub mod saved;
pub mod scan;
pub mod selftest;
pub mod zds;

pub use capture::{CaptureError, Outcome, capture, remove, verify};
pub use rules::{Backend, CaptureConfig, Ipv6Mode};
