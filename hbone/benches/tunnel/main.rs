//! A tunnel beside a plain connection, and beside a tunnel made of libraries: what carrying bytes and small requests
//! costs, in CPU time of this process.
//!
//! Both ends, the client and the application run on one thread over loopback, so the figures are the sum of all of them;
//! what the tunnel adds is the difference to the plain connection.

mod library;

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use hbone::{
    ConnectHeaders, Dialer, Engine, Http2Config, LocalBoxFuture, Pool, PoolKey, TlsIdentity,
    TlsOptions, accept,
};
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType,
};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinSet, LocalSet, spawn_local};

const SERVER: &str = "spiffe://td/ns/b/sa/server";
const CLIENT: &str = "spiffe://td/ns/a/sa/client";
const BULK: usize = 1 << 30;
const FLOWS: usize = 64;
const ROUNDS: usize = 500;

struct Direct;

impl Dialer for Direct {
    fn dial(&self, destination: SocketAddr) -> LocalBoxFuture<'_, io::Result<TcpStream>> {
        Box::pin(TcpStream::connect(destination))
    }
}

fn identities() -> (Arc<TlsIdentity>, Arc<TlsIdentity>) {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let root = params.self_signed(&key).unwrap().der().clone();
    let issuer = Issuer::new(params, key);
    let issue = |uri: &str| {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(uri.try_into().unwrap())];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let leaf = params.signed_by(&key, &issuer).unwrap().der().clone();
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        Arc::new(
            TlsIdentity::new(vec![leaf], key, vec![root.clone()], &TlsOptions::default()).unwrap(),
        )
    };
    (issue(CLIENT), issue(SERVER))
}

/// Everything that a flow may go through.
struct World {
    application: TcpListener,
    tunnel: SocketAddr,
    pool: Pool,
    client: Arc<TlsIdentity>,
    /// The calling end of a tunnel made of libraries.
    library: h2::client::SendRequest<Bytes>,
}

/// What a flow goes through.
#[derive(Clone, Copy, PartialEq)]
enum Way {
    Plain,
    Library,
    Tunnel,
}

impl World {
    async fn new() -> Self {
        let (client, server) = identities();
        let expected = [SERVER.parse().unwrap()];
        let other = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let other_address = other.local_addr().unwrap();
        let serving_config = server.server_config();
        let application = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let target = application.local_addr().unwrap();
        library::serve(other, serving_config, target);
        let config = client.client_config(&expected).unwrap();
        let library = library::connect(other_address, config).await;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let tunnel = listener.local_addr().unwrap();
        let engine = Engine::start();
        let serving = engine.clone();
        spawn_local(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let _ = socket.set_nodelay(true);
                let (identity, engine) = (server.clone(), serving.clone());
                spawn_local(async move {
                    let mut tunnel = accept(&engine, socket, &identity, &Http2Config::default())
                        .await
                        .unwrap();
                    while let Some(incoming) = tunnel.next().await {
                        spawn_local(async move {
                            let socket = TcpStream::connect(target).await.unwrap();
                            let _ = socket.set_nodelay(true);
                            let _ = incoming
                                .accept(None)
                                .unwrap()
                                .carry(socket, &Rc::default())
                                .await;
                        });
                    }
                });
            }
        });
        let pool = Pool::new(engine, Rc::new(Http2Config::default()), Rc::new(Direct));
        Self {
            application,
            tunnel,
            pool,
            client,
            library,
        }
    }

    /// Both ends of a flow, through the tunnel or not.
    async fn flow(&self, way: Way) -> (TcpStream, TcpStream) {
        let near = if way != Way::Plain {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let (near, carried) = tokio::join!(TcpStream::connect(address), listener.accept());
            let (near, carried) = (near.unwrap(), carried.unwrap().0);
            let _ = carried.set_nodelay(true);
            if way == Way::Library {
                library::open(&self.library, carried).await;
                return self.accepted(near).await;
            }
            let key = PoolKey {
                src: CLIENT.parse().unwrap(),
                expected: vec![SERVER.parse().unwrap()],
                dst: self.tunnel,
                src_ip: self.tunnel.ip(),
            };
            let headers = ConnectHeaders {
                authority: "10.0.0.1:80".to_string(),
                ..Default::default()
            };
            let tls = || {
                let client = self.client.clone();
                async move { Ok(client) }
            };
            let tunnelled = self.pool.open(&key, tls, &headers).await.unwrap();
            spawn_local(async move { tunnelled.stream.carry(carried, &Rc::default()).await });
            near
        } else {
            TcpStream::connect(self.application.local_addr().unwrap())
                .await
                .unwrap()
        };
        self.accepted(near).await
    }

    /// The near end with the application's.
    async fn accepted(&self, near: TcpStream) -> (TcpStream, TcpStream) {
        let _ = near.set_nodelay(true);
        let (far, _) = self.application.accept().await.unwrap();
        let _ = far.set_nodelay(true);
        (near, far)
    }

    async fn bulk(&self, way: Way) {
        let (mut near, mut far) = self.flow(way).await;
        let block = vec![7u8; 256 << 10];
        let mut buffer = vec![0; 256 << 10];
        let sending = async {
            for _ in 0..BULK / block.len() {
                near.write_all(&block).await.unwrap();
            }
        };
        let receiving = async {
            let mut left = BULK;
            while left > 0 {
                left -= far.read(&mut buffer).await.unwrap();
            }
        };
        tokio::join!(sending, receiving);
    }

    async fn requests(&self, way: Way) {
        let mut flows = JoinSet::new();
        for _ in 0..FLOWS {
            let (mut near, mut far) = self.flow(way).await;
            flows.spawn_local(async move {
                let mut answer = [0; 128];
                for _ in 0..ROUNDS {
                    near.write_all(&[1; 100]).await.unwrap();
                    near.read_exact(&mut answer).await.unwrap();
                }
            });
            spawn_local(async move {
                let mut question = [0; 100];
                while far.read_exact(&mut question).await.is_ok()
                    && far.write_all(&[2; 128]).await.is_ok()
                {}
            });
        }
        while flows.join_next().await.is_some() {}
    }
}

fn cpu() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the pointer is to a local value.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

async fn measured(work: impl Future<Output = ()>) -> (Duration, Duration) {
    let (wall, start) = (Instant::now(), cpu());
    work.await;
    (wall.elapsed(), cpu() - start)
}

fn main() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    LocalSet::new().block_on(&runtime, async {
        let world = World::new().await;
        println!("{:<44}{:>12}{:>22}", "", "wall", "CPU of all four ends");
        let ways = [
            ("plain", Way::Plain),
            ("h2 and tokio-rustls", Way::Library),
            ("tunnel", Way::Tunnel),
        ];
        for (kind, way) in ways {
            let (wall, cpu) = measured(world.bulk(way)).await;
            let rate = BULK as f64 * 8.0 / wall.as_secs_f64() / 1e9;
            let cost = cpu.as_secs_f64() * 1e9 / BULK as f64;
            println!(
                "{:<44}{rate:>7.1} Gb/s{cost:>17.2} s/GB",
                format!("{kind}, one flow, 1 GiB")
            );
            let (wall, cpu) = measured(world.requests(way)).await;
            let count = (FLOWS * ROUNDS) as f64;
            let (rate, cost) = (count / wall.as_secs_f64(), cpu.as_secs_f64() * 1e6 / count);
            println!(
                "{:<44}{rate:>8.0} /s {cost:>14.1} us each",
                format!("{kind}, {FLOWS} flows of questions")
            );
        }
    });
}
