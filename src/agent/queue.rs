//! Work by pod: each at most once at a time, several side by side, again later when it fails.

use std::collections::{HashMap, HashSet};
use std::future::Future;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

/// How many pods are worked on side by side.
const SIDE_BY_SIDE: usize = 8;
/// The first pause after a failure, and the longest.
const PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

#[derive(Default)]
struct Schedule {
    /// When each waiting pod's turn is.
    due: HashMap<String, Instant>,
    running: HashSet<String>,
    failures: HashMap<String, u32>,
}

impl Schedule {
    /// Something has changed for a pod, so it is not to wait any longer.
    fn touch(&mut self, uid: String, now: Instant) {
        self.due.insert(uid, now);
    }

    /// The next pod whose turn has come and that is not being worked on.
    fn next(&mut self, now: Instant) -> Option<String> {
        if self.running.len() >= SIDE_BY_SIDE {
            return None;
        }
        let waiting = self
            .due
            .iter()
            .filter(|(uid, due)| **due <= now && !self.running.contains(*uid));
        let uid = waiting.min_by_key(|(_, due)| **due)?.0.clone();
        self.due.remove(&uid);
        self.running.insert(uid.clone());
        Some(uid)
    }

    /// When to look again.
    fn wake(&self) -> Option<Instant> {
        let waiting = self
            .due
            .iter()
            .filter(|(uid, _)| !self.running.contains(*uid));
        waiting.map(|(_, due)| *due).min()
    }

    fn done(&mut self, uid: String, succeeded: bool, now: Instant) {
        self.running.remove(&uid);
        if succeeded {
            self.failures.remove(&uid);
            return;
        }
        let failures = self.failures.entry(uid.clone()).or_default();
        let pause = PAUSE * 2u32.saturating_pow((*failures).min(16));
        *failures += 1;
        self.due
            .entry(uid)
            .or_insert(now + pause.min(LONGEST_PAUSE));
    }
}

/// Works on every pod that is touched until nobody can touch one any more; `work` says whether it succeeded.
pub async fn run<W, F>(mut touched: mpsc::UnboundedReceiver<String>, work: W)
where
    W: Fn(String) -> F,
    F: Future<Output = bool> + Send + 'static,
{
    let mut schedule = Schedule::default();
    let mut tasks = JoinSet::new();
    let mut owners = HashMap::new();
    loop {
        while let Some(uid) = schedule.next(Instant::now()) {
            let task = tasks.spawn(work(uid.clone()));
            owners.insert(task.id(), uid);
        }
        let full = schedule.running.len() >= SIDE_BY_SIDE;
        let wake = schedule.wake().filter(|_| !full);
        tokio::select! {
            uid = touched.recv() => match uid {
                Some(uid) => schedule.touch(uid, Instant::now()),
                None => return,
            },
            Some(done) = tasks.join_next_with_id() => {
                let (id, succeeded) = done.unwrap_or_else(|error| {
                    tracing::error!("work on a pod ended unexpectedly: {error}");
                    (error.id(), false)
                });
                if let Some(uid) = owners.remove(&id) {
                    schedule.done(uid, succeeded, Instant::now());
                }
            }
            () = sleep_until(wake.unwrap_or_else(Instant::now)), if wake.is_some() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use tokio::sync::Semaphore;

    use super::*;

    #[test]
    fn a_pod_that_fails_waits_longer_each_time_until_something_changes() {
        let mut schedule = Schedule::default();
        let mut now = Instant::now();
        schedule.touch("a".to_string(), now);
        let mut pauses = Vec::new();
        for _ in 0..10 {
            assert_eq!(schedule.next(now).as_deref(), Some("a"));
            assert_eq!(schedule.next(now), None);
            schedule.done("a".to_string(), false, now);
            let wake = schedule.wake().unwrap();
            pauses.push(wake - now);
            now = wake;
        }
        assert_eq!(pauses[..3], [PAUSE, PAUSE * 2, PAUSE * 4]);
        assert_eq!(pauses[9], LONGEST_PAUSE);
        // A change is looked at without waiting, and success forgets the failures.
        let earlier = now - LONGEST_PAUSE / 2;
        schedule.touch("a".to_string(), earlier);
        assert_eq!(schedule.next(earlier).as_deref(), Some("a"));
        schedule.done("a".to_string(), true, now);
        assert_eq!(schedule.wake(), None);
        assert!(schedule.failures.is_empty());
    }

    #[tokio::test]
    async fn a_pod_touched_while_it_is_worked_on_is_worked_on_again_and_never_twice_at_once() {
        let (touch, touched) = mpsc::unbounded_channel();
        let gate = Arc::new(Semaphore::new(0));
        let counts = Arc::new(Mutex::new((0, 0, 0)));
        let work = {
            let (gate, counts) = (gate.clone(), counts.clone());
            move |_| {
                let (gate, counts) = (gate.clone(), counts.clone());
                async move {
                    {
                        let mut counts = counts.lock().unwrap();
                        counts.0 += 1;
                        counts.1 += 1;
                        counts.2 = counts.2.max(counts.1);
                    }
                    gate.acquire().await.unwrap().forget();
                    counts.lock().unwrap().1 -= 1;
                    true
                }
            }
        };
        let running = tokio::spawn(run(touched, work));
        for _ in 0..3 {
            touch.send("a".to_string()).unwrap();
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(*counts.lock().unwrap(), (1, 1, 1));
        gate.add_permits(2);
        for _ in 0..500 {
            if *counts.lock().unwrap() == (2, 0, 1) {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(*counts.lock().unwrap(), (2, 0, 1));
        drop(touch);
        running.await.unwrap();
    }
}
