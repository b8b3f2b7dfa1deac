//! Which endpoint of a service takes a flow.

use std::net::IpAddr;
use std::sync::Arc;

use super::service::{BalanceMode, Endpoint, HealthPolicy, LoadBalancer, Scope};
use super::snapshot::{Mesh, ServiceEntry};
use super::workload::{HealthStatus, Workload};

/// How often a random endpoint is tried before all are looked at.
const DRAWS: usize = 32;

/// What an endpoint must be able to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Serve a port of the service.
    Serve,
    /// Be a waypoint, whose service need not name the port.
    Waypoint,
}

/// What a choice depends on besides the mesh.
pub trait Choose {
    /// A number below `bound`.
    fn random(&mut self, bound: u64) -> u64;

    /// The addresses of a workload that has only a hostname.
    fn resolved(&mut self, _hostname: &str) -> Resolved {
        Resolved::NotYet
    }

    /// Whether a workload failed a moment ago, so that it is only taken when no other is left.
    fn is_shunned(&self, _workload_uid: &str) -> bool {
        false
    }
}

/// What the hostname of a workload resolves to, as far as that is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resolved {
    NotYet,
    Failed,
    /// Perhaps to nothing.
    To(Arc<[IpAddr]>),
}

impl<F: FnMut(u64) -> u64> Choose for F {
    fn random(&mut self, bound: u64) -> u64 {
        self(bound)
    }
}

/// Who chooses.
pub type Chooser<'a> = &'a mut dyn Choose;

/// Picks an endpoint for a client's flow to a port of the service; none when no endpoint can take it.
pub fn pick<'a>(
    mesh: &'a Mesh,
    entry: &'a ServiceEntry,
    client: &Workload,
    port: u16,
    purpose: Purpose,
    chooser: Chooser<'_>,
) -> Option<(&'a Endpoint, &'a Arc<Workload>)> {
    let usable = |endpoint: &'a Endpoint| {
        let workload = mesh.workload_by_uid(&endpoint.workload_uid)?;
        is_usable(entry, endpoint, workload, client, port, purpose).then_some((endpoint, workload))
    };
    let ranked = entry.service.load_balancer.as_ref().filter(|balancer| {
        matches!(balancer.mode, BalanceMode::Strict | BalanceMode::Failover)
            && !balancer.routing_preferences.is_empty()
    });
    let Some(balancer) = ranked else {
        if let Some(drawn) = draw(entry, usable, chooser) {
            return Some(drawn);
        }
        let mut candidates = Candidates::default();
        for candidate in entry.endpoints.iter().filter_map(usable) {
            candidates.add(0, candidate, chooser);
        }
        return candidates.pick(chooser);
    };
    let mut candidates = Candidates::default();
    for (endpoint, workload) in entry.endpoints.iter().filter_map(usable) {
        let rank = rank(balancer, client, workload);
        if balancer.mode == BalanceMode::Failover || rank.complete {
            candidates.add(rank.score, (endpoint, workload), chooser);
        }
    }
    candidates.pick(chooser)
}

type Candidate<'a> = (&'a Endpoint, &'a Arc<Workload>);

/// The candidates of the best rank so far: those that work, and those that failed a moment ago.
#[derive(Default)]
struct Candidates<'a> {
    sound: Ranked<'a>,
    shunned: Ranked<'a>,
}

#[derive(Default)]
struct Ranked<'a> {
    best: usize,
    list: Vec<Candidate<'a>>,
}

impl<'a> Candidates<'a> {
    fn add(&mut self, rank: usize, candidate: Candidate<'a>, chooser: Chooser<'_>) {
        // One without weight is never chosen, so it must not keep others from being chosen.
        if candidate.0.capacity == 0 {
            return;
        }
        let ranked = match chooser.is_shunned(&candidate.0.workload_uid) {
            false => &mut self.sound,
            true => &mut self.shunned,
        };
        if rank > ranked.best {
            ranked.best = rank;
            ranked.list.clear();
        }
        if rank == ranked.best {
            ranked.list.push(candidate);
        }
    }

