//! The YAML of a local source, read into the records a control plane would send, so that both have one meaning.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use serde::Deserialize;

use crate::proto::{security, workload as proto};

/// A whole file.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct File {
    pub workloads: Vec<Workload>,
    pub services: Vec<Service>,
    pub policies: Vec<Policy>,
}

type Ports = BTreeMap<u16, u16>;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Workload {
    namespace: String,
    #[serde(default)]
    workload_ips: Vec<IpAddr>,
    /// `namespace/hostname` to its ports.
    #[serde(default)]
    pub services: BTreeMap<String, Ports>,
    #[serde(default)]
    uid: String,
    #[serde(default)]
    name: String,
    #[serde(default)]
    trust_domain: String,
    #[serde(default)]
    service_account: String,
    #[serde(default)]
    network: String,
    #[serde(default)]
    workload_name: String,
    #[serde(default)]
    workload_type: WorkloadType,
    #[serde(default)]
    canonical_name: String,
    #[serde(default)]
    canonical_revision: String,
    #[serde(default)]
    hostname: String,
    #[serde(default)]
    node: String,
    #[serde(default)]
    cluster_id: String,
    #[serde(default)]
    protocol: Protocol,
    #[serde(default)]
    network_mode: NetworkMode,
    waypoint: Option<Gateway>,
    network_gateway: Option<Gateway>,
    #[serde(default)]
    native_tunnel: bool,
    application_tunnel: Option<ApplicationTunnel>,
    #[serde(default)]
    authorization_policies: Vec<String>,
    #[serde(default)]
    status: Status,
    locality: Option<Locality>,
    capacity: Option<u32>,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
enum WorkloadType {
    #[default]
    #[serde(alias = "deployment", alias = "")]
    Deployment,
    #[serde(alias = "cronjob")]
    CronJob,
    #[serde(alias = "pod")]
    Pod,
    #[serde(alias = "job")]
    Job,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
enum Protocol {
    #[default]
    Tcp,
    Hbone,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
enum NetworkMode {
    #[default]
    Standard,
    HostNetwork,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
enum Status {
    #[default]
    Healthy,
    Unhealthy,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Gateway {
    /// `network/ip` or `namespace/hostname`.
    destination: String,
    hbone_mtls_port: u16,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ApplicationTunnel {
    protocol: TunnelProtocol,
    port: Option<u16>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
enum TunnelProtocol {
    None,
    Proxy,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Locality {
    region: String,
    zone: String,
    subzone: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Service {
    name: String,
    namespace: String,
    hostname: String,
    /// `network/ip`.
    #[serde(default)]
    vips: Vec<String>,
    #[serde(default)]
    cidr_vips: Vec<Range>,
    #[serde(default)]
    ports: Ports,
    /// Endpoints beyond those that workloads name themselves, by workload uid.
    #[serde(default)]
    pub endpoints: BTreeMap<String, Endpoint>,
    #[serde(default)]
    subject_alt_names: Vec<String>,
    waypoint: Option<Gateway>,
    #[serde(default)]
    weighted_waypoints: Vec<WeightedWaypoint>,
    load_balancer: Option<LoadBalancer>,
    ip_families: Option<IpFamilies>,
    #[serde(default)]
    canonical: bool,
    #[serde(default)]
    visibility: Visibility,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Range {
    #[serde(default)]
    network: String,
    cidr: IpNet,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Endpoint {
    pub workload_uid: String,
    #[serde(default)]
    pub port: Ports,
    /// Taken from the workload; allowed here since the configuration dump shows it here.
    #[serde(default, rename = "status")]
    _status: Status,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct WeightedWaypoint {
    destination: Gateway,
    weight: u32,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct LoadBalancer {
    #[serde(default)]
    routing_preferences: Vec<Scope>,
    #[serde(default)]
    mode: Mode,
    #[serde(default)]
    health_policy: HealthPolicy,
}

#[derive(Clone, Copy, Debug, Deserialize)]
enum Scope {
    Region = 1,
    Zone,
    Subzone,
    Node,
    Cluster,
    Network,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
enum Mode {
    #[default]
    Standard,
    Strict,
    Failover,
    Passthrough,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
enum HealthPolicy {
    #[default]
    OnlyHealthy,
    AllowAll,
}

#[derive(Clone, Copy, Debug, Deserialize)]
enum IpFamilies {
    IPv4 = 1,
    IPv6,
    Dual,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
enum Visibility {
    #[default]
    Public,
    Namespace,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Policy {
    name: String,
    namespace: String,
    scope: PolicyScope,
    action: Action,
    #[serde(default)]
    dry_run: bool,
    #[serde(default)]
    rules: Vec<Vec<Vec<Match>>>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
enum PolicyScope {
    Global,
    Namespace,
    WorkloadSelector,
}

#[derive(Clone, Copy, Debug, Deserialize)]
enum Action {
    Allow,
    Deny,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Match {
    namespaces: Vec<StringMatch>,
    not_namespaces: Vec<StringMatch>,
    service_accounts: Vec<ServiceAccount>,
    not_service_accounts: Vec<ServiceAccount>,
    principals: Vec<StringMatch>,
    not_principals: Vec<StringMatch>,
    source_ips: Vec<Net>,
    not_source_ips: Vec<Net>,
    destination_ips: Vec<Net>,
    not_destination_ips: Vec<Net>,
    destination_ports: Vec<u16>,
    not_destination_ports: Vec<u16>,
}

/// One key and its value, as in `{Prefix: cluster.local/ns/a/}`.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", deny_unknown_fields, default)]
struct StringMatch {
    exact: Option<String>,
    prefix: Option<String>,
    suffix: Option<String>,
    presence: Option<[(); 0]>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct ServiceAccount {
    namespace: String,
    service_account: String,
}

/// A range, or an address that stands for itself.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Net {
    Range(IpNet),
    Address(IpAddr),
}

impl Workload {
    /// What names it: its uid, or one made of its namespace and what else it has.
    pub fn uid(&self) -> String {
        match (self.uid.is_empty(), self.workload_ips.first()) {
            (false, _) => self.uid.clone(),
            (true, Some(ip)) if self.name.is_empty() => format!("local/{}/{ip}", self.namespace),
            (true, None) if self.name.is_empty() => {
                format!("local/{}/{}", self.namespace, self.hostname)
            }
            (true, _) => format!("local//Pod/{}/{}", self.namespace, self.name),
        }
    }

    /// The record a control plane would send.
    ///
    /// # Errors
    /// Which field means nothing.
    pub fn record(self) -> Result<proto::Workload, String> {
        Ok(proto::Workload {
            uid: self.uid(),
            name: self.name,
            namespace: self.namespace,
            addresses: self.workload_ips.iter().map(bytes).collect(),
            network: self.network,
            tunnel_protocol: self.protocol as i32,
            trust_domain: self.trust_domain,
            service_account: self.service_account,
            waypoint: gateway("waypoint", self.waypoint)?,
            node: self.node,
            canonical_name: self.canonical_name,
            canonical_revision: self.canonical_revision,
            workload_type: self.workload_type as i32,
            workload_name: self.workload_name,
            native_tunnel: self.native_tunnel,
            authorization_policies: self.authorization_policies,
            status: self.status as i32,
            cluster_id: self.cluster_id,
            network_gateway: gateway("networkGateway", self.network_gateway)?,
            hostname: self.hostname,
            services: self
                .services
                .into_iter()
                .map(|(name, list)| (name, proto::PortList { ports: ports(list) }))
                .collect(),
            application_tunnel: self
                .application_tunnel
                .map(|tunnel| proto::ApplicationTunnel {
                    protocol: tunnel.protocol as i32,
                    port: tunnel.port.unwrap_or(0).into(),
                }),
            locality: self.locality.map(|locality| proto::Locality {
                region: locality.region,
                zone: locality.zone,
                subzone: locality.subzone,
            }),
            network_mode: self.network_mode as i32,
            capacity: self.capacity,
        })
    }
}

impl Service {
    /// What names it, `namespace/hostname`.
    pub fn key(&self) -> String {
        format!("{}/{}", self.namespace, self.hostname)
    }

    /// The record a control plane would send.
    ///
    /// # Errors
    /// Which field means nothing.
    pub fn record(self) -> Result<proto::Service, String> {
        let mut addresses = Vec::new();
        for vip in &self.vips {
            let address = address(vip).ok_or_else(|| format!("vips: {vip} is not network/ip"))?;
            addresses.push(address);
        }
        addresses.extend(
            self.cidr_vips
                .into_iter()
                .map(|range| proto::NetworkAddress {
                    network: range.network,
                    address: bytes(&range.cidr.network()),
                    length: Some(range.cidr.prefix_len().into()),
                }),
        );
        let weighted = self.weighted_waypoints.into_iter().map(|weighted| {
            Ok(proto::WeightedWaypoint {
                destination: gateway("weightedWaypoints", Some(weighted.destination))?,
                weight: weighted.weight,
            })
        });
        Ok(proto::Service {
            name: self.name,
            namespace: self.namespace,
            hostname: self.hostname,
            addresses,
            ports: ports(self.ports),
            subject_alt_names: self.subject_alt_names,
            waypoint: gateway("waypoint", self.waypoint)?,
            load_balancing: self.load_balancer.map(|balancer| proto::LoadBalancing {
                routing_preference: balancer
                    .routing_preferences
                    .into_iter()
                    .map(|scope| scope as i32)
                    .collect(),
                mode: balancer.mode as i32,
                health_policy: balancer.health_policy as i32,
            }),
            ip_families: self.ip_families.map_or(0, |families| families as i32),
            canonical: self.canonical,
            ingress_use_waypoint: false,
            weighted_waypoints: weighted.collect::<Result<_, String>>()?,
            visibility: self.visibility as i32,
        })
    }
}

impl Policy {
    /// What names it, `namespace/name`.
    pub fn key(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    /// The record a control plane would send.
    pub fn record(self) -> security::Authorization {
        let clause = |matches: Vec<Match>| security::Clause {
            matches: matches.into_iter().map(Match::record).collect(),
        };
        let rule = |clauses: Vec<Vec<Match>>| security::Rule {
            clauses: clauses.into_iter().map(clause).collect(),
        };
        security::Authorization {
            name: self.name,
            namespace: self.namespace,
            scope: self.scope as i32,
            action: self.action as i32,
            rules: self.rules.into_iter().map(rule).collect(),
            dry_run: self.dry_run,
        }
    }
}

impl Match {
    fn record(self) -> security::Match {
        let texts = |list: Vec<StringMatch>| list.into_iter().map(StringMatch::record).collect();
        let nets = |list: Vec<Net>| list.into_iter().map(Net::record).collect();
        let ports = |list: Vec<u16>| list.into_iter().map(u32::from).collect();
        let accounts = |list: Vec<ServiceAccount>| {
            let account = |known: ServiceAccount| security::ServiceAccountMatch {
                namespace: known.namespace,
                service_account: known.service_account,
            };
            list.into_iter().map(account).collect()
        };
        security::Match {
            namespaces: texts(self.namespaces),
            not_namespaces: texts(self.not_namespaces),
            service_accounts: accounts(self.service_accounts),
            not_service_accounts: accounts(self.not_service_accounts),
            principals: texts(self.principals),
            not_principals: texts(self.not_principals),
            source_ips: nets(self.source_ips),
            not_source_ips: nets(self.not_source_ips),
            destination_ips: nets(self.destination_ips),
            not_destination_ips: nets(self.not_destination_ips),
            destination_ports: ports(self.destination_ports),
            not_destination_ports: ports(self.not_destination_ports),
        }
    }
}

impl StringMatch {
    fn record(self) -> security::StringMatch {
        use security::string_match::MatchType;
        let kinds = [
            self.exact.map(MatchType::Exact),
            self.prefix.map(MatchType::Prefix),
            self.suffix.map(MatchType::Suffix),
            self.presence.map(|_| MatchType::Presence(())),
        ];
        let mut given = kinds.into_iter().flatten();
        // What does not say one thing is unreadable, as it would be from a control plane.
        security::StringMatch {
            match_type: given.next().filter(|_| given.next().is_none()),
        }
    }
}

impl Net {
    fn record(self) -> security::Address {
        let net = match self {
            Self::Range(net) => net,
            Self::Address(ip) => ip.into(),
        };
        security::Address {
            address: bytes(&net.addr()),
            length: net.prefix_len().into(),
        }
    }
}

fn ports(ports: Ports) -> Vec<proto::Port> {
    let port = |(service, target): (u16, u16)| proto::Port {
        service_port: service.into(),
        target_port: target.into(),
        app_protocol: 0,
    };
    ports.into_iter().map(port).collect()
}

fn gateway(field: &str, known: Option<Gateway>) -> Result<Option<proto::GatewayAddress>, String> {
    use proto::gateway_address::Destination;
    let Some(known) = known else { return Ok(None) };
    let text = &known.destination;
    let destination = match (address(text), text.split_once('/')) {
        (Some(address), _) => Destination::Address(address),
        (None, Some((namespace, hostname))) => Destination::Hostname(proto::NamespacedHostname {
            namespace: namespace.to_string(),
            hostname: hostname.to_string(),
        }),
        (None, None) => {
            return Err(format!(
                "{field}: {text} is neither network/ip nor namespace/hostname"
            ));
        }
    };
    Ok(Some(proto::GatewayAddress {
        destination: Some(destination),
        hbone_mtls_port: known.hbone_mtls_port.into(),
    }))
}

/// `network/ip`.
fn address(text: &str) -> Option<proto::NetworkAddress> {
    let (network, ip) = text.split_once('/')?;
    Some(proto::NetworkAddress {
        network: network.to_string(),
        address: bytes(&ip.parse().ok()?),
        length: None,
    })
}

fn bytes(ip: &IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}
