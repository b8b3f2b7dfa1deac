//! Capture: the rules in a pod's network namespace, and the protocol that hands pods to the proxy.

pub mod capture;
mod compare;
pub mod eligibility;
pub mod install;
pub mod iptables;
mod netlink;
pub mod netns;
pub mod render;
mod routes;
pub mod rules;
pub mod saved;
pub mod zds;

pub use capture::{CaptureError, Outcome, capture, remove, verify};
pub use rules::CaptureConfig;
