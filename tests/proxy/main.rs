//! The whole proxy, with its real control plane, against peers good and bad.

mod harness;
mod hostile;
mod life;
mod outbound;
mod profiles;
mod soak;
mod tunnel;
