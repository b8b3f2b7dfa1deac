//! The mesh at one moment: an immutable snapshot, and every way of looking something up in it.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::endpoints::Endpoints;
use super::few::Few;
use super::service::{CidrAddress, Endpoint, Service, Visibility};
use super::workload::{NamespacedHostname, Workload};
use crate::policy::Policy;

/// A service and its endpoints.
#[derive(Clone, Debug)]
pub struct ServiceEntry {
    pub service: Arc<Service>,
    pub endpoints: Endpoints,
}

/// What is behind an address.
#[derive(Clone, Copy, Debug)]
pub enum Address<'a> {
    Service(&'a Arc<Service>),
    Workload(&'a Arc<Workload>),
}

impl<'a> Address<'a> {
    /// The service, if it is one.
    pub fn service(self) -> Option<&'a Arc<Service>> {
        match self {
            Self::Service(service) => Some(service),
            Self::Workload(_) => None,
        }
    }

    /// The workload, if it is one.
    pub fn workload(self) -> Option<&'a Arc<Workload>> {
        match self {
            Self::Workload(workload) => Some(workload),
            Self::Service(_) => None,
        }
    }
}

/// Namespace and service account.
pub(super) type LocalKey = (Arc<str>, Arc<str>);

/// Everything the control plane has said, as persistent maps: a clone is cheap and never changes.
#[derive(Clone, Debug, Default)]
pub struct Mesh {
    pub(super) workloads: imbl::HashMap<Arc<str>, Arc<Workload>>,
    /// The workloads that claim an address, in the order they came.
    pub(super) by_address: imbl::HashMap<IpAddr, Few<Arc<Workload>>>,
    pub(super) by_workload_hostname: imbl::HashMap<NamespacedHostname, imbl::OrdSet<Arc<str>>>,
    /// The workloads of this node by namespace and service account.
    pub(super) local: imbl::HashMap<LocalKey, imbl::OrdSet<Arc<str>>>,
    pub(super) services: imbl::HashMap<NamespacedHostname, ServiceEntry>,
    pub(super) by_vip: imbl::HashMap<IpAddr, Few<NamespacedHostname>>,
    pub(super) by_hostname: imbl::HashMap<Arc<str>, Few<NamespacedHostname>>,
    /// The services of each range, in the order they came.
    pub(super) by_range: imbl::HashMap<IpNet, Few<NamespacedHostname>>,
    /// How many ranges there are of each family (IPv6 or not) and prefix length.
    pub(super) range_lengths: imbl::OrdMap<(bool, u8), usize>,
    /// Endpoints whose service has not arrived.
    pub(super) staged: imbl::HashMap<NamespacedHostname, Endpoints>,
    pub(super) policies: imbl::HashMap<Arc<str>, Arc<Policy>>,
    /// Keys of the policies for everyone (`""`) or for a namespace.
    pub(super) policies_by_namespace: imbl::HashMap<Arc<str>, imbl::OrdSet<Arc<str>>>,
    /// Policies that are gone for certain, while workloads may still name them.
    pub(super) removed_policies: imbl::HashSet<Arc<str>>,
    pub(super) policies_synced: bool,
}

impl Mesh {
    /// The workload of a uid.
    pub fn workload_by_uid(&self, uid: &str) -> Option<&Arc<Workload>> {
        self.workloads.get(uid)
    }

    /// The workload that owns an address: pods before others, HBONE before plain, then the one that came last.
    pub fn workload_by_ip(&self, network: &str, ip: &IpAddr) -> Option<&Arc<Workload>> {
        let rank = |workload: &Workload| {
            let pod = if workload.uid.contains("//Pod/") {
                2
            } else {
                0
            };
            pod + i32::from(workload.protocol == super::workload::Protocol::Hbone)
        };
        let candidates = self.by_address.get(ip)?;
        candidates
            .iter()
            .filter(|workload| &*workload.network == network)
            .max_by_key(|workload| rank(workload))
    }

