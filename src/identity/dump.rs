//! How certificates look in the configuration dump.

use std::time::SystemTime;

use hbone::{Identity, TlsIdentity};
use rustls::pki_types::CertificateDer;
use serde_json::{Value, json};
use x509_parser::prelude::{FromDer, X509Certificate};
use x509_parser::time::ASN1Time;

/// One entry of `certificates`: its chains are empty unless there is a certificate.
pub fn entry(identity: &Identity, state: String, tls: Option<&TlsIdentity>) -> Value {
    let list = |certificates: &[CertificateDer<'_>]| -> Vec<Value> {
        certificates.iter().filter_map(certificate).collect()
    };
    json!({
        "identity": identity.to_string(),
        "state": state,
        "certChain": tls.map(|t| list(t.chain())).unwrap_or_default(),
        "rootCerts": tls.map(|t| list(t.roots())).unwrap_or_default(),
    })
}

/// RFC 3339 with whole seconds in UTC.
pub fn timestamp(time: SystemTime) -> String {
    time.duration_since(SystemTime::UNIX_EPOCH)
        .ok()
        .and_then(|since| i64::try_from(since.as_secs()).ok())
        .and_then(|seconds| ASN1Time::from_timestamp(seconds).ok())
        .map_or_else(|| "an unknown time".to_string(), |time| rfc3339(&time))
}

fn rfc3339(time: &ASN1Time) -> String {
    let time = time.to_datetime();
    format!(
        "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}Z",
        time.year(),
        u8::from(time.month()),
        time.day(),
        time.hour(),
        time.minute(),
        time.second()
    )
}

fn certificate(der: &CertificateDer<'_>) -> Option<Value> {
    let (_, parsed) = X509Certificate::from_der(der).ok()?;
    let validity = parsed.validity();
    Some(json!({
        "pem": base64(pem(der).as_bytes()),
        "serialNumber": parsed.tbs_certificate.serial.to_string(),
        "validFrom": rfc3339(&validity.not_before),
        "expirationTime": rfc3339(&validity.not_after),
    }))
}

/// RFC 7468: base64 in lines of 64 between the labels.
fn pem(der: &[u8]) -> String {
    let body = base64(der);
    let mut text = String::with_capacity(body.len() + body.len() / 64 + 60);
    text.push_str("-----BEGIN CERTIFICATE-----\n");
    for (index, symbol) in body.chars().enumerate() {
        if index > 0 && index % 64 == 0 {
            text.push('\n');
        }
        text.push(symbol);
    }
    text.push_str("\n-----END CERTIFICATE-----\n");
    text
}

/// RFC 4648 §4, padded.
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let byte = |i: usize| u32::from(chunk.get(i).copied().unwrap_or(0));
        let group = byte(0) << 16 | byte(1) << 8 | byte(2);
        for position in 0..4 {
            if position <= chunk.len() {
                let sextet = (group >> (18 - 6 * position)) & 0x3f;
                text.push(char::from(ALPHABET[sextet as usize]));
            } else {
                text.push('=');
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rustls::pki_types::pem::PemObject;

    use super::*;

    #[test]
    fn base64_matches_the_vectors_of_rfc_4648() {
        for (plain, encoded) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(base64(plain.as_bytes()), encoded);
        }
    }

    #[test]
    fn pem_reads_back_as_the_same_certificate() {
        let der = rcgen::generate_simple_self_signed(["a".to_string()]).unwrap();
        let text = pem(der.cert.der());
        let back = CertificateDer::from_pem_slice(text.as_bytes()).unwrap();
        assert_eq!(&back, der.cert.der());
        assert!(text.lines().all(|line| line.len() <= 64));
    }

    #[test]
    fn times_are_rfc_3339_with_whole_seconds() {
        let time = SystemTime::UNIX_EPOCH + Duration::from_millis(1_700_000_000_900);
        assert_eq!(timestamp(time), "2023-11-14T22:13:20Z");
    }
}
