//! Both ends of the tunnel against each other, and against peers that misbehave, over loopback.

use std::cell::Cell;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{LocalSet, spawn_local};
use tokio_rustls::TlsConnector;

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

/// A serving end that accepts every CONNECT and carries it to an application; counts tunnels.
pub(crate) struct Server {
    pub address: SocketAddr,
    pub tunnels: Rc<Cell<usize>>,
    pub application: TcpListener,
    errors: tokio::sync::mpsc::UnboundedReceiver<String>,
}

pub(crate) async fn server(identity: Arc<TlsIdentity>, config: Http2Config) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let application = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let target = application.local_addr().unwrap();
    let tunnels = Rc::new(Cell::new(0));
    let (report, errors) = tokio::sync::mpsc::unbounded_channel();
    let counted = tunnels.clone();
    let engine = Engine::start();
    spawn_local(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let (identity, config) = (identity.clone(), config.clone());
            let (counted, report, engine) = (counted.clone(), report.clone(), engine.clone());
            spawn_local(async move {
                let mut tunnel = match accept(&engine, socket, &identity, &config).await {
                    Ok(tunnel) => tunnel,
                    Err(error) => return report.send(error.to_string()).unwrap_or_default(),
                };
                counted.set(counted.get() + 1);
                while let Some(incoming) = tunnel.next().await {
                    match incoming.authority() {
                        "refuse.me:1" => incoming.refuse(401, "not_you"),
                        "ignore.me:1" => {
                            spawn_local(async move {
                                tokio::time::sleep(Duration::from_secs(60)).await;
                                drop(incoming);
                            });
                        }
                        "last.one:1" => {
                            incoming.refuse(503, "not_now");
                            tunnel.graceful_shutdown();
                        }
                        _ => {
                            spawn_local(async move {
                                let socket = TcpStream::connect(target).await.unwrap();
                                let stream = incoming.accept(Some("service.name=app")).unwrap();
                                let _ = stream.carry(socket, &Rc::default()).await;
                            });
                        }
                    }
                }
            });
        }
    });
    Server {
        address,
        tunnels,
        application,
        errors,
    }
}

pub(crate) fn key(address: SocketAddr) -> PoolKey {
    PoolKey {
        src: CLIENT.parse().unwrap(),
        expected: vec![SERVER.parse().unwrap()],
        dst: address,
        src_ip: address.ip(),
    }
}

pub(crate) fn to(authority: &str) -> ConnectHeaders {
    ConnectHeaders {
        authority: authority.to_string(),
        ..Default::default()
    }
}

pub(crate) async fn open(
    pool: &Pool,
    key: &PoolKey,
    identity: &Arc<TlsIdentity>,
    authority: &str,
) -> Result<Tunnelled, OpenError> {
    let tls = || {
        let identity = identity.clone();
        async move { Ok(identity) }
    };
    pool.open(key, tls, &to(authority)).await
}

pub(crate) fn pool(config: Http2Config) -> Pool {
    Pool::new(Engine::start(), Rc::new(config), Rc::new(Direct))
}

pub(crate) async fn socket_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (near, far) = tokio::join!(TcpStream::connect(address), listener.accept());
    (near.unwrap(), far.unwrap().0)
}

pub(crate) async fn local<F: Future<Output = ()>>(test: F) {
    LocalSet::new()
        .run_until(async {
            tokio::time::timeout(Duration::from_secs(20), test)
                .await
                .unwrap()
        })
        .await;
}

/// A carried flow: the client's socket and the application's.
async fn flow(
    server: &Server,
    pool: &Pool,
    identity: &Arc<TlsIdentity>,
) -> (TcpStream, TcpStream, Rc<Counters>) {
    let (client, carried) = socket_pair().await;
    let tunnelled = open(pool, &key(server.address), identity, "10.0.0.1:80")
        .await
        .unwrap();
    assert_eq!(tunnelled.peer, Some(SERVER.parse().unwrap()));
    assert_eq!(tunnelled.baggage.as_deref(), Some("service.name=app"));
    let counters = Rc::new(Counters::default());
    let counted = counters.clone();
    spawn_local(async move { tunnelled.stream.carry(carried, &counted).await });
    let (application, _) = server.application.accept().await.unwrap();
    (client, application, counters)
}

