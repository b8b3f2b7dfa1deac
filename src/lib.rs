//! Warren: a node-level L4 zero-trust tunnel for Kubernetes ambient meshes.

pub mod admin;
pub mod agent;
pub mod cli;
pub mod config;
pub mod control;
pub mod daemon;
pub mod dns;
pub mod identity;
pub mod lab;
pub mod local;
pub mod memory;
pub mod mesh;
pub mod mesh_feed;
pub mod node;
pub mod policy;
pub mod profile;
pub mod proto;
pub mod proxy;
pub mod telemetry;
pub mod version;
pub mod xds;
