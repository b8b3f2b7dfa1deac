//! The control plane's resources: how they are asked for and what they mean.

pub mod client;
pub mod demand;
pub mod names;
pub mod policies;
pub mod resources;
mod stream;
