//! The wire schemas of the control plane and the CA, compiled at build time.
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
