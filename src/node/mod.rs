//! The node's side: the node agent's socket, pod namespaces and sockets inside them.

pub mod netns;
pub mod sockets;
pub mod zds;

pub use netns::PodNetns;
