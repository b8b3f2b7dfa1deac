//! The configuration as the dump shows it; secrets are never part of it.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use serde_json::{Value, json};

use crate::config::{
    Config, ControlPeer, ListenAddress, Mode, RootSource, SOCKS5_PORT, WorkloadName,
};

fn duration(time: Duration) -> Value {
    json!({ "secs": time.as_secs(), "nanos": time.subsec_nanos() })
}

fn listen(address: ListenAddress, ipv6: bool) -> Value {
    match address {
        ListenAddress::Localhost(port) => json!({ "Localhost": [ipv6, port] }),
        ListenAddress::At(address) => socket(address),
    }
}

fn socket(address: SocketAddr) -> Value {
    json!({ "SocketAddr": address.to_string() })
}

fn named(workload: &WorkloadName) -> Value {
    json!({
        "namespace": workload.namespace, "name": workload.name, "serviceAccount": workload.service_account,
    })
}

fn root(peer: &ControlPeer) -> Value {
    match &peer.root {
        RootSource::File(path) => json!({ "File": path }),
        RootSource::System => json!("Default"),
        RootSource::Inline(_) => json!("Static"),
    }
}

/// Every effective setting.
pub fn config(config: &Config) -> Value {
    let wildcard = |port| socket(SocketAddr::new(config.wildcard(), port));
    let dedicated = match &config.mode {
        Mode::Dedicated(name) => Some(name),
        Mode::Shared => None,
    };
    let mut dump = json!({
        "proxy": config.proxy,
        "dnsProxy": config.dns,
        "windowSize": config.stream_window,
        "connectionWindowSize": config.connection_window,
        "frameSize": config.frame_size,
        "poolMaxStreamsPerConn": config.pool_max_streams,
        "poolUnusedReleaseTimeout": duration(config.pool_unused_release),
        "socks5Addr": config.socks5.then(|| socket((Ipv4Addr::LOCALHOST, SOCKS5_PORT).into())),
        "adminAddr": listen(config.admin, config.ipv6),
        "statsAddr": socket(config.stats),
        "readinessAddr": socket(config.readiness),
        "inboundAddr": wildcard(crate::config::HBONE_PORT),
        "inboundPlaintextAddr": wildcard(crate::config::PLAINTEXT_PORT),
        "outboundAddr": wildcard(crate::config::OUTBOUND_PORT),
        "dnsProxyAddr": listen(config.dns_address, config.ipv6),
        "illegalPorts": config.illegal_ports(),
        "network": config.network,
        "localNode": config.node,
        "proxyMode": if dedicated.is_some() { "Dedicated" } else { "Shared" },
        "proxyWorkloadInformation": dedicated.map(named),
        "clusterId": config.cluster_id,
        "clusterDomain": config.cluster_domain,
        "caAddress": config.ca.address,
        "caRootCert": root(&config.ca),
        "altCaHostname": config.ca.alt_hostname,
        "spiffeEndpointSocket": config.spiffe_socket,
        "xdsAddress": config.xds.address,
        "xdsRootCert": root(&config.xds),
        "altXdsHostname": config.xds.alt_hostname,
        "preferedServiceNamespace": config.preferred_service_namespace,
        "secretTtl": duration(config.secret_ttl),
    });
    let rest = json!({
        "xdsOnDemand": config.on_demand,
        "fakeCa": config.fake_ca,
        "fakeSelfInbound": false,
        "selfTerminationDeadline": duration(config.termination_deadline),
        "proxyMetadata": config.metadata,
        "numWorkerThreads": config.workers,
        "requireOriginalSource": config.original_source,
        "proxyArgs": config.arguments,
        "inpodUds": config.zds_path,
        "inpodPortReuse": config.port_reuse,
        "packetMark": config.packet_mark,
        "socketConfig": {
            "keepaliveTime": duration(config.keepalive.time),
            "keepaliveInterval": duration(config.keepalive.interval),
            "keepaliveRetries": config.keepalive.retries,
            "keepaliveEnabled": config.keepalive.enabled,
            "userTimeoutEnabled": config.keepalive.user_timeout,
        },
        "xdsHeaders": headers(&config.xds),
        "caHeaders": headers(&config.ca),
        "localhostAppTunnel": config.localhost_app_tunnel,
        "ztunnelIdentity": config.own_workload.as_ref().map(|own| {
            hbone::Identity::new(&config.trust_domain, &own.namespace, &own.service_account).to_string()
        }),
        "ztunnelWorkload": config.own_workload.as_ref().map(named),
        "ipv6Enabled": config.ipv6,
        "crlPath": config.crl,
        "enableEnhancedBaggage": config.response_baggage,
    });
    if let (Some(all), Value::Object(rest)) = (dump.as_object_mut(), rest) {
        all.extend(rest);
    }
    dump
}

/// The extra headers by name; their values may be secrets.
fn headers(peer: &ControlPeer) -> Value {
    peer.headers
        .iter()
        .map(|(name, _)| json!([name, "hidden"]))
        .collect()
}
