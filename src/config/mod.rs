//! The proxy's configuration: read once from the environment, every malformed value refused by name.
//!
//! Precedence: a variable of the environment, then `PROXY_CONFIG`, then the mesh config file.

mod environment;
mod parse;
mod proxy_config;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error;

use crate::policy::Egress;
use environment::Variables;
use proxy_config::ProxyConfig;

/// Captured egress.
pub const OUTBOUND_PORT: u16 = 15001;
/// Captured plaintext ingress.
pub const PLAINTEXT_PORT: u16 = 15006;
/// HBONE.
pub const HBONE_PORT: u16 = 15008;
/// SOCKS5, where it is switched on.
pub const SOCKS5_PORT: u16 = 15080;

const ADMIN_PORT: u16 = 15000;
const STATS_PORT: u16 = 15020;
const READINESS_PORT: u16 = 15021;
const DNS_PORT: u16 = 15053;
const DEFAULT_ROOT: &str = "./var/run/secrets/istio/root-cert.pem";
const DEFAULT_TOKEN: &str = "./var/run/secrets/tokens/istio-token";
const MESH_CONFIG: &str = "./etc/istio/config/mesh";

/// Why a process refuses to start.
#[derive(Debug, Error)]
pub enum ConfigError {
    #[error("invalid env var {name}={value} ({reason})")]
    Variable {
        name: String,
        value: String,
        reason: String,
    },
    #[error("error parsing proxy config: {0}")]
    ProxyConfig(String),
    #[error("invalid uri: {0}")]
    Uri(String),
    #[error("invalid configuration: {0}")]
    Invalid(String),
    #[error("failed to parse header {0}")]
    Header(String),
}

/// Where the roots for a control-plane connection come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RootSource {
    File(PathBuf),
    System,
    Inline(String),
}

/// Where the bearer token comes from; a file is read again for every request.
#[derive(Clone, PartialEq, Eq)]
pub enum TokenSource {
    None,
    File(PathBuf),
    Static(String),
}

impl std::fmt::Debug for TokenSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::None => f.write_str("None"),
            Self::File(path) => write!(f, "File({})", path.display()),
            Self::Static(_) => f.write_str("Static(hidden)"),
        }
    }
}

/// One peer of the control plane: the discovery server or the CA.
#[derive(Clone, Debug)]
pub struct ControlPeer {
    /// `https://host:port`; `None` when switched off.
    pub address: Option<String>,
    pub root: RootSource,
    /// A further DNS name accepted in the server's certificate.
    pub alt_hostname: Option<String>,
    pub headers: Vec<(String, String)>,
}

/// TCP keep-alive of every flow's sockets.
#[derive(Clone, Copy, Debug)]
pub struct Keepalive {
    pub enabled: bool,
    pub time: Duration,
    pub interval: Duration,
    pub retries: u32,
    pub user_timeout: bool,
}

/// The address of an HTTP endpoint or the DNS server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ListenAddress {
    /// `127.0.0.1` and, where IPv6 works, `::1`.
    Localhost(u16),
    At(SocketAddr),
}

/// A workload as the node agent names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkloadName {
    pub namespace: String,
    pub name: String,
    pub service_account: String,
}

/// Whom the process serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mode {
    /// The pods that the node agent names, each in its own network namespace.
    Shared,
    /// One workload, in the network namespace of the process.
    Dedicated(WorkloadName),
}

