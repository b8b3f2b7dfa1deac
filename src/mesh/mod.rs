//! The mesh as the control plane describes it: pure data and lookups, no I/O.

pub mod service;
pub mod workload;

pub use service::{Endpoint, Service};
pub use workload::{NamespacedHostname, NetworkAddress, Workload};
