//! A whole mesh on one machine.
