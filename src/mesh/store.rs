//! The writing side of the mesh: applies what the control plane sends and hands out snapshots.

use std::net::IpAddr;
use std::sync::Arc;

use hbone::Identity;
use ipnet::IpNet;

use super::endpoints::Endpoints;
use super::few::Few;
use super::service::{Endpoint, Service};
use super::snapshot::{LocalKey, Mesh, ServiceEntry};
use super::workload::{NamespacedHostname, NetworkMode, Protocol, Workload};
use crate::policy::Policy;
use crate::policy::model::Scope;

/// So many names of removed policies are kept without a look at who still names them.
const REMOVED_POLICIES: usize = 1024;

/// One resource of the address type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AddressResource {
    Workload(Workload),
    Service(Service),
}

impl AddressResource {
    /// Its resource name: a workload's uid, a service's `namespace/hostname`.
    pub fn name(&self) -> String {
        match self {
            Self::Workload(workload) => workload.uid.to_string(),
            Self::Service(service) => service.key().to_string(),
        }
    }
}

/// What an update means to those who keep certificates.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Identities of this node that will soon need a certificate, each once.
    pub wanted: Vec<Identity>,
    /// Identities that no workload of this node has any more, each once.
    pub unwanted: Vec<Identity>,
}

/// The mutable mesh; one owner, on the control thread.
#[derive(Debug, Default)]
pub struct Store {
    mesh: Mesh,
    /// Whose workloads are local; empty makes every workload local.
    node: String,
}

impl Store {
    /// An empty store for the node of that name; without a name every workload counts as local.
    pub fn new(node: impl Into<String>) -> Self {
        Self {
            mesh: Mesh::default(),
            node: node.into(),
        }
    }

    /// The mesh as it is now.
    pub fn snapshot(&self) -> Arc<Mesh> {
        Arc::new(self.mesh.clone())
    }

    /// Applies one response: removals by resource name, then workloads and services in order.
    pub fn apply_addresses(
        &mut self,
        upserts: Vec<AddressResource>,
        removals: &[String],
    ) -> Changes {
        let mut changes = Changes::default();
        for name in removals {
            self.remove_address(name, &mut changes);
        }
        for resource in upserts {
            match resource {
                AddressResource::Workload(workload) => self.put_workload(workload, &mut changes),
                AddressResource::Service(service) => self.put_service(service),
            }
        }
        for identities in [&mut changes.wanted, &mut changes.unwanted] {
            identities.sort();
            identities.dedup();
        }
        changes.wanted.retain(|identity| {
            self.local_with(identity)
                .any(|workload| presents_certificate(workload))
        });
        changes
            .unwanted
            .retain(|identity| self.local_with(identity).next().is_none());
        changes
    }

    /// The workloads of this node that have an identity.
    fn local_with(&self, identity: &Identity) -> impl Iterator<Item = &Arc<Workload>> {
        let key = (
            identity.namespace().into(),
            identity.service_account().into(),
        );
        let uids = self.mesh.local.get(&key);
        uids.into_iter()
            .flatten()
            .filter_map(|uid| self.mesh.workloads.get(uid))
            .filter(move |workload| workload.identity == *identity)
    }

    /// Applies one response of policies.
    pub fn apply_policies(&mut self, upserts: Vec<Policy>, removals: &[String]) {
        for key in removals {
            self.remove_policy(key);
            self.mesh.removed_policies.insert(key.as_str().into());
        }
        self.forget_removed_policies();
        for policy in upserts {
            self.remove_policy(&policy.key);
            self.mesh.removed_policies.remove(&policy.key);
            let namespace = match policy.scope {
                Scope::Global => Some(Arc::from("")),
                Scope::Namespace => Some(policy.namespace.clone()),
                Scope::WorkloadSelector => None,
            };
            if let Some(namespace) = namespace {
                self.mesh
                    .policies_by_namespace
                    .entry(namespace)
                    .or_default()
                    .insert(policy.key.clone());
            }
            self.mesh
                .policies
                .insert(policy.key.clone(), Arc::new(policy));
        }
    }

