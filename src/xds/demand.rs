//! Addresses that the data path asks the control plane for, when they are not all sent ahead.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::sync::{mpsc, oneshot};

/// How long a flow waits for an answer.
const WAIT: Duration = Duration::from_secs(5);
/// Questions that may wait for the control plane; more flows than that go on without an answer.
const WAITING: usize = 4096;
/// Names that turned out to mean nothing and are still subscribed to, in case they come to mean something.
const ABSENT: usize = 10_000;

/// The data path's end. Clones share it.
#[derive(Clone, Default)]
pub struct Demand(Option<Shared>);

#[derive(Clone)]
struct Shared {
    wait: Duration,
    questions: mpsc::Sender<Question>,
    /// What needs no question any more.
    answered: Arc<ArcSwap<imbl::HashSet<Arc<str>>>>,
}

/// A name that somebody waits for.
pub struct Question {
    key: String,
    answered: oneshot::Sender<()>,
}

/// The discovery client's end: what was asked, who waits, what is known.
pub struct Interest {
    questions: mpsc::Receiver<Question>,
    answered: Arc<ArcSwap<imbl::HashSet<Arc<str>>>>,
    subscribed: HashSet<Arc<str>>,
    waiting: HashMap<Arc<str>, Vec<oneshot::Sender<()>>>,
    /// In the order they were told, some of them there by now.
    absent: VecDeque<Arc<str>>,
}

/// Both ends.
pub fn demand() -> (Demand, Interest) {
    answered_within(WAIT)
}

fn answered_within(wait: Duration) -> (Demand, Interest) {
    let (sender, questions) = mpsc::channel(WAITING);
    let answered: Arc<ArcSwap<imbl::HashSet<Arc<str>>>> = Arc::default();
    let shared = Shared {
        wait,
        questions: sender,
        answered: answered.clone(),
    };
    let interest = Interest {
        questions,
        answered,
        subscribed: HashSet::new(),
        waiting: HashMap::new(),
        absent: VecDeque::new(),
    };
    (Demand(Some(shared)), interest)
}

impl Demand {
    /// Whether addresses have to be asked for at all.
    pub fn is_needed(&self) -> bool {
        self.0.is_some()
    }

    /// Asks for a workload's uid, `network/ip` or `namespace/hostname`, unless that was answered before; gives whether
    /// the mesh may know more now. Waits a bounded time.
    pub async fn fetch(&self, key: &str) -> bool {
        let Some(shared) = &self.0 else { return false };
        if shared.answered.load().contains(key) {
            return false;
        }
        let (answered, answer) = oneshot::channel();
        let question = Question {
            key: key.to_string(),
            answered,
        };
        if shared.questions.try_send(question).is_err() {
            tracing::warn!("too much is asked of the control plane: {key} is taken as unknown");
            return false;
        }
        match tokio::time::timeout(shared.wait, answer).await {
            Ok(answer) => answer.is_ok(),
            Err(_) => {
                tracing::warn!(
                    "timed out waiting for {key} from xds: it is taken as unknown meanwhile"
                );
                false
            }
        }
    }
}

impl Interest {
    /// What is to be subscribed to anew on a new stream.
    pub fn subscribed(&self) -> impl Iterator<Item = String> {
        self.subscribed.iter().map(ToString::to_string)
    }

    /// Waits for a question that has to go to the control plane.
    pub async fn next(&mut self) -> Option<String> {
        loop {
            let Question { key, answered } = self.questions.recv().await?;
            if answered.is_closed() {
                continue;
            }
            if self.answered.load().contains(&*key) {
                let _ = answered.send(());
                continue;
            }
            let key: Arc<str> = key.into();
            self.waiting.entry(key.clone()).or_default().push(answered);
            if self.subscribed.insert(key.clone()) {
                return Some(key.to_string());
            }
        }
    }

    /// Takes the names of a response that is applied by now, those that are there and those that are not; gives the names
    /// that are not worth a subscription any more.
    pub fn answered<'a>(
        &mut self,
        there: impl Iterator<Item = &'a str>,
        missing: &[String],
    ) -> Vec<String> {
        let mut known = imbl::HashSet::clone(&self.answered.load());
        let before = known.len();
        for name in there {
            if let Some(key) = self.subscribed.get(name).cloned() {
                known.insert(key);
            }
            self.release(name);
        }
        for name in missing {
            if let Some(key) = self.subscribed.get(name.as_str()).cloned() {
                if known.insert(key.clone()).is_none() {
                    self.absent.push_back(key);
                }
                self.release(name);
            }
        }
        let mut forgotten = Vec::new();
        while self.absent.len() > ABSENT
            && let Some(key) = self.absent.pop_front()
        {
            known.remove(&key);
            self.subscribed.remove(&key);
            forgotten.push(key.to_string());
        }
        if known.len() != before || !forgotten.is_empty() {
            self.answered.store(Arc::new(known));
        }
        forgotten
    }

    fn release(&mut self, name: &str) {
        for waiting in self.waiting.remove(name).into_iter().flatten() {
            let _ = waiting.send(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Asks in the background.
    fn ask(demand: &Demand, key: &'static str) -> tokio::task::JoinHandle<bool> {
        let demand = demand.clone();
        tokio::spawn(async move { demand.fetch(key).await })
    }

    #[tokio::test]
    async fn everyone_who_waits_for_a_name_is_told_and_nobody_asks_twice() {
        let (demand, mut interest) = demand();
        let first = ask(&demand, "/10.0.0.1");
        assert_eq!(interest.next().await.unwrap(), "/10.0.0.1");
        let second = ask(&demand, "/10.0.0.1");
        let other = ask(&demand, "b/web");
        // The second waiter is noted, and only the other name goes out.
        assert_eq!(interest.next().await.unwrap(), "b/web");
        let there = ["uid", "/10.0.0.1"];
        assert!(interest.answered(there.into_iter(), &[]).is_empty());
        assert!(first.await.unwrap() && second.await.unwrap());
        assert!(!other.is_finished());
        interest.answered([].into_iter(), &["b/web".to_string()]);
        assert!(other.await.unwrap());
        assert!(!demand.fetch("b/web").await, "it was answered");
        let mut again: Vec<_> = interest.subscribed().collect();
        again.sort();
        assert_eq!(again, ["/10.0.0.1", "b/web"]);
    }

    #[tokio::test]
    async fn names_that_mean_nothing_are_not_kept_without_end() {
        let (demand, mut interest) = demand();
        let mut forgotten = Vec::new();
        for number in 0..ABSENT + 5 {
            let asking = {
                let demand = demand.clone();
                tokio::spawn(async move { demand.fetch(&format!("b/{number}")).await })
            };
            let key = interest.next().await.unwrap();
            forgotten.extend(interest.answered([].into_iter(), &[key]));
            assert!(asking.await.unwrap());
        }
        assert_eq!(forgotten, ["b/0", "b/1", "b/2", "b/3", "b/4"]);
        assert_eq!(interest.subscribed().count(), ABSENT);
    }

    #[tokio::test]
    async fn a_control_plane_that_does_not_answer_holds_nobody_for_long() {
        let (demand, mut interest) = answered_within(Duration::from_millis(20));
        let asking = ask(&demand, "b/web");
        interest.next().await.unwrap();
        assert!(!asking.await.unwrap());
        assert!(!Demand::default().fetch("b/web").await);
    }
}
