//! The live flows of one pod on one worker: for the dump, and so that a policy change reaches them.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::rc::Rc;

use hbone::Identity;
use tokio::sync::Notify;

/// An open flow: what it was admitted with, and what the configuration dump says of it.
#[derive(Clone, Debug)]
pub struct Admission {
    pub src: SocketAddr,
    /// Where it really goes.
    pub dst: SocketAddr,
    /// What the client asked for: an address, or the host it named.
    pub original: Option<String>,
    /// `HBONE` or `TCP`.
    pub protocol: &'static str,
    /// Who the client proved to be.
    pub identity: Option<Identity>,
}

#[derive(Default)]
struct Slots {
    entries: Vec<Option<(Admission, Rc<Notify>)>>,
    free: Vec<usize>,
}

/// The open flows of one direction; cheap to clone, one per pod, direction and worker.
#[derive(Clone, Default)]
pub struct Connections(Rc<RefCell<Slots>>);

/// A flow's entry, gone when dropped.
pub struct Registration {
    connections: Connections,
    slot: usize,
    revoked: Rc<Notify>,
}

impl Connections {
    /// Registers a flow; do so before its first verdict, so that no policy change falls between.
    pub fn register(&self, admission: Admission) -> Registration {
        let revoked = Rc::new(Notify::new());
        let mut slots = self.0.borrow_mut();
        let entry = Some((admission, revoked.clone()));
        let slot = match slots.free.pop() {
            Some(slot) => {
                slots.entries[slot] = entry;
                slot
            }
            None => {
                slots.entries.push(entry);
                slots.entries.len() - 1
            }
        };
        Registration {
            connections: self.clone(),
            slot,
            revoked,
        }
    }

    /// Every flow, as in the configuration dump.
    pub fn dump(&self) -> Vec<serde_json::Value> {
        let slots = self.0.borrow();
        let entries = slots.entries.iter().flatten();
        let one = |(flow, _): &(Admission, _)| {
            serde_json::json!({
                "src": flow.src, "originalDst": flow.original, "actualDst": flow.dst, "protocol": flow.protocol,
            })
        };
        entries.map(one).collect()
    }

    /// Revokes every flow that `allowed` no longer lets in; gives those.
    pub fn revoke(&self, allowed: impl Fn(&Admission) -> bool) -> Vec<Admission> {
        let mut revoked = Vec::new();
        for (admission, notify) in self.0.borrow().entries.iter().flatten() {
            if !allowed(admission) {
                notify.notify_one();
                revoked.push(admission.clone());
            }
        }
        revoked
    }
}

impl Registration {
    /// Waits until policy no longer allows the flow.
    pub async fn revoked(&self) {
        self.revoked.notified().await;
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let mut slots = self.connections.0.borrow_mut();
        slots.entries[self.slot] = None;
        slots.free.push(self.slot);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_revoked_flow_is_told_and_an_ended_one_is_forgotten() {
        let connections = Connections::default();
        let admission = |port| Admission {
            src: SocketAddr::from(([10, 0, 0, 1], port)),
            dst: SocketAddr::from(([10, 0, 0, 2], 80)),
            original: None,
            protocol: "TCP",
            identity: None,
        };
        let kept = connections.register(admission(1));
        let ended = connections.register(admission(2));
        let cut = connections.register(admission(3));
        drop(ended);
        let revoked = connections.revoke(|flow| flow.src.port() == 1);
        assert_eq!(revoked.len(), 1);
        cut.revoked().await;
        drop(kept);
        assert_eq!(connections.revoke(|_| false).len(), 1);
    }
}
