//! Workload identities: certificates from the CA, and the authenticated channels to the control plane.

pub mod ca_client;
pub mod certificates;
pub mod channel;
pub mod crl;
pub mod csr;
mod dump;
pub mod fake_ca;
mod queue;
mod retry;
pub mod token;

pub use ca_client::CaClient;
pub use certificates::{Authority, Certificates};

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
    #[error("the identity is no longer needed")]
    Forgotten,
}