/// The whole configuration of `warren proxy`.
#[derive(Clone, Debug)]
pub struct Config {
    /// Whether traffic is carried at all, or only DNS answered.
    pub proxy: bool,
    pub mode: Mode,
    /// The proxy's own workload, for its own metrics through the mesh.
    pub own_workload: Option<WorkloadName>,
    pub socks5: bool,
    /// Certificates of a root that every process of this user on this machine shares, for trying things out.
    pub fake_ca: bool,
    /// Addresses are asked for when they are needed, instead of all of them ahead.
    pub on_demand: bool,
    /// Applications that take the PROXY protocol are reached over loopback.
    pub localhost_app_tunnel: bool,
    pub dns: bool,
    pub dns_address: ListenAddress,
    pub stream_window: u32,
    pub connection_window: u32,
    pub frame_size: u32,
    pub pool_max_streams: u16,
    pub pool_unused_release: Duration,
    pub admin: ListenAddress,
    pub stats: SocketAddr,
    pub readiness: SocketAddr,
    pub network: String,
    pub node: String,
    pub cluster_id: String,
    pub cluster_domain: String,
    pub pod_name: String,
    pub pod_namespace: String,
    pub instance_ip: String,
    pub trust_domain: String,
    /// Revocation lists.
    pub crl: Option<PathBuf>,
    pub xds: ControlPeer,
    /// Switched off where certificates come from elsewhere.
    pub ca: ControlPeer,
    /// The socket of the SPIFFE Workload API, where certificates come from it and not from a CA.
    pub spiffe_socket: Option<String>,
    pub token: TokenSource,
    pub preferred_service_namespace: Option<String>,
    pub secret_ttl: Duration,
    pub local_xds: Option<LocalXds>,
    pub termination_deadline: Duration,
    pub metadata: BTreeMap<String, String>,
    pub metadata_json: BTreeMap<String, serde_json::Value>,
    pub workers: usize,
    /// `Some` forces or forbids original source addresses, `None` uses them where the kernel allows.
    pub original_source: Option<bool>,
    pub packet_mark: Option<u32>,
    pub keepalive: Keepalive,
    pub response_baggage: bool,
    /// Where pods may connect to.
    pub egress: Egress,
    /// Flows of the node and of one pod, if other than what follows from the limit of open files.
    pub flow_budgets: [Option<usize>; 2],
    /// Bytes that may wait for slow readers, of the node and of one pod, if other than what follows from the memory.
    pub memory_budgets: [Option<u64>; 2],
    pub zds_path: PathBuf,
    pub port_reuse: bool,
    pub ipv6: bool,
    pub tls12: bool,
    pub pqc: bool,
    pub policy_info_logging: bool,
    pub arguments: String,
}

/// Static state for a proxy without a control plane.
#[derive(Clone, Debug)]
pub enum LocalXds {
    File(PathBuf),
    Inline(String),
}

impl Config {
    /// The wildcard address listeners bind to.
    pub fn wildcard(&self) -> IpAddr {
        if self.ipv6 {
            IpAddr::V6(Ipv6Addr::UNSPECIFIED)
        } else {
            IpAddr::V4(Ipv4Addr::UNSPECIFIED)
        }
    }

