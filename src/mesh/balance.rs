//! Which endpoint of a service takes a flow.

use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;

use super::service::{BalanceMode, Endpoint, HealthPolicy, LoadBalancer, Scope};
use super::snapshot::{Mesh, ServiceEntry};
use super::workload::{HealthStatus, Workload};

/// How often a random endpoint is tried before all are looked at.
const DRAWS: usize = 32;

/// What an endpoint must be able to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
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

    /// The ranking, computed unless it is known and nothing that it depends on has changed.
    fn ranking(&mut self, _of: RankingOf<'_>, compute: &dyn Fn() -> Ranking) -> Rc<Ranking> {
        Rc::new(compute())
    }

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
    let drawn = match ranked.is_none() && entry.endpoints.are_alike() {
        true => draw(entry, usable, chooser),
        false => {
            let of = RankingOf {
                entry,
                client,
                port,
                purpose,
            };
            let rank = |workload: &Workload| match ranked {
                None => Some(0),
                Some(balancer) => rank_in(balancer, client, workload),
            };
            let ranking = chooser.ranking(of, &|| Ranking::new(entry, &usable, &rank));
            ranking.draw(entry, &usable, chooser)
        }
    };
    if drawn.is_some() {
        return drawn;
    }
    // Few can take the flow, or failed a moment ago: all are looked at.
    let mut candidates = Candidates::default();
    for (endpoint, workload) in entry.endpoints.iter().filter_map(usable) {
        let rank = match ranked {
            None => Some(0),
            Some(balancer) => rank_in(balancer, client, workload),
        };
        if let Some(rank) = rank {
            candidates.add(rank, (endpoint, workload), chooser);
        }
    }
    candidates.pick(chooser)
}

/// What a ranking depends on.
#[derive(Clone, Copy)]
pub struct RankingOf<'a> {
    pub entry: &'a ServiceEntry,
    pub client: &'a Workload,
    pub port: u16,
    pub purpose: Purpose,
}

/// The endpoints of a service that are the best for a client, with their weights added up, so that one is drawn without a
/// look at the others.
#[derive(Debug, Default)]
pub struct Ranking {
    /// Places among the service's endpoints.
    places: Box<[u32]>,
    /// The weights up to and with each.
    sums: Box<[u64]>,
}

impl Ranking {
    fn new<'a>(
        entry: &'a ServiceEntry,
        usable: &dyn Fn(&'a Endpoint) -> Option<Candidate<'a>>,
        rank: &dyn Fn(&Workload) -> Option<usize>,
    ) -> Self {
        let (mut best, mut places) = (0, Vec::new());
        for (place, endpoint) in entry.endpoints.iter().enumerate() {
            let weight = u64::from(endpoint.capacity);
            let rank = usable(endpoint).and_then(|(_, workload)| rank(workload));
            let Some(rank) = rank.filter(|rank| weight > 0 && *rank >= best) else {
                continue;
            };
            if rank > best {
                best = rank;
                places.clear();
            }
            places.push((place as u32, weight));
        }
        let mut sum = 0;
        let sums = places.iter().map(|(_, weight)| {
            sum += weight;
            sum
        });
        Self {
            sums: sums.collect(),
            places: places.iter().map(|(place, _)| *place).collect(),
        }
    }

    fn draw<'a>(
        &self,
        entry: &'a ServiceEntry,
        usable: &dyn Fn(&'a Endpoint) -> Option<Candidate<'a>>,
        chooser: Chooser<'_>,
    ) -> Option<Candidate<'a>> {
        let total = *self.sums.last()?;
        (0..DRAWS).find_map(|_| {
            let drawn = chooser.random(total);
            let place = self.sums.partition_point(|sum| *sum <= drawn);
            let endpoint = entry.endpoints.at(*self.places.get(place)? as usize)?;
            (!chooser.is_shunned(&endpoint.workload_uid))
                .then(|| usable(endpoint))
                .flatten()
        })
    }
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

/// Draws until an endpoint is usable, all of which have one weight, without looking at all of them.
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
        (!chooser.is_shunned(&endpoint.workload_uid))
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

/// The rank of a workload; none if it does not match all that it must.
fn rank_in(balancer: &LoadBalancer, client: &Workload, workload: &Workload) -> Option<usize> {
    let rank = rank(balancer, client, workload);
    let counts = balancer.mode == BalanceMode::Failover || rank.complete;
    counts.then_some(rank.score)
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
#[path = "balance_tests.rs"]
mod tests;
