//! The order in which identities are taken to the CA: what is due, the most urgent first.

use std::collections::{BTreeSet, HashMap};

use hbone::Identity;
use tokio::time::Instant;

/// How badly a certificate is needed; the first is the most urgent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Priority {
    /// A connection waits for it.
    RealTime,
    /// A workload of this node will need it.
    Warmup,
    /// A renewal ahead of time.
    Background,
}

#[derive(Clone, Copy)]
struct Job {
    priority: Priority,
    at: Instant,
    due: bool,
}

/// Jobs by identity, at most one each.
#[derive(Default)]
pub struct Queue {
    jobs: HashMap<Identity, Job>,
    later: BTreeSet<(Instant, Identity)>,
    due: BTreeSet<(Priority, Instant, Identity)>,
}

impl Queue {
    /// Queues `identity` for `at`, in place of any job that it had.
    pub fn put(&mut self, identity: Identity, priority: Priority, at: Instant) {
        self.remove(&identity);
        self.later.insert((at, identity.clone()));
        let due = false;
        self.jobs.insert(identity, Job { priority, at, due });
    }

    /// Makes a queued job at least this urgent and no later than `at`; without a job (it is with the CA
    /// already) nothing happens.
    pub fn hurry(&mut self, identity: &Identity, priority: Priority, at: Instant) {
        if let Some(job) = self.jobs.get(identity).copied()
            && (priority < job.priority || at < job.at)
        {
            self.put(identity.clone(), priority.min(job.priority), at.min(job.at));
        }
    }

    pub fn remove(&mut self, identity: &Identity) {
        if let Some(job) = self.jobs.remove(identity) {
            if job.due {
                self.due.remove(&(job.priority, job.at, identity.clone()));
            } else {
                self.later.remove(&(job.at, identity.clone()));
            }
        }
    }

    /// Takes the most urgent job that is due.
    pub fn pop(&mut self, now: Instant) -> Option<Identity> {
        while let Some((at, identity)) = self.later.pop_first() {
            if at > now {
                self.later.insert((at, identity));
                break;
            }
            if let Some(job) = self.jobs.get_mut(&identity) {
                job.due = true;
                self.due.insert((job.priority, at, identity));
            }
        }
        let (_, _, identity) = self.due.pop_first()?;
        self.jobs.remove(&identity);
        Some(identity)
    }

    /// When [`Self::pop`] will next have something, with nothing new queued; only asked when it has nothing now.
    pub fn next_at(&self) -> Option<Instant> {
        self.later.first().map(|(at, _)| *at)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn id(name: &str) -> Identity {
        Identity::new("td", "ns", name)
    }

    #[test]
    fn the_most_urgent_goes_first_and_then_the_oldest() {
        let now = Instant::now();
        let tick = Duration::from_millis(1);
        let mut queue = Queue::default();
        queue.put(id("renew"), Priority::Background, now);
        queue.put(id("warm-late"), Priority::Warmup, now + tick);
        queue.put(id("warm"), Priority::Warmup, now);
        queue.put(id("flow"), Priority::RealTime, now + tick);
        let order: Vec<_> = std::iter::from_fn(|| queue.pop(now + tick)).collect();
        assert_eq!(order, ["flow", "warm", "warm-late", "renew"].map(id));
    }

    #[test]
    fn an_urgent_job_of_the_future_holds_nothing_up() {
        let now = Instant::now();
        let later = now + Duration::from_secs(9);
        let mut queue = Queue::default();
        queue.put(id("flow"), Priority::RealTime, later);
        queue.put(id("renew"), Priority::Background, now);
        assert_eq!(queue.pop(now), Some(id("renew")));
        assert_eq!(queue.pop(now), None);
        assert_eq!(queue.next_at(), Some(later));
    }

    #[test]
    fn a_job_can_be_hurried_but_not_slowed() {
        let now = Instant::now();
        let later = now + Duration::from_secs(9);
        let mut queue = Queue::default();
        queue.put(id("a"), Priority::Warmup, now);
        queue.put(id("b"), Priority::Warmup, now);
        assert_eq!(queue.pop(now), Some(id("a")));
        queue.hurry(&id("a"), Priority::RealTime, now);
        queue.hurry(&id("b"), Priority::Background, later);
        queue.put(id("c"), Priority::Background, later);
        queue.hurry(&id("c"), Priority::RealTime, now);
        assert_eq!(queue.pop(now), Some(id("c")));
        assert_eq!(queue.pop(now), Some(id("b")));
        assert_eq!(queue.pop(later), None);
    }

    #[test]
    fn a_removed_job_never_comes_out() {
        let now = Instant::now();
        let mut queue = Queue::default();
        queue.put(id("a"), Priority::Warmup, now);
        queue.put(id("b"), Priority::Background, now);
        assert_eq!(queue.pop(now), Some(id("a")));
        queue.remove(&id("b"));
        assert_eq!(queue.pop(now), None);
        assert_eq!(queue.next_at(), None);
    }
}