    /// Ports that a flow may never be carried to: they are Warren's own.
    pub fn illegal_ports(&self) -> &'static [u16] {
        const PORTS: &[u16] = &[OUTBOUND_PORT, PLAINTEXT_PORT, HBONE_PORT, SOCKS5_PORT];
        if self.socks5 { PORTS } else { &PORTS[..3] }
    }

    /// Reads the configuration of this process.
    ///
    /// # Errors
    /// The first value that is malformed or asks for what this build cannot do.
    pub fn from_environment(arguments: String) -> Result<Self, ConfigError> {
        let variables: BTreeMap<String, String> = std::env::vars_os()
            .filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?)))
            .collect();
        let mesh_config = match std::fs::read_to_string(MESH_CONFIG) {
            Ok(text) => Some(text),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
            Err(e) => {
                return Err(ConfigError::ProxyConfig(format!(
                    "failed reading mesh config file {MESH_CONFIG}: {e}"
                )));
            }
        };
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self::from_variables(
            &Variables(variables),
            mesh_config.as_deref(),
            cores,
            arguments,
        )
    }

    fn from_variables(
        env: &Variables,
        mesh_config: Option<&str>,
        cores: usize,
        arguments: String,
    ) -> Result<Self, ConfigError> {
        let proxy_config = ProxyConfig::load(mesh_config, env.text("PROXY_CONFIG"))?;
        let metadata = env.metadata(&proxy_config);

        let mode = env.mode()?;
        let on_demand = env.get("XDS_ON_DEMAND", "false", parse::boolean)?;
        let proxy = env.get("ENABLE_PROXY", "true", parse::boolean)?;
        let dns = metadata
            .get("DNS_CAPTURE")
            .is_none_or(|v| v.eq_ignore_ascii_case("true"));
        if !proxy && !dns {
            return Err(ConfigError::Invalid(
                "the proxy would serve nothing: ENABLE_PROXY=false and DNS capture is off".into(),
            ));
        }
        let pqc = match env.text("COMPLIANCE_POLICY") {
            None => false,
            Some("pqc") => true,
            Some(other) => {
                return Err(env.wrong("COMPLIANCE_POLICY", other, "expected pqc"));
            }
        };
        let local_xds = env.local_xds()?;
        let egress = Egress {
            registry_only: env.get("OUTBOUND_TRAFFIC_POLICY", "ALLOW_ANY", |v| match v {
                "ALLOW_ANY" => Ok(false),
                "REGISTRY_ONLY" => Ok(true),
                _ => Err("expected ALLOW_ANY or REGISTRY_ONLY".to_string()),
            })?,
            deny: env.get("OUTBOUND_DENY", "", parse::list)?,
            allow: env.get("OUTBOUND_ALLOW", "", parse::list)?,
        };
        let ipv6 = env.get("IPV6_ENABLED", "true", parse::boolean)?;
        let wildcard = if ipv6 {
            IpAddr::V6(Ipv6Addr::UNSPECIFIED)
        } else {
            IpAddr::V4(Ipv4Addr::UNSPECIFIED)
        };
        let default_control = proxy_config.discovery_address.clone().unwrap_or_else(|| {
            if env.text("KUBERNETES_SERVICE_HOST").is_some() {
                "https://istiod.istio-system.svc:15012".to_string()
            } else {
                "https://localhost:15012".to_string()
            }
        });
        let fake_ca = env.get("FAKE_CA", "false", parse::boolean)?;
        let spiffe_socket = env.spiffe_socket(fake_ca)?;
        let mut ca = env.peer("CA", &default_control)?;
        if spiffe_socket.is_some() {
            ca.address = None;
        }
        let token = match env.text("AUTH_TOKEN") {
            Some(value) if std::path::Path::new(value).exists() => TokenSource::File(value.into()),
            Some(value) => TokenSource::Static(value.to_string()),
            None if std::path::Path::new(DEFAULT_TOKEN).exists() => {
                TokenSource::File(DEFAULT_TOKEN.into())
            }
            None => TokenSource::None,
        };
        if ca.address.is_none() && spiffe_socket.is_none() && !fake_ca {
            return Err(ConfigError::Invalid(
                "CA_ADDRESS is empty: without a CA no identity can be had; name the CA's address, or the socket of a \
                 SPIFFE Workload API server in SPIFFE_ENDPOINT_SOCKET"
                    .into(),
            ));
        }
        let xds = env.peer("XDS", &default_control)?;
        let on_demand = on_demand && xds.address.is_some();
        if xds.address.is_none() && local_xds.is_none() {
            return Err(ConfigError::Invalid(
                "XDS_ADDRESS is empty: without a control plane nothing would ever be let in; name its address, or give \
                 the state in LOCAL_XDS_PATH"
                    .into(),
            ));
        }
        let default_mark = if mode == Mode::Shared { "1337" } else { "0" };
        Ok(Self {
            proxy,
            own_workload: env.own_workload().filter(|_| mode == Mode::Shared),
            socks5: env.get("UNSTABLE_ENABLE_SOCKS5", "false", parse::boolean)?,
            fake_ca,
            on_demand,
            localhost_app_tunnel: env.get("LOCALHOST_APP_TUNNEL", "true", parse::boolean)?,
            dns,
            dns_address: match metadata.get("DNS_PROXY_ADDR") {
                None => ListenAddress::Localhost(DNS_PORT),
                Some(text) => dns_address(text)?,
            },
            stream_window: env.window("HTTP2_STREAM_WINDOW_SIZE", 4 << 20)?,
            connection_window: env.window("HTTP2_CONNECTION_WINDOW_SIZE", 16 << 20)?,
            frame_size: env.get("HTTP2_FRAME_SIZE", "1048576", |v| match v.parse() {
                Ok(size @ 16_384..=16_777_215) => Ok(size),
                _ => Err("expected 16384 to 16777215".to_string()),
            })?,
            pool_max_streams: env.get("POOL_MAX_STREAMS_PER_CONNECTION", "100", |v| {
                match v.parse() {
                    Ok(0) | Err(_) => Err("expected 1 to 65535".to_string()),
                    Ok(count) => Ok(count),
                }
            })?,
            pool_unused_release: env.get("POOL_UNUSED_RELEASE_TIMEOUT", "5m", parse::duration)?,
            admin: ListenAddress::Localhost(proxy_config.proxy_admin_port.unwrap_or(ADMIN_PORT)),
            stats: SocketAddr::new(wildcard, proxy_config.stats_port.unwrap_or(STATS_PORT)),
            readiness: SocketAddr::new(wildcard, READINESS_PORT),
            network: env.owned("NETWORK", ""),
            node: env.owned("NODE_NAME", ""),
            cluster_id: metadata
                .get("CLUSTER_ID")
                .cloned()
                .unwrap_or_else(|| env.owned("CLUSTER_ID", "Kubernetes")),
            cluster_domain: env.owned("CLUSTER_DOMAIN", "cluster.local"),
            pod_name: env.owned("POD_NAME", ""),
            pod_namespace: env.owned("POD_NAMESPACE", ""),
            instance_ip: env.owned("INSTANCE_IP", "1.1.1.1"),
            crl: env.text("CRL_PATH").map(PathBuf::from),
            trust_domain: env.owned("TRUST_DOMAIN", "cluster.local"),
            xds,
            ca,
            spiffe_socket,
            token,
            preferred_service_namespace: env.text("PREFERED_SERVICE_NAMESPACE").map(str::to_string),
            secret_ttl: env.get("SECRET_TTL", "24h", parse::duration)?,
            local_xds,
            termination_deadline: env.termination_deadline()?,
            metadata_json: env.metadata_json(),
            metadata,
            workers: env.workers(&proxy_config, cores)?,
            original_source: env.optional("ENABLE_ORIG_SRC", parse::boolean)?,
            packet_mark: env.get("PACKET_MARK", default_mark, |v| match v.parse::<u32>() {
                Ok(0) => Ok(None),
                Ok(mark) => Ok(Some(mark)),
                Err(_) => Err("expected a number".to_string()),
            })?,
            keepalive: Keepalive {
                enabled: env.get("KEEPALIVE_ENABLED", "true", parse::boolean)?,
                time: env.get("KEEPALIVE_TIME", "180s", parse::duration)?,
                interval: env.get("KEEPALIVE_INTERVAL", "180s", parse::duration)?,
                retries: env.get("KEEPALIVE_RETRIES", "9", |v| match v.parse() {
                    Ok(count @ 1..=127) => Ok(count),
                    _ => Err("expected 1 to 127".to_string()),
                })?,
                user_timeout: env.get("USER_TIMEOUT_ENABLED", "false", parse::boolean)?,
            },
            egress,
            flow_budgets: [
                env.optional("FLOW_BUDGET", parse::count)?,
                env.optional("FLOW_BUDGET_PER_POD", parse::count)?,
            ],
            memory_budgets: [
                env.optional("MEMORY_BUDGET", parse::bytes)?,
                env.optional("MEMORY_BUDGET_PER_POD", parse::bytes)?,
            ],
            response_baggage: env.get("ENABLE_RESPONSE_BAGGAGE", "true", parse::boolean)?,
            zds_path: env
                .owned("INPOD_UDS", "/var/run/ztunnel/ztunnel.sock")
                .into(),
            port_reuse: env.get("INPOD_PORT_REUSE", "true", parse::boolean)?,
            ipv6,
            tls12: env.get("TLS12_ENABLED", "false", parse::boolean)?,
            pqc,
            policy_info_logging: env.get("AUTHZ_POLICY_INFO_LOGGING", "false", parse::boolean)?,
            mode,
            arguments,
        })
    }
}

fn dns_address(text: &str) -> Result<ListenAddress, ConfigError> {
    let parsed = match text.strip_prefix("localhost:") {
        Some(port) => port.parse().ok().map(ListenAddress::Localhost),
        None => text.parse().ok().map(ListenAddress::At),
    };
    parsed.ok_or_else(|| {
        ConfigError::Invalid(format!(
            "failed to parse DNS_PROXY_ADDR: expected localhost:PORT or IP:PORT, got {text:?}"
        ))
    })
}

#[cfg(test)]
mod tests;
