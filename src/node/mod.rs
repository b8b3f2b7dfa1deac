//! The node's side: the node agent's socket, pod namespaces and sockets inside them.

pub mod netns;
pub mod sockets;
#[cfg(test)]
pub mod testing;
pub mod zds;

pub use netns::PodNetns;
