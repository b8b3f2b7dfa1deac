//! One HTTP request over a connection that is already there.

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};

/// The most that is read of an answer, in bytes; objects of Kubernetes are smaller.
const ANSWER: usize = 4 << 20;

/// A request by its parts.
pub struct Asked<'a> {
    pub method: Method,
    pub host: &'a str,
    pub path: &'a str,
    pub token: Option<&'a str>,
    pub body: String,
}

/// Sends a request and reads the whole answer.
///
/// # Errors
/// What broke on the way, in words.
pub async fn exchange<S>(stream: S, asked: Asked<'_>) -> Result<(StatusCode, Bytes), String>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| error.to_string())?;
    let connection = tokio::spawn(connection);
    let mut request = Request::builder()
        .method(asked.method)
        .uri(asked.path)
        .header("host", asked.host)
        .header("accept", "application/json")
        .header(
            "user-agent",
            concat!("warren-cni/", env!("CARGO_PKG_VERSION")),
        );
    if !asked.body.is_empty() {
        request = request.header("content-type", "application/json");
    }
    if let Some(token) = asked.token {
        request = request.header("authorization", format!("Bearer {token}"));
    }
    let request = request
        .body(Full::new(Bytes::from(asked.body)))
        .map_err(|error| error.to_string())?;
    let answered = async {
        let response = sender.send_request(request).await;
        let response = response.map_err(|error| error.to_string())?;
        let status = response.status();
        let body = Limited::new(response.into_body(), ANSWER).collect().await;
        let body = body.map_err(|error| error.to_string())?;
        Ok((status, body.to_bytes()))
    };
    let answered = answered.await;
    connection.abort();
    answered
}
