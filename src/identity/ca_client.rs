//! The CA's client: one signing request out, a checked chain back.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use futures_util::future::BoxFuture;
use hbone::{Identity, TlsIdentity, TlsOptions};
use prost_types::value::Kind;
use prost_types::{Struct, Value};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use tokio::time::timeout;
use tonic::transport::Channel;
use tonic::{Extensions, Request, Status};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::IdentityError;
use super::certificates::Authority;
use super::channel::{ConnectError, Peer, explain};
use super::csr::SigningRequest;
use super::token::Credentials;
use crate::proto::ca::IstioCertificateRequest;
use crate::proto::ca::istio_certificate_service_client::IstioCertificateServiceClient;

/// Longest wait for a signature, with the connection where one must be made.
const RPC_TIMEOUT: Duration = Duration::from_secs(20);

/// Gets certificates of workloads signed, authenticated as this node.
pub struct CaClient {
    channel: Channel,
    credentials: Credentials,
    validity: Duration,
    tls: TlsOptions,
    /// Whether certificates are asked for others than whom the token names.
    impersonates: bool,
}

impl CaClient {
    /// `validity` is what is asked for; the CA may grant less. One that does not impersonate takes the identity that
    /// the CA gives it. Needs a tokio runtime.
    ///
    /// # Errors
    /// An address that is no URI.
    pub fn new(
        peer: &Peer,
        credentials: Credentials,
        validity: Duration,
        impersonates: bool,
    ) -> Result<Self, ConnectError> {
        Ok(Self {
            channel: peer.connect_lazily()?,
            credentials,
            validity,
            impersonates,
            tls: TlsOptions {
                tls12: peer.tls12,
                pqc: peer.pqc,
            },
        })
    }

    async fn sign(&self, identity: &Identity) -> Result<TlsIdentity, IdentityError> {
        let request = SigningRequest::new(identity)?;
        let metadata = self
            .credentials
            .metadata()
            .await
            .map_err(|e| signing(&Status::unauthenticated(e.to_string())))?;
        let message = IstioCertificateRequest {
            csr: request.pem.clone(),
            validity_duration: i64::try_from(self.validity.as_secs()).unwrap_or(i64::MAX),
            metadata: self.impersonates.then(|| impersonation(identity)),
        };
        let mut client = IstioCertificateServiceClient::new(self.channel.clone());
        let call = client.create_certificate(Request::from_parts(
            metadata,
            Extensions::default(),
            message,
        ));
        let response = timeout(RPC_TIMEOUT, call)
            .await
            .unwrap_or_else(|_| {
                Err(Status::deadline_exceeded(format!(
                    "no answer from the CA within {} s",
                    RPC_TIMEOUT.as_secs()
                )))
            })
            .map_err(|e| signing(&e))?
            .into_inner();
        let issued = check(
            identity,
            self.impersonates,
            &request.public_key_info(),
            &response.cert_chain,
            SystemTime::now(),
        )?;
        TlsIdentity::new(
            issued.chain,
            request.into_private_key(),
            issued.roots,
            &self.tls,
        )
        .map_err(|e| IdentityError::Local(e.to_string()))
    }
}

impl Authority for CaClient {
    fn issue<'a>(
        &'a self,
        identity: &'a Identity,
    ) -> BoxFuture<'a, Result<TlsIdentity, IdentityError>> {
        Box::pin(self.sign(identity))
    }
}

fn impersonation(identity: &Identity) -> Struct {
    Struct {
        fields: BTreeMap::from([(
            "ImpersonatedIdentity".to_string(),
            Value {
                kind: Some(Kind::StringValue(identity.to_string())),
            },
        )]),
    }
}

fn signing(status: &Status) -> IdentityError {
    let (code, message) = explain(status);
    IdentityError::Signing {
        code: code.to_string(),
        message,
    }
}

/// A chain that passed the checks.
#[derive(Debug)]
struct Issued {
    /// The leaf, then the intermediates.
    chain: Vec<CertificateDer<'static>>,
    roots: Vec<CertificateDer<'static>>,
}

/// Checks the CA's answer: `[leaf, intermediates…, roots]` in PEM, for this key and, if `exactly` so, this identity.
fn check(
    identity: &Identity,
    exactly: bool,
    public_key_info: &[u8],
    answer: &[String],
    now: SystemTime,
) -> Result<Issued, IdentityError> {
    let (leaf, rest) = answer
        .split_first()
        .ok_or_else(|| IdentityError::EmptyChain(identity.clone()))?;
    let Some((roots, intermediates)) = rest.split_last() else {
        tracing::warn!("no chain certs for: {identity}");
        return Err(no_root());
    };
    let mut chain = vec![one_certificate(leaf)?];
    check_leaf(identity, exactly, public_key_info, &chain[0], now)?;
    for pem in intermediates {
        chain.push(one_certificate(pem)?);
    }
    let roots: Vec<_> = CertificateDer::pem_slice_iter(roots.as_bytes())
        .filter_map(|root| match root {
            Ok(root) if X509Certificate::from_der(&root).is_ok() => Some(root),
            _ => {
                tracing::warn!("skipping a root certificate for {identity} that cannot be parsed");
                None
            }
        })
        .collect();
    if roots.is_empty() {
        return Err(no_root());
    }
    Ok(Issued { chain, roots })
}

