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
