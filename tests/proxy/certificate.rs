//! Certificates of peers of the tests, good and bad.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use hbone::{TlsIdentity, TlsOptions};
use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use warren::proto::spiffe::X509svid;

/// A client's certificate to be.
pub struct Certificate {
    issuer: Issuer<'static, KeyPair>,
    root: String,
    uri: String,
    expired: bool,
}

impl Certificate {
    /// Signed by the root in that folder.
    pub fn of(folder: &Path, uri: &str) -> Self {
        let read = |name: &str| std::fs::read_to_string(folder.join(name)).unwrap();
        let root = read("root-cert.pem");
        let key = KeyPair::from_pem(&read("root-key.pem")).unwrap();
        Self {
            issuer: Issuer::from_ca_cert_pem(&root, key).unwrap(),
            root,
            uri: uri.to_string(),
            expired: false,
        }
    }

    /// Signed by somebody else who looks the same, while the mesh's root is trusted.
    pub fn of_another_root(mut self) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        self.issuer = Issuer::new(params, key);
        self
    }

    /// Valid until yesterday.
    pub fn expired(mut self) -> Self {
        self.expired = true;
        self
    }

    /// A revocation list with the certificate of an identity on it.
    pub fn revoke(&self, identity: &TlsIdentity) -> String {
        use x509_parser::prelude::FromDer;
        let leaf = &identity.chain()[0];
        let (_, parsed) = x509_parser::prelude::X509Certificate::from_der(leaf).unwrap();
        let now = rcgen::date_time_ymd(2026, 1, 1);
        let entry = rcgen::RevokedCertParams {
            serial_number: rcgen::SerialNumber::from_slice(parsed.raw_serial()),
            revocation_time: now,
            reason_code: None,
            invalidity_date: None,
        };
        let list = rcgen::CertificateRevocationListParams {
            this_update: now,
            next_update: rcgen::date_time_ymd(2036, 1, 1),
            crl_number: rcgen::SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: vec![entry],
            key_identifier_method: rcgen::KeyIdMethod::Sha256,
        };
        list.signed_by(&self.issuer).unwrap().pem().unwrap()
    }

    /// The certificate with a new key, and the configurations made of it.
    pub fn identity(&self) -> Arc<TlsIdentity> {
        let (leaf, key) = self.issue();
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let root = CertificateDer::from_pem_slice(self.root.as_bytes()).unwrap();
        let chain = vec![leaf.der().clone()];
        Arc::new(
            TlsIdentity::new(
                chain,
                key,
                vec![root],
                &TlsOptions {
                    tls12: true,
                    pqc: false,
                },
            )
            .unwrap(),
        )
    }

    /// The certificate with a new key, as the SPIFFE Workload API sends it.
    pub fn svid(&self) -> X509svid {
        let (leaf, key) = self.issue();
        let root = CertificateDer::from_pem_slice(self.root.as_bytes()).unwrap();
        X509svid {
            spiffe_id: self.uri.clone(),
            x509_svid: leaf.der().to_vec(),
            x509_svid_key: key.serialize_der(),
            bundle: root.to_vec(),
            hint: String::new(),
        }
    }

    /// Writes `root.pem`, and `cert.pem` with its new key `key.pem`, for a peer that is another program.
    pub fn write(&self, folder: &Path) {
        std::fs::create_dir_all(folder).unwrap();
        let (leaf, key) = self.issue();
        for (name, text) in [
            ("root.pem", &self.root),
            ("cert.pem", &leaf.pem()),
            ("key.pem", &key.serialize_pem()),
        ] {
            std::fs::write(folder.join(name), text).unwrap();
        }
    }

    fn issue(&self) -> (rcgen::Certificate, KeyPair) {
        const DAY: Duration = Duration::from_secs(24 * 3600);
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(self.uri.as_str().try_into().unwrap())];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ClientAuth,
            ExtendedKeyUsagePurpose::ServerAuth,
        ];
        let now = SystemTime::now();
        params.not_before = (now - 2 * DAY).into();
        params.not_after = if self.expired {
            (now - DAY).into()
        } else {
            (now + DAY).into()
        };
        (params.signed_by(&key, &self.issuer).unwrap(), key)
    }
}