    /// A workload of this node by namespace, pod name and service account.
    pub fn local_workload(
        &self,
        namespace: &str,
        name: &str,
        service_account: &str,
    ) -> Option<&Arc<Workload>> {
        let uids = self
            .local
            .get(&(namespace.into(), service_account.into()))?;
        uids.iter()
            .filter_map(|uid| self.workloads.get(uid))
            .find(|workload| &*workload.name == name)
    }

    /// The trust domain of the workloads of this node, if there are any.
    pub fn local_trust_domain(&self) -> Option<&str> {
        let (_, uids) = self.local.iter().next()?;
        let workload = self.workloads.get(uids.get_min()?)?;
        Some(workload.identity.trust_domain())
    }

    /// The workload of a hostname.
    pub fn workload_by_hostname(&self, name: &NamespacedHostname) -> Option<&Arc<Workload>> {
        self.by_workload_hostname
            .get(name)?
            .iter()
            .find_map(|uid| self.workloads.get(uid))
    }

    /// A service with its endpoints.
    pub fn service_entry(&self, key: &NamespacedHostname) -> Option<&ServiceEntry> {
        self.services.get(key)
    }

    /// A service.
    pub fn service(&self, key: &NamespacedHostname) -> Option<&Arc<Service>> {
        self.services.get(key).map(|entry| &entry.service)
    }

