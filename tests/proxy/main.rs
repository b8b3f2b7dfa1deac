//! The whole proxy, with its real control plane, against peers good and bad.

mod budgets;
mod harness;
mod hostile;
mod life;
mod modes;
mod networks;
mod outbound;
mod soak;
mod tunnel;
