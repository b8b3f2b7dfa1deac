//! HBONE: TCP flows carried in HTTP/2 CONNECT streams over mutual TLS.

mod counters;
mod headers;
mod identity;

pub use counters::Counters;
pub use headers::{Authority, AuthorityError, Baggage};
pub use identity::{Identity, IdentityError};
