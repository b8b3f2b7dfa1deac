//! DNS answers for captured pods.
