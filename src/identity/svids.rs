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

#[cfg(test)]
mod tests {
    use rcgen::{
        BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa,
        KeyPair, SanType,
    };

    use super::*;

    /// Puts bytes into an SVID that do not belong there.
    type Spoil = fn(&mut X509svid, Vec<u8>);
    type Ca = CertifiedIssuer<'static, KeyPair>;

    fn ca() -> Ca {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
    }

    fn svid(ca: &Ca, uri: &str) -> X509svid {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(uri.try_into().unwrap())];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        X509svid {
            spiffe_id: uri.to_string(),
            x509_svid: params.signed_by(&key, ca).unwrap().der().to_vec(),
            x509_svid_key: key.serialize_der(),
            bundle: ca.der().to_vec(),
            hint: String::new(),
        }
    }

    fn response(svids: &[X509svid]) -> X509svidResponse {
        X509svidResponse {
            svids: svids.to_vec(),
            ..Default::default()
        }
    }

    fn set(svids: &[X509svid], former: Option<&Set>) -> Result<Set, Malformed> {
        read(response(svids), former, &TlsOptions::default())
    }

    const WEB: &str = "spiffe://td/ns/b/sa/web";
    const CURL: &str = "spiffe://td/ns/a/sa/curl";

    #[test]
    fn chains_and_bundles_are_split_and_the_first_svid_of_an_identity_counts() {
        let (ca, other) = (ca(), ca());
        let mut web = svid(&ca, WEB);
        web.x509_svid.extend_from_slice(other.der());
        web.bundle.extend_from_slice(other.der());
        let agent = svid(&ca, "spiffe://td/spire/agent");
        let svids = [web.clone(), svid(&ca, CURL), svid(&ca, WEB), agent];
        let set = set(&svids, None).unwrap();
        assert_eq!(set.len(), 2);
        let read = &set[&WEB.parse().unwrap()];
        let chain = [&read.chain()[0][..], &read.chain()[1][..]].concat();
        assert_eq!((read.chain().len(), chain), (2, web.x509_svid));
        assert_eq!(read.roots(), [ca.der().clone(), other.der().clone()]);
    }

    #[test]
    fn only_what_changed_is_a_new_object() {
        let (ca, other) = (ca(), ca());
        let (web, curl) = (svid(&ca, WEB), svid(&ca, CURL));
        let first = set(&[web.clone(), curl.clone()], None).unwrap();
        let second = set(&[web.clone(), svid(&ca, CURL)], Some(&first)).unwrap();
        let same = |a: &Set, b: &Set, uri: &str| {
            let identity = uri.parse().unwrap();
            Arc::ptr_eq(&a[&identity], &b[&identity])
        };
        assert!(same(&first, &second, WEB));
        assert!(!same(&first, &second, CURL));
        let bundle = other.der().to_vec();
        let third = set(&[X509svid { bundle, ..web }], Some(&first)).unwrap();
        assert!(!same(&first, &third, WEB));
    }

    #[test]
    fn one_bad_part_spoils_the_response() {
        let ca = ca();
        let good = svid(&ca, CURL);
        let junk = vec![0x30, 1, 2, 3];
        let half = |der: &[u8]| der[..der.len() / 2].to_vec();
        let web = || svid(&ca, WEB);
        let bad: [(&str, Spoil, Vec<u8>); 9] = [
            (
                "certificate chain",
                |svid, v| svid.x509_svid = v,
                junk.clone(),
            ),
            (
                "certificate chain",
                |svid, v| svid.x509_svid.extend(v),
                junk.clone(),
            ),
            (
                "certificate chain",
                |svid, v| svid.x509_svid = v,
                half(&web().x509_svid),
            ),
            ("chain is empty", |svid, v| svid.x509_svid = v, vec![]),
            ("trust bundle", |svid, v| svid.bundle = v, junk.clone()),
            ("no root certificates", |svid, v| svid.bundle = v, vec![]),
            (
                "cannot be used",
                |svid, v| svid.x509_svid_key = v,
                web().x509_svid_key,
            ),
            ("cannot be used", |svid, v| svid.x509_svid_key = v, junk),
            (
                "does not name it",
                |svid, _| svid.spiffe_id = "spiffe://td/ns/b/sa/x".into(),
                vec![],
            ),
        ];
        for (says, spoil, value) in bad {
            let mut spoiled = web();
            spoil(&mut spoiled, value);
            let error = set(&[good.clone(), spoiled], None).unwrap_err().to_string();
            assert!(error.contains(says), "{says}: {error}");
            assert!(error.contains("spiffe://td/ns/b/sa/"), "{error}");
        }
        assert!(matches!(set(&[], None), Err(Malformed::Empty)));
    }
}
