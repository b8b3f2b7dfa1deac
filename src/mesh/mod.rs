//! The mesh as the control plane describes it: pure data and lookups, no I/O.

pub mod balance;
pub mod dump;
pub mod endpoints;
pub mod few;
pub mod inbound;
pub mod route;
pub mod service;
pub mod snapshot;
pub mod store;
#[cfg(any(test, feature = "internals"))]
pub mod testing;
pub mod verdict;
pub mod workload;

pub use service::{Endpoint, Service};
pub use snapshot::Mesh;
pub use store::Store;
pub use workload::{NamespacedHostname, NetworkAddress, Workload};
