//! A small HTTP/1.1 server for the endpoints of one address.

use std::convert::Infallible;
use std::future::Future;
use std::io::{self, Write};
use std::net::SocketAddr;
use std::time::Duration;

use flate2::Compression;
use flate2::write::GzEncoder;
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, TcpStream};

/// How long a client may take for its request's head.
const HEAD: Duration = Duration::from_secs(2);
/// The most that is buffered of a request, in bytes.
const BUFFER: usize = 8 << 10;

/// What the handlers need of a request.
#[derive(Debug, Default)]
pub struct Request {
    pub method: String,
    pub path: String,
    /// Without the question mark.
    pub query: String,
    /// All of `Accept`, between commas.
    pub accept: String,
    /// All of `Accept-Encoding`, between commas.
    pub accept_encoding: String,
}

impl Request {
    /// Whether `Accept` names a media type, whatever its parameters.
    pub fn accepts(&self, media_type: &str) -> bool {
        let named = |item: &str| {
            item.split(';')
                .next()
                .unwrap_or_default()
                .trim()
                .to_string()
        };
        let mut items = self.accept.split(',').map(named);
        items.any(|item| item.eq_ignore_ascii_case(media_type))
    }

    /// Whether the answer may be compressed with gzip (RFC 9110 §12.5.3).
    pub fn takes_gzip(&self) -> bool {
        let mut items = self.accept_encoding.split(',').map(|item| {
            let (name, parameters) = item.split_once(';').unwrap_or((item, ""));
            let weight = parameters.trim().strip_prefix("q=");
            (name.trim(), weight.and_then(|weight| weight.parse().ok()))
        });
        items.any(|(name, weight)| name == "gzip" && weight.unwrap_or(1.0) > 0.0)
    }

    /// The value of a query parameter; empty if it is only named. Percent escapes are decoded.
    pub fn parameter(&self, name: &str) -> Option<String> {
        self.query.split('&').find_map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            (key == name).then(|| unescape(value))
        })
    }
}

/// Undoes the escapes of a query (percent signs and plus signs).
pub fn unescape(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut plain = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let escaped = bytes
            .get(at + 1..at + 3)
            .and_then(|hex| std::str::from_utf8(hex).ok());
        match (
            bytes[at],
            escaped.and_then(|hex| u8::from_str_radix(hex, 16).ok()),
        ) {
            (b'%', Some(byte)) => {
                plain.push(byte);
                at += 3;
            }
            (byte, _) => {
                plain.push(if byte == b'+' { b' ' } else { byte });
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&plain).into_owned()
}

/// An answer.
#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub content_type: Option<&'static str>,
    pub content_encoding: Option<&'static str>,
    pub body: Vec<u8>,
}

impl Reply {
    /// A status alone.
    pub fn empty(status: u16) -> Self {
        Self {
            status,
            content_type: None,
            content_encoding: None,
            body: Vec::new(),
        }
    }

    /// Plain text.
    pub fn text(status: u16, body: impl Into<String>) -> Self {
        Self {
            status,
            content_type: Some("text/plain"),
            content_encoding: None,
            body: body.into().into_bytes(),
        }
    }

    /// A body of a given type.
    pub fn of(content_type: &'static str, body: impl Into<Vec<u8>>) -> Self {
        Self {
            status: 200,
            content_type: Some(content_type),
            content_encoding: None,
            body: body.into(),
        }
    }

    /// The same, smaller, if the client takes that.
    pub fn compressed_for(self, request: &Request) -> Self {
        if !request.takes_gzip() {
            return self;
        }
        let mut packed = GzEncoder::new(Vec::new(), Compression::fast());
        match packed.write_all(&self.body).and_then(|()| packed.finish()) {
            Ok(body) => Self {
                content_encoding: Some("gzip"),
                body,
                ..self
            },
            Err(_) => self,
        }
    }
}

/// Listens at an address, on both families if it is the IPv6 wildcard.
///
/// # Errors
/// Which address cannot be bound.
pub fn listen(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let bound = || {
        let socket = Socket::new(
            Domain::for_address(address),
            Type::STREAM,
            Some(Protocol::TCP),
        )?;
        socket.set_reuse_address(true)?;
        if address.is_ipv6() && address.ip().is_unspecified() {
            socket.set_only_v6(false)?;
        }
        socket.bind(&address.into())?;
        socket.listen(128)?;
        socket.set_nonblocking(true)?;
        Ok(socket.into())
    };
    bound().map_err(|error: io::Error| {
        io::Error::new(
            error.kind(),
            format!("failed to bind to address {address}: {error}"),
        )
    })
}

