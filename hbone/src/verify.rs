//! What each end demands of the other's certificate.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    DigitallySignedStruct, DistinguishedName, Error, OtherError, RootCertStore, SignatureScheme,
};

use crate::Identity;
use crate::spiffe_san::identities;

/// The serving end's check: our roots, and a SPIFFE identity of our trust domain.
#[derive(Debug)]
pub(crate) struct ClientVerifier {
    pub chain_check: Arc<dyn ClientCertVerifier>,
    /// None when our own certificate names no trust domain; then any is taken.
    pub trust_domain: Option<String>,
}

impl ClientCertVerifier for ClientVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // Hints would only tell strangers which authority we trust.
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self
            .chain_check
            .verify_client_cert(end_entity, intermediates, now)?;
        let Some(trust_domain) = &self.trust_domain else {
            return Ok(verified);
        };
        let presented = identities(end_entity);
        if presented
            .iter()
            .any(|identity| identity.trust_domain() == trust_domain)
        {
            return Ok(verified);
        }
        Err(mismatch(format!(
            "peer did not present the expected trustdomain ({trust_domain}), got {}",
            joined(&presented)
        )))
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain_check.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain_check.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain_check.supported_verify_schemes()
    }
}

/// The calling end's check: our roots, and one of the expected identities; host names mean nothing here.
#[derive(Debug)]
pub(crate) struct ServerVerifier {
    pub roots: Arc<RootCertStore>,
    pub algorithms: WebPkiSupportedAlgorithms,
    pub expected: Vec<Identity>,
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let parsed = ParsedCertificate::try_from(end_entity)?;
        verify_server_cert_signed_by_trust_anchor(
            &parsed,
            &self.roots,
            intermediates,
            now,
            self.algorithms.all,
        )?;
        let presented = identities(end_entity);
        if presented
            .iter()
            .any(|identity| self.expected.contains(identity))
        {
            return Ok(ServerCertVerified::assertion());
        }
        Err(mismatch(format!(
            "peer did not present the expected SAN ({}), got {}",
            joined(&self.expected),
            joined(&presented)
        )))
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// Marks a certificate that is sound but somebody else's.
#[derive(Debug, thiserror::Error)]
#[error("identity verification error: {0}")]
struct IdentityMismatch(String);

fn mismatch(text: String) -> Error {
    Error::Other(OtherError(Arc::new(IdentityMismatch(text))))
}

fn joined(identities: &[Identity]) -> String {
    identities
        .iter()
        .map(Identity::as_str)
        .collect::<Vec<_>>()
        .join(",")
}
