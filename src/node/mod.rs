//! The node's side: the node agent's socket, pod namespaces and sockets inside them.

pub mod connector;
pub mod netns;
pub mod sockets;
#[cfg(test)]
pub mod testing;
pub mod zds;

pub use connector::{Connector, Toward};
pub use netns::PodNetns;
