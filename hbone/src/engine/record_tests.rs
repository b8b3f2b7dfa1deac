//! The record layer against rustls's own, which is the peer in every test.

use std::io::{Read, Write};
use std::sync::Arc;

use rustls::ServerConnection;
use rustls::client::UnbufferedClientConnection;
use rustls::pki_types::ServerName;
use rustls::unbuffered::{ConnectionState, UnbufferedStatus};

use super::record::{Opened, RecordError, Records};
use crate::testing::Authority;
use crate::{TlsIdentity, TlsOptions};

/// Our end after its handshake, and rustls as the serving peer, of one TLS version.
fn pair(tls12: bool) -> (Records, ServerConnection) {
    let authority = Authority::new();
    let identity = |uri: &str| {
        let (chain, key, roots) = authority.material(uri);
        let options = TlsOptions { tls12, pqc: false };
        TlsIdentity::new(chain, key, roots, &options).unwrap()
    };
    let server = identity("spiffe://td/ns/b/sa/server").server_config();
    let expected = ["spiffe://td/ns/b/sa/server".parse().unwrap()];
    let client = identity("spiffe://td/ns/a/sa/client")
        .client_config(&expected)
        .unwrap();
    let mut server = (*server).clone();
    if tls12 {
        // A peer of the past.
        let mut provider = (**server.crypto_provider()).clone();
        provider
            .cipher_suites
            .retain(|suite| suite.tls13().is_none());
        let versions = &[&rustls::version::TLS12];
        let old = rustls::ServerConfig::builder_with_provider(Arc::new(provider));
        let resolver = server.cert_resolver.clone();
        server = old
            .with_protocol_versions(versions)
            .unwrap()
            .with_no_client_auth()
            .with_cert_resolver(resolver);
        server.alpn_protocols = vec![b"h2".to_vec()];
    } else {
        // Tickets are of no use to a tunnel, but a peer may send them.
        server.send_tls13_tickets = 2;
    }
    let mut server = ServerConnection::new(Arc::new(server)).unwrap();
    let name = ServerName::try_from("localhost").unwrap();
    let mut client = UnbufferedClientConnection::new(client, name).unwrap();
    let (mut input, mut output) = (Vec::new(), Vec::new());
    for _ in 0..100 {
        let handshaking = client.is_handshaking();
        let UnbufferedStatus { discard, state, .. } = client.process_tls_records(&mut input);
        let done = match state.unwrap() {
            ConnectionState::EncodeTlsData(mut data) => {
                let start = output.len();
                output.resize(start + 8192, 0);
                let length = data.encode(&mut output[start..]).unwrap();
                output.truncate(start + length);
                false
            }
            ConnectionState::TransmitTlsData(data) => {
                data.done();
                false
            }
            ConnectionState::WriteTraffic(_) => !handshaking,
            _ => false,
        };
        input.drain(..discard);
        while !output.is_empty() {
            let read = server.read_tls(&mut output.as_slice()).unwrap();
            output.drain(..read);
            server.process_new_packets().unwrap();
        }
        if done {
            break;
        }
        if client.is_handshaking() && server.wants_write() {
            server.write_tls(&mut input).unwrap();
        }
    }
    assert!(!client.is_handshaking() && !server.is_handshaking());
    let records = Records::client(client.dangerous_into_kernel_connection().unwrap());
    (records.unwrap(), server)
}

fn seal(records: &mut Records, plain: &[u8]) -> Vec<u8> {
    let mut out = vec![0; Records::sealed(plain.len())];
    let length = records.seal(plain, &mut out).unwrap();
    out.truncate(length);
    out
}

/// What the peer reads of our records.
fn read(peer: &mut ServerConnection, mut sealed: &[u8], plain: usize) -> Vec<u8> {
    let mut got = Vec::new();
    while got.len() < plain || !sealed.is_empty() {
        if !sealed.is_empty() {
            peer.read_tls(&mut sealed).unwrap();
            peer.process_new_packets().unwrap();
        }
        let mut buffer = [0; 20_000];
        while let Ok(read @ 1..) = peer.reader().read(&mut buffer) {
            got.extend_from_slice(&buffer[..read]);
        }
    }
    got
}

/// Everything that the peer has to send.
fn written(peer: &mut ServerConnection) -> Vec<u8> {
    let mut out = Vec::new();
    while peer.wants_write() {
        peer.write_tls(&mut out).unwrap();
    }
    out
}

fn open(records: &mut Records, cipher: &[u8]) -> Result<(Opened, Vec<u8>), RecordError> {
    let mut plain = vec![0; cipher.len()];
    let opened = records.open(cipher, &mut plain)?;
    plain.truncate(opened.plain);
    Ok((opened, plain))
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at * 31 % 251) as u8).collect()
}