    /// What an address means to a client of a namespace: a service's own address first, then a workload's, then a
    /// service's range.
    pub fn lookup(&self, network: &str, ip: &IpAddr, client: Option<&str>) -> Option<Address<'_>> {
        let service = self.service_at(network, ip, client).map(Address::Service);
        let workload = || self.workload_by_ip(network, ip).map(Address::Workload);
        let range = || self.service_around(network, ip, client);
        service
            .or_else(workload)
            .or_else(|| range().map(Address::Service))
    }

    /// The service of a virtual address as a client of a namespace sees it: exact addresses first, then ranges.
    pub fn service_by_vip(
        &self,
        network: &str,
        ip: &IpAddr,
        client: Option<&str>,
    ) -> Option<&Arc<Service>> {
        self.service_at(network, ip, client)
            .or_else(|| self.service_around(network, ip, client))
    }

    fn service_at(
        &self,
        network: &str,
        ip: &IpAddr,
        client: Option<&str>,
    ) -> Option<&Arc<Service>> {
        let on_network = |service: &&Arc<Service>| {
            service
                .vips
                .iter()
                .any(|vip| vip.address == *ip && &*vip.network == network)
        };
        let exact = self
            .by_vip
            .get(ip)
            .into_iter()
            .flatten()
            .filter_map(|key| self.service(key))
            .filter(on_network);
        best(exact, client, None)
    }

    /// The service that has the address in a range, in as many steps as there are prefix lengths.
    fn service_around(
        &self,
        network: &str,
        ip: &IpAddr,
        client: Option<&str>,
    ) -> Option<&Arc<Service>> {
        let mut best: Option<(_, &Arc<Service>)> = None;
        let lengths = self.range_lengths.keys().map(|(v6, length)| (*v6, *length));
        for (_, length) in lengths.filter(|(v6, _)| *v6 == ip.is_ipv6()) {
            let Ok(range) = IpNet::new(*ip, length).map(|range| range.trunc()) else {
                continue;
            };
            let on_network =
                |known: &CidrAddress| known.cidr == range && &*known.network == network;
            for key in self.by_range.get(&range).into_iter().flatten() {
                let Some(service) = self.service(key) else {
                    continue;
                };
                let own = client == Some(&*service.namespace);
                let rank = (own, length, service.canonical);
                if service.cidr_vips.iter().any(on_network)
                    && is_visible(service, client)
                    && best.is_none_or(|(known, _)| rank > known)
                {
                    best = Some((rank, service));
                }
            }
        }
        best.map(|(_, service)| service)
    }

    /// The service of a hostname as a client of a namespace sees it; `preferred` breaks ties after canonical services.
    pub fn best_by_hostname(
        &self,
        hostname: &str,
        client: Option<&str>,
        preferred: Option<&str>,
    ) -> Option<&Arc<Service>> {
        self.best_of_hostname(hostname, client, preferred, |_| true)
    }

    /// The same among the services that qualify.
    pub fn best_of_hostname(
        &self,
        hostname: &str,
        client: Option<&str>,
        preferred: Option<&str>,
        qualifies: impl Fn(&Service) -> bool,
    ) -> Option<&Arc<Service>> {
        let named = self.by_hostname.get(hostname)?.iter();
        let named = named.filter_map(|key| self.service(key));
        best(
            named.filter(|service| qualifies(service)),
            client,
            preferred,
        )
    }

    /// Whether the first set of policies has arrived; until then nobody is let in.
    pub fn policies_synced(&self) -> bool {
        self.policies_synced
    }

    /// Whether the control plane has taken a policy back, rather than not sent it yet.
    pub fn is_removed_policy(&self, key: &str) -> bool {
        self.removed_policies.contains(key)
    }

    /// Whether there is a workload or a service of that resource name.
    pub fn has(&self, name: &str) -> bool {
        let service = || {
            let (namespace, hostname) = name.split_once('/')?;
            let (namespace, hostname) = (namespace.into(), hostname.into());
            self.services.get(&NamespacedHostname {
                namespace,
                hostname,
            })
        };
        self.workloads.contains_key(name) || service().is_some()
    }

    /// A policy by its resource name.
    pub fn policy(&self, key: &str) -> Option<&Arc<Policy>> {
        self.policies.get(key)
    }

    /// The policies for every workload of a namespace; `""` for those for every workload there is.
    pub fn policies_for_namespace<'a>(
        &'a self,
        namespace: &str,
    ) -> impl Iterator<Item = &'a Arc<Policy>> + use<'a> {
        let keys = self.policies_by_namespace.get(namespace);
        keys.into_iter()
            .flatten()
            .filter_map(|key| self.policies.get(key))
    }

    /// All workloads, in no order.
    pub fn workloads(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.workloads.values()
    }

    /// All services, in no order.
    pub fn services(&self) -> impl Iterator<Item = &ServiceEntry> {
        self.services.values()
    }

    /// All policies, in no order.
    pub fn policies(&self) -> impl Iterator<Item = &Arc<Policy>> {
        self.policies.values()
    }

    /// The endpoints that wait for their service.
    pub fn staged(&self) -> impl Iterator<Item = (&NamespacedHostname, &Endpoint)> {
        self.staged
            .iter()
            .flat_map(|(key, endpoints)| endpoints.iter().map(move |endpoint| (key, endpoint)))
    }
}

/// Whether a client of a namespace may see a service; without a namespace everything is seen.
pub fn is_visible(service: &Service, client: Option<&str>) -> bool {
    service.visibility == Visibility::Public
        || client.is_none_or(|namespace| *namespace == *service.namespace)
}

/// Of the visible candidates: one of the client's own namespace, else the last canonical one, else one of the
/// preferred namespace, else the first.
fn best<'a>(
    candidates: impl Iterator<Item = &'a Arc<Service>>,
    client: Option<&str>,
    preferred: Option<&str>,
) -> Option<&'a Arc<Service>> {
    let mut best: Option<(u8, &Arc<Service>)> = None;
    for service in candidates.filter(|service| is_visible(service, client)) {
        let rank = if client == Some(&*service.namespace) {
            return Some(service);
        } else if service.canonical {
            2
        } else {
            u8::from(preferred == Some(&*service.namespace))
        };
        if best.is_none_or(|(known, _)| rank > known || (rank == 2 && known == 2)) {
            best = Some((rank, service));
        }
    }
    best.map(|(_, service)| service)
}

#[cfg(test)]
#[path = "lookup_tests.rs"]
mod tests;
