//! Warren: a node-level L4 zero-trust tunnel for Kubernetes ambient meshes.

pub mod admin;
pub mod config;
pub mod control;
pub mod dns;
pub mod identity;
pub mod lab;
pub mod mesh;
pub mod mesh_feed;
pub mod node;
pub mod policy;
pub mod proto;
pub mod telemetry;
pub mod version;
pub mod xds;
