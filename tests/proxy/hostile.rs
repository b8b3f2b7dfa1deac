//! Peers that must not get in, and must not hurt anybody else.

use std::sync::Arc;
use std::time::Duration;

use http::Method;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use crate::harness::{Node, POD};
use crate::tunnel::{CURL, HBONE, answer, config, open, request, status, tls};

/// An application that says hello to everyone.
fn greet(listener: TcpListener) {
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            let _ = socket.write_all(b"hello").await;
        }
    });
}

/// A well-behaved client is served as ever.
async fn assert_served(node: &Node) {
    let mut send = open(node).await.ready().await.unwrap();
    let (response, mut stream) = send
        .send_request(request(&format!("{POD}:8080")), false)
        .unwrap();
    let response = response.await.unwrap();
    assert_eq!(response.status(), 200);
    let data = response.into_body().data().await.unwrap().unwrap();
    assert_eq!(&data[..], b"hello");
    stream.send_data(bytes::Bytes::new(), true).unwrap();
}

#[derive(Debug)]
struct NoCertificate;

impl rustls::client::ResolvesClientCert for NoCertificate {
    fn resolve(
        &self,
        _: &[&[u8]],
        _: &[rustls::SignatureScheme],
    ) -> Option<Arc<rustls::sign::CertifiedKey>> {
        None
    }

    fn has_certs(&self) -> bool {
        false
    }
}

#[tokio::test]
async fn a_peer_without_the_right_certificate_is_refused_logged_and_hurts_nobody() {
    let Some(node) = Node::start("certificates", &[]).await else {
        return;
    };
    greet(node.listen(8080));
    let good = || config(&node.certificate(CURL).identity());
    let mut anonymous = good();
    anonymous.client_auth_cert_resolver = Arc::new(NoCertificate);
    let mut http1 = good();
    http1.alpn_protocols = vec![b"http/1.1".to_vec()];
    let cases = [
        ("peer sent no certificates", anonymous),
        (
            "UnknownIssuer",
            config(&node.certificate(CURL).of_another_root().identity()),
        ),
        (
            "expired",
            config(&node.certificate(CURL).expired().identity()),
        ),
        (
            "peer did not present the expected trustdomain (cluster.local), got spiffe://elsewhere/ns/a/sa/curl",
            config(
                &node
                    .certificate("spiffe://elsewhere/ns/a/sa/curl")
                    .identity(),
            ),
        ),
        ("peer doesn't support any known protocol", http1),
    ];
    for (reason, config) in cases {
        // Under TLS 1.3 a client may think that it is in before the server has looked at its certificate.
        if let Ok(mut stream) = tls(&node, config).await {
            let _ = stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await;
            assert!(
                !matches!(stream.read(&mut [0; 16]).await, Ok(1..)),
                "{reason}"
            );
        }
        let line = node
            .logged(&["warn\taccess\tconnection failed", reason])
            .await;
        assert!(
            line.contains("src.addr=10.0.0.1:") && line.contains("dst.addr=10.0.0.9:15008"),
            "{line}"
        );
        assert!(line.contains("error=\"tls handshake error: "), "{line}");
        assert_served(&node).await;
    }
}

#[tokio::test]
async fn what_is_no_tunnel_at_all_is_refused() {
    let Some(node) = Node::start("garbage", &[]).await else {
        return;
    };
    greet(node.listen(8080));
    // TLS 1.2 with the right certificate, from a client that can do nothing else.
    let identity = node.certificate(CURL).identity();
    let provider = Arc::new(hbone::provider(&hbone::TlsOptions {
        tls12: true,
        pqc: false,
    }));
    let old = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS12])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anybody))
        .with_client_cert_resolver(config(&identity).client_auth_cert_resolver);
    assert!(tls(&node, old).await.is_err());
    node.logged(&["connection failed", "tls handshake error: "])
        .await;
    for hello in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        &[0xff; 4096],
        b"\x16\x03\x01\x00",
    ] {
        let mut socket = node.connect(HBONE).await.unwrap();
        socket.write_all(hello).await.unwrap();
        let _ = socket.shutdown().await;
        let mut answer = Vec::new();
        let _ = socket.read_to_end(&mut answer).await;
        assert!(!answer.starts_with(b"HTTP/"), "{answer:?}");
    }
    assert_served(&node).await;
}

#[derive(Debug)]
struct Anybody;

impl rustls::client::danger::ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &[rustls::pki_types::CertificateDer<'_>],
        _: &rustls::pki_types::ServerName<'_>,
        _: &[u8],
        _: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        vec![
            rustls::SignatureScheme::ECDSA_NISTP256_SHA256,
            rustls::SignatureScheme::ED25519,
        ]
    }
}

