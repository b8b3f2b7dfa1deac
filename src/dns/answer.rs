//! What a name means to a client in the mesh.

use std::net::IpAddr;
use std::sync::Arc;

use crate::mesh::Mesh;
use crate::mesh::service::{HealthPolicy, IpFamilies, Service};
use crate::mesh::workload::{HealthStatus, Workload};

/// What resolving depends on besides the mesh.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The cluster's domain, `cluster.local` for example.
    pub domain: String,
    /// The search domains of the clients; none for those that a client's namespace gives it in a cluster.
    pub search: Option<Vec<String>>,
    /// Whose services win among those of one name.
    pub preferred_namespace: Option<String>,
    pub ipv6: bool,
}

/// What is answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resolution {
    /// The mesh does not know the name.
    Forward,
    /// The name is known; there may be no address of the family asked for.
    Known {
        /// The name that owns the addresses, when it is another than the one asked for.
        alias: Option<String>,
        addresses: Vec<IpAddr>,
    },
}

struct Alias {
    name: String,
    /// The name without a search domain that the client appended.
    stripped: Option<String>,
}

/// Resolves a name (lower case, without the final dot) for a client to IPv6 (`v6`) or IPv4 addresses.
pub fn resolve(
    mesh: &Mesh,
    settings: &Settings,
    client: &Workload,
    name: &str,
    v6: bool,
) -> Resolution {
    for alias in aliases(name, &client.namespace, settings) {
        for candidate in candidates(&alias.name) {
            let Some(service) = find(mesh, settings, client, &candidate) else {
                continue;
            };
            let wildcard = candidate.starts_with("*.");
            return Resolution::Known {
                alias: alias.stripped.filter(|_| !wildcard),
                addresses: addresses(mesh, settings, client, service, v6),
            };
        }
    }
    Resolution::Forward
}

fn aliases(name: &str, namespace: &str, settings: &Settings) -> Vec<Alias> {
    let domain = &settings.domain;
    let mut all: Vec<Alias> = Vec::new();
    let mut add = |name: String, stripped: Option<&str>| {
        if !all.iter().any(|known| known.name == name) {
            all.push(Alias {
                name,
                stripped: stripped.map(str::to_string),
            });
        }
    };
    add(name.to_string(), None);
    for expanded in expansions(name, namespace, domain) {
        add(expanded, None);
    }
    let of_cluster = || {
        vec![
            format!("{namespace}.svc.{domain}"),
            format!("svc.{domain}"),
            domain.clone(),
        ]
    };
    for search in settings.search.clone().unwrap_or_else(of_cluster) {
        let Some(stripped) = name
            .strip_suffix(&*search)
            .and_then(|rest| rest.strip_suffix('.'))
        else {
            continue;
        };
        add(stripped.to_string(), Some(stripped));
        for expanded in expansions(stripped, namespace, domain) {
            add(expanded, Some(stripped));
        }
    }
    all
}

/// The full names that a short Kubernetes name may stand for.
fn expansions(name: &str, namespace: &str, domain: &str) -> Vec<String> {
    let labels: Vec<&str> = name.split('.').collect();
    match labels[..] {
        [service] => vec![format!("{service}.{namespace}.svc.{domain}")],
        [a, b] => vec![
            format!("{a}.{b}.svc.{domain}"),
            format!("{a}.{b}.{namespace}.svc.{domain}"),
        ],
        [a, b, "svc"] => vec![
            format!("{a}.{b}.svc.{domain}"),
            format!("{a}.{b}.svc.svc.{domain}"),
        ],
        [a, b, c] => vec![format!("{a}.{b}.{c}.svc.{domain}")],
        [a, b, c, "svc"] => vec![format!("{a}.{b}.{c}.svc.{domain}")],
        _ => Vec::new(),
    }
}

/// The name itself, then the wildcards that cover it, the closest first.
fn candidates(name: &str) -> impl Iterator<Item = String> {
    let rests = name
        .match_indices('.')
        .map(|(at, _)| format!("*{}", &name[at..]));
    std::iter::once(name.to_string()).chain(rests)
}

fn find<'a>(
    mesh: &'a Mesh,
    settings: &Settings,
    client: &Workload,
    hostname: &str,
) -> Option<&'a Arc<Service>> {
    let preferred = settings.preferred_namespace.as_deref();
    let kubernetes = format!(".svc.{}", settings.domain);
    mesh.best_of_hostname(hostname, Some(&client.namespace), preferred, |service| {
        !service.vips.is_empty() || service.hostname.ends_with(&kubernetes)
    })
}

fn addresses(
    mesh: &Mesh,
    settings: &Settings,
    client: &Workload,
    service: &Service,
    v6: bool,
) -> Vec<IpAddr> {
    let served = match service.ip_families {
        None | Some(IpFamilies::Dual) => true,
        Some(IpFamilies::Ipv4) => !v6,
        Some(IpFamilies::Ipv6) => v6,
    };
    if !served || (v6 && !settings.ipv6) {
        return Vec::new();
    }
    let wanted = |ip: &IpAddr| ip.is_ipv6() == v6;
    if !service.vips.is_empty() {
        let vips = service
            .vips
            .iter()
            .filter(|vip| vip.network == client.network);
        return vips.map(|vip| vip.address).filter(wanted).collect();
    }
    let any_health = service
        .load_balancer
        .as_ref()
        .is_some_and(|lb| lb.health_policy == HealthPolicy::AllowAll);
    let endpoints = mesh
        .service_entry(&service.key())
        .into_iter()
        .flat_map(|entry| entry.endpoints.iter());
    endpoints
        .filter(|endpoint| any_health || endpoint.status == HealthStatus::Healthy)
        .filter_map(|endpoint| mesh.workload_by_uid(&endpoint.workload_uid))
        .filter_map(|workload| workload.addresses.iter().copied().find(wanted))
        .collect()
}

#[cfg(test)]
#[path = "answer_tests.rs"]
mod tests;
