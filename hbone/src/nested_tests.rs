//! Tunnels in tunnels, and tunnels whose certificates end.

use std::cell::RefCell;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::spawn_local;

use crate::testing::Authority;
use crate::tunnel_tests::{
    CLIENT, SERVER, Server, key, local, open, pool, server, socket_pair, to,
};
use crate::*;

const GATEWAY: &str = "spiffe://td/ns/gw/sa/gateway";

/// A gateway that passes every stream on to the server.
async fn gateway(authority: &Authority, behind: SocketAddr) -> Server {
    let mut gateway = server(authority.issue(GATEWAY), Http2Config::default()).await;
    let free = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let application = std::mem::replace(&mut gateway.application, free);
    spawn_local(async move {
        while let Ok((mut socket, _)) = application.accept().await {
            spawn_local(async move {
                let mut far = TcpStream::connect(behind).await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut socket, &mut far).await;
            });
        }
    });
    gateway
}

/// Opens a stream to the server through the gateway, expecting that identity there.
async fn through(
    gateway: &Server,
    pool: &Pool,
    identity: &Arc<TlsIdentity>,
    expected: &str,
) -> Result<Tunnelled, OpenError> {
    through_a(gateway, pool, identity, expected, false).await
}

async fn through_a(
    gateway: &Server,
    pool: &Pool,
    identity: &Arc<TlsIdentity>,
    expected: &str,
    shared: bool,
) -> Result<Tunnelled, OpenError> {
    let outer = PoolKey {
        expected: vec![GATEWAY.parse().unwrap()],
        ..key(gateway.address)
    };
    let beyond = Beyond {
        gateway: outer.clone(),
        authority: "web.b:80".to_string(),
        expected: vec![expected.parse().unwrap()],
        shared,
    };
    let way = async {
        let outer = open(pool, &outer, identity, "web.b:80").await?;
        assert_eq!(outer.peer, Some(GATEWAY.parse().unwrap()));
        Ok(outer.stream)
    };
    let inner = to("web.b:80");
    pool.open_through(&beyond, identity.clone(), &inner, way)
        .await
}

#[tokio::test]
async fn flows_to_who_balances_by_himself_share_an_inner_tunnel() {
    local(async {
        let authority = Authority::new();
        let server = server(authority.issue(SERVER), Http2Config::default()).await;
        let gateway = gateway(&authority, server.address).await;
        let (pool, identity) = (pool(Http2Config::default()), authority.issue(CLIENT));
        let open = async |identity: &Arc<TlsIdentity>| {
            let opened = through_a(&gateway, &pool, identity, SERVER, true).await;
            let (mut client, carried) = socket_pair().await;
            spawn_local(async move {
                let stream = opened.unwrap().stream;
                stream.carry(carried, &Rc::default()).await
            });
            let (mut application, _) = server.application.accept().await.unwrap();
            application.write_all(b"hello").await.unwrap();
            let mut text = [0; 5];
            client.read_exact(&mut text).await.unwrap();
            (client, application)
        };
        let mut flows = Vec::new();
        for _ in 0..3 {
            flows.push(open(&identity).await);
        }
        assert_eq!(server.tunnels.get(), 1);
        // Not with another certificate.
        flows.push(open(&authority.issue(CLIENT)).await);
        assert_eq!(server.tunnels.get(), 2);
        pool.drain();
        let closed = through_a(&gateway, &pool, &identity, SERVER, true).await;
        assert_eq!(closed.err().unwrap().to_string(), "pool draining");
    })
    .await;
}

#[tokio::test]
async fn a_flow_passes_a_gateway_in_a_tunnel_of_its_own() {
    local(async {
        let authority = Authority::new();
        let server = server(authority.issue(SERVER), Http2Config::default()).await;
        let gateway = gateway(&authority, server.address).await;
        let (pool, identity) = (pool(Http2Config::default()), authority.issue(CLIENT));
        for flows in 1..4 {
            let tunnelled = through(&gateway, &pool, &identity, SERVER).await.unwrap();
            assert_eq!(tunnelled.peer, Some(SERVER.parse().unwrap()));
            assert_eq!(tunnelled.baggage.as_deref(), Some("service.name=app"));
            let (mut client, carried) = socket_pair().await;
            let counters = Rc::new(Counters::default());
            let counted = counters.clone();
            let carrying =
                spawn_local(async move { tunnelled.stream.carry(carried, &counted).await });
            let (mut application, _) = server.application.accept().await.unwrap();
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
            carrying.await.unwrap().unwrap();
            let counted = (counters.sent.get(), counters.received.get());
            assert_eq!(counted, (big.len() as u64, 6));
            // The way to the gateway is shared, the rest is not.
            assert_eq!((gateway.tunnels.get(), server.tunnels.get()), (1, flows));
        }
    })
    .await;
}

