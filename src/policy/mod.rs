//! L4 authorization: the model of the policies and their evaluation.

pub mod model;

pub use model::Policy;
