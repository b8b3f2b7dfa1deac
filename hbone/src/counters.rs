//! What a carried socket has moved, and what waits for it.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes of one flow, counted as they move, by the worker that carries it.
#[derive(Debug, Default)]
pub struct Counters {
    /// Bytes read from the carried socket and sent into the tunnel.
    pub sent: Cell<u64>,
    /// Bytes taken from the tunnel and written to the carried socket.
    pub received: Cell<u64>,
    /// Bytes of the tunnel that wait for the carried socket to take them.
    waiting: Cell<u64>,
    /// Where those are added up.
    ledger: Option<Arc<Ledger>>,
}

/// Bytes that wait in this process for slow readers, added up for whoever has the flows, and for everybody.
#[derive(Debug, Default)]
pub struct Ledger {
    waiting: AtomicU64,
    whole: Option<Arc<Ledger>>,
}

impl Ledger {
    /// One that is part of a larger one.
    pub fn within(whole: Arc<Self>) -> Self {
        Self {
            waiting: AtomicU64::new(0),
            whole: Some(whole),
        }
    }

    /// How many bytes wait.
    pub fn waiting(&self) -> u64 {
        self.waiting.load(Ordering::Relaxed)
    }

    fn change(&self, from: u64, to: u64) {
        // Wraps around in between, never in sum.
        self.waiting
            .fetch_add(to.wrapping_sub(from), Ordering::Relaxed);
        if let Some(whole) = &self.whole {
            whole.change(from, to);
        }
    }
}

impl Counters {
    /// Counters whose waiting bytes are added up there.
    pub fn of(ledger: Arc<Ledger>) -> Self {
        Self {
            sent: Cell::new(0),
            received: Cell::new(0),
            waiting: Cell::new(0),
            ledger: Some(ledger),
        }
    }

    /// Notes how many bytes wait now.
    pub(crate) fn wait(&self, bytes: usize) {
        let bytes = bytes as u64;
        let before = self.waiting.replace(bytes);
        if before != bytes
            && let Some(ledger) = &self.ledger
        {
            ledger.change(before, bytes);
        }
    }
}

impl Drop for Counters {
    fn drop(&mut self) {
        self.wait(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_waits_is_added_up_and_gone_with_its_flow() {
        let all = Arc::new(Ledger::default());
        let [one, other] = [(), ()].map(|()| Arc::new(Ledger::within(all.clone())));
        let flows = [&one, &one, &other].map(|ledger| Counters::of(ledger.clone()));
        for (flow, bytes) in flows.iter().zip([10, 20, 5]) {
            flow.wait(100);
            flow.wait(bytes);
        }
        assert_eq!((one.waiting(), other.waiting(), all.waiting()), (30, 5, 35));
        drop(flows);
        assert_eq!((one.waiting(), other.waiting(), all.waiting()), (0, 0, 0));
    }
}
