//! What must be done before the process is ready, and the endpoint that says so.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::http::{Reply, Request};

/// The tasks that are not done; clones share them.
#[derive(Clone)]
pub struct Ready(Arc<Tasks>);

struct Tasks {
    /// How many tasks of a name are pending.
    pending: Mutex<BTreeMap<&'static str, usize>>,
    start: Instant,
}

/// A pending task; it is done when dropped.
pub struct Task {
    ready: Ready,
    name: &'static str,
}

impl Default for Ready {
    fn default() -> Self {
        Self(Arc::new(Tasks {
            pending: Mutex::default(),
            start: Instant::now(),
        }))
    }
}

impl Ready {
    /// Adds a task that readiness waits for.
    pub fn register(&self, name: &'static str) -> Task {
        *self.pending().entry(name).or_default() += 1;
        Task {
            ready: self.clone(),
            name,
        }
    }

    /// The names of the pending tasks, sorted.
    pub fn waiting_for(&self) -> Vec<&'static str> {
        self.pending().keys().copied().collect()
    }

    fn pending(&self) -> MutexGuard<'_, BTreeMap<&'static str, usize>> {
        self.0
            .pending
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers a request to the readiness server.
    pub fn answer(&self, request: &Request) -> Reply {
        if request.path != "/healthz/ready" {
            return Reply::empty(404);
        }
        if request.method != "GET" {
            return Reply::empty(405);
        }
        let pending = self.waiting_for();
        if pending.is_empty() {
            return Reply::text(200, "ready\n");
        }
        Reply::text(500, format!("not ready, pending: {}\n", pending.join(", ")))
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        let mut pending = self.ready.pending();
        if let Some(count) = pending.get_mut(self.name) {
            *count -= 1;
            if *count == 0 {
                pending.remove(self.name);
            }
        }
        let left = pending.len();
        drop(pending);
        let (name, elapsed) = (self.name, self.ready.0.start.elapsed());
        if left == 0 {
            tracing::info!("Task '{name}' complete ({elapsed:?}), marking server ready");
        } else {
            tracing::info!("Task '{name}' complete ({elapsed:?}), still awaiting {left} tasks");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_pending_is_named_until_it_is_done() {
        let ready = Ready::default();
        let get = |path: &str, method: &str| {
            let reply = ready.answer(&Request {
                method: method.into(),
                path: path.into(),
                ..Request::default()
            });
            (reply.status, String::from_utf8(reply.body).unwrap())
        };
        let one = ready.register("state manager");
        let two = ready.register("proxy");
        assert_eq!(
            get("/healthz/ready", "GET"),
            (
                500,
                "not ready, pending: proxy, state manager\n".to_string()
            )
        );
        drop(one);
        drop(two);
        assert_eq!(get("/healthz/ready", "GET"), (200, "ready\n".to_string()));
        assert_eq!(get("/healthz/ready", "POST").0, 405);
        assert_eq!(get("/other", "GET").0, 404);
    }
}