#[tokio::test]
async fn bytes_and_half_closes_pass_both_ways_and_are_counted() {
    local(async {
        let authority = Authority::new();
        let server = server(authority.issue(SERVER), Http2Config::default()).await;
        let (pool, identity) = (pool(Http2Config::default()), authority.issue(CLIENT));
        let (mut client, mut application, counters) = flow(&server, &pool, &identity).await;
        let big = vec![7u8; 3 << 20];
        let sending = async {
            client.write_all(&big).await.unwrap();
            client.shutdown().await.unwrap();
        };
        let mut got = Vec::new();
        let (_, read) = tokio::join!(sending, application.read_to_end(&mut got));
        assert_eq!((read.unwrap(), got == big), (big.len(), true));
        application.write_all(b"answer").await.unwrap();
        drop(application);
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert_eq!(answer, "answer");
        assert_eq!(
            (counters.sent.get(), counters.received.get()),
            (big.len() as u64, 6)
        );
    })
    .await;
}

#[tokio::test]
async fn a_reset_of_either_end_arrives_as_a_reset() {
    local(async {
        let authority = Authority::new();
        let server = server(authority.issue(SERVER), Http2Config::default()).await;
        let (pool, identity) = (pool(Http2Config::default()), authority.issue(CLIENT));
        for client_resets in [true, false] {
            let (client, application, _) = flow(&server, &pool, &identity).await;
            let (resetting, mut other) = if client_resets {
                (client, application)
            } else {
                (application, client)
            };
            socket2::SockRef::from(&resetting)
                .set_linger(Some(Duration::ZERO))
                .unwrap();
            drop(resetting);
            let error = other.read(&mut [0; 1]).await.unwrap_err();
            assert_eq!(
                error.kind(),
                io::ErrorKind::ConnectionReset,
                "client resets: {client_resets}"
            );
        }
    })
    .await;
}

#[tokio::test]
async fn a_slow_reader_gets_all_that_came_before_a_reset() {
    local(async {
        let authority = Authority::new();
        let server = server(authority.issue(SERVER), Http2Config::default()).await;
        let (pool, identity) = (pool(Http2Config::default()), authority.issue(CLIENT));
        let (mut client, mut application, counters) = flow(&server, &pool, &identity).await;
        let much = vec![7; 3 << 20];
        client.write_all(&much).await.unwrap();
        while counters.sent.get() < much.len() as u64 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        socket2::SockRef::from(&client)
            .set_linger(Some(Duration::ZERO))
            .unwrap();
        drop(client);
        // The reset has come when another flow's bytes have.
        let (mut client, mut other, _) = flow(&server, &pool, &identity).await;
        client.write_all(b"later").await.unwrap();
        other.read_exact(&mut [0; 5]).await.unwrap();
        let mut got = Vec::new();
        let error = application.read_to_end(&mut got).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        assert_eq!(got.len(), much.len());
    })
    .await;
}

#[tokio::test]
async fn flows_share_a_tunnel_up_to_its_limit_and_places_come_back() {
    local(async {
        let authority = Authority::new();
        let server = server(authority.issue(SERVER), Http2Config::default()).await;
        let config = Http2Config {
            max_streams_per_connection: 2,
            ..Default::default()
        };
        let (pool, identity) = (pool(config), authority.issue(CLIENT));
        let first = flow(&server, &pool, &identity).await;
        let second = flow(&server, &pool, &identity).await;
        assert_eq!(server.tunnels.get(), 1);
        let third = flow(&server, &pool, &identity).await;
        assert_eq!((server.tunnels.get(), pool.tunnels()), (2, 2));
        drop((first, second, third));
        tokio::time::sleep(Duration::from_millis(100)).await;
        let _fourth = flow(&server, &pool, &identity).await;
        assert_eq!(server.tunnels.get(), 2);
    })
    .await;
}

#[tokio::test]
async fn everyone_who_waits_for_a_dial_sees_why_it_failed() {
    local(async {
        let closed = TcpListener::bind("127.0.0.1:0")
            .await
            .unwrap()
            .local_addr()
            .unwrap();
        let identity = Authority::new().issue(CLIENT);
        let pool = pool(Http2Config::default());
        let key = key(closed);
        let (a, b) = tokio::join!(
            open(&pool, &key, &identity, "10.0.0.1:80"),
            open(&pool, &key, &identity, "10.0.0.1:80")
        );
        for error in [a.err().unwrap(), b.err().unwrap()] {
            assert_eq!(
                error.to_string(),
                "io error: Connection refused (os error 111)"
            );
        }
    })
    .await;
}

