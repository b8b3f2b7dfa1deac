//! The node agent as a whole, against a real API server's protocol, real namespaces and rules, and a proxy that is good
//! or bad as the test wants.

mod crash;
mod end;
mod harness;
mod lifecycle;
mod plugin;
mod starting;
