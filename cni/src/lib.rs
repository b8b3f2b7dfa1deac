//! Capture: the rules in a pod's network namespace, and the protocol that hands pods to the proxy.

pub mod zds;
