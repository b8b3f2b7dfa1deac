//! The whole proxy, with its real control plane, against peers good and bad.

mod applications;
mod budgets;
mod certificate;
mod envoy;
mod faults;
mod handover;
mod harness;
mod hostile;
mod life;
mod modes;
mod names;
mod networks;
mod ondemand;
mod outbound;
mod pods;
mod profiles;
mod python;
mod refusals;
mod soak;
mod spiffe;
mod tunnel;
mod waypoints;
