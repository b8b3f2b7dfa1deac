//! What Warren tells of its work: the access log, metrics, the diagnostics log.

mod access;
mod flow;
pub mod log;
pub mod metrics;
mod sink;
pub mod time;

pub use flow::{Direction, Flow, FlowError, settle};
pub use metrics::Telemetry;
