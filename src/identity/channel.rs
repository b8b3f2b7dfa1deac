//! gRPC channels to the control plane: TCP, TLS with the configured roots, HTTP/2 only.
//!
//! Roots are read at every connection, so a rotated bundle is used without a restart.

use std::error::Error;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::Uri;
use hyper_util::rt::TokioIo;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{
    CertificateError, CipherSuite, ClientConfig, DigitallySignedStruct, RootCertStore,
    SignatureScheme,
};
use thiserror::Error;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use crate::config::{Config, ControlPeer, RootSource};

/// Longest wait for one address to accept.
const TCP_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest wait for name, TCP and TLS together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const PING_INTERVAL: Duration = Duration::from_secs(30);
const PING_TIMEOUT: Duration = Duration::from_secs(10);

/// Why there is no connection to the control plane.
#[derive(Debug, Error)]
pub enum ConnectError {
    #[error("invalid address {0}: expected https://HOST:PORT")]
    Address(String),
    #[error("cannot resolve {host}: {source} (hint: is the DNS server reachable?)")]
    Resolve { host: String, source: io::Error },
    #[error("cannot connect to {peer}: {source}")]
    Tcp { peer: String, source: io::Error },
    #[error("no connection within {} s", CONNECT_TIMEOUT.as_secs())]
    TimedOut,
    #[error("cannot read the root certificates in {path}: {source}")]
    RootFile { path: String, source: io::Error },
    #[error("no usable root certificate in {0}")]
    NoRoots(String),
    #[error("TLS configuration: {0}")]
    Config(#[from] rustls::Error),
    #[error("TLS handshake: {0}")]
    Handshake(io::Error),
    #[error("the server does not speak HTTP/2 (no h2 by ALPN)")]
    NotHttp2,
}

/// A server of the control plane and how to trust it.
#[derive(Clone, Debug)]
pub struct Peer {
    /// `https://host:port`.
    pub address: String,
    pub root: RootSource,
    /// A further DNS name accepted in the server's certificate.
    pub alt_hostname: Option<String>,
    /// Whether TLS 1.2 is allowed besides 1.3.
    pub tls12: bool,
    /// Whether key exchange is restricted to X25519MLKEM768.
    pub pqc: bool,
}

impl Peer {
    /// The peer as configured; `None` when its address is switched off.
    pub fn new(config: &Config, peer: &ControlPeer) -> Option<Self> {
        Some(Self {
            address: peer.address.clone()?,
            root: peer.root.clone(),
            alt_hostname: peer.alt_hostname.clone(),
            tls12: config.tls12,
            pqc: config.pqc,
        })
    }

    /// Connects now.
    ///
    /// # Errors
    /// The reason in words, with the whole chain of causes.
    pub async fn connect(&self) -> Result<Channel, String> {
        self.endpoint()
            .map_err(|e| e.to_string())?
            .connect_with_connector(self.connector())
            .await
            .map_err(|e| chain(&e))
    }

    /// Connects at the first request and again whenever the connection is lost. Needs a tokio runtime.
    ///
    /// # Errors
    /// An address that is no URI.
    pub fn connect_lazily(&self) -> Result<Channel, ConnectError> {
        Ok(self
            .endpoint()?
            .connect_with_connector_lazy(self.connector()))
    }

    fn endpoint(&self) -> Result<Endpoint, ConnectError> {
        let address = || ConnectError::Address(self.address.clone());
        Ok(Endpoint::from_shared(self.address.clone())
            .map_err(|_| address())?
            .user_agent(concat!("warren/", env!("CARGO_PKG_VERSION")))
            .map_err(|_| address())?
            .http2_keep_alive_interval(PING_INTERVAL)
            .keep_alive_timeout(PING_TIMEOUT))
    }

    fn connector(&self) -> Connector {
        Connector(Arc::new(self.clone()))
    }