    /// Keeps the names of removed policies from piling up: only those that are still named matter.
    fn forget_removed_policies(&mut self) {
        if self.mesh.removed_policies.len() > REMOVED_POLICIES {
            let workloads = self.mesh.workloads.values();
            let named = workloads.flat_map(|workload| &workload.authorization_policies);
            let removed = &self.mesh.removed_policies;
            self.mesh.removed_policies = named
                .filter(|key| removed.contains(*key))
                .cloned()
                .collect();
        }
    }

    /// Notes that all policies there are have arrived.
    pub fn set_policies_synced(&mut self) {
        self.mesh.policies_synced = true;
    }

    fn remove_policy(&mut self, key: &str) {
        let Some(policy) = self.mesh.policies.remove(key) else {
            return;
        };
        for namespace in [&Arc::from(""), &policy.namespace] {
            if let Some(keys) = self.mesh.policies_by_namespace.get_mut(namespace) {
                keys.remove(key);
                if keys.is_empty() {
                    self.mesh.policies_by_namespace.remove(namespace);
                }
            }
        }
    }

    fn remove_address(&mut self, name: &str, changes: &mut Changes) {
        if self.mesh.workloads.contains_key(name) {
            return self.remove_workload(name, changes);
        }
        let service = name
            .split_once('/')
            .filter(|(_, hostname)| !hostname.contains('/'))
            .map(|(namespace, hostname)| NamespacedHostname {
                namespace: namespace.into(),
                hostname: hostname.into(),
            })
            .filter(|key| self.mesh.services.contains_key(key));
        match service {
            Some(key) => self.remove_service(&key),
            None => tracing::warn!("the control plane removed {name}, which is not known"),
        }
    }

    fn is_local(&self, workload: &Workload) -> bool {
        self.node.is_empty() || *workload.node == *self.node
    }

    fn put_workload(&mut self, workload: Workload, changes: &mut Changes) {
        let uid = workload.uid.clone();
        self.remove_workload(&uid, changes);
        let workload = Arc::new(workload);
        for ip in own_addresses(&workload) {
            self.mesh
                .by_address
                .entry(*ip)
                .or_default()
                .push(workload.clone());
        }
        if let Some(name) = hostname_key(&workload) {
            self.mesh
                .by_workload_hostname
                .entry(name)
                .or_default()
                .insert(uid.clone());
        }
        if self.is_local(&workload) {
            self.mesh
                .local
                .entry(local_key(&workload))
                .or_default()
                .insert(uid.clone());
            if presents_certificate(&workload) {
                changes.wanted.push(workload.identity.clone());
            }
        }
        for (service, ports) in workload.services.iter() {
            let endpoint = Endpoint {
                workload_uid: uid.clone(),
                ports: ports.clone(),
                status: workload.status,
                capacity: workload.capacity,
            };
            match self.mesh.services.get_mut(service) {
                Some(entry) => entry.endpoints.insert(endpoint),
                None => self
                    .mesh
                    .staged
                    .entry(service.clone())
                    .or_default()
                    .insert(endpoint),
            }
        }
        self.mesh.workloads.insert(uid, workload);
    }

    fn remove_workload(&mut self, uid: &str, changes: &mut Changes) {
        let Some(workload) = self.mesh.workloads.remove(uid) else {
            return;
        };
        for ip in own_addresses(&workload) {
            if let Some(claims) = self.mesh.by_address.get_mut(ip) {
                claims.retain(|claim| *claim.uid != *uid);
                if claims.is_empty() {
                    self.mesh.by_address.remove(ip);
                }
            }
        }
        if let Some(name) = hostname_key(&workload) {
            remove_from(&mut self.mesh.by_workload_hostname, &name, uid);
        }
        if self.is_local(&workload) {
            remove_from(&mut self.mesh.local, &local_key(&workload), uid);
            changes.unwanted.push(workload.identity.clone());
        }
        for service in workload.services.keys() {
            if let Some(entry) = self.mesh.services.get_mut(service) {
                entry.endpoints.remove(uid);
            } else if let Some(staged) = self.mesh.staged.get_mut(service) {
                staged.remove(uid);
                if staged.is_empty() {
                    self.mesh.staged.remove(service);
                }
            }
        }
    }

