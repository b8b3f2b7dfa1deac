//! HTTP endpoints: readiness, metrics, administration.

pub mod config_dump;
pub mod console;
pub mod http;
pub mod profiles;
pub mod ready;
