//! The current mesh: published by the control thread, read by the workers without a lock.

use std::cell::RefCell;
use std::collections::HashSet;
use std::sync::Arc;

use arc_swap::{ArcSwap, Guard};
use tokio::sync::watch;

use crate::identity::Certificates;
use crate::local::State;
use crate::mesh::store::AddressResource;
use crate::mesh::{Mesh, Store};
use crate::policy::Policy;

/// The newest snapshot and a signal for each new one; clones share it.
#[derive(Clone)]
pub struct SharedMesh(Arc<Feed>);

struct Feed {
    mesh: ArcSwap<Mesh>,
    version: watch::Sender<u64>,
}

impl SharedMesh {
    /// Begins with a snapshot.
    pub fn new(mesh: Arc<Mesh>) -> Self {
        Self(Arc::new(Feed {
            mesh: ArcSwap::new(mesh),
            version: watch::Sender::new(0),
        }))
    }

    /// The newest snapshot; hold it for one decision, not across a wait.
    pub fn load(&self) -> Guard<Arc<Mesh>> {
        self.0.mesh.load()
    }

    /// Makes a snapshot the newest and tells everyone who subscribed.
    pub fn publish(&self, mesh: Arc<Mesh>) {
        self.0.mesh.store(mesh);
        self.0.version.send_modify(|version| *version += 1);
    }

    /// A signal for each snapshot published from now on.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.0.version.subscribe()
    }
}

/// The one writer of the mesh, shared by all who know something of it: every change is published, and the keeper of
/// certificates hears which identities this node has.
pub struct MeshWriter {
    store: RefCell<Store>,
    mesh: SharedMesh,
    certificates: Certificates,
    /// Names in force that came from the local source, of addresses and of policies.
    local: RefCell<[HashSet<String>; 2]>,
}

impl MeshWriter {
    /// Begins with nothing for the node of that name.
    pub fn new(node: impl Into<String>, mesh: SharedMesh, certificates: Certificates) -> Self {
        Self {
            store: RefCell::new(Store::new(node)),
            mesh,
            certificates,
            local: RefCell::default(),
        }
    }

    /// Applies addresses of the control plane.
    pub fn apply_addresses(&self, upserts: Vec<AddressResource>, removals: &[String]) {
        if let [local, _] = &mut *self.local.borrow_mut()
            && !local.is_empty()
        {
            for resource in &upserts {
                local.remove(&resource.name());
            }
        }
        self.put_addresses(upserts, removals);
    }

    /// Applies policies of the control plane; `whole` says that none of them was refused.
    pub fn apply_policies(&self, upserts: Vec<Policy>, removals: &[String], whole: bool) {
        for policy in &upserts {
            self.local.borrow_mut()[1].remove(&*policy.key);
        }
        let mut store = self.store.borrow_mut();
        store.apply_policies(upserts, removals);
        // A policy that was refused might have been a denial: until all are understood once, nobody is let in.
        if whole {
            store.set_policies_synced();
        }
        self.mesh.publish(store.snapshot());
    }

    /// Notes that there is no control plane whose policies are to be waited for.
    pub fn needs_no_policies(&self) {
        let mut store = self.store.borrow_mut();
        store.set_policies_synced();
        self.mesh.publish(store.snapshot());
    }

    /// Goes from one state of the local source to the next; names that the control plane has taken over stay its own.
    pub fn apply_local(&self, former: &State, state: &State) {
        let mesh = self.mesh.load().clone();
        let [mut addresses, mut policies] = self.local.take();
        let gone = |name: &&String| !state.addresses.contains_key(*name);
        let removals: Vec<_> = former.addresses.keys().filter(gone).cloned().collect();
        let removals: Vec<_> = removals
            .into_iter()
            .filter(|name| addresses.remove(name))
            .collect();
        let mut upserts = Vec::new();
        for (name, resource) in &state.addresses {
            let taken = !addresses.contains(name) && mesh.has(name);
            if !taken && (former.addresses.get(name) != Some(resource)) {
                addresses.insert(name.clone());
                upserts.push(resource.clone());
            }
        }
        self.put_addresses(upserts, &removals);
        let gone = |name: &&String| !state.policies.contains_key(*name);
        let removals: Vec<_> = former.policies.keys().filter(gone).cloned().collect();
        let removals: Vec<_> = removals
            .into_iter()
            .filter(|name| policies.remove(name))
            .collect();
        let mut upserts = Vec::new();
        for (name, policy) in &state.policies {
            let taken = !policies.contains(name) && mesh.policy(name).is_some();
            if !taken && former.policies.get(name) != Some(policy) {
                policies.insert(name.clone());
                upserts.push(policy.clone());
            }
        }
        *self.local.borrow_mut() = [addresses, policies];
        let mut store = self.store.borrow_mut();
        store.apply_policies(upserts, &removals);
        self.mesh.publish(store.snapshot());
    }

    fn put_addresses(&self, upserts: Vec<AddressResource>, removals: &[String]) {
        let mut store = self.store.borrow_mut();
        let changes = store.apply_addresses(upserts, removals);
        self.mesh.publish(store.snapshot());
        for identity in &changes.wanted {
            self.certificates.prefetch(identity);
        }
        for identity in &changes.unwanted {
            self.certificates.forget(identity);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_published_mesh_is_seen_by_every_clone_and_signalled_once() {
        let feed = SharedMesh::new(Arc::default());
        let reader = feed.clone();
        let mut changes = reader.subscribe();
        assert!(!changes.has_changed().unwrap());
        let newest: Arc<Mesh> = Arc::default();
        feed.publish(newest.clone());
        assert!(Arc::ptr_eq(&reader.load(), &newest));
        assert!(changes.has_changed().unwrap());
        changes.mark_unchanged();
        assert!(!changes.has_changed().unwrap());
    }
}
