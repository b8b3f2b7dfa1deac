//! The live flows of one pod on one worker: for the dump, and so that a policy change reaches them.

use std::cell::RefCell;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::rc::Rc;
use std::task::{Poll, Waker};

use hbone::Identity;
use slab::Slab;

/// What the client asked for.
#[derive(Clone, Debug)]
pub enum Asked {
    /// Nothing but a way into this pod.
    Nothing,
    Address(SocketAddr),
    Host(Box<str>),
}

/// An open flow: what it was admitted with, and what the configuration dump says of it.
#[derive(Clone, Debug)]
pub struct Admission {
    pub src: SocketAddr,
    /// Where it really goes.
    pub dst: SocketAddr,
    pub original: Asked,
    /// `HBONE` or `TCP`.
    pub protocol: &'static str,
    /// Who the client proved to be.
    pub identity: Option<Identity>,
}

struct Entry {
    admission: Admission,
    revoked: bool,
    /// Who waits for that.
    waker: Option<Waker>,
}

/// The open flows of one direction; cheap to clone, one per pod, direction and worker.
#[derive(Clone, Default)]
pub struct Connections(Rc<RefCell<Slab<Entry>>>);

/// A flow's entry, gone when dropped.
pub struct Registration {
    connections: Connections,
    place: usize,
}

impl Connections {
    /// Registers a flow; do so before its first verdict, so that no policy change falls between.
    pub fn register(&self, admission: Admission) -> Registration {
        let place = self.0.borrow_mut().insert(Entry {
            admission,
            revoked: false,
            waker: None,
        });
        Registration {
            connections: self.clone(),
            place,
        }
    }

    /// Every flow, as in the configuration dump.
    pub fn dump(&self) -> Vec<serde_json::Value> {
        let one = |(
            _,
            Entry {
                admission: flow, ..
            },
        ): (usize, &Entry)| {
            let original = match &flow.original {
                Asked::Nothing => None,
                Asked::Address(address) => Some(address.to_string()),
                Asked::Host(host) => Some(host.to_string()),
            };
            serde_json::json!({
                "src": flow.src, "originalDst": original, "actualDst": flow.dst, "protocol": flow.protocol,
            })
        };
        self.0.borrow().iter().map(one).collect()
    }

    /// Revokes the flows that `allowed` no longer lets in among those at `most` places from `first` on.
    ///
    /// Gives them and, unless that was all, the place to go on from. What is registered meanwhile may be passed over.
    pub fn revoke(
        &self,
        first: usize,
        most: usize,
        allowed: impl Fn(&Admission) -> bool,
    ) -> (Vec<Admission>, Option<usize>) {
        let mut entries = self.0.borrow_mut();
        let end = entries.capacity().min(first.saturating_add(most));
        let mut cut = Vec::new();
        for place in first..end {
            if let Some(entry) = entries.get_mut(place)
                && !entry.revoked
                && !allowed(&entry.admission)
            {
                entry.revoked = true;
                cut.push(entry.admission.clone());
                if let Some(waker) = entry.waker.take() {
                    waker.wake();
                }
            }
        }
        (cut, (end < entries.capacity()).then_some(end))
    }
}

impl Registration {
    /// Waits until policy no longer allows the flow.
    pub async fn revoked(&self) {
        poll_fn(|cx| {
            let mut entries = self.connections.0.borrow_mut();
            let entry = &mut entries[self.place];
            if entry.revoked {
                return Poll::Ready(());
            }
            match &mut entry.waker {
                Some(waker) => waker.clone_from(cx.waker()),
                none => *none = Some(cx.waker().clone()),
            }
            Poll::Pending
        })
        .await;
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let mut entries = self.connections.0.borrow_mut();
        entries.remove(self.place);
        if entries.is_empty() {
            // What a burst of flows needed is not kept.
            *entries = Slab::new();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admission(port: u16) -> Admission {
        Admission {
            src: SocketAddr::from(([10, 0, 0, 1], port)),
            dst: SocketAddr::from(([10, 0, 0, 2], 80)),
            original: Asked::Nothing,
            protocol: "TCP",
            identity: None,
        }
    }

    #[tokio::test]
    async fn a_revoked_flow_is_told_once_and_an_ended_one_is_forgotten() {
        let connections = Connections::default();
        let kept = connections.register(admission(1));
        let ended = connections.register(admission(2));
        let cut = connections.register(admission(3));
        drop(ended);
        let first = |flow: &Admission| flow.src.port() == 1;
        assert_eq!(connections.revoke(0, 100, first).0.len(), 1);
        assert_eq!(connections.revoke(0, 100, first).0.len(), 0);
        cut.revoked().await;
        cut.revoked().await;
        drop(kept);
        drop(cut);
        assert_eq!(connections.revoke(0, 100, |_| false).0.len(), 0);
        assert!(connections.dump().is_empty());
    }

    #[tokio::test]
    async fn a_waiting_flow_is_woken() {
        let connections = Connections::default();
        let flow = connections.register(admission(1));
        let revoke = async {
            tokio::task::yield_now().await;
            connections.revoke(0, 1, |_| false);
        };
        tokio::join!(flow.revoked(), revoke);
    }

    #[test]
    fn many_flows_are_walked_piece_by_piece() {
        let connections = Connections::default();
        let flows: Vec<_> = (0..1000)
            .map(|n| connections.register(admission(n)))
            .collect();
        let (mut cut, mut next, mut rounds) = (0, Some(0), 0);
        while let Some(first) = next {
            let (some, rest) = connections.revoke(first, 300, |flow| flow.src.port() % 2 == 0);
            (cut, next, rounds) = (cut + some.len(), rest, rounds + 1);
        }
        assert_eq!(cut, 500);
        assert!(rounds >= 4);
        drop(flows);
    }
}
