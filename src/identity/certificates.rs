//! The certificates of this node's identities: fetched once, renewed at half-life, read without a lock.
//!
//! One worker talks to the CA, with a bounded number of calls in flight. Where certificates are pushed instead, it
//! only hands out what came last.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use arc_swap::ArcSwap;
use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use hbone::{Identity, TlsIdentity};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep_until};

use super::IdentityError;
use super::dump;
use super::pushed::Delivered;
use super::queue::{Priority, Queue};
use super::retry::{self, Failures};

/// Calls to the CA at the same time.
const CALLS: usize = 8;

/// Whoever issues certificates: the CA's client, or a test's own.
pub trait Authority: Send + Sync + 'static {
    /// Gets a certificate with a new key. Bounded in time by the implementation.
    fn issue<'a>(
        &'a self,
        identity: &'a Identity,
    ) -> BoxFuture<'a, Result<TlsIdentity, IdentityError>>;
}

/// A handle on all certificates; clones share them.
#[derive(Clone)]
pub struct Certificates(Arc<Shared>);

struct Shared {
    source: Source,
    entries: ArcSwap<Entries>,
    /// Also the lock of all writers of `entries`.
    queue: Mutex<Queue>,
    wake: Notify,
}

/// Where certificates come from.
enum Source {
    /// They are asked for one by one.
    Asked(Arc<dyn Authority>),
    /// They come unasked and all at once.
    Pushed(watch::Receiver<Delivered>),
}

type Entries = imbl::HashMap<Identity, Arc<Entry>>;

struct Entry {
    identity: Identity,
    state: ArcSwap<State>,
    failures: Mutex<Failures>,
    changed: Notify,
}

enum State {
    Initializing,
    Available(Arc<TlsIdentity>),
    Unavailable(IdentityError),
    Forgotten,
}

impl Certificates {
    /// Nothing is fetched until [`Self::run`] is polled.
    pub fn new(authority: Arc<dyn Authority>) -> Self {
        Self::of(Source::Asked(authority))
    }

    /// Certificates that somebody pushes; each delivery replaces the former one while [`Self::run`] is polled.
    pub fn pushed(deliveries: watch::Receiver<Delivered>) -> Self {
        Self::of(Source::Pushed(deliveries))
    }

    fn of(source: Source) -> Self {
        Self(Arc::new(Shared {
            source,
            entries: ArcSwap::from_pointee(Entries::new()),
            queue: Mutex::new(Queue::default()),
            wake: Notify::new(),
        }))
    }

    /// The certificate, if there is a valid one now. Takes no lock.
    pub fn cached(&self, identity: &Identity) -> Option<Arc<TlsIdentity>> {
        let entries = self.0.entries.load();
        match &**entries.get(identity)?.state.load() {
            State::Available(tls) if is_valid(tls) => Some(tls.clone()),
            _ => None,
        }
    }

    /// The certificate, waiting for the first answer or delivery if need be.
    ///
    /// # Errors
    /// Why the last attempt failed, at once while the worker waits to try again.
    pub async fn fetch(&self, identity: &Identity) -> Result<Arc<TlsIdentity>, IdentityError> {
        let entry = self.request(identity, Priority::RealTime);
        loop {
            let changed = entry.changed.notified();
            tokio::pin!(changed);
            // Before the state is read, so that no change in between is missed.
            changed.as_mut().enable();
            match &*entry.state.load_full() {
                State::Available(tls) if is_valid(tls) => return Ok(tls.clone()),
                // Expired while the machine slept or its clock jumped.
                State::Available(_) => match &self.0.source {
                    Source::Asked(_) => self.hurry(identity, Priority::RealTime),
                    Source::Pushed(newest) => {
                        if let Some(result) = newest.borrow().certificate(identity) {
                            return result;
                        }
                    }
                },
                State::Initializing => {}
                State::Unavailable(error) => return Err(error.clone()),
                State::Forgotten => return Err(IdentityError::Forgotten),
            }
            changed.await;
        }
    }

    /// Has the certificate fetched ahead of its use.
    pub fn prefetch(&self, identity: &Identity) {
        self.request(identity, Priority::Warmup);
    }

    /// Drops the certificate and ends its renewal; whoever waits for it is told so.
    pub fn forget(&self, identity: &Identity) {
        let mut queue = self.queue();
        let mut entries = Entries::clone(&self.0.entries.load());
        if let Some(entry) = entries.remove(identity) {
            self.0.entries.store(Arc::new(entries));
            queue.remove(identity);
            entry.set(State::Forgotten);
        }
    }

    /// All identities with their states and chains, for the configuration dump.
    pub fn dump(&self) -> serde_json::Value {
        let entries = self.0.entries.load_full();
        let mut sorted: Vec<_> = entries.values().collect();
        sorted.sort_by_key(|entry| entry.identity.to_string());
        sorted
            .into_iter()
            .map(|entry| match &*entry.state.load_full() {
                State::Initializing | State::Forgotten => {
                    dump::entry(&entry.identity, "Initializing".to_string(), None)
                }
                State::Available(tls) => {
                    dump::entry(&entry.identity, "Available".to_string(), Some(tls))
                }
                State::Unavailable(error) => {
                    dump::entry(&entry.identity, format!("Unavailable: {error}"), None)
                }
            })
            .collect()
    }

