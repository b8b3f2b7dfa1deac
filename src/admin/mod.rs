//! HTTP endpoints: readiness, metrics, administration.