    async fn dial(&self, uri: &Uri) -> Result<TlsStream<TcpStream>, ConnectError> {
        let address = || ConnectError::Address(self.address.clone());
        if uri.scheme_str() != Some("https") {
            return Err(address());
        }
        let host = uri
            .host()
            .ok_or_else(address)?
            .trim_matches(['[', ']'])
            .to_string();
        let port = uri.port_u16().unwrap_or(443);
        let name = ServerName::try_from(host.clone()).map_err(|_| address())?;
        // Before any packet: bad roots are the same wherever the server is.
        let config = self.client_config().await?;
        let socket = dial_tcp(&host, port).await?;
        let stream = TlsConnector::from(Arc::new(config))
            .connect(name, socket)
            .await
            .map_err(ConnectError::Handshake)?;
        if stream.get_ref().1.alpn_protocol() != Some(b"h2") {
            return Err(ConnectError::NotHttp2);
        }
        Ok(stream)
    }

    async fn client_config(&self) -> Result<ClientConfig, ConnectError> {
        let roots = Arc::new(load_roots(&self.root).await?);
        let provider = Arc::new(provider(self.pqc));
        let versions: &[&rustls::SupportedProtocolVersion] = if self.tls12 {
            &[&rustls::version::TLS13, &rustls::version::TLS12]
        } else {
            &[&rustls::version::TLS13]
        };
        let inner = WebPkiServerVerifier::builder_with_provider(roots, provider.clone())
            .build()
            .map_err(|e| rustls::Error::General(e.to_string()))?;
        let alternative = match &self.alt_hostname {
            None => None,
            Some(name) => Some(
                ServerName::try_from(name.clone())
                    .map_err(|_| ConnectError::Address(name.clone()))?,
            ),
        };
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(ServerVerifier { inner, alternative }))
            .with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(config)
    }
}

/// Code and text of a failed call. A transport failure says little in its message, so its causes are told instead.
pub fn explain(status: &Status) -> (Code, String) {
    match (status.code(), status.source()) {
        (Code::Unknown, Some(source)) => (Code::Unavailable, chain(source)),
        (code, Some(source)) => (code, chain(source)),
        (code, None) => (code, status.message().to_string()),
    }
}

/// `error` and all its causes on one line, each text once.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.ends_with(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        cause = error.source();
    }
    text
}

async fn dial_tcp(host: &str, port: u16) -> Result<TcpStream, ConnectError> {
    let unresolved = |source| ConnectError::Resolve {
        host: host.to_string(),
        source,
    };
    let addresses = tokio::net::lookup_host((host, port))
        .await
        .map_err(unresolved)?;
    let mut failure = unresolved(io::Error::new(io::ErrorKind::NotFound, "no address"));
    for address in addresses {
        let attempt = timeout(TCP_TIMEOUT, TcpStream::connect(address))
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
            .and_then(|socket| keep_alive(&socket).map(|()| socket));
        match attempt {
            Ok(socket) => return Ok(socket),
            Err(source) => {
                failure = ConnectError::Tcp {
                    peer: address.to_string(),
                    source,
                };
            }
        }
    }
    Err(failure)
}

fn keep_alive(socket: &TcpStream) -> io::Result<()> {
    socket.set_nodelay(true)?;
    socket2::SockRef::from(socket).set_tcp_keepalive(
        &socket2::TcpKeepalive::new()
            .with_time(Duration::from_secs(300))
            .with_interval(Duration::from_secs(75))
            .with_retries(9),
    )
}

async fn load_roots(source: &RootSource) -> Result<RootCertStore, ConnectError> {
    let (certificates, origin) = match source {
        RootSource::Inline(pem) => (
            read_pem(pem.as_bytes()),
            "the inline certificates".to_string(),
        ),
        RootSource::File(path) => {
            let origin = path.display().to_string();
            let pem = tokio::fs::read(path)
                .await
                .map_err(|source| ConnectError::RootFile {
                    path: origin.clone(),
                    source,
                })?;
            (read_pem(&pem), origin)
        }
        RootSource::System => {
            let certificates =
                tokio::task::spawn_blocking(|| rustls_native_certs::load_native_certs().certs)
                    .await
                    .unwrap_or_default();
            (certificates, "the system's store".to_string())
        }
    };
    let mut store = RootCertStore::empty();
    let (_, ignored) = store.add_parsable_certificates(certificates);
    if store.is_empty() {
        return Err(ConnectError::NoRoots(origin));
    }
    if ignored > 0 {
        tracing::debug!("ignored {ignored} unusable root certificates in {origin}");
    }
    Ok(store)
}

