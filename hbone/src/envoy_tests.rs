//! Both ends against a real Envoy: `WARREN_ENVOY` names its binary (`make test` installs it).

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::rc::Rc;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinSet, spawn_local};

use crate::interop_tests::{CLIENT, SERVER, exchange, local, open, pool};
use crate::testing::Authority;
use crate::*;

/// A running Envoy; it and its folder end with it.
struct Envoy {
    process: Child,
    folder: PathBuf,
}

impl Drop for Envoy {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

impl Envoy {
    /// Starts one with its own certificate and that configuration; none, with a line that says so, without a binary.
    async fn start(
        name: &str,
        authority: &Authority,
        uri: &str,
        resources: String,
    ) -> Option<Self> {
        let named = std::env::var_os("WARREN_ENVOY");
        let Some(binary) = named.filter(|binary| !binary.is_empty()) else {
            eprintln!("skipped: WARREN_ENVOY does not name an Envoy (make test sets it)");
            return None;
        };
        let folder = std::env::temp_dir().join(format!("wrn-envoy-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let [root, certificate, key] = authority.pem(uri);
        for (file, text) in [
            ("root.pem", root),
            ("cert.pem", certificate),
            ("key.pem", key),
        ] {
            std::fs::write(folder.join(file), text).unwrap();
        }
        let text = resources
            .replace("$TLS", TLS)
            .replace("$DIR", folder.to_str().unwrap());
        std::fs::write(folder.join("envoy.yaml"), text).unwrap();
        let log = std::fs::File::create(folder.join("log")).unwrap();
        let process = Command::new(binary)
            .args([
                "--concurrency",
                "1",
                "--disable-hot-restart",
                "-l",
                "warning",
                "-c",
            ])
            .arg(folder.join("envoy.yaml"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        Some(Self { process, folder })
    }

    /// Waits until it listens.
    async fn listens(&mut self, address: SocketAddr) {
        for _ in 0..500 {
            if TcpStream::connect(address).await.is_ok() {
                return;
            }
            assert!(self.process.try_wait().unwrap().is_none(), "{}", self.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("Envoy does not listen: {}", self.log());
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.folder.join("log")).unwrap_or_default()
    }
}

const TLS: &str = r#"alpn_protocols: [h2]
            tls_params: {tls_minimum_protocol_version: TLSv1_3, tls_maximum_protocol_version: TLSv1_3}
            tls_certificates: [{certificate_chain: {filename: $DIR/cert.pem}, private_key: {filename: $DIR/key.pem}}]
            validation_context:
              trusted_ca: {filename: $DIR/root.pem}
              match_typed_subject_alt_names: [{san_type: URI, matcher: {prefix: "spiffe://td/"}}]"#;

/// An Envoy that takes CONNECTs over mutual TLS at `port` and connects to `application`.
fn terminating(port: u16, application: u16) -> String {
    format!(
        r#"
static_resources:
  listeners:
  - address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}
    filter_chains:
    - transport_socket:
        name: tls
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext
          require_client_certificate: true
          common_tls_context:
            $TLS
      filters:
      - name: http
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: hbone
          codec_type: HTTP2
          upgrade_configs: [{{upgrade_type: CONNECT}}]
          http_filters:
          - name: router
            typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
          route_config:
            virtual_hosts:
            - name: served
              domains: ["10.0.0.1:80"]
              routes:
              - match: {{connect_matcher: {{}}}}
                route: {{cluster: application, timeout: 0s, upgrade_configs: [{{upgrade_type: CONNECT, connect_config: {{}}}}]}}
  clusters:
  - name: application
    type: STATIC
    load_assignment:
      cluster_name: application
      endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {application}}}}}}}}}]}}]
"#
    )
}

/// An Envoy that carries connections to `port` in CONNECTs over mutual TLS to `peer`.
fn originating(port: u16, peer: u16) -> String {
    format!(
        r#"
static_resources:
  listeners:
  - address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}
    filter_chains:
    - filters:
      - name: tcp
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy
          stat_prefix: originate
          cluster: hbone
          tunneling_config:
            hostname: "10.0.0.1:80"
            headers_to_add: [{{header: {{key: baggage, value: "k8s.namespace.name=a"}}}}]
  clusters:
  - name: hbone
    type: STATIC
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {{http2_protocol_options: {{}}}}
    transport_socket:
        name: tls
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext
          common_tls_context:
            $TLS
    load_assignment:
      cluster_name: hbone
      endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {peer}}}}}}}}}]}}]
