//! The tunnel engine: one task of a worker serves all its tunnels and the sockets that they carry.
//!
//! Sockets report to a queue; a turn takes what is ready, reads tunnels, writes straight to the applications, reads the
//! ready applications directly behind frame headers in one scratch, seals and sends once. A flow owns bytes only while
//! they wait for a socket. What the protocol allows is decided in `connection`, which does no I/O.

mod connection;
#[cfg(test)]
mod connection_tests;
mod control;
mod fate;
mod flow;
mod frame;
pub(crate) mod handshake;
mod hpack;
mod huffman;
mod ready;
mod receive;
mod record;
#[cfg(test)]
mod record_tests;
mod scratch;
mod tunnel;

use std::cell::RefCell;
use std::future::poll_fn;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use slab::Slab;
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

pub(crate) use connection::{Fields, Limits, Role};
pub(crate) use control::REASON;
pub use fate::Failure;
pub(crate) use fate::is_abrupt_close;
pub(crate) use flow::Outcome;
pub use frame::Reason;
pub(crate) use hpack::Encoder;

/// What benchmarks of the framing need.
#[cfg(feature = "internals")]
pub mod internals {
    pub use super::connection::{Connection, Limits, Role};
}

use crate::revocation::Number;
use crate::{Counters, Revocations};
use connection::Connection;
use fate::{Request, Shared};
use flow::Ticket;
use handshake::Proven;
use ready::{ReadyQueue, Token};
use scratch::Scratch;
use tunnel::Tunnel;

/// How long a worker keeps large buffers that it does not use.
const REST: Duration = Duration::from_secs(10);

/// The engine of one worker; cheap to clone, not shared between threads.
#[derive(Clone)]
pub struct Engine {
    core: Rc<RefCell<Core>>,
    queue: Arc<ReadyQueue>,
}

#[derive(Default)]
struct Core {
    tunnels: Slab<Tunnel>,
    /// Tunnels to be served in the next turn.
    scheduled: Vec<u32>,
    tokens: Vec<Token>,
    scratch: Scratch,
}

impl Engine {
    /// Starts the engine's task on the `LocalSet` that this is called in; it ends with the set.
    pub fn start() -> Self {
        let engine = Self {
            core: Rc::default(),
            queue: Arc::default(),
        };
        let (core, queue) = (engine.core.clone(), engine.queue.clone());
        // A turn is bounded by itself; the runtime's budget would only make it see sockets as not ready.
        tokio::task::spawn_local(tokio::task::unconstrained(poll_fn(move |cx| {
            core.borrow_mut().turn(&queue, cx)
        })));
        let core = Rc::downgrade(&engine.core);
        tokio::task::spawn_local(async move {
            loop {
                sleep(REST).await;
                match core.upgrade() {
                    Some(core) => core.borrow_mut().scratch.rest(),
                    None => return,
                }
            }
        });
        engine
    }

    /// Serves a tunnel from now on, until it ends.
    pub(crate) fn add(
        &self,
        socket: TcpStream,
        proven: Proven,
        role: Role,
        limits: Limits,
        streams: u32,
    ) -> TunnelHandle {
        let mut core = self.core.borrow_mut();
        let core = &mut *core;
        let entry = core.tunnels.vacant_entry();
        let place = entry.key();
        let http = Connection::new(role, limits, streams);
        let Proven {
            records,
            early,
            rest,
            ..
        } = proven;
        let tunnel = Tunnel::new(place as u32, &self.queue, socket, records, http);
        let shared = tunnel.shared.clone();
        entry.insert(tunnel);
        let result = core.tunnels[place].begin(&early, &rest, &mut core.scratch);
        core.schedule(place);
        if let Err(failure) = result {
            core.end(place, failure);
        }
        self.queue.wake();
        TunnelHandle {
            engine: self.clone(),
            place,
            shared,
        }
    }
}

impl Core {
    /// Serves everything that is ready once.
    fn turn(&mut self, queue: &ReadyQueue, cx: &mut Context<'_>) -> Poll<()> {
        queue.serve_by(cx.waker());
        let mut tokens = std::mem::take(&mut self.tokens);
        queue.take(&mut tokens);
        for token in tokens.drain(..) {
            let place = token.tunnel as usize;
            let Some(tunnel) = self.tunnels.get_mut(place) else {
                continue;
            };
            match token.stream {
                None => tunnel.readable = true,
                Some(stream) => tunnel.list(stream as usize),
            }
            self.schedule(place);
        }
        self.tokens = tokens;
        for place in std::mem::take(&mut self.scheduled) {
            let place = place as usize;
            let Some(tunnel) = self.tunnels.get_mut(place) else {
                continue;
            };
            tunnel.scheduled = false;
            match tunnel.serve(&mut self.scratch) {
                Ok(true) => self.schedule(place),
                Ok(false) => {}
                Err(failure) => self.end(place, failure),
            }
        }
        if !self.scheduled.is_empty() {
            cx.waker().wake_by_ref();
        }
        Poll::Pending
    }

