//! Which sockets of a worker are ready: each has a waker of its own, and one task serves what they report.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Wake, Waker};

/// What became ready: a tunnel's own socket, or the socket of one of its streams, by their places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Token {
    pub tunnel: u32,
    pub stream: Option<u32>,
}

/// The sockets that became ready since they were last served.
#[derive(Debug, Default)]
pub struct ReadyQueue(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    ready: Vec<(Token, Arc<SocketWaker>)>,
    server: Option<Waker>,
}

#[derive(Debug)]
struct SocketWaker {
    queue: Arc<ReadyQueue>,
    token: Token,
    queued: AtomicBool,
}

impl ReadyQueue {
    /// A waker for one socket. It may outlive it: a token of the past does no harm but a look in vain.
    pub fn waker(self: &Arc<Self>, token: Token) -> Waker {
        Arc::new(SocketWaker {
            queue: self.clone(),
            token,
            queued: AtomicBool::new(false),
        })
        .into()
    }

    /// Has `server` woken from now on whenever the queue is no longer empty.
    pub fn serve_by(&self, server: &Waker) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut state.server {
            Some(known) => known.clone_from(server),
            none => *none = Some(server.clone()),
        }
    }

    /// Has the server look, without any socket having become ready.
    pub fn wake(&self) {
        let state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(server) = &state.server {
            server.wake_by_ref();
        }
    }

    /// Moves the ready sockets into `tokens`.
    pub fn take(&self, tokens: &mut Vec<Token>) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (token, waker) in state.ready.drain(..) {
            waker.queued.store(false, Ordering::Release);
            tokens.push(token);
        }
    }
}

impl Wake for SocketWaker {
    fn wake(self: Arc<Self>) {
        if self.queued.swap(true, Ordering::AcqRel) {
            return;
        }
        let queue = self.queue.clone();
        let mut state = queue.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.ready.push((self.token, self));
        if state.ready.len() == 1
            && let Some(server) = &state.server
        {
            server.wake_by_ref();
        }
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.clone().wake();
    }
}