"#
    )
}

/// Sends back what comes, ends included.
async fn echo(listener: TcpListener) {
    while let Ok((mut socket, _)) = listener.accept().await {
        spawn_local(async move {
            let (mut read, mut write) = socket.split();
            if tokio::io::copy(&mut read, &mut write).await.is_ok() {
                let _ = write.shutdown().await;
            }
        });
    }
}

async fn bind() -> (TcpListener, u16) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

async fn free_address() -> SocketAddr {
    let (listener, _) = bind().await;
    listener.local_addr().unwrap()
}

const LENGTHS: [usize; 6] = [0, 1, 16_384, 100_000, 1_000_000, 5_000_000];

#[tokio::test]
async fn flows_pass_through_an_envoy_that_terminates_tunnels() {
    local(async {
        let authority = Authority::new();
        let (application, port) = bind().await;
        spawn_local(echo(application));
        let address = free_address().await;
        let resources = terminating(address.port(), port);
        let Some(mut envoy) = Envoy::start("terminates", &authority, SERVER, resources).await
        else {
            return;
        };
        envoy.listens(address).await;
        let (pool, identity) = (pool(), authority.issue(CLIENT));
        let mut flows = JoinSet::new();
        for (seed, length) in LENGTHS.into_iter().cycle().take(30).enumerate() {
            flows.spawn_local(exchange(
                open(&pool, &identity, address).await,
                seed,
                length,
            ));
        }
        while let Some(flow) = flows.join_next().await {
            flow.unwrap();
        }
        assert_eq!(pool.tunnels(), 1, "all flows share a tunnel");
    })
    .await;
}

#[tokio::test]
async fn an_envoy_with_somebody_elses_certificate_is_refused() {
    local(async {
        let authority = Authority::new();
        let address = free_address().await;
        let resources = terminating(address.port(), 1);
        let other = "spiffe://td/ns/b/sa/other";
        let Some(mut envoy) = Envoy::start("other", &authority, other, resources).await else {
            return;
        };
        envoy.listens(address).await;
        let identity = authority.issue(CLIENT);
        let key = PoolKey {
            src: CLIENT.parse().unwrap(),
            expected: vec![SERVER.parse().unwrap()],
            dst: address,
            src_ip: address.ip(),
        };
        let tls = || {
            let identity = identity.clone();
            async move { Ok(identity) }
        };
        let headers = ConnectHeaders {
            authority: "10.0.0.1:80".to_string(),
            ..Default::default()
        };
        let refused = pool().open(&key, tls, &headers).await.err().unwrap();
        let text = refused.to_string();
        assert!(text.contains("did not present the expected SAN"), "{text}");
    })
    .await;
}

#[tokio::test]
async fn flows_of_an_envoy_that_originates_tunnels_are_served() {
    local(async {
        let authority = Authority::new();
        let (tunnels, peer) = bind().await;
        let address = free_address().await;
        let resources = originating(address.port(), peer);
        let Some(mut envoy) = Envoy::start("originates", &authority, CLIENT, resources).await
        else {
            return;
        };
        let (application, port) = bind().await;
        spawn_local(echo(application));
        let (engine, identity) = (Engine::start(), authority.issue(SERVER));
        spawn_local(async move {
            while let Ok((socket, _)) = tunnels.accept().await {
                let mut tunnel = accept(&engine, socket, &identity, &Http2Config::default())
                    .await
                    .unwrap();
                assert_eq!(tunnel.peer(), Some(&CLIENT.parse().unwrap()));
                spawn_local(async move {
                    while let Some(incoming) = tunnel.next().await {
                        assert_eq!(
                            (incoming.method(), incoming.authority()),
                            ("CONNECT", "10.0.0.1:80")
                        );
                        let baggage = incoming.headers.baggage().unwrap();
                        assert_eq!(baggage.namespace.as_deref(), Some("a"));
                        let socket = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
                        let stream = incoming.accept(None).unwrap();
                        spawn_local(async move { stream.carry(socket, &Rc::default()).await });
                    }
                });
            }
        });
        envoy.listens(address).await;
        let mut flows = JoinSet::new();
        for (seed, length) in LENGTHS.into_iter().cycle().take(30).enumerate() {
            let socket = TcpStream::connect(address).await.unwrap();
            flows.spawn_local(exchange(socket, seed, length));
        }
        while let Some(flow) = flows.join_next().await {
            flow.unwrap();
        }
    })
    .await;
}
