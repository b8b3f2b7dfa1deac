//! A throw-away certificate authority for the tests of this crate.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose,
    RevokedCertParams, SanType, SerialNumber,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

use crate::{TlsIdentity, TlsOptions};

pub(crate) struct Authority {
    pem: String,
    certificate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

pub(crate) type Material = (
    Vec<CertificateDer<'static>>,
    PrivateKeyDer<'static>,
    Vec<CertificateDer<'static>>,
);

impl Authority {
    pub fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.distinguished_name.push(
            DnType::OrganizationName,
            format!("root {:x?}", &key.public_key_raw()[1..9]),
        );
        let certificate = params.self_signed(&key).unwrap();
        Self {
            pem: certificate.pem(),
            certificate: certificate.der().clone(),
            issuer: Issuer::new(params, key),
        }
    }

    pub fn material(&self, uri: &str) -> Material {
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(uri.try_into().unwrap())];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        self.sign(params)
    }

    pub fn expired(&self, uri: &str) -> Arc<TlsIdentity> {
        self.ending(uri, rcgen::date_time_ymd(2020, 1, 2).into())
    }

    pub fn expiring_in(&self, uri: &str, time: Duration) -> Arc<TlsIdentity> {
        self.ending(uri, SystemTime::now() + time)
    }

    fn ending(&self, uri: &str, end: SystemTime) -> Arc<TlsIdentity> {
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(uri.try_into().unwrap())];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.not_before = rcgen::date_time_ymd(2020, 1, 1);
        params.not_after = end.into();
        let (chain, key, roots) = self.sign(params);
        Arc::new(TlsIdentity::new(chain, key, roots, &TlsOptions::default()).unwrap())
    }

    /// The root, a certificate for `uri` and its key.
    pub fn pem(&self, uri: &str) -> [String; 3] {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(uri.try_into().unwrap())];
        let leaf = params.signed_by(&key, &self.issuer).unwrap();
        [self.pem.clone(), leaf.pem(), key.serialize_pem()]
    }

    /// A list with that certificate on it, PEM.
    pub fn revoke(&self, certificate: &CertificateDer<'_>) -> String {
        let serial = crate::testing::serial(certificate);
        let now = rcgen::date_time_ymd(2026, 1, 1);
        let entry = RevokedCertParams {
            serial_number: SerialNumber::from_slice(&serial),
            revocation_time: now,
            reason_code: None,
            invalidity_date: None,
        };
        let list = CertificateRevocationListParams {
            this_update: now,
            next_update: rcgen::date_time_ymd(2036, 1, 1),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: vec![entry],
            key_identifier_method: KeyIdMethod::Sha256,
        };
        list.signed_by(&self.issuer).unwrap().pem().unwrap()
    }

    fn sign(&self, params: CertificateParams) -> Material {
        let key = KeyPair::generate().unwrap();
        let leaf = params.signed_by(&key, &self.issuer).unwrap();
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        (
            vec![leaf.der().clone()],
            key,
            vec![self.certificate.clone()],
        )
    }

    pub fn issue(&self, uri: &str) -> Arc<TlsIdentity> {
        let (chain, key, roots) = self.material(uri);
        Arc::new(TlsIdentity::new(chain, key, roots, &TlsOptions::default()).unwrap())
    }
}

/// A certificate's number, as its bytes.
fn serial(certificate: &CertificateDer<'_>) -> Vec<u8> {
    use x509_parser::prelude::FromDer;
    let (_, parsed) = x509_parser::prelude::X509Certificate::from_der(certificate).unwrap();
    parsed.raw_serial().to_vec()
}
