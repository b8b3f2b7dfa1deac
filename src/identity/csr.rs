//! Certificate signing requests: a fresh P-256 key, an empty subject and one critical SPIFFE URI.

use hbone::Identity;
use rcgen::{
    CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType,
};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};

use super::IdentityError;

/// A request to be signed, with the key that it is for.
pub struct SigningRequest {
    /// The request in PEM.
    pub pem: String,
    key: KeyPair,
}

impl SigningRequest {
    /// Makes a new key and a request that asks for `identity`.
    ///
    /// # Errors
    /// An identity that is no ASCII URI, or a failure of the random source.
    pub fn new(identity: &Identity) -> Result<Self, IdentityError> {
        let local = |e: rcgen::Error| IdentityError::Local(e.to_string());
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(local)?;
        let mut params = CertificateParams::default();
        // With an empty subject the SAN becomes critical (RFC 5280 §4.2.1.6).
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(
            identity.to_string().try_into().map_err(local)?,
        )];
        let request = params.serialize_request(&key).map_err(local)?;
        Ok(Self {
            pem: request.pem().map_err(local)?,
            key,
        })
    }

    /// The SubjectPublicKeyInfo that the issued certificate must carry.
    pub fn public_key_info(&self) -> Vec<u8> {
        self.key.subject_public_key_info()
    }

    /// The private key, in PKCS#8.
    pub fn into_private_key(self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.key.serialize_der()))
    }
}

#[cfg(test)]
mod tests {
    use rustls::pki_types::CertificateSigningRequestDer;
    use rustls::pki_types::pem::PemObject;
    use x509_parser::certification_request::X509CertificationRequest;
    use x509_parser::extensions::{GeneralName, ParsedExtension};
    use x509_parser::prelude::FromDer;

    use super::*;

    #[test]
    fn the_request_has_no_subject_and_one_critical_uri() {
        let identity = Identity::new("td", "ns", "sa");
        let request = SigningRequest::new(&identity).unwrap();
        let der = CertificateSigningRequestDer::from_pem_slice(request.pem.as_bytes()).unwrap();
        let (_, csr) = X509CertificationRequest::from_der(&der).unwrap();
        let info = &csr.certification_request_info;
        assert_eq!(info.subject.iter().count(), 0);
        assert_eq!(info.subject_pki.raw, request.public_key_info());
        let extensions: Vec<_> = csr.requested_extensions().unwrap().collect();
        assert!(matches!(
            extensions[..],
            [ParsedExtension::SubjectAlternativeName(san)]
                if matches!(san.general_names[..], [GeneralName::URI("spiffe://td/ns/ns/sa/sa")])
        ));
        // The DER of the SAN's OID followed by the critical flag (BOOLEAN TRUE).
        let critical = [0x06, 0x03, 0x55, 0x1d, 0x11, 0x01, 0x01, 0xff];
        assert!(der.windows(critical.len()).any(|w| w == critical));
    }

    #[test]
    fn every_request_has_its_own_key() {
        let identity = Identity::new("td", "ns", "sa");
        let one = SigningRequest::new(&identity).unwrap();
        let two = SigningRequest::new(&identity).unwrap();
        assert_ne!(one.public_key_info(), two.public_key_info());
    }
}