#[tokio::test]
async fn a_refusal_is_the_status_and_leaves_the_tunnel_alone() {
    local(async {
        let authority = Authority::new();
        let server = server(authority.issue(SERVER), Http2Config::default()).await;
        let (pool, identity) = (pool(Http2Config::default()), authority.issue(CLIENT));
        let error = open(&pool, &key(server.address), &identity, "refuse.me:1")
            .await
            .err()
            .unwrap();
        assert_eq!(error.to_string(), "http status: 401 Unauthorized");
        assert!(
            matches!(&error, OpenError::Status(_, Some(reason)) if **reason == *"not_you"),
            "{error:?}"
        );
        flow(&server, &pool, &identity).await;
        assert_eq!(server.tunnels.get(), 1);
    })
    .await;
}

#[tokio::test]
async fn a_tunnel_that_went_away_is_replaced() {
    local(async {
        let authority = Authority::new();
        let server = server(authority.issue(SERVER), Http2Config::default()).await;
        let (pool, identity) = (pool(Http2Config::default()), authority.issue(CLIENT));
        let error = open(&pool, &key(server.address), &identity, "last.one:1")
            .await
            .err()
            .unwrap();
        assert_eq!(error.to_string(), "http status: 503 Service Unavailable");
        flow(&server, &pool, &identity).await;
        assert_eq!(server.tunnels.get(), 2);
    })
    .await;
}

#[tokio::test]
async fn an_unanswered_connect_ends_in_time() {
    local(async {
        let authority = Authority::new();
        let server = server(authority.issue(SERVER), Http2Config::default()).await;
        let config = Http2Config {
            answer_timeout: Duration::from_millis(50),
            ..Default::default()
        };
        let (pool, identity) = (pool(config), authority.issue(CLIENT));
        let error = open(&pool, &key(server.address), &identity, "ignore.me:1")
            .await
            .err()
            .unwrap();
        assert!(matches!(error, OpenError::AnswerTimeout(_)), "{error}");
    })
    .await;
}

