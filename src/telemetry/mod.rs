//! Access log, metrics and the diagnostics log.
