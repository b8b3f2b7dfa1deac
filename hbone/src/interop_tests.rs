//! The engine against the `h2` crate as an independent peer, and both ends of it under load, with checksums.

use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream};
use http::{Method, Request, Response};
use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{LocalSet, spawn_local};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::testing::Authority;
use crate::*;

pub(crate) const SERVER: &str = "spiffe://td/ns/b/sa/server";
pub(crate) const CLIENT: &str = "spiffe://td/ns/a/sa/client";

struct Direct;

impl Dialer for Direct {
    fn dial(&self, destination: SocketAddr) -> LocalBoxFuture<'_, io::Result<TcpStream>> {
        Box::pin(TcpStream::connect(destination))
    }
}

pub(crate) async fn local<F: Future<Output = ()>>(test: F) {
    let limited = tokio::time::timeout(Duration::from_secs(60), test);
    LocalSet::new().run_until(limited).await.unwrap();
}

async fn socket_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (near, far) = tokio::join!(TcpStream::connect(address), listener.accept());
    (near.unwrap(), far.unwrap().0)
}

/// Bytes that cannot be in the wrong place unnoticed.
fn pattern(seed: usize, length: usize) -> Vec<u8> {
    let mut state = seed as u64 + 1;
    let step = |_| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(99);
        (state >> 56) as u8
    };
    (0..length).map(step).collect()
}

/// Opens a stream of ours to `address` and carries one end of a socket pair; gives the other end.
pub(crate) async fn open(
    pool: &Pool,
    identity: &Arc<TlsIdentity>,
    address: SocketAddr,
) -> TcpStream {
    let key = PoolKey {
        src: CLIENT.parse().unwrap(),
        expected: vec![SERVER.parse().unwrap()],
        dst: address,
        src_ip: address.ip(),
    };
    let headers = ConnectHeaders {
        authority: "10.0.0.1:80".to_string(),
        baggage: Some("k8s.namespace.name=a".to_string()),
        ..Default::default()
    };
    let tls = || {
        let identity = identity.clone();
        async move { Ok(identity) }
    };
    let tunnelled = pool.open(&key, tls, &headers).await.unwrap();
    let (near, carried) = socket_pair().await;
    spawn_local(async move { tunnelled.stream.carry(carried, &Rc::default()).await });
    near
}

pub(crate) fn pool() -> Pool {
    Pool::new(Engine::start(), Rc::default(), Rc::new(Direct))
}

/// Sends `length` bytes in odd pieces and ends, while it reads as many and the end.
pub(crate) async fn exchange(socket: TcpStream, seed: usize, length: usize) {
    let (mut read, mut write) = socket.into_split();
    let bytes = pattern(seed, length);
    let sending = async {
        let mut rest = &bytes[..];
        let mut piece = 1;
        while !rest.is_empty() {
            let (now, later) = rest.split_at(piece.min(rest.len()));
            write.write_all(now).await.unwrap();
            (rest, piece) = (later, piece * 3 % 70_001 + 1);
        }
        write.shutdown().await.unwrap();
    };
    let mut got = Vec::new();
    let (_, read) = tokio::join!(sending, read.read_to_end(&mut got));
    assert_eq!(read.unwrap(), length);
    assert!(
        got == bytes,
        "flow {seed} of {length} bytes came out changed"
    );
}

/// Sends back what comes, at once.
async fn echo_h2(mut body: RecvStream, mut send: SendStream<Bytes>) {
    while let Some(data) = body.data().await {
        let mut data = data.unwrap();
        body.flow_control().release_capacity(data.len()).unwrap();
        while !data.is_empty() {
            send.reserve_capacity(data.len());
            let room = std::future::poll_fn(|cx| send.poll_capacity(cx)).await;
            let room = room.unwrap().unwrap();
            send.send_data(data.split_to(room.min(data.len())), false)
                .unwrap();
        }
    }
    send.send_data(Bytes::new(), true).unwrap();
}