#[tokio::test]
async fn an_unused_tunnel_is_let_go_but_its_flows_go_on() {
    local(async {
        let authority = Authority::new();
        let server = server(authority.issue(SERVER), Http2Config::default()).await;
        let config = Http2Config {
            unused_release: Duration::from_millis(50),
            ..Default::default()
        };
        let (pool, identity) = (pool(config), authority.issue(CLIENT));
        let (mut client, mut application, _) = flow(&server, &pool, &identity).await;
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert_eq!(pool.tunnels(), 0);
        client.write_all(b"still here").await.unwrap();
        let mut got = [0; 10];
        application.read_exact(&mut got).await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn only_the_expected_identity_of_our_root_is_called() {
    local(async {
        let (authority, stranger) = (Authority::new(), Authority::new());
        let cases = [
            (authority.issue("spiffe://td/ns/b/sa/other"), "identity verification error: peer did not present the expected SAN (spiffe://td/ns/b/sa/server), got spiffe://td/ns/b/sa/other"),
            (stranger.issue(SERVER), "UnknownIssuer"),
            (authority.expired(SERVER), "expired"),
        ];
        for (presented, text) in cases {
            let server = server(presented, Http2Config::default()).await;
            let (pool, identity) = (pool(Http2Config::default()), authority.issue(CLIENT));
            let error = open(&pool, &key(server.address), &identity, "10.0.0.1:80").await.err().unwrap();
            assert!(error.to_string().contains(text), "{error}");
        }
    })
    .await;
}

/// Connects to a server of ours with `config` and returns why the server would not have it.
async fn rejected(identity: Arc<TlsIdentity>, config: ClientConfig) -> String {
    let mut server = server(identity, Http2Config::default()).await;
    let socket = TcpStream::connect(server.address).await.unwrap();
    let name = ServerName::try_from("localhost").unwrap();
    if let Ok(mut stream) = TlsConnector::from(Arc::new(config))
        .connect(name, socket)
        .await
    {
        let _ = stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await;
        let _ = stream.read(&mut [0; 64]).await;
    }
    let error = server.errors.recv().await.unwrap();
    assert_eq!(server.tunnels.get(), 0);
    error
}

#[tokio::test]
async fn only_clients_of_our_root_and_trust_domain_are_served() {
    local(async {
        let (authority, stranger) = (Authority::new(), Authority::new());
        let expected = [SERVER.parse().unwrap()];
        let config = |identity: Arc<TlsIdentity>| (*identity.client_config(&expected).unwrap()).clone();
        let foreign = config(authority.issue("spiffe://elsewhere/ns/a/sa/client"));
        let error = rejected(authority.issue(SERVER), foreign).await;
        assert!(error.contains("identity verification error: peer did not present the expected trustdomain (td), got spiffe://elsewhere/ns/a/sa/client"), "{error}");
        let error = rejected(authority.issue(SERVER), config(authority.expired(CLIENT))).await;
        assert!(error.contains("expired"), "{error}");
        // The stranger's own client would refuse our certificate first; it lends its key to one that trusts us.
        let mut lax = config(authority.issue(CLIENT));
        lax.client_auth_cert_resolver = config(stranger.issue(CLIENT)).client_auth_cert_resolver;
        let error = rejected(authority.issue(SERVER), lax).await;
        assert!(error.contains("UnknownIssuer"), "{error}");
        let mut anonymous = config(authority.issue(CLIENT));
        anonymous.client_auth_cert_resolver = Arc::new(NoCertificate);
        let error = rejected(authority.issue(SERVER), anonymous).await;
        assert!(error.contains("peer sent no certificates"), "{error}");
        let mut http1 = config(authority.issue(CLIENT));
        http1.alpn_protocols = vec![b"http/1.1".to_vec()];
        let error = rejected(authority.issue(SERVER), http1).await;
        assert!(error.contains("tls handshake error"), "{error}");
    })
    .await;
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
async fn peers_that_are_no_tunnels_are_refused_in_time() {
    local(async {
        let authority = Authority::new();
        let config = Http2Config {
            handshake_timeout: Duration::from_millis(200),
            ..Default::default()
        };
        let mut server = server(authority.issue(SERVER), config).await;
        for hello in [
            &b"GET / HTTP/1.1\r\n\r\n"[..],
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"\x16\x03\x01",
            b"",
        ] {
            let mut socket = TcpStream::connect(server.address).await.unwrap();
            socket.write_all(hello).await.unwrap();
            let error = server.errors.recv().await.unwrap();
            assert!(error.starts_with("tls handshake error: "), "{error}");
        }
        // A proven peer that says nothing afterwards.
        let expected = [SERVER.parse().unwrap()];
        let config = authority.issue(CLIENT).client_config(&expected).unwrap();
        let socket = TcpStream::connect(server.address).await.unwrap();
        let name = ServerName::try_from("localhost").unwrap();
        let _silent = TlsConnector::from(config)
            .connect(name, socket)
            .await
            .unwrap();
        let error = server.errors.recv().await.unwrap();
        assert!(error.contains("no HTTP/2 preface"), "{error}");
    })
    .await;
}

#[tokio::test]
async fn a_peer_that_answers_no_ping_is_dead() {
    local(async {
        let authority = Authority::new();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let identity = authority.issue(SERVER);
        // A server that goes silent after its first stream.
        spawn_local(async move {
            let (socket, _) = listener.accept().await.unwrap();
            let acceptor = tokio_rustls::TlsAcceptor::from(identity.server_config());
            let stream = acceptor.accept(socket).await.unwrap();
            let mut tunnel = h2::server::handshake(stream).await.unwrap();
            let (request, mut respond) = tunnel.accept().await.unwrap().unwrap();
            let send = respond
                .send_response(http::Response::new(()), false)
                .unwrap();
            let _ = tokio::time::timeout(Duration::from_millis(100), tunnel.accept()).await;
            tokio::time::sleep(Duration::from_secs(60)).await;
            drop((request, send));
        });
        let config = Http2Config {
            ping_interval: Duration::from_millis(150),
            ping_timeout: Duration::from_millis(50),
            ..Default::default()
        };
        let (pool, client) = (pool(config), authority.issue(CLIENT));
        let tunnelled = open(&pool, &key(address), &client, "10.0.0.1:80")
            .await
            .unwrap();
        let (mut near, carried) = socket_pair().await;
        let counters = Rc::new(Counters::default());
        let mut buffer = [0; 1];
        let (_, read) = tokio::join!(
            tunnelled.stream.carry(carried, &counters),
            near.read(&mut buffer)
        );
        assert!(read.is_err(), "the flow must break off");
    })
    .await;
}
