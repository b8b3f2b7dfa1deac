//! Profiles of the running process: where its CPU time goes, and who holds its memory.

pub mod cpu;
pub mod heap;
mod live;
pub mod pprof;
mod stack;