/// An `h2` server that echoes; with its library's own small windows and frames unless told otherwise.
async fn h2_server(identity: Arc<TlsIdentity>, builder: h2::server::Builder) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    spawn_local(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let acceptor = TlsAcceptor::from(identity.server_config());
            let builder = builder.clone();
            spawn_local(async move {
                let stream = acceptor.accept(socket).await.unwrap();
                let mut tunnel = builder.handshake::<_, Bytes>(stream).await.unwrap();
                while let Some(Ok((request, mut respond))) = tunnel.accept().await {
                    assert_eq!(request.method(), Method::CONNECT);
                    assert_eq!(request.uri().authority().unwrap(), "10.0.0.1:80");
                    assert_eq!(request.headers()["baggage"], "k8s.namespace.name=a");
                    let send = respond.send_response(Response::new(()), false).unwrap();
                    spawn_local(echo_h2(request.into_body(), send));
                }
            });
        }
    });
    address
}

#[tokio::test]
async fn our_client_and_a_server_of_h2_carry_bytes_whatever_its_windows() {
    local(async {
        let authority = Authority::new();
        let mut large = h2::server::Builder::new();
        large
            .initial_window_size(4 << 20)
            .initial_connection_window_size(16 << 20)
            .max_frame_size(1 << 20);
        let mut tiny = h2::server::Builder::new();
        tiny.initial_window_size(1).header_table_size(0);
        for (builder, most) in [
            (h2::server::Builder::new(), 3 << 20),
            (large, 8 << 20),
            (tiny, 300),
        ] {
            let address = h2_server(authority.issue(SERVER), builder).await;
            let (pool, identity) = (pool(), authority.issue(CLIENT));
            let mut flows = Vec::new();
            for (seed, length) in [0, 1, 100, 70_000, 1 << 20, most].into_iter().enumerate() {
                let socket = open(&pool, &identity, address).await;
                flows.push(spawn_local(exchange(socket, seed, length.min(most))));
            }
            for flow in flows {
                flow.await.unwrap();
            }
            assert_eq!(pool.tunnels(), 1);
        }
    })
    .await;
}

/// A tunnel end of ours that carries every stream to an application that echoes.
async fn echo_server(identity: Arc<TlsIdentity>) -> SocketAddr {
    let application = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let target = application.local_addr().unwrap();
    spawn_local(async move {
        while let Ok((socket, _)) = application.accept().await {
            spawn_local(async move {
                let (mut read, mut write) = socket.into_split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
            });
        }
    });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let engine = Engine::start();
    spawn_local(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let (engine, identity) = (engine.clone(), identity.clone());
            spawn_local(async move {
                let tunnel = accept(&engine, socket, &identity, &Http2Config::default()).await;
                let mut tunnel = tunnel.unwrap();
                while let Some(incoming) = tunnel.next().await {
                    spawn_local(async move {
                        let socket = TcpStream::connect(target).await.unwrap();
                        let stream = incoming.accept(Some("service.name=app")).unwrap();
                        let _ = stream.carry(socket, &Rc::default()).await;
                    });
                }
            });
        }
    });
    address
}

async fn h2_client(
    identity: &Arc<TlsIdentity>,
    address: SocketAddr,
) -> h2::client::SendRequest<Bytes> {
    let expected = [SERVER.parse().unwrap()];
    let connector = TlsConnector::from(identity.client_config(&expected).unwrap());
    let socket = TcpStream::connect(address).await.unwrap();
    let name = ServerName::try_from("localhost").unwrap();
    let stream = connector.connect(name, socket).await.unwrap();
    let (send, connection) = h2::client::handshake(stream).await.unwrap();
    spawn_local(async move { drop(connection.await) });
    send
}

fn connect() -> Request<()> {
    let request = Request::builder()
        .method(Method::CONNECT)
        .uri("10.0.0.1:80");
    request.body(()).unwrap()
}

