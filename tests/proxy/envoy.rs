//! A real Envoy in the roles that it has in a mesh; `WARREN_ENVOY` names its binary (`make test` sets it).

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::Duration;

use serde_json::{Value, json};

use crate::pods::{Host, Pods};

/// The binary; none, with a line that says so, where there is none.
pub fn binary() -> Option<OsString> {
    let named = std::env::var_os("WARREN_ENVOY").filter(|binary| !binary.is_empty());
    if named.is_none() {
        eprintln!("skipped: WARREN_ENVOY does not name an Envoy (make test sets it)");
    }
    named
}

/// A running Envoy.
pub struct Envoy {
    process: Child,
    log: PathBuf,
}

impl Drop for Envoy {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        if std::thread::panicking() {
            eprintln!("{}", std::fs::read_to_string(&self.log).unwrap_or_default());
        }
    }
}

impl Envoy {
    /// Waits until its administration interface, asked at its own place, says something.
    pub async fn says(&mut self, host: &Host, path: &str, text: &str) {
        for _ in 0..1000 {
            if host.get_path(ADMIN, path).await.contains(text) {
                return;
            }
            assert!(self.process.try_wait().unwrap().is_none());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("{path} did not become {text}");
    }
}

/// What an Envoy is to do.
pub struct Role {
    name: &'static str,
    idle: &'static str,
    listeners: Vec<Value>,
    clusters: Vec<Value>,
}

/// Where it tells of itself.
const ADMIN: &str = "127.0.0.1:15000";
/// Where the internal listener that looks into tunnelled connections gets them from.
const INSIDE: &str = "inside";
/// The internal listener that wraps connections into tunnels.
const ORIGINATE: &str = "originate";
/// The filter state with the identity of who sent a request.
const PEER: &str = "io.istio.peer_principal";

impl Role {
    /// An Envoy that does nothing yet, of that name in the answers that pass through it.
    pub fn new(name: &'static str) -> Self {
        Self {
            name,
            idle: "0s",
            listeners: Vec::new(),
            clusters: Vec::new(),
        }
    }

    /// Ends connections and tunnels over which nothing has come for so long; to be said before all else.
    pub fn idle_after(mut self, time: &'static str) -> Self {
        self.idle = time;
        self
    }

    /// Takes tunnels for those addresses, looks into the HTTP in them and passes it to the cluster beside each.
    pub fn waypoint(mut self, routes: &[(&str, &str)]) -> Self {
        let from_request = |key: &str, text: &str| {
            let format = json!({"text_format_source": {"inline_string": text}});
            json!({"object_key": key, "format_string": format, "shared_with_upstream": "ONCE"})
        };
        let mut peer = from_request(PEER, "%DOWNSTREAM_PEER_URI_SAN%");
        peer["factory_key"] = "envoy.string".into();
        let destination = "envoy.filters.listener.original_dst";
        let carried = [
            from_request(&format!("{destination}.local_ip"), "%REQ(:AUTHORITY)%"),
            from_request(
                &format!("{destination}.remote_ip"),
                "%DOWNSTREAM_REMOTE_ADDRESS%",
            ),
            peer,
        ];
        let state = extension(
            "filters.http.set_filter_state.v3.Config",
            json!({"on_request_headers": carried}),
        );
        let domains: Vec<_> = routes.iter().map(|(authority, _)| authority).collect();
        let route = json!({
            "match": {"connect_matcher": {}},
            "route": {"cluster": INSIDE, "timeout": "0s", "idle_timeout": self.idle, "upgrade_configs": [{"upgrade_type": "CONNECT", "connect_config": {}}]},
        });
        let manager = http_manager(
            vec![state],
            json!({"virtual_hosts": [{"name": "served", "domains": domains, "routes": [route]}]}),
            json!({"codec_type": "HTTP2"}),
        );
        let tls = extension(
            "transport_sockets.tls.v3.DownstreamTlsContext",
            json!({"require_client_certificate": true, "common_tls_context": tls()}),
        );
        self.listeners.push(json!({
            "name": "terminate",
            "address": socket("0.0.0.0", 15008),
            "filter_chains": [{"transport_socket": tls, "filters": [manager]}],
        }));
        let filter = extension("filters.listener.original_dst.v3.OriginalDst", json!({}));
        let chains = self.chains(routes, &format!("%FILTER_STATE({PEER}:PLAIN)%"));
        self.listeners.push(json!({
            "name": INSIDE,
            "internal_listener": {},
            "listener_filters": [filter],
            "filter_chains": chains,
        }));
        self.clusters
            .push(cluster(INSIDE, internal(INSIDE), Some(through(&[]))));
        self
    }

