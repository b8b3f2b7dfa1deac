//! A whole mesh on one machine: nodes and pods as network namespaces, with the real parts in between.
//!
//! `up` starts a process in new namespaces (`sandbox`), which builds the network (`topology`), starts the
//! control plane, the proxies and the node agents (`components`), and keeps pods as the applied objects say (`cluster`). The
//! other commands speak to it over a socket (`client`, `server`). It is made for a laptop and for tests: images
//! are not run.

mod addresses;
pub mod api;
mod bench;
mod client;
mod cluster;
mod commands;
mod components;
mod container;
mod daemon;
mod demo;
mod dns;
mod family;
mod health;
mod kube;
mod links;
mod listen;
mod live;
mod load;
mod logs;
mod manifest;
mod names;
mod namespaces;
mod plan;
mod pod;
mod process;
mod progress;
mod runtime;
mod samples;
mod sandbox;
mod say;
mod serve;
mod server;
mod service_rules;
mod services;
mod sniff;
mod state;
mod status;
mod story;
mod topology;
mod up;
mod wire;

pub use commands::{LabArgs, run};