fn read_pem(pem: &[u8]) -> Vec<CertificateDer<'static>> {
    CertificateDer::pem_slice_iter(pem)
        .filter_map(Result::ok)
        .collect()
}

/// AES-GCM only, as everywhere in the mesh.
fn provider(pqc: bool) -> CryptoProvider {
    let mut provider = aws_lc_rs::default_provider();
    provider.cipher_suites.retain(|suite| {
        !matches!(
            suite.suite(),
            CipherSuite::TLS13_CHACHA20_POLY1305_SHA256
                | CipherSuite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256
                | CipherSuite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256
        )
    });
    if pqc {
        provider.kx_groups = vec![aws_lc_rs::kx_group::X25519MLKEM768];
    }
    provider
}

/// The usual verification, with a second name tried where the first does not match.
#[derive(Debug)]
struct ServerVerifier {
    inner: Arc<WebPkiServerVerifier>,
    alternative: Option<ServerName<'static>>,
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let verify = |name: &ServerName<'_>| {
            self.inner
                .verify_server_cert(end_entity, intermediates, name, ocsp, now)
        };
        match (verify(server_name), &self.alternative) {
            (
                Err(rustls::Error::InvalidCertificate(
                    CertificateError::NotValidForName
                    | CertificateError::NotValidForNameContext { .. },
                )),
                Some(alternative),
            ) => verify(alternative),
            (result, _) => result,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner
            .verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner
            .verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

#[derive(Clone)]
struct Connector(Arc<Peer>);

impl tower_service::Service<Uri> for Connector {
    type Response = TokioIo<TlsStream<TcpStream>>;
    type Error = ConnectError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let peer = self.0.clone();
        Box::pin(async move {
            timeout(CONNECT_TIMEOUT, peer.dial(&uri))
                .await
                .unwrap_or(Err(ConnectError::TimedOut))
                .map(TokioIo::new)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(root: RootSource) -> Peer {
        Peer {
            address: "https://127.0.0.1:1".to_string(),
            root,
            alt_hostname: None,
            tls12: false,
            pqc: false,
        }
    }

    #[tokio::test]
    async fn a_missing_root_file_is_named_in_the_error() {
        let error = peer(RootSource::File("/does/not/exist.pem".into()))
            .connect()
            .await
            .unwrap_err();
        assert!(error.contains("/does/not/exist.pem"), "{error}");
    }

    #[tokio::test]
    async fn roots_without_a_certificate_are_an_error() {
        let error = peer(RootSource::Inline("nothing here".to_string()))
            .connect()
            .await
            .unwrap_err();
        assert!(error.contains("no usable root certificate"), "{error}");
    }

    #[test]
    fn the_alternative_name_saves_only_a_wrong_name() {
        let good = rcgen::generate_simple_self_signed(["istiod.example".to_string()]).unwrap();
        let other = rcgen::generate_simple_self_signed(["istiod.example".to_string()]).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(good.cert.der().clone()).unwrap();
        let inner =
            WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::new(provider(false)))
                .build()
                .unwrap();
        let verify = |alternative: Option<&str>, certificate: &CertificateDer<'_>| {
            let verifier = ServerVerifier {
                inner: inner.clone(),
                alternative: alternative.map(|n| ServerName::try_from(n.to_string()).unwrap()),
            };
            let name = ServerName::try_from("localhost").unwrap();
            verifier.verify_server_cert(certificate, &[], &name, &[], UnixTime::now())
        };
        assert!(verify(Some("istiod.example"), good.cert.der()).is_ok());
        assert!(verify(Some("elsewhere"), good.cert.der()).is_err());
        assert!(verify(None, good.cert.der()).is_err());
        assert!(verify(Some("istiod.example"), other.cert.der()).is_err());
    }
}
