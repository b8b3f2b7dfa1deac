//! Revoked certificates: refused in handshakes, and the end of the tunnels that they made.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use rustls::pki_types::CertificateDer;
use thiserror::Error;
use tokio::sync::watch;
use x509_parser::pem::Pem;
use x509_parser::prelude::{CertificateRevocationList, FromDer, X509Certificate};

const PEM: &[u8] = b"-----BEGIN";

/// A revocation list that cannot be used.
#[derive(Debug, Error)]
#[error("the revocation list cannot be read: {0}")]
pub struct RevocationError(String);

/// What identifies a certificate: its issuer's name and its number, both DER.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Number {
    issuer: Box<[u8]>,
    serial: Box<[u8]>,
}

/// The certificates that are revoked now; clones share them.
#[derive(Clone, Debug)]
pub struct Revocations(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    revoked: RwLock<HashSet<Number>>,
    changes: watch::Sender<()>,
    /// Of clients and of servers.
    refused: [AtomicU64; 2],
}

impl Default for Revocations {
    fn default() -> Self {
        Self(Arc::new(Inner {
            revoked: RwLock::default(),
            changes: watch::Sender::new(()),
            refused: Default::default(),
        }))
    }
}

impl Revocations {
    /// Replaces what is revoked by the lists in a file (PEM, several if need be, or one as DER); gives how many
    /// certificates that are. An empty file revokes nothing. Live tunnels are looked at again.
    ///
    /// The lists are taken on the word of whoever wrote the file: their signatures and dates are not checked.
    ///
    /// # Errors
    /// When a list cannot be read; then everything stays as it was.
    pub fn replace(&self, file: &[u8]) -> Result<usize, RevocationError> {
        let wrong = |error: &dyn std::fmt::Display| RevocationError(error.to_string());
        let mut revoked = HashSet::new();
        let text = file.trim_ascii();
        if text.starts_with(PEM) {
            for block in Pem::iter_from_buffer(text) {
                let block = block.map_err(|error| wrong(&error))?;
                if block.label == "X509 CRL" {
                    read(&block.contents, &mut revoked)?;
                }
            }
        } else if !text.is_empty() {
            read(file, &mut revoked)?;
        }
        let count = revoked.len();
        *self
            .0
            .revoked
            .write()
            .unwrap_or_else(PoisonError::into_inner) = revoked;
        self.0.changes.send_replace(());
        Ok(count)
    }

    /// How many connections were refused or ended: those of clients, and those to servers.
    pub fn refused(&self) -> [u64; 2] {
        [0, 1].map(|place: usize| self.0.refused[place].load(Ordering::Relaxed))
    }

    /// Whether a certificate of a chain is revoked, which counts as a refusal.
    pub(crate) fn refuses(&self, chain: &[Number], of_client: bool) -> bool {
        let revoked = self
            .0
            .revoked
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        let refuses = chain.iter().any(|number| revoked.contains(number));
        if refuses {
            self.0.refused[usize::from(!of_client)].fetch_add(1, Ordering::Relaxed);
        }
        refuses
    }

    /// A signal for each change from now on.
    pub(crate) fn subscribe(&self) -> watch::Receiver<()> {
        self.0.changes.subscribe()
    }
}

fn read(der: &[u8], revoked: &mut HashSet<Number>) -> Result<(), RevocationError> {
    let (rest, list) = CertificateRevocationList::from_der(der)
        .map_err(|error| RevocationError(error.to_string()))?;
    if !rest.is_empty() {
        return Err(RevocationError("something follows the list".to_string()));
    }
    let issuer = list.issuer().as_raw();
    revoked.extend(list.iter_revoked_certificates().map(|entry| Number {
        issuer: issuer.into(),
        serial: entry.raw_serial().into(),
    }));
    Ok(())
}

/// The numbers of a chain's certificates.
pub(crate) fn numbers(chain: &[CertificateDer<'_>]) -> Vec<Number> {
    let number = |certificate: &CertificateDer<'_>| {
        let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
        Some(Number {
            issuer: parsed.issuer().as_raw().into(),
            serial: parsed.raw_serial().into(),
        })
    };
    chain.iter().filter_map(number).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Authority;

    #[test]
    fn what_a_list_names_is_refused_until_the_list_is_replaced() {
        let (authority, other) = (Authority::new(), Authority::new());
        let chain = |authority: &Authority| authority.material("spiffe://td/ns/a/sa/b").0;
        let (revoked, sound, foreign) = (chain(&authority), chain(&authority), chain(&other));
        let revocations = Revocations::default();
        let refuses = |chain: &[CertificateDer<'_>]| revocations.refuses(&numbers(chain), true);
        assert!(!refuses(&revoked));
        let list = authority.revoke(&revoked[0]);
        for file in [
            list.as_bytes().to_vec(),
            Pem::iter_from_buffer(list.as_bytes())
                .next()
                .unwrap()
                .unwrap()
                .contents,
        ] {
            assert_eq!(revocations.replace(b"").unwrap(), 0);
            assert!(!refuses(&revoked));
            assert_eq!(revocations.replace(&file).unwrap(), 1);
            assert!(refuses(&revoked) && !refuses(&sound) && !refuses(&foreign));
        }
        let both = format!("{list}\n{}", other.revoke(&foreign[0]));
        assert_eq!(revocations.replace(both.as_bytes()).unwrap(), 2);
        assert!(refuses(&revoked) && refuses(&foreign) && !refuses(&sound));
        let before = revocations.refused();
        for broken in [
            &b"junk"[..],
            b"-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n",
            &list.as_bytes()[..100],
        ] {
            assert!(revocations.replace(broken).is_err());
            assert!(refuses(&revoked), "a broken file must change nothing");
        }
        assert_eq!(revocations.refused(), [before[0] + 3, 0]);
    }
}
