//! The data path: a flow is accepted, judged, connected, carried and accounted, all on one worker.

mod connections;
pub mod drain;
mod inbound;
mod outbound;
mod passthrough;
mod pipes;
pub mod pod;
mod pod_dns;
pub mod pods;
mod proxy_protocol;
mod relay;
pub mod worker;