    /// Takes connections with a PROXY header for those addresses, and passes the HTTP in them to the cluster beside each.
    pub fn behind_proxy_headers(mut self, ip: &str, port: u16, routes: &[(&str, &str)]) -> Self {
        let (namespace, key) = ("peer", "identity");
        let filter = extension(
            "filters.listener.proxy_protocol.v3.ProxyProtocol",
            json!({"rules": [{"tlv_type": 0xd0, "on_tlv_present": {"metadata_namespace": namespace, "key": key}}]}),
        );
        let state = extension(
            "filters.network.set_filter_state.v3.Config",
            json!({"on_new_connection": [{
                "object_key": PEER,
                "factory_key": "envoy.string",
                "format_string": {"text_format_source": {"inline_string": format!("%DYNAMIC_METADATA({namespace}:{key})%")}},
            }]}),
        );
        let mut chains = self.chains(routes, &format!("%FILTER_STATE({PEER}:PLAIN)%"));
        for chain in &mut chains {
            let filters = chain["filters"].as_array_mut().unwrap();
            filters.insert(0, state.clone());
        }
        self.listeners.push(json!({
            "name": "announced",
            "address": socket(ip, port),
            "listener_filters": [filter],
            "filter_chains": chains,
        }));
        self
    }

    /// Takes HTTP at a port and passes it to a cluster.
    pub fn http(mut self, port: u16, cluster: &str) -> Self {
        let manager = self.routed(cluster, "nobody");
        self.listeners.push(json!({
            "name": format!("http-{port}"),
            "address": socket("0.0.0.0", port),
            "filter_chains": [{"filters": [manager]}],
        }));
        self
    }

    /// Takes connections at a port and passes them to a cluster.
    pub fn tcp(mut self, port: u16, cluster: &str) -> Self {
        let proxy = extension(
            "filters.network.tcp_proxy.v3.TcpProxy",
            json!({"stat_prefix": "tcp", "cluster": cluster}),
        );
        self.listeners.push(json!({
            "name": format!("tcp-{port}"),
            "address": socket("0.0.0.0", port),
            "filter_chains": [{"filters": [proxy]}],
        }));
        self
    }

    /// A cluster of one address that is reached as it is.
    pub fn plain(mut self, name: &str, ip: &str, port: u16) -> Self {
        self.clusters.push(cluster(
            name,
            json!({"endpoint": {"address": socket(ip, port)}}),
            None,
        ));
        self
    }

    /// A cluster of one workload of the mesh: tunnels to its HBONE port, for whoever proves that identity.
    pub fn tunnelled(mut self, name: &str, address: &str, identity: &str) -> Self {
        let mut endpoint = internal(ORIGINATE);
        endpoint["endpoint"]["address"]["envoy_internal_address"]["endpoint_id"] = address.into();
        endpoint["metadata"] = json!({"filter_metadata": {
            "envoy.filters.listener.original_dst": {"local": address},
            "mesh": {"identity": identity},
        }});
        let socket = through(&["envoy.filters.listener.original_dst", "mesh"]);
        self.clusters.push(cluster(name, endpoint, Some(socket)));
        self
    }

    /// Starts it at a place, as that identity of the mesh, and waits until it serves.
    pub async fn start(self, pods: &Pods, host: &Host, identity: &str) -> Envoy {
        let folder = pods.folder().join(self.name);
        pods.certificate(identity).write(&folder);
        let config = folder.join("envoy.json");
        let text = self.bootstrap().to_string();
        let text = text.replace("$DIR", folder.to_str().unwrap());
        std::fs::write(&config, text).unwrap();
        let log = folder.join("log");
        let mut command = Command::new(binary().unwrap());
        command.args(["--concurrency", "1", "--disable-hot-restart"]);
        command.args(["-l", "warning", "-c"]).arg(&config);
        let process = host.spawn(&mut command, &log);
        let mut envoy = Envoy { process, log };
        envoy.says(host, "/ready", "LIVE").await;
        envoy
    }

    fn bootstrap(mut self) -> Value {
        self.originate();
        json!({
            "admin": {"address": socket("127.0.0.1", 15000)},
            "bootstrap_extensions": [extension("bootstrap.internal_listener.v3.InternalListener", json!({}))],
            "static_resources": {"listeners": self.listeners, "clusters": self.clusters},
        })
    }

