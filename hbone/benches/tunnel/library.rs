//! The same tunnel on tokio-rustls and the `h2` crate, to hold the engine against: a task per end of a flow, as the
//! libraries suggest it. It carries bytes and half-closes; errors end the benchmark.

use std::future::poll_fn;
use std::io::ErrorKind;
use std::net::{Shutdown, SocketAddr};
use std::sync::Arc;

use bytes::{Buf, Bytes, BytesMut};
use h2::{RecvStream, SendStream};
use http::{Method, Request, Response};
use rustls::pki_types::ServerName;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::spawn_local;
use tokio_rustls::{TlsAcceptor, TlsConnector};

const READ: usize = 64 << 10;
const STREAM_WINDOW: u32 = 4 << 20;
const TUNNEL_WINDOW: u32 = 16 << 20;
const FRAME: u32 = 1 << 20;

/// Serves tunnels on the listener; every stream goes to `target`.
pub fn serve(listener: TcpListener, config: Arc<rustls::ServerConfig>, target: SocketAddr) {
    spawn_local(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let _ = socket.set_nodelay(true);
            let stream = TlsAcceptor::from(config.clone())
                .accept(socket)
                .await
                .unwrap();
            let mut builder = h2::server::Builder::new();
            builder
                .initial_window_size(STREAM_WINDOW)
                .initial_connection_window_size(TUNNEL_WINDOW)
                .max_frame_size(FRAME)
                .data_frame_budget(TUNNEL_WINDOW as usize);
            spawn_local(async move {
                let mut tunnel = builder.handshake::<_, Bytes>(stream).await.unwrap();
                while let Some(Ok((request, mut respond))) = tunnel.accept().await {
                    spawn_local(async move {
                        let socket = TcpStream::connect(target).await.unwrap();
                        let _ = socket.set_nodelay(true);
                        let send = respond.send_response(Response::new(()), false).unwrap();
                        carry(socket, send, request.into_body()).await;
                    });
                }
            });
        }
    });
}

/// The calling end of one tunnel.
pub async fn connect(
    address: SocketAddr,
    config: Arc<rustls::ClientConfig>,
) -> h2::client::SendRequest<Bytes> {
    let socket = TcpStream::connect(address).await.unwrap();
    let _ = socket.set_nodelay(true);
    let name = ServerName::try_from("localhost").unwrap();
    let stream = TlsConnector::from(config)
        .connect(name, socket)
        .await
        .unwrap();
    let mut builder = h2::client::Builder::new();
    builder
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(TUNNEL_WINDOW)
        .max_frame_size(FRAME)
        .data_frame_budget(TUNNEL_WINDOW as usize);
    let (send, connection) = builder.handshake(stream).await.unwrap();
    spawn_local(async move { drop(connection.await) });
    send
}

/// Opens a stream and carries the socket in it, in a task of its own.
pub async fn open(client: &h2::client::SendRequest<Bytes>, socket: TcpStream) {
    let mut client = client.clone().ready().await.unwrap();
    let request = Request::builder()
        .method(Method::CONNECT)
        .uri("10.0.0.1:80");
    let (answer, send) = client
        .send_request(request.body(()).unwrap(), false)
        .unwrap();
    let body = answer.await.unwrap().into_body();
    spawn_local(carry(socket, send, body));
}

async fn carry(socket: TcpStream, send: SendStream<Bytes>, body: RecvStream) {
    tokio::join!(upload(&socket, send), download(&socket, body));
}

async fn upload(socket: &TcpStream, mut send: SendStream<Bytes>) {
    loop {
        socket.readable().await.unwrap();
        send.reserve_capacity(READ);
        while send.capacity() == 0 {
            poll_fn(|cx| send.poll_capacity(cx)).await;
        }
        let mut buffer = BytesMut::with_capacity(send.capacity().min(READ));
        match socket.try_read_buf(&mut buffer) {
            Ok(0) => {
                let _ = send.send_data(Bytes::new(), true);
                return;
            }
            Ok(_) => send.send_data(buffer.freeze(), false).unwrap(),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(_) => return,
        }
    }
}

async fn download(socket: &TcpStream, mut body: RecvStream) {
    while let Some(Ok(mut data)) = body.data().await {
        let length = data.len();
        while !data.is_empty() {
            match socket.try_write(&data) {
                Ok(written) => data.advance(written),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    socket.writable().await.unwrap();
                }
                Err(_) => return,
            }
        }
        body.flow_control().release_capacity(length).unwrap();
    }
    let _ = socket2::SockRef::from(socket).shutdown(Shutdown::Write);
}
