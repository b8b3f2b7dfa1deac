//! L4 authorization: the model of the policies and their evaluation.

pub mod egress;
pub mod evaluate;
pub mod model;

pub use egress::Egress;
pub use evaluate::{Context, Verdict};
pub use model::Policy;
