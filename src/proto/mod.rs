//! The wire schemas of the control plane, the CA and the SPIFFE Workload API, compiled at build time.
#![allow(missing_docs, clippy::all, reason = "generated code")]

pub mod workload {
    tonic::include_proto!("istio.workload");
}
pub mod security {
    tonic::include_proto!("istio.security");
}
pub mod discovery {
    tonic::include_proto!("envoy.service.discovery.v3");
}
pub mod ca {
    tonic::include_proto!("istio.v1.auth");
}
/// The schema has no package, so its file has no name.
pub mod spiffe {
    tonic::include_proto!("_");
}
