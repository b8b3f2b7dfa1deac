//! The mesh's own certificate authority.

use std::io::Write;
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use hbone::Identity;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData,
    SanType,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

/// How long the root is valid.
const ROOT_LIFETIME: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// How long the serving certificate is valid; it is made anew at every start.
const SERVING_LIFETIME: Duration = Duration::from_secs(365 * 24 * 3600);
/// How far clocks may differ.
const SKEW: Duration = Duration::from_secs(120);

const ROOT: &str = "root-cert.pem";
const ROOT_KEY: &str = "root-key.pem";

/// Signs certificates with the root of a state folder.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    root: String,
    longest: Duration,
}

impl Authority {
    /// The authority of a folder, which is made at first use; `longest` limits what is granted.
    ///
    /// # Errors
    /// When the root cannot be read or written.
    pub fn open(folder: &Path, longest: Duration) -> anyhow::Result<Self> {
        let (certificate, key) = (folder.join(ROOT), folder.join(ROOT_KEY));
        if !key.exists() {
            make_root(&certificate, &key)?;
            tracing::info!("made a new root certificate, {}", certificate.display());
        }
        let root = std::fs::read_to_string(&certificate)
            .with_context(|| format!("cannot read {}", certificate.display()))?;
        let key = std::fs::read_to_string(&key)
            .with_context(|| format!("cannot read {}", key.display()))?;
        let key = KeyPair::from_pem(&key).context("the root key cannot be used")?;
        let public = key.subject_public_key_info();
        let issuer =
            Issuer::from_ca_cert_pem(&root, key).context("the root certificate cannot be used")?;
        anyhow::ensure!(
            holds_key(&root, &public),
            "{} is not the certificate of {ROOT_KEY}; remove both for a new root",
            certificate.display()
        );
        Ok(Self {
            issuer,
            root,
            longest,
        })
    }

    /// Signs a workload's request; gives the chain as one PEM per certificate, the root last.
    ///
    /// The request gives the key only: whom the certificate names is decided here.
    ///
    /// # Errors
    /// When the request cannot be read or its signature is wrong.
    pub fn sign(
        &self,
        request: &str,
        identity: &Identity,
        wanted: Duration,
    ) -> Result<Vec<String>, String> {
        let mut request = CertificateSigningRequestParams::from_pem(request)
            .map_err(|error| format!("the certificate request cannot be used: {error}"))?;
        let lifetime = if wanted.is_zero() {
            self.longest
        } else {
            wanted.min(self.longest)
        };
        let mut params = params(lifetime);
        let name = identity
            .as_str()
            .try_into()
            .map_err(|_| format!("{identity} cannot be a certificate's name"))?;
        params.subject_alt_names = vec![SanType::URI(name)];
        params.key_usages = vec![
            KeyUsagePurpose::DigitalSignature,
            KeyUsagePurpose::KeyEncipherment,
        ];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        request.params = params;
        let certificate = request
            .signed_by(&self.issuer)
            .map_err(|error| format!("signing failed: {error}"))?;
        Ok(vec![certificate.pem(), self.root.clone()])
    }

    /// The certificate and key that the control plane itself presents under those names and addresses.
    ///
    /// # Errors
    /// When a name cannot be part of a certificate.
    pub fn serving(
        &self,
        names: &[String],
    ) -> anyhow::Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)> {
        let key = KeyPair::generate()?;
        let mut params = params(SERVING_LIFETIME);
        for name in names {
            params.subject_alt_names.push(match name.parse::<IpAddr>() {
                Ok(ip) => SanType::IpAddress(ip),
                Err(_) => SanType::DnsName(
                    name.as_str()
                        .try_into()
                        .with_context(|| format!("{name} is no host name"))?,
                ),
            });
        }
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let certificate = params.signed_by(&key, &self.issuer)?;
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        Ok((vec![certificate.der().clone()], key))
    }
}

/// Whether a certificate in PEM is of that public key.
fn holds_key(certificate: &str, public: &[u8]) -> bool {
    let Ok((_, pem)) = x509_parser::pem::parse_x509_pem(certificate.as_bytes()) else {
        return false;
    };
    pem.parse_x509()
        .is_ok_and(|certificate| certificate.public_key().raw == public)
}

fn params(lifetime: Duration) -> CertificateParams {
    let now = SystemTime::now();
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.not_before = (now - SKEW).into();
    params.not_after = (now + lifetime).into();
    params.use_authority_key_identifier_extension = true;
    params
}

fn make_root(certificate: &Path, key_path: &Path) -> anyhow::Result<()> {
    let key = KeyPair::generate()?;
    let mut params = params(ROOT_LIFETIME);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
        .distinguished_name
        .push(DnType::OrganizationName, "Warren");
    params
        .distinguished_name
        .push(DnType::CommonName, "Warren mesh root");
    params.use_authority_key_identifier_extension = false;
    let root = params.self_signed(&key)?;
    std::fs::write(certificate, root.pem())
        .with_context(|| format!("cannot write {}", certificate.display()))?;
    secret(key_path, &key.serialize_pem())
        .with_context(|| format!("cannot write {}", key_path.display()))
}

/// Writes a file that only its owner may read, whole or not at all.
pub fn secret(path: &Path, text: &str) -> std::io::Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let scratch = path.with_file_name(format!(".{name}.new"));
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&scratch)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    std::fs::rename(scratch, path)
}

#[cfg(test)]
#[path = "ca_tests.rs"]
mod tests;
