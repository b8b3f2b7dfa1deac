//! ZDS: how the node agent hands pods, with their network namespaces, to the proxies of the node.

pub mod messages;
pub mod server;
pub mod transport;

pub use messages::{Payload, WorkloadInfo};
pub use server::{ZdsError, ZdsServer};
pub use transport::{Connection, Listener, Packet, TransportError};
