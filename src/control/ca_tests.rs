//! What the authority signs and what it does not.

use std::path::PathBuf;

use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer;

use super::*;
use crate::identity::csr::SigningRequest;

const HOUR: Duration = Duration::from_secs(3600);

struct State(PathBuf);

impl State {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("wrn-ca-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn open(&self) -> anyhow::Result<Authority> {
        Authority::open(&self.0, HOUR)
    }

    fn root(&self) -> String {
        std::fs::read_to_string(self.0.join(ROOT)).unwrap()
    }
}

impl Drop for State {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn identity(account: &str) -> Identity {
    Identity::new("cluster.local", "a", account)
}

fn request(account: &str) -> String {
    SigningRequest::new(&identity(account)).unwrap().pem
}

/// Looks at the first certificate of a PEM.
fn see<T>(pem: &str, look: impl FnOnce(&X509Certificate<'_>) -> T) -> T {
    let (_, pem) = x509_parser::pem::parse_x509_pem(pem.as_bytes()).unwrap();
    look(&pem.parse_x509().unwrap())
}

#[test]
fn a_certificate_names_whom_the_authority_says_and_nobody_else() {
    let state = State::new("names");
    let authority = state.open().unwrap();
    // The request asks for another name than the one that is granted.
    let chain = authority
        .sign(&request("mallory"), &identity("alice"), HOUR)
        .unwrap();
    assert_eq!(chain.len(), 2);
    assert_eq!(chain[1], state.root());
    let names = see(&chain[0], |leaf| {
        assert!(!leaf.is_ca());
        let names = leaf.subject_alternative_name().unwrap().unwrap();
        assert!(names.critical);
        let names = names.value.general_names.iter();
        names
            .map(|name| match name {
                GeneralName::URI(uri) => (*uri).to_string(),
                other => panic!("{other}"),
            })
            .collect::<Vec<_>>()
    });
    assert_eq!(names, ["spiffe://cluster.local/ns/a/sa/alice"]);
}

#[test]
fn a_certificate_is_signed_by_the_root_and_of_the_requests_key() {
    let state = State::new("key");
    let authority = state.open().unwrap();
    let request = request("alice");
    let leaf = authority.sign(&request, &identity("alice"), HOUR).unwrap()[0].clone();
    let (_, pem) = x509_parser::pem::parse_x509_pem(request.as_bytes()).unwrap();
    let (_, asked) =
        x509_parser::certification_request::X509CertificationRequest::from_der(&pem.contents)
            .unwrap();
    let wanted = asked.certification_request_info.subject_pki.raw;
    see(&leaf, |leaf| {
        assert_eq!(leaf.public_key().raw, wanted);
        see(&state.root(), |root| {
            assert_eq!(leaf.issuer(), root.subject());
            leaf.verify_signature(Some(root.public_key())).unwrap();
        });
    });
}

#[test]
fn nobody_gets_a_longer_life_than_there_is() {
    let state = State::new("life");
    let authority = state.open().unwrap();
    let minute = Duration::from_secs(60);
    let cases = [
        (Duration::ZERO, HOUR),
        (minute, minute),
        (HOUR * 1000, HOUR),
        (Duration::from_secs(u64::MAX), HOUR),
    ];
    for (wanted, granted) in cases {
        let leaf = authority
            .sign(&request("alice"), &identity("alice"), wanted)
            .unwrap()[0]
            .clone();
        let (from, to) = see(&leaf, |leaf| {
            let validity = leaf.validity();
            (
                validity.not_before.timestamp(),
                validity.not_after.timestamp(),
            )
        });
        assert_eq!(
            u64::try_from(to - from).unwrap(),
            (granted + SKEW).as_secs(),
            "{wanted:?}"
        );
    }
}

#[test]
fn requests_that_cannot_be_trusted_are_refused() {
    let state = State::new("refused");
    let authority = state.open().unwrap();
    let good = request("alice");
    let (_, pem) = x509_parser::pem::parse_x509_pem(good.as_bytes()).unwrap();
    let mut der = pem.contents;
    let same = pem_of("CERTIFICATE REQUEST", &der);
    assert!(authority.sign(&same, &identity("alice"), HOUR).is_ok());
    // The last byte is the signature's.
    *der.last_mut().unwrap() ^= 1;
    let forged = pem_of("CERTIFICATE REQUEST", &der);
    for bad in [
        "",
        "nonsense",
        &state.root(),
        &forged,
        &good[..good.len() / 2],
    ] {
        let refusal = authority.sign(bad, &identity("alice"), HOUR).unwrap_err();
        assert!(
            refusal.starts_with("the certificate request cannot be used: "),
            "{refusal}"
        );
    }
}

fn pem_of(label: &str, der: &[u8]) -> String {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = format!("-----BEGIN {label}-----\n");
    for (number, chunk) in der.chunks(3).enumerate() {
        let mut bytes = [0; 4];
        bytes[1..=chunk.len()].copy_from_slice(chunk);
        let value = u32::from_be_bytes(bytes);
        for digit in 0..4 {
            let index = (value >> (18 - 6 * digit)) & 63;
            text.push(if digit <= chunk.len() {
                DIGITS[index as usize].into()
            } else {
                '='
            });
        }
        if number % 16 == 15 {
            text.push('\n');
        }
    }
    format!("{}\n-----END {label}-----\n", text.trim_end())
}

#[test]
fn the_root_is_made_once_and_belongs_to_its_key() {
    let (state, other) = (State::new("once"), State::new("other"));
    state.open().unwrap();
    let root = state.root();
    state.open().unwrap();
    assert_eq!(state.root(), root);
    other.open().unwrap();
    std::fs::copy(other.0.join(ROOT), state.0.join(ROOT)).unwrap();
    let refusal = state.open().err().unwrap().to_string();
    assert!(
        refusal.ends_with("is not the certificate of root-key.pem; remove both for a new root"),
        "{refusal}"
    );
}
