//! One identity's certificate and key, and the TLS configurations made of them.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use rustls::crypto::aws_lc_rs::{self, cipher_suite, kx_group};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use thiserror::Error;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::Identity;
use crate::spiffe_san::identities;
use crate::verify::{ClientVerifier, ServerVerifier};

/// How many client configurations an identity keeps; one serves all connections to one set of identities.
const CLIENT_CONFIGS: usize = 4096;

static TLS13_ONLY: &[&rustls::SupportedProtocolVersion] = &[&rustls::version::TLS13];
static TLS13_AND_12: &[&rustls::SupportedProtocolVersion] =
    &[&rustls::version::TLS13, &rustls::version::TLS12];

/// What may be negotiated beyond the default, which is TLS 1.3 with classic and hybrid key exchange.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TlsOptions {
    /// Also TLS 1.2.
    pub tls12: bool,
    /// Only the hybrid post-quantum key exchange.
    pub pqc: bool,
}

/// Certificate material that cannot be used.
#[derive(Debug, Error)]
pub enum TlsError {
    #[error("the certificate chain is empty")]
    EmptyChain,
    #[error("the certificate cannot be read: {0}")]
    Certificate(String),
    #[error("root certificate {0} cannot be used: {1}")]
    Root(usize, rustls::Error),
    #[error("there are no root certificates")]
    NoRoots,
    #[error("the root certificates cannot be used: {0}")]
    Roots(rustls::server::VerifierBuilderError),
    #[error(transparent)]
    Rustls(#[from] rustls::Error),
}

/// One identity's certificate, key and roots with the TLS configurations made of them; share it in an `Arc`.
pub struct TlsIdentity {
    identity: Option<Identity>,
    key: Arc<CertifiedKey>,
    roots: Vec<CertificateDer<'static>>,
    root_store: Arc<RootCertStore>,
    validity: (SystemTime, SystemTime),
    provider: Arc<CryptoProvider>,
    versions: &'static [&'static rustls::SupportedProtocolVersion],
    server: Arc<ServerConfig>,
    clients: Mutex<HashMap<Box<[Identity]>, Arc<ClientConfig>>>,
}

impl fmt::Debug for TlsIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsIdentity")
            .field("identity", &self.identity)
            .finish_non_exhaustive()
    }
}

impl TlsIdentity {
    /// Makes the configurations of a chain (leaf first), its key and the roots that peers are checked against.
    ///
    /// # Errors
    /// When the chain or the roots are empty or unreadable, or the key does not belong to the leaf.
    pub fn new(
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
        roots: Vec<CertificateDer<'static>>,
        options: &TlsOptions,
    ) -> Result<Self, TlsError> {
        let leaf = chain.first().ok_or(TlsError::EmptyChain)?;
        let identity = identities(leaf).into_iter().next();
        let validity = validity(leaf)?;
        let provider = Arc::new(provider(options));
        let key = Arc::new(CertifiedKey::from_der(chain, key, &provider)?);
        let mut root_store = RootCertStore::empty();
        for (index, root) in roots.iter().enumerate() {
            root_store
                .add(root.clone())
                .map_err(|error| TlsError::Root(index, error))?;
        }
        if root_store.is_empty() {
            return Err(TlsError::NoRoots);
        }
        let root_store = Arc::new(root_store);
        let versions = if options.tls12 {
            TLS13_AND_12
        } else {
            TLS13_ONLY
        };
        let chain_check =
            WebPkiClientVerifier::builder_with_provider(root_store.clone(), provider.clone())
                .build()
                .map_err(TlsError::Roots)?;
        let trust_domain = identity
            .as_ref()
            .map(|identity| identity.trust_domain().to_string());
        let mut server = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(versions)?
            .with_client_cert_verifier(Arc::new(ClientVerifier {
                chain_check,
                trust_domain,
            }))
            .with_cert_resolver(Arc::new(SingleCertAndKey::from(key.clone())));
        server.alpn_protocols = vec![b"h2".to_vec()];
        server.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
        server.send_tls13_tickets = 0;
        // The engine seals records itself.
        server.enable_secret_extraction = true;
        Ok(Self {
            identity,
            key,
            roots,
            root_store,
            validity,
            provider,
            versions,
            server: Arc::new(server),
            clients: Mutex::default(),
        })
    }

    /// Who this is: the first SPIFFE identity of the leaf.
    pub fn identity(&self) -> Option<&Identity> {
        self.identity.as_ref()
    }

