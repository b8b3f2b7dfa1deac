//! How many flows there may be and how much may wait in memory: for the node, and for each pod, so that one cannot take
//! what the others need.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use hbone::Ledger;

use crate::telemetry::{FlowError, Reason};

/// What may be used at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Open connections and streams.
    pub flows: usize,
    /// Bytes that wait for slow readers.
    pub waiting: u64,
}

/// What is used, of a node or of a pod as a part of it.
#[derive(Debug)]
pub struct Budget {
    limits: Limits,
    flows: AtomicUsize,
    ledger: Arc<Ledger>,
    node: Option<Arc<Budget>>,
}

/// A flow's place in the budgets, free again when dropped.
#[derive(Debug)]
pub struct Place(Arc<Budget>);

impl Budget {
    /// A node's.
    pub fn of_node(limits: Limits) -> Arc<Self> {
        Arc::new(Self {
            limits,
            flows: AtomicUsize::new(0),
            ledger: Arc::default(),
            node: None,
        })
    }

    /// A pod's, within its node's.
    pub fn of_pod(limits: Limits, node: &Arc<Self>) -> Arc<Self> {
        Arc::new(Self {
            limits,
            flows: AtomicUsize::new(0),
            ledger: Arc::new(Ledger::within(node.ledger.clone())),
            node: Some(node.clone()),
        })
    }

    /// Where the bytes that wait are added up.
    pub fn ledger(&self) -> &Arc<Ledger> {
        &self.ledger
    }

    /// What may be used.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// How many flows there are.
    pub fn flows(&self) -> usize {
        self.flows.load(Ordering::Relaxed)
    }

    /// Gives one more flow its place.
    ///
    /// # Errors
    /// Which budget is used up, and what to do.
    pub fn admit(self: &Arc<Self>) -> Result<Place, FlowError> {
        if let Some(node) = &self.node {
            node.take()?;
            self.take().inspect_err(|_| node.give_back())?;
        } else {
            self.take()?;
        }
        Ok(Place(self.clone()))
    }

    fn take(&self) -> Result<(), FlowError> {
        let (whose, setting) = match self.node {
            Some(_) => ("pod", "_PER_POD"),
            None => ("node", ""),
        };
        if self.ledger.waiting() > self.limits.waiting {
            let text = format!(
                "the {whose}'s budget of {} bytes that wait for slow readers is used up; raise MEMORY_BUDGET{setting}",
                self.limits.waiting
            );
            return Err(FlowError::new(Reason::OutOfMemory, text));
        }
        if self.flows.fetch_add(1, Ordering::Relaxed) >= self.limits.flows {
            self.give_back();
            let text = format!(
                "the {whose}'s budget of {} flows is used up; raise FLOW_BUDGET{setting}",
                self.limits.flows
            );
            return Err(FlowError::new(Reason::TooManyFlows, text));
        }
        Ok(())
    }

    fn give_back(&self) {
        self.flows.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.give_back();
        if let Some(node) = &self.0.node {
            node.give_back();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_cannot_take_what_the_others_need() {
        let limits = |flows| Limits { flows, waiting: 0 };
        let node = Budget::of_node(limits(3));
        let [greedy, other, third] = [(); 3].map(|()| Budget::of_pod(limits(2), &node));
        let mut places: Vec<_> = (0..2).map(|_| greedy.admit().unwrap()).collect();
        let refused = greedy.admit().unwrap_err();
        assert_eq!(refused.reason, Reason::TooManyFlows);
        assert_eq!(
            refused.text,
            "the pod's budget of 2 flows is used up; raise FLOW_BUDGET_PER_POD"
        );
        places.push(other.admit().unwrap());
        let refused = third.admit().unwrap_err();
        assert_eq!(
            refused.text,
            "the node's budget of 3 flows is used up; raise FLOW_BUDGET"
        );
        drop(places);
        let counts = [&node, &greedy, &other, &third].map(|budget| budget.flows());
        assert_eq!(counts, [0; 4]);
        assert!(third.admit().is_ok());
    }
}