    /// The worker: fetches and renews until it is dropped. Run it once.
    pub async fn run(self) {
        match &self.0.source {
            Source::Asked(authority) => self.ask(&**authority).await,
            Source::Pushed(deliveries) => self.take(deliveries.clone()).await,
        }
    }

    async fn take(&self, mut deliveries: watch::Receiver<Delivered>) {
        loop {
            {
                let _writing = self.queue();
                let newest = deliveries.borrow_and_update();
                for entry in self.0.entries.load().values() {
                    entry.settle(&newest);
                }
            }
            if deliveries.changed().await.is_err() {
                return; // Nobody is left to push.
            }
        }
    }

    async fn ask(&self, authority: &dyn Authority) {
        let mut running = FuturesUnordered::new();
        loop {
            let next = {
                let mut queue = self.queue();
                while running.len() < CALLS
                    && let Some(identity) = queue.pop(Instant::now())
                {
                    if let Some(entry) = self.0.entries.load().get(&identity).cloned() {
                        running.push(call(authority, entry));
                    }
                }
                // With all calls taken, only a finished one is of interest.
                queue.next_at().filter(|_| running.len() < CALLS)
            };
            tokio::select! {
                Some((entry, result)) = running.next() => self.finish(&entry, result),
                () = self.0.wake.notified() => {}
                () = async { sleep_until(next.unwrap_or_else(Instant::now)).await },
                    if next.is_some() => {}
            }
        }
    }

    fn finish(&self, entry: &Arc<Entry>, result: Result<TlsIdentity, IdentityError>) {
        let mut queue = self.queue();
        let current = self.0.entries.load().get(&entry.identity).cloned();
        if !current.is_some_and(|current| Arc::ptr_eq(&current, entry)) {
            return; // Forgotten meanwhile.
        }
        let (state, priority, wait) = match result {
            Ok(tls) => {
                *lock(&entry.failures) = Failures::default();
                let wait =
                    retry::renewal_after(tls.not_before(), tls.not_after(), SystemTime::now());
                (
                    Some(State::Available(Arc::new(tls))),
                    Priority::Background,
                    wait,
                )
            }
            Err(error) => {
                let delay = lock(&entry.failures).next_delay();
                match &**entry.state.load() {
                    State::Available(tls) if is_valid(tls) => {
                        tracing::info!(
                            "certificate renewal failed ({error}); retaining existing valid certificate until {}",
                            dump::timestamp(tls.not_after())
                        );
                        let left = tls
                            .not_after()
                            .duration_since(SystemTime::now())
                            .unwrap_or_default();
                        (None, Priority::Background, delay.min(left))
                    }
                    _ => {
                        tracing::warn!(
                            "certificate fetch failed ({error}) and no valid existing certificate; will retry in {delay:?}"
                        );
                        (Some(State::Unavailable(error)), Priority::Warmup, delay)
                    }
                }
            }
        };
        queue.put(entry.identity.clone(), priority, Instant::now() + wait);
        if let Some(state) = state {
            entry.set(state);
        }
    }

    /// The entry of an identity, which is queued if it is new and hurried if it still waits for its first answer.
    fn request(&self, identity: &Identity, priority: Priority) -> Arc<Entry> {
        if let Some(entry) = self.0.entries.load().get(identity) {
            if matches!(**entry.state.load(), State::Initializing) {
                self.hurry(identity, priority);
            }
            return entry.clone();
        }
        let mut queue = self.queue();
        let entries = self.0.entries.load_full();
        if let Some(entry) = entries.get(identity) {
            queue.hurry(identity, priority, Instant::now());
            return entry.clone();
        }
        let entry = Arc::new(Entry {
            identity: identity.clone(),
            state: ArcSwap::from_pointee(State::Initializing),
            failures: Mutex::default(),
            changed: Notify::new(),
        });
        self.0
            .entries
            .store(Arc::new(entries.update(identity.clone(), entry.clone())));
        match &self.0.source {
            Source::Asked(_) => queue.put(identity.clone(), priority, Instant::now()),
            Source::Pushed(newest) => entry.settle(&newest.borrow()),
        }
        drop(queue);
        self.0.wake.notify_one();
        entry
    }

    fn hurry(&self, identity: &Identity, priority: Priority) {
        self.queue().hurry(identity, priority, Instant::now());
        self.0.wake.notify_one();
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        lock(&self.0.queue)
    }
}

impl Entry {
    fn set(&self, state: State) {
        self.state.store(Arc::new(state));
        self.changed.notify_waiters();
    }

    /// Takes the state that follows from a delivery.
    fn settle(&self, delivered: &Delivered) {
        let state = match delivered.certificate(&self.identity) {
            None => State::Initializing,
            Some(Ok(tls)) => State::Available(tls),
            Some(Err(error)) => State::Unavailable(error),
        };
        let told = matches!(
            **self.state.load(),
            State::Unavailable(IdentityError::NoEntry(_))
        );
        if let State::Unavailable(error @ IdentityError::NoEntry(_)) = &state
            && !told
        {
            tracing::warn!("{error}");
        }
        self.set(state);
    }
}

async fn call(
    authority: &dyn Authority,
    entry: Arc<Entry>,
) -> (Arc<Entry>, Result<TlsIdentity, IdentityError>) {
    let result = authority.issue(&entry.identity).await;
    (entry, result)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn is_valid(tls: &TlsIdentity) -> bool {
    tls.not_after() > SystemTime::now()
}

#[cfg(test)]
#[path = "certificates_tests.rs"]
mod tests;