#[tokio::test]
async fn a_client_of_h2_and_our_server_carry_bytes() {
    local(async {
        let authority = Authority::new();
        let address = echo_server(authority.issue(SERVER)).await;
        let client = h2_client(&authority.issue(CLIENT), address).await;
        let mut flows = Vec::new();
        for (seed, length) in [0, 1, 5_000, 400_000, 3 << 20].into_iter().enumerate() {
            let mut client = client.clone().ready().await.unwrap();
            let (response, mut send) = client.send_request(connect(), false).unwrap();
            flows.push(spawn_local(async move {
                let response = response.await.unwrap();
                assert_eq!(response.headers()["baggage"], "service.name=app");
                let bytes = pattern(seed, length);
                let sending = async {
                    let mut rest = Bytes::from(bytes.clone());
                    while !rest.is_empty() {
                        send.reserve_capacity(rest.len());
                        let room = std::future::poll_fn(|cx| send.poll_capacity(cx)).await;
                        let room = room.unwrap().unwrap();
                        send.send_data(rest.split_to(room.min(rest.len())), false)
                            .unwrap();
                    }
                    send.send_data(Bytes::new(), true).unwrap();
                };
                let receiving = async {
                    let (mut body, mut got) = (response.into_body(), Vec::new());
                    while let Some(data) = body.data().await {
                        let data = data.unwrap();
                        body.flow_control().release_capacity(data.len()).unwrap();
                        got.extend_from_slice(&data);
                    }
                    got
                };
                let (_, got) = tokio::join!(sending, receiving);
                assert!(got == bytes);
            }));
        }
        for flow in flows {
            flow.await.unwrap();
        }
    })
    .await;
}

#[tokio::test]
async fn a_reset_by_a_client_of_h2_reaches_the_application_and_spares_the_others() {
    local(async {
        let authority = Authority::new();
        let address = echo_server(authority.issue(SERVER)).await;
        let client = h2_client(&authority.issue(CLIENT), address).await;
        for reason in [
            Reason::CONNECT_ERROR,
            Reason::CANCEL,
            Reason::INTERNAL_ERROR,
        ] {
            let mut client = client.clone().ready().await.unwrap();
            let (response, mut send) = client.send_request(connect(), false).unwrap();
            send.send_data(Bytes::from_static(b"half"), false).unwrap();
            let mut body = response.await.unwrap().into_body();
            assert_eq!(body.data().await.unwrap().unwrap(), "half");
            send.send_reset(reason);
        }
        let mut client = client.ready().await.unwrap();
        let (response, mut send) = client.send_request(connect(), false).unwrap();
        send.send_data(Bytes::from_static(b"whole"), true).unwrap();
        let mut body = response.await.unwrap().into_body();
        assert_eq!(body.data().await.unwrap().unwrap(), "whole");
        while let Some(data) = body.data().await {
            assert_eq!(data.unwrap(), "", "the end");
        }
    })
    .await;
}

#[tokio::test]
async fn many_flows_at_once_lose_nothing_even_to_slow_readers() {
    local(async {
        let authority = Authority::new();
        let address = echo_server(authority.issue(SERVER)).await;
        let (pool, identity) = (pool(), authority.issue(CLIENT));
        // One that sends and does not read until the others are done.
        let mut stuck = open(&pool, &identity, address).await;
        let much = pattern(99, 6 << 20);
        let (mut late, mut early) = stuck.split();
        let (sending, others) = (async { early.write_all(&much).await.unwrap() }, async {
            let mut flows = Vec::new();
            for seed in 0..150 {
                let socket = open(&pool, &identity, address).await;
                flows.push(spawn_local(exchange(socket, seed, seed * seed * 40)));
            }
            for flow in flows {
                flow.await.unwrap();
            }
            let mut got = vec![0; much.len()];
            late.read_exact(&mut got).await.unwrap();
            assert!(got == much);
        });
        tokio::join!(sending, others);
        assert!(pool.tunnels() <= 2);
    })
    .await;
}
