//! The current mesh: published by the control thread, read by the workers without a lock.

use std::sync::Arc;

use arc_swap::{ArcSwap, Guard};
use tokio::sync::watch;

use crate::mesh::Mesh;

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
