//! Warren: a node-level L4 zero-trust tunnel for Kubernetes ambient meshes.

pub mod config;
pub mod proto;
pub mod version;
