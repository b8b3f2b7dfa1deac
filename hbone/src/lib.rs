//! HBONE: TCP flows carried in HTTP/2 CONNECT streams over mutual TLS.

mod headers;
mod identity;

pub use headers::{Authority, AuthorityError, Baggage};
pub use identity::{Identity, IdentityError};
