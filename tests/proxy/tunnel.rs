//! A client of the tests: TLS and HTTP/2 by hand, so that it can also misbehave.

use std::io;
use std::sync::Arc;

use bytes::Bytes;
use h2::client::SendRequest;
use hbone::TlsIdentity;
use http::{Method, Request, Uri};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::harness::{Node, Proxy};

/// Who the client is in good standing.
pub const CURL: &str = "spiffe://cluster.local/ns/a/sa/curl";
/// The pod's HBONE port.
pub const HBONE: &str = "10.0.0.9:15008";

/// The usual configuration of a client that expects the pod `web`.
pub fn config(identity: &TlsIdentity) -> ClientConfig {
    let expected = ["spiffe://cluster.local/ns/b/sa/web".parse().unwrap()];
    (*identity.client_config(&expected).unwrap()).clone()
}

/// A TLS connection to the pod's HBONE port.
pub async fn tls(node: &Proxy, config: ClientConfig) -> io::Result<TlsStream<TcpStream>> {
    let socket = node.connect(HBONE).await?;
    let name = ServerName::try_from("localhost").unwrap();
    TlsConnector::from(Arc::new(config))
        .connect(name, socket)
        .await
}

/// A tunnel of a client in good standing, already driven.
pub async fn open(node: &Node) -> SendRequest<Bytes> {
    let stream = tls(node, config(&node.certificate(CURL).identity()))
        .await
        .unwrap();
    let (send, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    send
}

/// A CONNECT request.
pub fn request(authority: &str) -> Request<()> {
    let mut request = Request::new(());
    *request.method_mut() = Method::CONNECT;
    *request.uri_mut() = Uri::builder().authority(authority).build().unwrap();
    request
}

/// The status that a CONNECT is answered with on a new tunnel.
pub async fn status(node: &Node, authority: &str) -> u16 {
    answer(open(node).await, request(authority)).await.unwrap()
}

/// The status that a request is answered with.
pub async fn answer(send: SendRequest<Bytes>, request: Request<()>) -> Result<u16, h2::Error> {
    let mut send = send.ready().await?;
    let (response, _stream) = send.send_request(request, false)?;
    Ok(response.await?.status().as_u16())
}

/// Sends a request in a tunnel of that caller to whom it expects; gives what comes back.
pub async fn exchange(
    proxy: &Proxy,
    caller: &TlsIdentity,
    expected: &str,
    authority: &str,
    sent: &'static [u8],
) -> String {
    let config = caller.client_config(&[expected.parse().unwrap()]).unwrap();
    let stream = tls(proxy, (*config).clone()).await.unwrap();
    let (send, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    let mut send = send.ready().await.unwrap();
    let (response, mut upload) = send.send_request(request(authority), false).unwrap();
    let response = response.await.unwrap();
    assert_eq!(response.status(), 200);
    upload.send_data(Bytes::from_static(sent), true).unwrap();
    let mut body = response.into_body();
    let mut text = Vec::new();
    while let Some(part) = body.data().await {
        let part = part.unwrap();
        let _ = body.flow_control().release_capacity(part.len());
        text.extend_from_slice(&part);
    }
    String::from_utf8(text).unwrap()
}