#[test]
fn both_versions_carry_bytes_of_any_length_both_ways() {
    for tls12 in [false, true] {
        let (mut ours, mut peer) = pair(tls12);
        for length in [1, 100, 16_383, 16_384, 16_385, 50_000] {
            let bytes = pattern(length);
            let sealed = seal(&mut ours, &bytes);
            assert!(
                read(&mut peer, &sealed, length) == bytes,
                "{length}, 1.2: {tls12}"
            );
            let mut rest = &bytes[..];
            let mut cipher = Vec::new();
            while !rest.is_empty() {
                let taken = peer.writer().write(rest).unwrap();
                rest = &rest[taken..];
                cipher.extend(written(&mut peer));
            }
            let (opened, plain) = open(&mut ours, &cipher).unwrap();
            assert!(plain == bytes, "{length}, 1.2: {tls12}");
            assert_eq!((opened.consumed, opened.closed), (cipher.len(), false));
        }
    }
}

#[test]
fn a_record_that_is_not_whole_waits() {
    let (mut ours, mut peer) = pair(false);
    open(&mut ours, &written(&mut peer)).unwrap();
    peer.writer().write_all(b"first").unwrap();
    let first = written(&mut peer);
    peer.writer().write_all(b"second").unwrap();
    let all = [first.clone(), written(&mut peer)].concat();
    for cut in first.len()..all.len() {
        let (mut ours, mut peer) = pair(false);
        open(&mut ours, &written(&mut peer)).unwrap();
        peer.writer().write_all(b"first").unwrap();
        let first = written(&mut peer);
        peer.writer().write_all(b"second").unwrap();
        let all = [first.clone(), written(&mut peer)].concat();
        let (opened, plain) = open(&mut ours, &all[..cut]).unwrap();
        assert_eq!(
            (opened.consumed, plain.as_slice()),
            (first.len(), &b"first"[..])
        );
        let (_, plain) = open(&mut ours, &all[opened.consumed..]).unwrap();
        assert_eq!(plain, b"second");
        if cut > first.len() + 6 {
            break;
        }
    }
}

#[test]
fn the_peer_may_replace_its_key_and_ask_for_ours() {
    let (mut ours, mut peer) = pair(false);
    open(&mut ours, &written(&mut peer)).unwrap();
    for _ in 0..3 {
        peer.refresh_traffic_keys().unwrap();
        peer.writer().write_all(b"after").unwrap();
        let (_, plain) = open(&mut ours, &written(&mut peer)).unwrap();
        assert_eq!(plain, b"after");
        assert!(ours.wants_to_seal());
        let sealed = seal(&mut ours, b"answer");
        assert_eq!(read(&mut peer, &sealed, 6), b"answer");
        assert!(!ours.wants_to_seal());
    }
}

#[test]
fn alerts_are_understood_and_sent() {
    for tls12 in [false, true] {
        let (mut ours, mut peer) = pair(tls12);
        peer.writer().write_all(b"last").unwrap();
        peer.send_close_notify();
        let (opened, plain) = open(&mut ours, &written(&mut peer)).unwrap();
        assert_eq!((plain.as_slice(), opened.closed), (&b"last"[..], true));
        let mut out = [0; 64];
        let length = ours.close(&mut out).unwrap();
        peer.read_tls(&mut &out[..length]).unwrap();
        let state = peer.process_new_packets().unwrap();
        assert!(state.peer_has_closed());
    }
}

#[test]
fn what_was_tampered_with_is_refused() {
    for tls12 in [false, true] {
        for at in [0, 1, 3, 5, 12, 20] {
            let (mut ours, mut peer) = pair(tls12);
            open(&mut ours, &written(&mut peer)).unwrap();
            peer.writer().write_all(b"genuine bytes").unwrap();
            let mut cipher = written(&mut peer);
            cipher[at] ^= 0x41;
            // A length that was made larger is waited for in vain.
            let plain = open(&mut ours, &cipher).map_or(Vec::new(), |(_, plain)| plain);
            assert_eq!(plain, b"", "{at}, 1.2: {tls12}");
        }
        let (mut ours, mut peer) = pair(tls12);
        open(&mut ours, &written(&mut peer)).unwrap();
        peer.writer().write_all(b"once").unwrap();
        let cipher = written(&mut peer);
        open(&mut ours, &cipher).unwrap();
        assert_eq!(
            open(&mut ours, &cipher),
            Err(RecordError::Decrypt),
            "replay, 1.2: {tls12}"
        );
    }
}

#[test]
fn a_record_longer_than_allowed_is_refused_by_its_header() {
    let (mut ours, _) = pair(false);
    let error = open(&mut ours, &[23, 3, 3, 0xff, 0xff]).unwrap_err();
    assert_eq!(error, RecordError::Unexpected("a record is too large"));
}