/// Serves requests on the current runtime for ever; run it inside a `LocalSet`.
pub async fn serve<H, F>(listener: std::net::TcpListener, component: &'static str, handler: H)
where
    H: Fn(Request) -> F + Clone + 'static,
    F: Future<Output = Reply> + 'static,
{
    let listener = match TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => return tracing::error!(component, "listener failed: {error}"),
    };
    if let Ok(address) = listener.local_addr() {
        tracing::info!(address = %address, component, "listener established");
    }
    loop {
        match listener.accept().await {
            Ok((socket, _)) => {
                tokio::task::spawn_local(connection(socket, handler.clone()));
            }
            Err(error) => {
                tracing::error!(component, "Failed TCP handshake {error}");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

async fn connection<H, F>(socket: TcpStream, handler: H)
where
    H: Fn(Request) -> F + Clone + 'static,
    F: Future<Output = Reply> + 'static,
{
    let _ = socket.set_nodelay(true);
    let service = service_fn(move |request: hyper::Request<Incoming>| {
        let handler = handler.clone();
        let uri = request.uri();
        let all = |name| {
            let values = request.headers().get_all(name).iter();
            let texts: Vec<_> = values.filter_map(|value| value.to_str().ok()).collect();
            texts.join(",")
        };
        let asked = Request {
            method: request.method().to_string(),
            path: uri.path().to_string(),
            query: uri.query().unwrap_or_default().to_string(),
            accept: all(hyper::header::ACCEPT),
            accept_encoding: all(hyper::header::ACCEPT_ENCODING),
        };
        async move { Ok::<_, Infallible>(response(handler(asked).await)) }
    });
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD)
        .half_close(true)
        .max_buf_size(BUFFER)
        .serve_connection(TokioIo::new(socket), service)
        .await;
    if let Err(error) = served {
        tracing::debug!("HTTP connection ended: {error}");
    }
}

fn response(reply: Reply) -> hyper::Response<Full<Bytes>> {
    let mut response = hyper::Response::new(Full::new(Bytes::from(reply.body)));
    *response.status_mut() = hyper::StatusCode::from_u16(reply.status)
        .unwrap_or(hyper::StatusCode::INTERNAL_SERVER_ERROR);
    if let Some(content_type) = reply.content_type {
        let value = hyper::header::HeaderValue::from_static(content_type);
        response
            .headers_mut()
            .insert(hyper::header::CONTENT_TYPE, value);
    }
    if let Some(encoding) = reply.content_encoding {
        let value = hyper::header::HeaderValue::from_static(encoding);
        let headers = response.headers_mut();
        headers.insert(hyper::header::CONTENT_ENCODING, value);
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_client_takes_is_read_item_by_item() {
        let request = |accept: &str, encoding: &str| Request {
            accept: accept.into(),
            accept_encoding: encoding.into(),
            ..Request::default()
        };
        let open_metrics = "application/openmetrics-text";
        for (accept, expected) in [
            (
                "application/openmetrics-text;version=1.0.0,text/plain;q=0.5",
                true,
            ),
            ("text/plain, Application/OpenMetrics-Text", true),
            ("text/plain", false),
            ("", false),
            ("*/*", false),
        ] {
            assert_eq!(
                request(accept, "").accepts(open_metrics),
                expected,
                "{accept}"
            );
        }
        for (encoding, expected) in [
            ("gzip, deflate, br", true),
            ("br;q=1.0, gzip;q=0.8", true),
            ("gzip;q=0", false),
            ("identity", false),
            ("", false),
        ] {
            assert_eq!(request("", encoding).takes_gzip(), expected, "{encoding}");
        }
    }

    #[test]
    fn parameters_are_found_and_unescaped() {
        let request = Request {
            method: "POST".into(),
            path: "/".into(),
            query: "level=a%3Ddebug,b%zz&reset".into(),
            ..Request::default()
        };
        assert_eq!(request.parameter("level").as_deref(), Some("a=debug,b%zz"));
        assert_eq!(request.parameter("reset").as_deref(), Some(""));
        assert_eq!(request.parameter("other"), None);
    }
}