    fn pick(self, chooser: Chooser<'_>) -> Option<Candidate<'a>> {
        match self.sound.list.is_empty() {
            false => weighted(self.sound.list, chooser),
            true => weighted(self.shunned.list, chooser),
        }
    }
}

fn is_usable(
    entry: &ServiceEntry,
    endpoint: &Endpoint,
    workload: &Workload,
    client: &Workload,
    port: u16,
    purpose: Purpose,
) -> bool {
    let balancer = entry.service.load_balancer.as_ref();
    let any_health =
        balancer.is_some_and(|balancer| balancer.health_policy == HealthPolicy::AllowAll);
    if !any_health && endpoint.status == HealthStatus::Unhealthy {
        return false;
    }
    if workload.addresses.is_empty()
        && workload.hostname.is_empty()
        && (workload.network == client.network || workload.network_gateway.is_none())
    {
        return false;
    }
    match (entry.service.ports.get(&port), purpose) {
        (Some(0), Purpose::Serve) => match endpoint.ports.get(&port) {
            None => false,
            Some(0) => {
                let tunnel = workload.application_tunnel;
                tunnel.is_some_and(|tunnel| tunnel.port.is_some())
            }
            Some(_) => true,
        },
        (Some(_), _) => true,
        (None, Purpose::Serve) => false,
        (None, Purpose::Waypoint) => workload.application_tunnel.is_some(),
    }
}

/// Draws until an endpoint is usable, in proportion to the weights, without looking at all of them.
fn draw<'a, T>(
    entry: &'a ServiceEntry,
    usable: impl Fn(&'a Endpoint) -> Option<T>,
    chooser: Chooser<'_>,
) -> Option<T> {
    let (count, heaviest) = (entry.endpoints.len(), entry.endpoints.heaviest());
    if count == 0 || heaviest == 0 {
        return None;
    }
    (0..DRAWS).find_map(|_| {
        let position = chooser.random(count as u64) as usize;
        let endpoint = entry.endpoints.at(position)?;
        let kept = heaviest == 1 && endpoint.capacity == 1
            || chooser.random(heaviest.into()) < endpoint.capacity.into();
        (kept && !chooser.is_shunned(&endpoint.workload_uid))
            .then(|| usable(endpoint))
            .flatten()
    })
}

fn weighted<'a>(candidates: Vec<Candidate<'a>>, chooser: Chooser<'_>) -> Option<Candidate<'a>> {
    let total: u64 = candidates
        .iter()
        .map(|(endpoint, _)| u64::from(endpoint.capacity))
        .sum();
    if total == 0 {
        return None;
    }
    let mut left = chooser.random(total);
    candidates.into_iter().find(|(endpoint, _)| {
        let weight = u64::from(endpoint.capacity);
        let chosen = left < weight;
        left = left.saturating_sub(weight);
        chosen
    })
}

struct Rank {
    score: usize,
    /// Whether every preference matched.
    complete: bool,
}

/// Each preference that matches counts one, up to the first that does not. With the network first, sharing it counts
/// more than all others together, and not sharing it does not end the count.
fn rank(balancer: &LoadBalancer, client: &Workload, workload: &Workload) -> Rank {
    let preferences = &balancer.routing_preferences;
    let mut rank = Rank {
        score: 0,
        complete: true,
    };
    for (position, scope) in preferences.iter().enumerate() {
        let network_first = position == 0 && *scope == Scope::Network;
        if shares(*scope, client, workload) {
            rank.score += if network_first { preferences.len() } else { 1 };
        } else {
            rank.complete = false;
            if !network_first {
                break;
            }
        }
    }
    rank
}

fn shares(scope: Scope, a: &Workload, b: &Workload) -> bool {
    match scope {
        Scope::Network => a.network == b.network,
        Scope::Region => a.locality.region == b.locality.region,
        Scope::Zone => a.locality.zone == b.locality.zone,
        Scope::Subzone => a.locality.subzone == b.locality.subzone,
        Scope::Node => a.node == b.node,
        Scope::Cluster => a.cluster_id == b.cluster_id,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::service::Service;
    use crate::mesh::store::AddressResource as Resource;
    use crate::mesh::testing::{key, mesh, pod, service, serving};

    /// Picks many times with evenly spread randomness; gives how often each pod was picked.
    fn picks(service: Service, pods: Vec<Workload>, port: u16) -> Vec<(String, usize)> {
        let client = pod("a", "client", "10.0.0.1");
        let pods = pods
            .into_iter()
            .map(|pod| Resource::Workload(serving(pod, &service)));
        let mesh = mesh(pods.chain([Resource::Service(service.clone())]).collect());
        let entry = mesh
            .service_entry(&key(&service.namespace, &service.name))
            .unwrap();
        let mut state = 1u64;
        let mut random = |bound: u64| {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            (state >> 33) % bound
        };
        let mut counts = std::collections::BTreeMap::new();
        for _ in 0..1000 {
            if let Some((_, workload)) =
                pick(&mesh, entry, &client, port, Purpose::Serve, &mut random)
            {
                *counts.entry(workload.name.to_string()).or_default() += 1;
            }
        }
        counts.into_iter().collect()
    }

    fn names(picks: Vec<(String, usize)>) -> Vec<String> {
        picks.into_iter().map(|(name, _)| name).collect()
    }

    #[test]
    fn endpoints_share_by_capacity() {
        let mut heavy = pod("b", "heavy", "10.0.0.2");
        heavy.capacity = 3;
        let picked = picks(
            service("b", "web", "10.96.0.1"),
            vec![heavy, pod("b", "light", "10.0.0.3")],
            80,
        );
        let heavy = picked[0].1;
        assert!((700..800).contains(&heavy), "{picked:?}");
        let mut none = pod("b", "none", "10.0.0.2");
        none.capacity = 0;
        assert!(picks(service("b", "web", "10.96.0.1"), vec![none], 80).is_empty());
    }

    #[test]
    fn only_endpoints_that_can_serve_are_picked() {
        let web = || service("b", "web", "10.96.0.1");
        let sick = || {
            let mut workload = pod("b", "sick", "10.0.0.2");
            workload.status = HealthStatus::Unhealthy;
            workload
        };
        let well = || pod("b", "well", "10.0.0.3");
        assert_eq!(names(picks(web(), vec![sick(), well()], 80)), ["well"]);
        assert!(picks(web(), vec![well()], 81).is_empty());
        let mut patient = web();
        patient.load_balancer = Some(LoadBalancer {
            routing_preferences: vec![],
            mode: BalanceMode::Standard,
            health_policy: HealthPolicy::AllowAll,
        });
        assert_eq!(
            names(picks(patient, vec![sick(), well()], 80)),
            ["sick", "well"]
        );
        let mut unreachable = well();
        unreachable.addresses = Default::default();
        assert!(picks(web(), vec![unreachable], 80).is_empty());
    }

    #[test]
    fn an_endpoint_without_addresses_is_picked_when_something_leads_to_it() {
        use crate::mesh::workload::{GatewayAddress, GatewayDestination};
        let gateway = || GatewayAddress {
            destination: GatewayDestination::Hostname(key("b", "gw")),
            hbone_mtls_port: 15008,
        };
        // network, hostname, gateway of the network, whether it is picked
        let cases = [
            ("", "", None, false),
            ("", "", Some(gateway()), false),
            ("far", "", None, false),
            ("far", "", Some(gateway()), true),
            ("", "db.example", None, true),
        ];
        for (network, hostname, gateway, picked) in cases {
            let told = format!("{network} {hostname} {gateway:?}");
            let mut bare = pod("b", "bare", "10.0.0.2");
            bare.addresses = Default::default();
            (bare.network, bare.hostname) = (network.into(), hostname.into());
            bare.network_gateway = gateway.map(Box::new);
            let found = picks(service("b", "web", "10.96.0.1"), vec![bare], 80);
            assert_eq!(!found.is_empty(), picked, "{told}");
        }
    }

    #[test]
    fn an_endpoint_that_cannot_resolve_a_named_port_is_not_picked() {
        use crate::mesh::workload::{ApplicationTunnel, TunnelProtocol};
        let mut web = service("b", "web", "10.96.0.1");
        web.ports = [(80, 0)].into();
        let tunnel = |port| {
            let protocol = TunnelProtocol::None;
            Some(ApplicationTunnel { protocol, port })
        };
        // the endpoint's own ports, its application tunnel, whether it is picked
        let cases = [
            (vec![(80, 8080)], None, true),
            (vec![(80, 0)], None, false),
            (vec![(81, 8080)], None, false),
            (vec![], None, false),
            (vec![(80, 0)], tunnel(Some(15088)), true),
            (vec![(80, 0)], tunnel(None), false),
            (vec![], tunnel(Some(15088)), false),
        ];
        for (ports, tunnel, picked) in cases {
            let client = pod("a", "client", "10.0.0.1");
            let mut unclear = pod("b", "unclear", "10.0.0.2");
            let told = format!("{ports:?} {tunnel:?}");
            unclear
                .services
                .insert(web.key(), ports.into_iter().collect());
            unclear.application_tunnel = tunnel;
            let mesh = mesh(vec![
                Resource::Service(web.clone()),
                Resource::Workload(unclear),
            ]);
            let entry = mesh.service_entry(&web.key()).unwrap();
            let found = pick(&mesh, entry, &client, 80, Purpose::Serve, &mut |_: u64| 0);
            assert_eq!(found.is_some(), picked, "{told}");
        }
    }

    #[test]
    fn an_endpoint_that_failed_is_taken_last() {
        struct Shuns(&'static [&'static str], u64);
        impl Choose for Shuns {
            fn random(&mut self, bound: u64) -> u64 {
                self.1 += 1;
                self.1 % bound
            }
            fn is_shunned(&self, workload_uid: &str) -> bool {
                self.0.iter().any(|name| workload_uid.ends_with(name))
            }
        }
        let client = pod("a", "client", "10.0.0.1");
        let preferring = LoadBalancer {
            routing_preferences: vec![Scope::Node],
            mode: BalanceMode::Failover,
            health_policy: HealthPolicy::OnlyHealthy,
        };
        for balancer in [None, Some(preferring)] {
            let mut web = service("b", "web", "10.96.0.1");
            web.load_balancer = balancer;
            let mut near = serving(pod("b", "near", "10.0.0.2"), &web);
            near.node = "n1".into();
            let mut far = serving(pod("b", "far", "10.0.0.3"), &web);
            far.node = "n2".into();
            let mesh = mesh(vec![
                Resource::Service(web.clone()),
                Resource::Workload(near),
                Resource::Workload(far),
            ]);
            let entry = mesh.service_entry(&web.key()).unwrap();
            let picked = |shunned| {
                let mut chooser = Shuns(shunned, 0);
                let mut names: Vec<_> = (0..20)
                    .filter_map(|_| pick(&mesh, entry, &client, 80, Purpose::Serve, &mut chooser))
                    .map(|(_, workload)| workload.name.to_string())
                    .collect();
                names.sort();
                names.dedup();
                names
            };
            assert_eq!(picked(&["near"]), ["far"]);
            assert_eq!(picked(&["far"]), ["near"]);
            assert!(!picked(&["near", "far"]).is_empty());
        }
    }

    #[test]
    fn near_endpoints_come_first_and_strict_takes_no_others() {
        let placed = |name: &str, network: &str, node: &str| {
            let mut workload = pod("b", name, "10.0.0.2");
            (workload.network, workload.node) = (network.into(), node.into());
            workload
        };
        let near = || placed("near", "", "n1");
        let same_network = || placed("same-network", "", "n2");
        let far = || placed("far", "other", "n1");
        let with = |mode, preferences: &[Scope]| {
            let mut web = service("b", "web", "10.96.0.1");
            web.load_balancer = Some(LoadBalancer {
                routing_preferences: preferences.to_vec(),
                mode,
                health_policy: HealthPolicy::OnlyHealthy,
            });
            web
        };
        use BalanceMode::{Failover, Strict};
        use Scope::{Network, Node};
        let cases = [
            (
                Failover,
                &[Node][..],
                vec![near(), same_network()],
                vec!["near"],
            ),
            (
                Failover,
                &[Node],
                vec![same_network()],
                vec!["same-network"],
            ),
            (Strict, &[Node], vec![same_network()], vec![]),
            (
                Failover,
                &[Network, Node],
                vec![same_network(), far()],
                vec!["same-network"],
            ),
            (
                Failover,
                &[Network, Node],
                vec![far(), placed("farther", "other", "n2")],
                vec!["far"],
            ),
            (
                Strict,
                &[Network, Node],
                vec![near(), same_network(), far()],
                vec!["near"],
            ),
        ];
        for (mode, preferences, pods, expected) in cases {
            assert_eq!(
                names(picks(with(mode, preferences), pods, 80)),
                expected,
                "{mode:?} {preferences:?}"
            );
        }
    }
}