    fn schedule(&mut self, place: usize) {
        if let Some(tunnel) = self.tunnels.get_mut(place)
            && !std::mem::replace(&mut tunnel.scheduled, true)
        {
            self.scheduled.push(place as u32);
        }
    }

    fn end(&mut self, place: usize, failure: Failure) {
        if let Some(tunnel) = self.tunnels.try_remove(place) {
            tunnel.end(failure, &mut self.scratch);
        }
    }
}

/// Somebody's hold on a tunnel; dropping it changes nothing.
#[derive(Clone)]
pub(crate) struct TunnelHandle {
    engine: Engine,
    place: usize,
    shared: Rc<Shared>,
}

impl TunnelHandle {
    /// Does something with the tunnel and has it served; none when it has ended.
    fn with<T>(&self, work: impl FnOnce(&mut Tunnel) -> T) -> Option<T> {
        if self.shared.is_over() {
            return None;
        }
        let mut core = self.engine.core.borrow_mut();
        let result = work(core.tunnels.get_mut(self.place)?);
        core.schedule(self.place);
        self.engine.queue.wake();
        Some(result)
    }

    /// Whether a stream may be opened now, `limit` being this end's own.
    pub fn has_room(&self, limit: usize) -> bool {
        let core = self.engine.core.borrow();
        let tunnel = core
            .tunnels
            .get(self.place)
            .filter(|_| !self.shared.is_over());
        tunnel.is_some_and(|tunnel| {
            !tunnel.retiring && tunnel.http.streams() < limit && tunnel.http.has_room()
        })
    }

    /// Whether no stream will ever be opened on it again.
    pub fn is_ending(&self) -> bool {
        let core = self.engine.core.borrow();
        let tunnel = core
            .tunnels
            .get(self.place)
            .filter(|_| !self.shared.is_over());
        tunnel.is_none_or(|tunnel| tunnel.retiring || tunnel.http.is_ending())
    }

