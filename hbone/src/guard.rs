//! What ends a tunnel from outside: a peer that is silent, a certificate that is revoked, one that has expired.

use std::time::SystemTime;

use rustls::pki_types::CertificateDer;

use crate::engine::{Role, TunnelHandle};
use crate::error::Revoked;
use crate::revocation::{Number, Revocations, numbers};
use crate::tls::validity;
use crate::{Http2Config, TlsIdentity};

/// What is watched over a tunnel's life.
pub(crate) struct Guard {
    role: Role,
    revocations: Option<(Revocations, Vec<Number>)>,
    expires: SystemTime,
}

impl Guard {
    /// Looks at the chain that the peer presented to this end, which presented `own`.
    ///
    /// # Errors
    /// When a certificate of the chain is revoked already.
    pub fn new(
        config: &Http2Config,
        own: &TlsIdentity,
        chain: &[CertificateDer<'_>],
        role: Role,
    ) -> Result<Self, Revoked> {
        let revocations = config
            .revocations
            .clone()
            .map(|list| (list, numbers(chain)));
        if let Some((revocations, chain)) = &revocations
            && revocations.refuses(chain, matches!(role, Role::Server))
        {
            return Err(Revoked);
        }
        let leaf = chain.first().and_then(|leaf| validity(leaf).ok());
        let expires = leaf.map_or(own.not_after(), |(_, end)| end.min(own.not_after()));
        Ok(Self {
            role,
            revocations,
            expires,
        })
    }

    /// Watches a tunnel from now on.
    pub fn watch(self, handle: &TunnelHandle, config: &Http2Config) {
        let (interval, limit) = (config.ping_interval, config.ping_timeout);
        let watch = handle
            .clone()
            .watch(self.role, interval, limit, self.expires);
        tokio::task::spawn_local(watch);
        if let Some((revocations, chain)) = self.revocations {
            tokio::task::spawn_local(handle.clone().guard(revocations, chain, self.role));
        }
    }
}