    fn put_service(&mut self, service: Service) {
        let key = service.key();
        let endpoints = self.take_service(&key);
        let service = Arc::new(service);
        for vip in distinct(service.vips.iter().map(|vip| vip.address)) {
            self.mesh.by_vip.entry(vip).or_default().push(key.clone());
        }
        for range in ranges(&service) {
            let owners = self.mesh.by_range.entry(range).or_default();
            if owners.is_empty() {
                let length = (range.addr().is_ipv6(), range.prefix_len());
                *self.mesh.range_lengths.entry(length).or_default() += 1;
            }
            owners.push(key.clone());
        }
        self.mesh
            .by_hostname
            .entry(service.hostname.clone())
            .or_default()
            .push(key.clone());
        self.mesh
            .services
            .insert(key, ServiceEntry { service, endpoints });
    }

    /// Removes a service; its endpoints wait for it in case it comes back, as their workloads still name it.
    fn remove_service(&mut self, key: &NamespacedHostname) {
        let endpoints = self.take_service(key);
        if !endpoints.is_empty() {
            self.mesh.staged.insert(key.clone(), endpoints);
        }
    }

    /// Takes a service out of every index; gives its endpoints, or those that waited for it.
    fn take_service(&mut self, key: &NamespacedHostname) -> Endpoints {
        let Some(entry) = self.mesh.services.remove(key) else {
            return self.mesh.staged.remove(key).unwrap_or_default();
        };
        for vip in distinct(entry.service.vips.iter().map(|vip| vip.address)) {
            remove_key(&mut self.mesh.by_vip, &vip, key);
        }
        for range in ranges(&entry.service) {
            remove_key(&mut self.mesh.by_range, &range, key);
            if !self.mesh.by_range.contains_key(&range) {
                let length = (range.addr().is_ipv6(), range.prefix_len());
                if let Some(count) = self.mesh.range_lengths.get_mut(&length) {
                    *count -= 1;
                    if *count == 0 {
                        self.mesh.range_lengths.remove(&length);
                    }
                }
            }
        }
        remove_key(&mut self.mesh.by_hostname, &entry.service.hostname, key);
        entry.endpoints
    }
}

/// The addresses that mean this workload alone; a host's address means its node.
fn own_addresses(workload: &Workload) -> &[IpAddr] {
    match workload.network_mode {
        NetworkMode::Standard => &workload.addresses,
        NetworkMode::HostNetwork => &[],
    }
}

/// Whether traffic of this workload is tunnelled, so that it needs a certificate.
fn presents_certificate(workload: &Workload) -> bool {
    workload.protocol == Protocol::Hbone || workload.native_tunnel
}

fn hostname_key(workload: &Workload) -> Option<NamespacedHostname> {
    (!workload.hostname.is_empty()).then(|| NamespacedHostname {
        namespace: workload.namespace.clone(),
        hostname: workload.hostname.clone(),
    })
}

fn local_key(workload: &Workload) -> LocalKey {
    (
        workload.namespace.clone(),
        workload.identity.service_account().into(),
    )
}

/// The ranges of a service, each once.
fn ranges(service: &Service) -> Vec<IpNet> {
    let mut ranges: Vec<_> = service.cidr_vips.iter().map(|range| range.cidr).collect();
    ranges.sort();
    ranges.dedup();
    ranges
}

fn distinct(addresses: impl Iterator<Item = IpAddr>) -> Vec<IpAddr> {
    let mut addresses: Vec<_> = addresses.collect();
    addresses.sort();
    addresses.dedup();
    addresses
}

fn remove_from<K: std::hash::Hash + Eq + Clone>(
    index: &mut imbl::HashMap<K, imbl::OrdSet<Arc<str>>>,
    key: &K,
    uid: &str,
) {
    if let Some(uids) = index.get_mut(key) {
        uids.remove(uid);
        if uids.is_empty() {
            index.remove(key);
        }
    }
}

fn remove_key<K: std::hash::Hash + Eq + Clone>(
    index: &mut imbl::HashMap<K, Few<NamespacedHostname>>,
    key: &K,
    owner: &NamespacedHostname,
) {
    if let Some(owners) = index.get_mut(key) {
        owners.retain(|known| known != owner);
        if owners.is_empty() {
            index.remove(key);
        }
    }
}

#[cfg(test)]
#[path = "store_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "history_tests.rs"]
mod history_tests;
