//! DNS answers for captured pods: services from the mesh, the rest from the upstream servers.

pub mod answer;
pub mod forward;
pub mod hosts;
pub mod server;