    /// The leaf and its intermediates, DER.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.key.cert
    }

    /// The roots that peers are checked against, DER.
    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.roots
    }

    /// Since when the leaf is valid.
    pub fn not_before(&self) -> SystemTime {
        self.validity.0
    }

    /// Until when the leaf is valid.
    pub fn not_after(&self) -> SystemTime {
        self.validity.1
    }

    /// For the serving end: client certificate mandatory, from our roots and of our trust domain.
    pub fn server_config(&self) -> Arc<ServerConfig> {
        self.server.clone()
    }

    /// For the calling end: the server must present one of `expected`.
    ///
    /// # Errors
    /// When the protocol versions do not fit the key exchange groups.
    pub fn client_config(&self, expected: &[Identity]) -> Result<Arc<ClientConfig>, TlsError> {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(config) = clients.get(expected) {
            return Ok(config.clone());
        }
        let verifier = ServerVerifier {
            roots: self.root_store.clone(),
            algorithms: self.algorithms(),
            expected: expected.to_vec(),
        };
        let mut config = ClientConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(self.versions)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(self.key.clone())));
        config.alpn_protocols = vec![b"h2".to_vec()];
        config.enable_sni = false;
        config.enable_secret_extraction = true;
        config.resumption = rustls::client::Resumption::disabled();
        let config = Arc::new(config);
        if clients.len() >= CLIENT_CONFIGS {
            clients.clear();
        }
        clients.insert(expected.into(), config.clone());
        Ok(config)
    }

    fn algorithms(&self) -> WebPkiSupportedAlgorithms {
        self.provider.signature_verification_algorithms
    }
}

/// The cryptography of the tunnels: AES-GCM suites only, no ChaCha20.
pub fn provider(options: &TlsOptions) -> CryptoProvider {
    let mut provider = aws_lc_rs::default_provider();
    provider.cipher_suites = vec![
        cipher_suite::TLS13_AES_256_GCM_SHA384,
        cipher_suite::TLS13_AES_128_GCM_SHA256,
    ];
    if options.tls12 {
        provider.cipher_suites.extend([
            cipher_suite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
            cipher_suite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
            cipher_suite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
            cipher_suite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
        ]);
    }
    provider.kx_groups = if options.pqc {
        vec![kx_group::X25519MLKEM768]
    } else {
        vec![
            kx_group::X25519,
            kx_group::SECP256R1,
            kx_group::SECP384R1,
            kx_group::X25519MLKEM768,
        ]
    };
    provider
}

/// Since when and until when a certificate is valid.
pub(crate) fn validity(leaf: &CertificateDer<'_>) -> Result<(SystemTime, SystemTime), TlsError> {
    let (_, parsed) = X509Certificate::from_der(leaf)
        .map_err(|error| TlsError::Certificate(error.to_string()))?;
    let time = |seconds: i64| {
        let offset = Duration::from_secs(seconds.unsigned_abs());
        if seconds < 0 {
            SystemTime::UNIX_EPOCH - offset
        } else {
            SystemTime::UNIX_EPOCH + offset
        }
    };
    let validity = parsed.validity();
    Ok((
        time(validity.not_before.timestamp()),
        time(validity.not_after.timestamp()),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Authority;

    #[test]
    fn client_configurations_are_made_once_per_set_of_peers() {
        let authority = Authority::new();
        let identity = authority.issue("spiffe://td/ns/a/sa/b");
        let peer = Identity::new("td", "x", "y");
        let first = identity.client_config(std::slice::from_ref(&peer)).unwrap();
        assert!(Arc::ptr_eq(
            &first,
            &identity.client_config(&[peer]).unwrap()
        ));
        assert!(!Arc::ptr_eq(&first, &identity.client_config(&[]).unwrap()));
    }

    #[test]
    fn the_leaf_says_who_and_until_when() {
        let identity = Authority::new().issue("spiffe://td/ns/a/sa/b");
        assert_eq!(identity.identity(), Some(&Identity::new("td", "a", "b")));
        assert!(identity.not_before() < identity.not_after());
    }

    #[test]
    fn material_that_does_not_fit_is_refused() {
        let (a, b) = (Authority::new(), Authority::new());
        let (chain, _, roots) = a.material("spiffe://td/ns/a/sa/b");
        let (_, key, _) = b.material("spiffe://td/ns/a/sa/b");
        let options = TlsOptions::default();
        assert!(TlsIdentity::new(chain.clone(), key.clone_key(), roots, &options).is_err());
        assert!(matches!(
            TlsIdentity::new(vec![], key.clone_key(), vec![], &options),
            Err(TlsError::EmptyChain)
        ));
        let (chain, key, _) = a.material("spiffe://td/ns/a/sa/b");
        assert!(matches!(
            TlsIdentity::new(chain, key, vec![], &options),
            Err(TlsError::NoRoots)
        ));
    }
}
