//! Workload identities: certificates from the CA or the SPIFFE Workload API, and the authenticated channels to the control plane.

pub mod ca_client;
pub mod certificates;
pub mod channel;
pub mod crl;
pub mod csr;
mod dump;
pub mod fake_ca;
mod pushed;
mod queue;
mod retry;
mod svids;
pub mod token;
pub mod workload_api;

pub use ca_client::CaClient;
pub use certificates::{Authority, Certificates};
pub use pushed::Delivered;
pub use workload_api::WorkloadApi;

use hbone::Identity;
use thiserror::Error;

/// Why no certificate can be had for an identity.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum IdentityError {
    /// Making the key, or turning the answer into a TLS identity, failed on this side.
    #[error("failed to create CSR: {0}")]
    Local(String),
    #[error("signing gRPC error ({code}): {message}")]
    Signing { code: String, message: String },
    #[error("chain returned from CA is empty for: {0}")]
    EmptyChain(Identity),
    #[error("did not find expected SAN: {0}")]
    UnexpectedSan(Identity),
    #[error("certificate returned from CA has expired for: {0}")]
    Expired(Identity),
    /// There is no certificate of the Workload API at all.
    #[error("SPIFFE Workload API at {socket}: {reason}")]
    WorkloadApi { socket: String, reason: String },
    /// The Workload API sent certificates, but none of this identity.
    #[error(
        "the SPIFFE Workload API server has no entry for {0} (hint: add one whose selectors match this proxy's process)"
    )]
    NoEntry(Identity),
    #[error(
        "the SPIFFE Workload API server had no entry for {identity}, and nothing newer came: {reason}"
    )]
    NoNewerEntry { identity: Identity, reason: String },
    #[error("the certificate of {identity} has expired and none newer came: {reason}")]
    NotRenewed { identity: Identity, reason: String },
    #[error("the identity is no longer needed")]
    Forgotten,
}