    /// Opens a stream; none when there is no room.
    pub fn open(
        &self,
        authority: &str,
        fields: impl FnOnce(&mut Encoder<'_>),
    ) -> Option<StreamHandle> {
        let (place, ticket) = self.with(|tunnel| {
            let place = tunnel.http.open(authority, fields)?;
            let ticket = tunnel.http.stream(place)?.data.ticket.clone();
            Some((place, ticket))
        })??;
        Some(StreamHandle {
            tunnel: self.clone(),
            place,
            ticket,
        })
    }

    /// Has it end with its last stream.
    pub fn retire(&self) {
        self.with(|tunnel| tunnel.retiring = true);
    }

    /// Tells the peer to open its next streams elsewhere.
    pub fn shut_down(&self) {
        self.with(|tunnel| tunnel.http.shut_down());
    }

    /// Ends it at once, with all its streams.
    pub fn stop(&self, failure: Failure) {
        if !self.shared.is_over() {
            self.engine.core.borrow_mut().end(self.place, failure);
        }
    }

    /// Why it ended.
    pub fn failure(&self) -> Option<Failure> {
        self.shared.ended.borrow().clone()
    }

    /// Waits until the peer has spoken HTTP/2.
    ///
    /// # Errors
    /// Why the tunnel ended before.
    pub async fn settled(&self) -> Result<(), Failure> {
        poll_fn(|cx| {
            if let Some(failure) = self.failure() {
                return Poll::Ready(Err(failure));
            }
            if self.shared.settled.get() {
                return Poll::Ready(Ok(()));
            }
            *self.shared.acceptor.borrow_mut() = Some(cx.waker().clone());
            Poll::Pending
        })
        .await
    }

    /// Waits for a request; none when the tunnel has ended.
    pub async fn request(&self) -> Option<(StreamHandle, Box<Fields>)> {
        let request = poll_fn(|cx| {
            let taken = self.take_request();
            if taken.is_some() || self.shared.is_over() {
                return Poll::Ready(taken);
            }
            *self.shared.acceptor.borrow_mut() = Some(cx.waker().clone());
            Poll::Pending
        });
        let Request {
            place,
            ticket,
            fields,
        } = request.await?;
        let handle = StreamHandle {
            tunnel: self.clone(),
            place,
            ticket,
        };
        Some((handle, fields))
    }

    fn take_request(&self) -> Option<Request> {
        if self.shared.is_over() {
            return None;
        }
        let mut core = self.engine.core.borrow_mut();
        let requests = &mut core.tunnels.get_mut(self.place)?.requests;
        loop {
            let request = requests.pop_front()?;
            // The client may have given up meanwhile.
            if !request.ticket.is_gone() {
                return Some(request);
            }
        }
    }

    /// Ends it once a certificate of the peer's chain is revoked.
    pub async fn guard(self, revocations: Revocations, chain: Vec<Number>, role: Role) {
        let mut changes = revocations.subscribe();
        loop {
            let over = self.shared.over.notified();
            if self.shared.is_over() {
                return;
            }
            if revocations.refuses(&chain, matches!(role, Role::Server)) {
                tracing::info!("a tunnel was closed: its peer's certificate is revoked");
                return self.stop(Failure::Revoked);
            }
            tokio::select! {
                () = over => return,
                changed = changes.changed() => if changed.is_err() {
                    return;
                },
            }
        }
    }

    /// Pings until an answer fails to come, a certificate has expired, or the tunnel has ended.
    ///
    /// In the last quarter of its time it takes no new streams, so that its flows may end by themselves.
    pub async fn watch(self, role: Role, interval: Duration, limit: Duration, expires: SystemTime) {
        let left = || {
            let left = expires.duration_since(SystemTime::now());
            left.unwrap_or_default()
        };
        let quarter = left() / 4;
        let mut told = false;
        loop {
            let left = left();
            if left.is_zero() {
                return self.stop(Failure::Expired);
            }
            if left <= quarter && !std::mem::replace(&mut told, true) {
                match role {
                    Role::Client => self.retire(),
                    Role::Server => self.shut_down(),
                }
            }
            let next = left.checked_sub(quarter).filter(|next| !next.is_zero());
            let interval = interval.min(next.unwrap_or(left));
            let over = self.shared.over.notified();
            if self.shared.is_over() || timeout(interval, over).await.is_ok() {
                return;
            }
            let pong = self.shared.pong.notified();
            let closing = self.with(|tunnel| match tunnel.closing {
                true => true,
                false => {
                    tunnel.http.ping();
                    false
                }
            });
            match closing {
                None => return,
                // It had a whole interval to say goodbye in.
                Some(true) => return self.stop(Failure::Stopped),
                Some(false) => {}
            }
            tokio::select! {
                () = pong => {}
                () = self.shared.over.notified() => return,
                () = sleep(limit) => return self.stop(Failure::Silent),
            }
        }
    }
}

/// The owner's end of a stream; dropping it resets the stream if it has not ended.
pub(crate) struct StreamHandle {
    tunnel: TunnelHandle,
    place: usize,
    ticket: Rc<Ticket>,
}

impl StreamHandle {
    /// Waits for the peer's answer.
    ///
    /// # Errors
    /// Why there will be none.
    pub async fn answer(&self) -> Result<Box<Fields>, Outcome> {
        poll_fn(|cx| self.ticket.poll_answer(cx)).await
    }

    /// Waits for the stream's end.
    pub async fn over(&self) -> Outcome {
        poll_fn(|cx| self.ticket.poll_over(cx)).await
    }

    /// Answers with a status; with `end`, that is all.
    pub fn respond(&self, status: u16, end: bool, fields: impl FnOnce(&mut Encoder<'_>)) {
        if !self.ticket.is_gone() {
            self.tunnel.with(|tunnel| {
                tunnel.http.answer(self.place, status, end, fields);
                if end && let Some(flow) = tunnel.http.close(self.place, Reason::NO_ERROR) {
                    flow.finish(Outcome::Ended);
                }
            });
        }
    }

    /// Whether the engine knows the stream no more.
    pub fn is_gone(&self) -> bool {
        self.ticket.is_gone()
    }

    /// Has the engine carry the socket's bytes from now on.
    pub fn carry(&self, socket: TcpStream, counters: &Rc<Counters>) {
        if !self.ticket.is_gone() {
            let counters = counters.clone();
            self.tunnel
                .with(|tunnel| tunnel.carry(self.place, socket, counters));
        }
    }
}

impl Drop for StreamHandle {
    fn drop(&mut self) {
        if !self.ticket.is_gone() {
            self.tunnel.with(|tunnel| {
                if let Some(flow) = tunnel.http.close(self.place, Reason::CANCEL) {
                    flow.finish(Outcome::Reset(Reason::CANCEL));
                }
            });
        }
    }
}
