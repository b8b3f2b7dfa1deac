//! What Warren tells of its work: the access log, metrics, the diagnostics log.

mod access;
mod filter;
mod flow;
mod lines;
pub mod log;
pub mod metrics;
mod reason;
mod runtimes;
mod series;
mod sink;
pub mod time;

pub use flow::{Direction, Flow, FlowError, settle};
pub use metrics::{OpenSocket, Telemetry};
pub use reason::Reason;
