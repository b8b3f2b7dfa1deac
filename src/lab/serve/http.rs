//! A small HTTP/1.1 server and client over hyper, enough for the sample application.

use std::convert::Infallible;
use std::future::Future;
use std::rc::Rc;

use anyhow::{Context, anyhow};
use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Full, Limited};
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HOST, HeaderValue};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};

/// The largest answer taken from another service.
const BODY_LIMIT: usize = 1 << 20;

/// The part of a request that the sample application looks at.
pub struct Request {
    /// Path and query.
    pub path: String,
}

/// A whole answer.
pub struct Reply {
    pub status: u16,
    pub content_type: HeaderValue,
    pub body: Bytes,
}

impl Reply {
    pub fn text(status: u16, text: &str) -> Self {
        Self::new(status, "text/plain; charset=utf-8", text.to_owned())
    }

    pub fn html(page: String) -> Self {
        Self::new(200, "text/html; charset=utf-8", page)
    }

    pub fn json(value: serde_json::Value) -> Self {
        Self::new(200, "application/json", format!("{value}\n"))
    }

    fn new(status: u16, content_type: &'static str, body: String) -> Self {
        Self {
            status,
            content_type: HeaderValue::from_static(content_type),
            body: body.into(),
        }
    }

    fn into_response(self) -> hyper::Response<Full<Bytes>> {
        let mut response = hyper::Response::new(Full::new(self.body));
        *response.status_mut() = hyper::StatusCode::from_u16(self.status)
            .unwrap_or(hyper::StatusCode::INTERNAL_SERVER_ERROR);
        response
            .headers_mut()
            .insert(CONTENT_TYPE, self.content_type);
        response
    }
}

/// Answers every connection of `listener` with `answer`; never returns but on a dead listener.
pub async fn serve<F, A>(listener: TcpListener, answer: F) -> anyhow::Result<()>
where
    F: Fn(Request) -> A + 'static,
    A: Future<Output = Reply> + 'static,
{
    let answer = Rc::new(answer);
    loop {
        let (socket, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(e) => {
                eprintln!("accept failed: {e}");
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                continue;
            }
        };
        let (answer, peer) = (Rc::clone(&answer), peer.ip().to_canonical());
        tokio::task::spawn_local(async move {
            let service = service_fn(move |request: hyper::Request<Incoming>| {
                let path = request
                    .uri()
                    .path_and_query()
                    .map_or_else(|| "/".to_owned(), ToString::to_string);
                let method = request.method().clone();
                let answer = answer(Request { path: path.clone() });
                async move {
                    let reply = answer.await;
                    println!("{peer} {method} {path} {}", reply.status);
                    Ok::<_, Infallible>(reply.into_response())
                }
            });
            // A client that hangs up halfway is its own affair.
            let _ = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(socket), service)
                .await;
        });
    }
}

/// One GET on a connection of its own.
///
/// # Errors
/// Says which step failed: the name, the connection, the request.
pub async fn get(base: &str, path: &str) -> anyhow::Result<Reply> {
    let uri: hyper::Uri = base.parse().with_context(|| format!("bad URL {base}"))?;
    let host = uri.host().ok_or_else(|| anyhow!("no host in {base}"))?;
    let port = uri.port_u16().unwrap_or(80);
    let socket = TcpStream::connect((host, port)).await?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(socket)).await?;
    let driver = tokio::task::spawn_local(connection);
    let request = hyper::Request::get(path)
        .header(HOST, format!("{host}:{port}"))
        .body(Empty::<Bytes>::new())?;
    let response = sender.send_request(request).await?;
    let status = response.status().as_u16();
    let content_type = response
        .headers()
        .get(CONTENT_TYPE)
        .cloned()
        .unwrap_or(HeaderValue::from_static("application/octet-stream"));
    let body = Limited::new(response.into_body(), BODY_LIMIT)
        .collect()
        .await
        .map_err(|e| anyhow!("the answer broke off: {e}"))?
        .to_bytes();
    drop(sender);
    driver.abort();
    Ok(Reply {
        status,
        content_type,
        body,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn a_page_travels_from_server_to_client() {
        tokio::task::LocalSet::new()
            .run_until(async {
                let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
                let port = listener.local_addr().unwrap().port();
                tokio::task::spawn_local(serve(listener, |request| async move {
                    Reply::text(404, &request.path)
                }));
                let reply = get(&format!("http://127.0.0.1:{port}"), "/a?b=c")
                    .await
                    .unwrap();
                assert_eq!(reply.status, 404);
                assert_eq!(&reply.body[..], b"/a?b=c");
                assert_eq!(reply.content_type, "text/plain; charset=utf-8");
            })
            .await;
    }
}
