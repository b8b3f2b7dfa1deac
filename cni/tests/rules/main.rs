//! The rules of both backends: as they are written, as the kernel holds them, in pods and on the node.

mod backend;
mod by_hand;
mod damage;
mod golden;
mod host;
mod legacy;
#[path = "../namespace/mod.rs"]
mod namespace;
#[path = "../namespace/net.rs"]
mod net;
mod pods;
mod probes;
mod refusals;
mod variants;