fn no_root() -> IdentityError {
    IdentityError::Local("invalid root certificate: no root certificate present".to_string())
}

fn one_certificate(pem: &str) -> Result<CertificateDer<'static>, IdentityError> {
    CertificateDer::from_pem_slice(pem.as_bytes())
        .map_err(|e| IdentityError::Local(format!("invalid certificate: {e}")))
}

fn check_leaf(
    identity: &Identity,
    exactly: bool,
    public_key_info: &[u8],
    leaf: &CertificateDer<'_>,
    now: SystemTime,
) -> Result<(), IdentityError> {
    let invalid = |reason: String| IdentityError::Local(format!("invalid certificate: {reason}"));
    let (_, leaf) = X509Certificate::from_der(leaf).map_err(|e| invalid(e.to_string()))?;
    let names = leaf
        .subject_alternative_name()
        .map_err(|e| invalid(e.to_string()))?;
    let uri = names.and_then(|names| {
        names
            .value
            .general_names
            .iter()
            .find_map(|name| match name {
                GeneralName::URI(uri) => Some(*uri),
                _ => None,
            })
    });
    if exactly && uri != Some(identity.as_str()) {
        return Err(IdentityError::UnexpectedSan(identity.clone()));
    }
    if leaf.public_key().raw != public_key_info {
        return Err(invalid("it is not for the requested key".to_string()));
    }
    let since_epoch = now
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    if leaf.validity().not_after.timestamp()
        <= i64::try_from(since_epoch.as_secs()).unwrap_or(i64::MAX)
    {
        return Err(IdentityError::Expired(identity.clone()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use rcgen::{
        BasicConstraints, CertificateParams, CertificateSigningRequestParams, CertifiedIssuer,
        IsCa, KeyPair,
    };

    use super::*;

    struct Ca(CertifiedIssuer<'static, KeyPair>);

    impl Ca {
        fn new() -> Self {
            let mut params = CertificateParams::default();
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
        }

        fn sign(&self, csr: &str) -> String {
            let csr = CertificateSigningRequestParams::from_pem(csr).unwrap();
            csr.signed_by(&self.0).unwrap().pem()
        }
    }

    fn identity() -> Identity {
        Identity::new("td", "ns", "sa")
    }

    fn checked(
        identity: &Identity,
        request: &SigningRequest,
        answer: &[String],
    ) -> Result<Issued, IdentityError> {
        check(
            identity,
            true,
            &request.public_key_info(),
            answer,
            SystemTime::now(),
        )
    }

    #[test]
    fn a_full_chain_is_split_into_leaf_intermediates_and_roots() {
        let (ca, other) = (Ca::new(), Ca::new());
        let request = SigningRequest::new(&identity()).unwrap();
        let broken = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        let roots = format!("{}{broken}{}", ca.0.pem(), other.0.pem());
        let answer = [ca.sign(&request.pem), other.0.pem(), roots];
        let issued = checked(&identity(), &request, &answer).unwrap();
        assert_eq!(issued.chain.len(), 2);
        assert_eq!(issued.roots, [ca.0.der().clone(), other.0.der().clone()]);
    }

    #[test]
    fn a_chain_without_a_leaf_or_a_root_is_refused() {
        let ca = Ca::new();
        let request = SigningRequest::new(&identity()).unwrap();
        let leaf = ca.sign(&request.pem);
        let error = checked(&identity(), &request, &[]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "chain returned from CA is empty for: spiffe://td/ns/ns/sa/sa"
        );
        for answer in [vec![leaf.clone()], vec![leaf, "garbage".to_string()]] {
            assert_eq!(
                checked(&identity(), &request, &answer)
                    .unwrap_err()
                    .to_string(),
                "failed to create CSR: invalid root certificate: no root certificate present"
            );
        }
    }

    #[test]
    fn a_certificate_for_another_identity_is_refused() {
        let ca = Ca::new();
        let request = SigningRequest::new(&identity()).unwrap();
        let answer = [ca.sign(&request.pem), ca.0.pem()];
        let other = Identity::new("td", "ns", "other");
        assert_eq!(
            checked(&other, &request, &answer).unwrap_err(),
            IdentityError::UnexpectedSan(other)
        );
    }

    #[test]
    fn a_token_of_its_own_decides_whom_the_certificate_names() {
        let ca = Ca::new();
        let request = SigningRequest::new(&identity()).unwrap();
        let answer = [ca.sign(&request.pem), ca.0.pem()];
        let other = Identity::new("td", "ns", "other");
        let key = request.public_key_info();
        assert!(check(&other, false, &key, &answer, SystemTime::now()).is_ok());
    }

    #[test]
    fn a_certificate_for_another_key_or_of_the_past_is_refused() {
        let ca = Ca::new();
        let request = SigningRequest::new(&identity()).unwrap();
        let other = SigningRequest::new(&identity()).unwrap();
        let answer = [ca.sign(&other.pem), ca.0.pem()];
        assert!(checked(&identity(), &request, &answer).is_err());
        let key = other.public_key_info();
        let far = SystemTime::now() + Duration::from_secs(86_400 * 365 * 5000);
        assert_eq!(
            check(&identity(), true, &key, &answer, far).unwrap_err(),
            IdentityError::Expired(identity())
        );
    }
}
