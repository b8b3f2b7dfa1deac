//! Reads what the SPIFFE Workload API sends: all of a response or nothing of it.

use std::sync::Arc;

use hbone::{Identity, TlsError, TlsIdentity, TlsOptions};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use thiserror::Error;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::pushed::Set;
use crate::proto::spiffe::{X509svid, X509svidResponse};

/// Why a response is not used.
#[derive(Debug, Error)]
pub enum Malformed {
    #[error("it has no SVIDs")]
    Empty,
    #[error("the {part} of {identity} cannot be read: {reason}")]
    Der {
        part: &'static str,
        identity: Identity,
        reason: String,
    },
    #[error("the certificate sent for {0} does not name it first")]
    OtherName(Identity),
    #[error("the certificate of {0} cannot be used: {1}")]
    Unusable(Identity, TlsError),
}

/// The certificates of a response. One that is as it was in `former` stays the same object, so that its tunnels stay
/// in use. SVIDs whose SPIFFE ID is that of no workload of a mesh are left out.
///
/// # Errors
/// When any part of it is unusable.
pub fn read(
    response: X509svidResponse,
    former: Option<&Set>,
    tls: &TlsOptions,
) -> Result<Set, Malformed> {
    if response.svids.is_empty() {
        return Err(Malformed::Empty);
    }
    let mut set = Set::new();
    for svid in response.svids {
        let Ok(identity) = svid.spiffe_id.parse::<Identity>() else {
            tracing::debug!("ignored the SVID of {:?}", svid.spiffe_id);
            continue;
        };
        let new = Arc::new(certificate(&identity, svid, tls)?);
        let same =
            |old: &&Arc<TlsIdentity>| old.chain() == new.chain() && old.roots() == new.roots();
        let old = former.and_then(|former| former.get(&identity)).filter(same);
        let chosen = old.unwrap_or(&new).clone();
        // Of several for one identity the first is the default.
        set.entry(identity).or_insert(chosen);
    }
    Ok(set)
}

fn certificate(
    identity: &Identity,
    svid: X509svid,
    tls: &TlsOptions,
) -> Result<TlsIdentity, Malformed> {
    let unread = |part| {
        move |reason| Malformed::Der {
            part,
            identity: identity.clone(),
            reason,
        }
    };
    let chain = split(&svid.x509_svid).map_err(unread("certificate chain"))?;
    let roots = split(&svid.bundle).map_err(unread("trust bundle"))?;
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(svid.x509_svid_key));
    let tls = TlsIdentity::new(chain, key, roots, tls)
        .map_err(|error| Malformed::Unusable(identity.clone(), error))?;
    match tls.identity() {
        Some(named) if named == identity => Ok(tls),
        _ => Err(Malformed::OtherName(identity.clone())),
    }
}

/// Certificates that stand one after the other.
fn split(mut der: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let mut certificates = Vec::new();
    while !der.is_empty() {
        let (rest, _) = X509Certificate::from_der(der).map_err(|error| error.to_string())?;
        certificates.push(der[..der.len() - rest.len()].to_vec().into());
        der = rest;
    }
    Ok(certificates)
}
