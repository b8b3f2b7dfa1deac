//! The configuration as the dump shows it; secrets are never part of it.

use std::net::SocketAddr;
use std::time::Duration;

use serde_json::{Value, json};

use crate::config::{Config, ControlPeer, ILLEGAL_PORTS, ListenAddress, RootSource};

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
    let own = json!({
        "namespace": config.pod_namespace, "name": config.pod_name, "trustDomain": config.trust_domain,
    });
    let mut dump = json!({
        "proxy": true,
        "dnsProxy": config.dns,
        "windowSize": config.stream_window,
        "connectionWindowSize": config.connection_window,
        "frameSize": config.frame_size,
        "poolMaxStreamsPerConn": config.pool_max_streams,
        "poolUnusedReleaseTimeout": duration(config.pool_unused_release),
        "socks5Addr": null,
        "adminAddr": listen(config.admin, config.ipv6),
        "statsAddr": socket(config.stats),
        "readinessAddr": socket(config.readiness),
        "inboundAddr": wildcard(crate::config::HBONE_PORT),
        "inboundPlaintextAddr": wildcard(crate::config::PLAINTEXT_PORT),
        "outboundAddr": wildcard(crate::config::OUTBOUND_PORT),
        "dnsProxyAddr": listen(config.dns_address, config.ipv6),
        "illegalPorts": ILLEGAL_PORTS,
        "network": config.network,
        "localNode": config.node,
        "proxyMode": "Shared",
        "proxyWorkloadInformation": null,
        "clusterId": config.cluster_id,
        "clusterDomain": config.cluster_domain,
        "caAddress": config.ca.address,
        "caRootCert": root(&config.ca),
        "altCaHostname": config.ca.alt_hostname,
        "xdsAddress": config.xds.address,
        "xdsRootCert": root(&config.xds),
        "altXdsHostname": config.xds.alt_hostname,
        "preferedServiceNamespace": config.preferred_service_namespace,
        "secretTtl": duration(config.secret_ttl),
    });
    let rest = json!({
        "xdsOnDemand": false,
        "fakeCa": false,
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
        "localhostAppTunnel": false,
        "ztunnelIdentity": null,
        "ztunnelWorkload": if config.pod_name.is_empty() { Value::Null } else { own },
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