#[tokio::test]
async fn whoever_is_behind_a_gateway_must_be_who_was_meant() {
    local(async {
        let authority = Authority::new();
        let server = server(authority.issue(SERVER), Http2Config::default()).await;
        let gateway = gateway(&authority, server.address).await;
        let (pool, identity) = (pool(Http2Config::default()), authority.issue(CLIENT));
        let refused = through(&gateway, &pool, &identity, GATEWAY).await.err();
        let text = refused.unwrap().to_string();
        assert!(text.contains("did not present the expected SAN"), "{text}");
        assert!(through(&gateway, &pool, &identity, SERVER).await.is_ok());
    })
    .await;
}

#[tokio::test]
async fn a_reset_passes_a_gateway() {
    local(async {
        let authority = Authority::new();
        let server = server(authority.issue(SERVER), Http2Config::default()).await;
        let gateway = gateway(&authority, server.address).await;
        let (pool, identity) = (pool(Http2Config::default()), authority.issue(CLIENT));
        let tunnelled = through(&gateway, &pool, &identity, SERVER).await.unwrap();
        let (mut client, carried) = socket_pair().await;
        spawn_local(async move { tunnelled.stream.carry(carried, &Rc::default()).await });
        let (application, _) = server.application.accept().await.unwrap();
        socket2::SockRef::from(&application)
            .set_linger(Some(Duration::ZERO))
            .unwrap();
        drop(application);
        let read = client.read(&mut [0; 8]).await;
        assert_eq!(read.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    })
    .await;
}

#[tokio::test]
async fn a_tunnel_ends_with_the_certificate_of_either_end() {
    local(async {
        let authority = Authority::new();
        for brief in [CLIENT, SERVER] {
            let issue = |uri| match uri == brief {
                true => authority.expiring_in(uri, Duration::from_secs(2)),
                false => authority.issue(uri),
            };
            let server = server(issue(SERVER), Http2Config::default()).await;
            let (pool, identity) = (pool(Http2Config::default()), issue(CLIENT));
            let tunnelled = open(&pool, &key(server.address), &identity, "10.0.0.1:80").await;
            let (mut client, carried) = socket_pair().await;
            let carrying = spawn_local(async move {
                let stream = tunnelled.unwrap().stream;
                stream.carry(carried, &Rc::default()).await
            });
            let mut rest = Vec::new();
            let _ = client.read_to_end(&mut rest).await;
            let ended = carrying.await.unwrap();
            // Either end may be the first to see it.
            if let Err(error) = ended {
                assert!(matches!(error, CarryError::Expired), "{error}");
            }
        }
    })
    .await;
}

/// Dials with whatever certificate is the newest, if there still is one.
struct Renewing(Rc<RefCell<Option<Arc<TlsIdentity>>>>);

impl Dialer for Renewing {
    fn dial(&self, destination: SocketAddr) -> LocalBoxFuture<'_, io::Result<TcpStream>> {
        Box::pin(TcpStream::connect(destination))
    }

    fn is_current(&self, _: &Identity, certificate: &Arc<TlsIdentity>) -> bool {
        let newest = self.0.borrow();
        newest
            .as_ref()
            .is_some_and(|newest| Arc::ptr_eq(newest, certificate))
    }
}

#[tokio::test]
async fn a_tunnel_of_a_replaced_or_withdrawn_certificate_takes_no_new_streams() {
    local(async {
        let authority = Authority::new();
        let server = server(authority.issue(SERVER), Http2Config::default()).await;
        let (old, new) = (authority.issue(CLIENT), authority.issue(CLIENT));
        let newest = Rc::new(RefCell::new(Some(old.clone())));
        let config = Http2Config {
            unused_release: Duration::from_millis(400),
            ..Http2Config::default()
        };
        let pool = Pool::new(
            Engine::start(),
            Rc::new(config),
            Rc::new(Renewing(newest.clone())),
        );
        let open = async |identity: &Arc<TlsIdentity>| {
            open(&pool, &key(server.address), identity, "10.0.0.1:80")
                .await
                .unwrap()
        };
        let first = open(&old).await;
        let _second = open(&old).await;
        assert_eq!(server.tunnels.get(), 1);
        for (current, tunnels) in [(Some(new.clone()), 2), (None, 3)] {
            *newest.borrow_mut() = current;
            while server.tunnels.get() < tunnels {
                // What is in use is let go of for no other reason.
                drop(open(&new).await);
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
        let (mut client, carried) = socket_pair().await;
        spawn_local(async move { first.stream.carry(carried, &Rc::default()).await });
        let (mut application, _) = server.application.accept().await.unwrap();
        application.write_all(b"still here").await.unwrap();
        let mut text = [0; 10];
        client.read_exact(&mut text).await.unwrap();
        assert_eq!(&text, b"still here");
    })
    .await;
}