    /// The way from the tunnelled clusters to the HBONE ports of their endpoints.
    fn originate(&mut self) {
        let expected = extension(
            "filters.network.set_filter_state.v3.Config",
            json!({"on_new_connection": [{
                "object_key": "envoy.network.upstream_subject_alt_names",
                "format_string": {"text_format_source": {"inline_string": "%DYNAMIC_METADATA(mesh:identity)%"}},
            }]}),
        );
        let proxy = extension(
            "filters.network.tcp_proxy.v3.TcpProxy",
            json!({
                "stat_prefix": ORIGINATE,
                "cluster": ORIGINATE,
                "idle_timeout": self.idle,
                "tunneling_config": {"hostname": "%DOWNSTREAM_LOCAL_ADDRESS%"},
            }),
        );
        let filter = extension("filters.listener.original_dst.v3.OriginalDst", json!({}));
        self.listeners.push(json!({
            "name": ORIGINATE,
            "internal_listener": {},
            "listener_filters": [filter],
            "filter_chains": [{"filters": [expected, proxy]}],
        }));
        let http = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";
        let tls = extension(
            "transport_sockets.tls.v3.UpstreamTlsContext",
            json!({"common_tls_context": tls()}),
        );
        self.clusters.push(json!({
            "name": ORIGINATE,
            "type": "ORIGINAL_DST",
            "lb_policy": "CLUSTER_PROVIDED",
            "original_dst_lb_config": {"upstream_port_override": 15008},
            "typed_extension_protocol_options": {
                http: {"@type": format!("type.googleapis.com/{http}"), "explicit_http_config": {"http2_protocol_options": {}}},
            },
            "transport_socket": tls,
        }));
    }

    /// A filter chain for each address.
    fn chains(&self, routes: &[(&str, &str)], peer: &str) -> Vec<Value> {
        let chain = |(authority, cluster): &(&str, &str)| {
            let (ip, port) = authority.split_once(':').unwrap();
            let port: u16 = port.parse().unwrap();
            json!({
                "name": authority,
                "filter_chain_match": {"prefix_ranges": [{"address_prefix": ip, "prefix_len": 32}], "destination_port": port},
                "filters": [self.routed(cluster, peer)],
            })
        };
        routes.iter().map(chain).collect()
    }

    /// Sends every HTTP request to a cluster; the answers tell through whom they came and what that one knew.
    fn routed(&self, cluster: &str, peer: &str) -> Value {
        let seen = [
            ("x-through", self.name),
            ("x-peer", peer),
            ("x-client", "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%"),
            ("x-from", "%DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT%"),
        ];
        let header = |(key, value)| json!({"header": {"key": key, "value": value}});
        http_manager(
            Vec::new(),
            json!({
                "response_headers_to_add": seen.map(header),
                "virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [{"match": {"prefix": "/"}, "route": {"cluster": cluster}}]}],
            }),
            json!({"use_remote_address": true}),
        )
    }
}

fn extension(kind: &str, mut config: Value) -> Value {
    config["@type"] = format!("type.googleapis.com/envoy.extensions.{kind}").into();
    json!({"name": kind, "typed_config": config})
}

fn socket(ip: &str, port: u16) -> Value {
    json!({"socket_address": {"address": ip, "port_value": port}})
}

fn tls() -> Value {
    json!({
        "alpn_protocols": ["h2"],
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
        "tls_certificates": [{"certificate_chain": {"filename": "$DIR/cert.pem"}, "private_key": {"filename": "$DIR/key.pem"}}],
        "validation_context": {
            "trusted_ca": {"filename": "$DIR/root.pem"},
            "match_typed_subject_alt_names": [{"san_type": "URI", "matcher": {"prefix": "spiffe://cluster.local/"}}],
        },
    })
}

fn http_manager(mut filters: Vec<Value>, routes: Value, mut config: Value) -> Value {
    filters.push(extension("filters.http.router.v3.Router", json!({})));
    config["stat_prefix"] = "http".into();
    config["http_filters"] = filters.into();
    config["route_config"] = routes;
    extension(
        "filters.network.http_connection_manager.v3.HttpConnectionManager",
        config,
    )
}

fn cluster(name: &str, endpoint: Value, socket: Option<Value>) -> Value {
    let mut cluster = json!({
        "name": name,
        "type": "STATIC",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [endpoint]}]},
    });
    if let Some(socket) = socket {
        cluster["transport_socket"] = socket;
    }
    cluster
}

/// The endpoint that is an internal listener.
fn internal(listener: &str) -> Value {
    json!({"endpoint": {"address": {"envoy_internal_address": {"server_listener_name": listener}}}})
}

/// Hands what is known of a connection on to an internal listener: the shared filter state and that metadata.
fn through(metadata: &[&str]) -> Value {
    let passed = metadata
        .iter()
        .map(|name| json!({"kind": {"host": {}}, "name": name}));
    let raw = extension("transport_sockets.raw_buffer.v3.RawBuffer", json!({}));
    extension(
        "transport_sockets.internal_upstream.v3.InternalUpstreamTransport",
        json!({"passthrough_metadata": passed.collect::<Vec<_>>(), "transport_socket": raw}),
    )
}
