//! HBONE: TCP flows carried in HTTP/2 CONNECT streams over mutual TLS.

mod client;
mod counters;
mod engine;
#[cfg(test)]
mod envoy_tests;
mod error;
mod guard;
mod headers;
mod http2;
mod identity;
#[cfg(test)]
mod interop_tests;
#[cfg(test)]
mod nested_tests;
mod pool;
mod revocation;
mod server;
mod spiffe_san;
mod stream;
#[cfg(test)]
mod testing;
mod tls;
#[cfg(test)]
mod tunnel_tests;
mod verify;

pub use client::{ConnectHeaders, Dialer, Tunnelled};
pub use counters::{Counters, Ledger};
pub use engine::{Engine, Failure, Reason};
pub use error::{AcceptError, OpenError, StreamError};
pub use headers::{Authority, AuthorityError, Baggage, forwarded_host};
pub use http2::Http2Config;
pub use identity::{Identity, IdentityError};
pub use pool::{Beyond, Pool, PoolKey};
pub use revocation::{RevocationError, Revocations};
pub use server::{Incoming, IncomingHeaders, ServerTunnel, accept, canonical};
pub use spiffe_san::identities;
pub use stream::{CarryError, Stream};
pub use tls::{TlsError, TlsIdentity, TlsOptions, provider};

/// Parts of the engine, for benchmarks only.
#[cfg(feature = "internals")]
pub mod internals {
    pub use crate::engine::internals::{Connection, Limits, Role};
}

/// A boxed future that stays on its thread.
pub type LocalBoxFuture<'a, T> = std::pin::Pin<Box<dyn Future<Output = T> + 'a>>;
