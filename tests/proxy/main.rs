//! The whole proxy, with its real control plane, against peers good and bad.

mod certificate;
mod harness;
mod hostile;
mod life;
mod modes;
mod outbound;
mod soak;
mod tunnel;