#[tokio::test]
async fn a_connect_to_anything_but_the_pods_own_application_is_refused() {
    let Some(node) = Node::start("connects", &[]).await else {
        return;
    };
    greet(node.listen(8080));
    let cases = [
        ("10.0.0.10:8080", 400, "ip mismatch: 10.0.0.9 != 10.0.0.10"),
        ("127.0.0.1:8080", 400, "ip mismatch: 10.0.0.9 != 127.0.0.1"),
        ("127.0.0.1:15000", 400, "ip mismatch: 10.0.0.9 != 127.0.0.1"),
        (
            "10.0.0.9:15001",
            503,
            "attempted recursive call to ourselves",
        ),
        (
            "10.0.0.9:15006",
            503,
            "attempted recursive call to ourselves",
        ),
        (
            "10.0.0.9:15008",
            503,
            "attempted recursive call to ourselves",
        ),
        (
            "10.0.0.9",
            400,
            "no valid authority pseudo header: 10.0.0.9",
        ),
        (
            "nowhere.example:80",
            503,
            "no service or workload for hostname: nowhere.example",
        ),
        (
            "web.b.svc.cluster.local:81",
            503,
            "requested service web.b.svc.cluster.local:81 found, but cannot resolve port",
        ),
        (
            "web.b.svc.cluster.local:80",
            200,
            "dst.hbone_addr=web.b.svc.cluster.local:80",
        ),
        ("10.0.0.9:9", 503, "connection failed: Connection refused"),
    ];
    for (authority, expected, logged) in cases {
        assert_eq!(status(&node, authority).await, expected, "{authority}");
        node.logged(&[logged]).await;
    }
    let mut get = request("10.0.0.9:8080");
    *get.method_mut() = Method::GET;
    *get.uri_mut() = "https://10.0.0.9:8080/".parse().unwrap();
    assert_eq!(answer(open(&node).await, get).await.unwrap(), 400);
    node.logged(&["expected method CONNECT, got GET"]).await;
    assert_served(&node).await;
}

#[tokio::test]
async fn floods_end_the_tunnel_that_they_come_by_and_no_other() {
    let Some(node) = Node::start("floods", &[]).await else {
        return;
    };
    greet(node.listen(8080));
    // Rapid reset: far more streams than are ever accepted, each given up at once.
    let mut send = open(&node).await;
    let mut opened = 0;
    for _ in 0..100_000 {
        let Ok(mut ready) = send.clone().ready().await else {
            break;
        };
        let Ok((_, mut stream)) = ready.send_request(request(&format!("{POD}:8080")), false) else {
            break;
        };
        stream.send_reset(h2::Reason::CANCEL);
        opened += 1;
        if opened % 50 == 0 {
            tokio::task::yield_now().await;
        }
    }
    assert!(opened < 100_000, "the tunnel was never given up");
    assert_served(&node).await;
    // More headers than anyone needs.
    send = open(&node).await;
    let mut big = request(&format!("{POD}:8080"));
    let value: http::HeaderValue = "x".repeat(8000).parse().unwrap();
    for number in 0..20 {
        let name: http::HeaderName = format!("x-{number}").parse().unwrap();
        big.headers_mut().insert(name, value.clone());
    }
    let refused = answer(send, big).await;
    assert!(!matches!(refused, Ok(200)), "{refused:?}");
    assert_served(&node).await;
    // Many half-open handshakes.
    let mut waiting = Vec::new();
    for _ in 0..200 {
        let mut socket = node.connect(HBONE).await.unwrap();
        socket.write_all(b"\x16\x03\x01\x02").await.unwrap();
        waiting.push(socket);
    }
    assert_served(&node).await;
    let (_, dump) = node.http("GET", 15020, "/metrics").await;
    let resident = dump.lines().find_map(|line| {
        line.strip_prefix("process_resident_memory_bytes ")?
            .parse::<u64>()
            .ok()
    });
    assert!(
        resident.is_some_and(|bytes| bytes < 256 << 20),
        "{resident:?}"
    );
}

#[tokio::test]
async fn the_plaintext_and_egress_ports_do_not_call_themselves() {
    let Some(node) = Node::start("loops", &[]).await else {
        return;
    };
    for (target, direction) in [
        ("10.0.0.9:15006", "inbound"),
        ("127.0.0.1:15001", "outbound"),
    ] {
        let mut socket = node.connect(target).await.unwrap();
        let _ = tokio::time::timeout(Duration::from_secs(5), socket.read(&mut [0; 1]))
            .await
            .unwrap();
        node.logged(&["attempted recursive call to ourselves", direction])
            .await;
    }
}
