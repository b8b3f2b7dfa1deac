//! What real API servers do now and then: refuse, keep waiting, break connections.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

/// Requests that a test has to do with: the method, and what the path begins with.
#[derive(Clone, Debug)]
struct Aim {
    method: String,
    path: String,
}

impl Aim {
    fn hits(&self, method: &str, path: &str) -> bool {
        self.method == method && path.starts_with(&self.path)
    }
}

/// Requests that wait until the last copy of this is dropped.
#[derive(Clone, Debug)]
pub struct Held {
    waiting: Arc<AtomicUsize>,
    _open: Arc<watch::Sender<()>>,
}

impl Held {
    /// How many wait now.
    pub fn waiting(&self) -> usize {
        self.waiting.load(Ordering::SeqCst)
    }
}

#[derive(Default)]
struct State {
    failures: Vec<(Aim, u16, usize)>,
    holds: Vec<(Aim, Arc<AtomicUsize>, watch::Receiver<()>)>,
}

/// The faults that are asked for.
#[derive(Default)]
pub struct Faults(Mutex<State>);

impl Faults {
    pub fn fail(&self, method: &str, path: &str, status: u16, times: usize) {
        self.state()
            .failures
            .push((aim(method, path), status, times));
    }

    pub fn recover(&self) {
        self.state().failures.clear();
    }

    pub fn hold(&self, method: &str, path: &str) -> Held {
        let (open, opened) = watch::channel(());
        let waiting = Arc::new(AtomicUsize::new(0));
        self.state()
            .holds
            .push((aim(method, path), waiting.clone(), opened));
        Held {
            waiting,
            _open: Arc::new(open),
        }
    }

    /// Waits as long as a request is held, and gives the status it is to fail with.
    pub async fn meet(&self, method: &str, path: &str) -> Option<u16> {
        let held = {
            let mut state = self.state();
            state
                .holds
                .retain(|(_, _, open)| open.has_changed().is_ok());
            let found = state
                .holds
                .iter()
                .find(|(aim, _, _)| aim.hits(method, path));
            found.map(|(_, waiting, open)| (waiting.clone(), open.clone()))
        };
        if let Some((waiting, mut open)) = held {
            waiting.fetch_add(1, Ordering::SeqCst);
            // An error is the drop that was waited for.
            let _ = open.changed().await;
            waiting.fetch_sub(1, Ordering::SeqCst);
        }
        let mut state = self.state();
        let found = state
            .failures
            .iter_mut()
            .find(|(aim, _, times)| *times > 0 && aim.hits(method, path));
        found.map(|(_, status, times)| {
            *times -= 1;
            *status
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn aim(method: &str, path: &str) -> Aim {
    Aim {
        method: method.to_string(),
        path: path.to_string(),
    }
}
