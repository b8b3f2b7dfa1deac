//! The node agent in a cluster: against the API server and etcd of Kubernetes themselves, with an account and rights of
//! its own. `make test-cluster` builds the program that runs them and these tests with it.

mod access;
mod apiserver;
mod capture;
mod ending;
mod member;
mod outage;

#[path = "../agent/harness.rs"]
#[allow(
    dead_code,
    reason = "half of it drives the API server that the agent's own tests have in-process"
)]
mod harness;
