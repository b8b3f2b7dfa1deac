//! The TLS listener of the control plane, and the gRPC services behind it.

use std::io;
use std::net::{SocketAddr, TcpListener as StdListener};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use anyhow::Context as _;
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Server;
use tonic::transport::server::Connected;

use super::server::{Certificates, Discovery, Plane};
use crate::proto::ca::istio_certificate_service_server::IstioCertificateServiceServer;
use crate::proto::discovery::aggregated_discovery_service_server::AggregatedDiscoveryServiceServer;

/// How long a client may take for its handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// How long a request may be; a proxy that comes back names everything it holds.
const LARGEST_REQUEST: usize = 64 << 20;

/// An accepted TLS connection.
struct Accepted(TlsStream<TcpStream>);

impl Connected for Accepted {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for Accepted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Accepted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

/// The TLS configuration with the control plane's own certificate under those names.
///
/// # Errors
/// When the certificate cannot be made.
pub fn tls(plane: &Plane, names: &[String]) -> anyhow::Result<ServerConfig> {
    let (chain, key) = plane.authority.serving(names)?;
    let provider = Arc::new(hbone::provider(&hbone::TlsOptions::default()));
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(chain, key)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

/// Binds the listener.
///
/// # Errors
/// When the address is taken or not there.
pub fn bind(address: SocketAddr) -> anyhow::Result<StdListener> {
    let listener =
        StdListener::bind(address).with_context(|| format!("cannot listen on {address}"))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Serves until `shutdown` is over.
///
/// # Errors
/// When the server fails as a whole.
pub async fn serve(
    listener: StdListener,
    tls: ServerConfig,
    plane: Arc<Plane>,
    shutdown: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    let listener = TcpListener::from_std(listener)?;
    let (accepted, incoming) = mpsc::channel(16);
    let accepting = tokio::spawn(accept(listener, TlsAcceptor::from(Arc::new(tls)), accepted));
    let discovery = AggregatedDiscoveryServiceServer::new(Discovery(plane.clone()))
        .max_decoding_message_size(LARGEST_REQUEST);
    let served = Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(30)))
        .add_service(discovery)
        .add_service(IstioCertificateServiceServer::new(Certificates(plane)))
        .serve_with_incoming(ReceiverStream::new(incoming));
    let result = tokio::select! {
        result = served => result.context("serving failed"),
        () = shutdown => Ok(()),
    };
    accepting.abort();
    result
}

async fn accept(
    listener: TcpListener,
    tls: TlsAcceptor,
    accepted: mpsc::Sender<io::Result<Accepted>>,
) {
    loop {
        let (socket, client) = match listener.accept().await {
            Ok(connection) => connection,
            Err(error) => {
                tracing::warn!("a connection could not be accepted: {error}");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let (tls, accepted) = (tls.clone(), accepted.clone());
        tokio::spawn(async move {
            let _ = socket.set_nodelay(true);
            match tokio::time::timeout(HANDSHAKE, tls.accept(socket)).await {
                Ok(Ok(stream)) => drop(accepted.send(Ok(Accepted(stream))).await),
                Ok(Err(error)) => tracing::debug!("{client}: tls handshake error: {error}"),
                Err(_) => tracing::debug!("{client}: tls handshake timed out"),
            }
        });
    }
}
