//! What the engine keeps of a stream beside its place in the protocol, and how it tells the stream's owner.

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use tokio::net::TcpStream;

use super::connection::Fields;
use super::frame::Reason;
use super::tunnel::Failure;
use crate::Counters;

/// Why a stream is no more.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// Both directions ended.
    Ended,
    /// The peer reset it, or it was reset for the peer's errors.
    Reset(Reason),
    /// The peer will not act on it: it may be tried again elsewhere.
    Unprocessed,
    /// The tunnel broke.
    Tunnel(Failure),
    /// The carried socket could not be read.
    Read(Rc<io::Error>),
    /// The carried socket could not be written.
    Write(Rc<io::Error>),
}

/// Shared by the engine and the owner of a stream.
#[derive(Debug, Default)]
pub struct Ticket {
    answer: RefCell<Option<Box<Fields>>>,
    over: RefCell<Option<Outcome>>,
    gone: Cell<bool>,
    owner: RefCell<Option<Waker>>,
}

impl Ticket {
    /// Tells the owner of the peer's answer.
    pub fn answered(&self, fields: Box<Fields>) {
        *self.answer.borrow_mut() = Some(fields);
        self.wake();
    }

    /// Tells the owner that the engine knows the stream no more.
    pub fn finish(&self, outcome: Outcome) {
        self.gone.set(true);
        *self.over.borrow_mut() = Some(outcome);
        self.wake();
    }

    fn wake(&self) {
        if let Some(owner) = self.owner.borrow_mut().take() {
            owner.wake();
        }
    }

    /// Whether the engine knows the stream no more.
    pub fn is_gone(&self) -> bool {
        self.gone.get()
    }

    /// Waits for the peer's answer.
    pub fn poll_answer(&self, cx: &mut Context<'_>) -> Poll<Result<Box<Fields>, Outcome>> {
        if let Some(answer) = self.answer.borrow_mut().take() {
            return Poll::Ready(Ok(answer));
        }
        self.poll_over(cx).map(Err)
    }

    /// Waits for the stream's end.
    pub fn poll_over(&self, cx: &mut Context<'_>) -> Poll<Outcome> {
        if let Some(outcome) = &*self.over.borrow() {
            return Poll::Ready(outcome.clone());
        }
        *self.owner.borrow_mut() = Some(cx.waker().clone());
        Poll::Pending
    }
}

/// The engine's part of a stream.
#[derive(Debug, Default)]
pub struct Flow {
    pub ticket: Rc<Ticket>,
    pub carried: Option<Carried>,
    /// Bytes of the peer that the socket did not take yet, from `written` on.
    pub pending: Vec<u8>,
    pub written: usize,
    /// Whether it stands in a list of the tunnel's, so that it is in no other.
    pub listed: bool,
    /// Whether the socket was told that nothing more comes.
    pub shut: bool,
}

/// The socket that a stream carries.
#[derive(Debug)]
pub struct Carried {
    pub socket: TcpStream,
    pub waker: Waker,
    pub counters: Rc<Counters>,
}

impl Flow {
    /// Whether all that the peer sent is written.
    pub fn is_drained(&self) -> bool {
        self.written == self.pending.len()
    }

    /// Has it known how much memory waits for the socket.
    pub fn note_waiting(&self) {
        if let Some(carried) = &self.carried {
            carried.counters.wait(self.pending.len());
        }
    }

    /// Writes what waits for the socket without the engine, then ends in peace.
    pub async fn write_out(mut self) {
        let outcome = loop {
            let Some(carried) = &self.carried else {
                break Outcome::Ended;
            };
            // Its owner may have given it up.
            if self.is_drained() || Rc::strong_count(&self.ticket) == 1 {
                break Outcome::Ended;
            }
            match carried.socket.try_write(&self.pending[self.written..]) {
                Ok(written) => {
                    self.written += written;
                    let received = &carried.counters.received;
                    received.set(received.get() + written as u64);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if let Err(error) = carried.socket.writable().await {
                        break Outcome::Write(Rc::new(error));
                    }
                }
                Err(error) => break Outcome::Write(Rc::new(error)),
            }
        };
        match self.is_drained() {
            true => self.finish(outcome),
            false => self.finish(Outcome::Reset(Reason::CANCEL)),
        }
    }

    /// Ends it: the owner is told, and unless it ended in peace, so is the application, by a reset.
    pub fn finish(self, outcome: Outcome) {
        if !matches!(outcome, Outcome::Ended)
            && let Some(carried) = &self.carried
        {
            let socket = socket2::SockRef::from(&carried.socket);
            // A failure leaves an orderly close, which is the next best thing.
            let _ = socket.set_linger(Some(std::time::Duration::ZERO));
        }
        self.ticket.finish(outcome);
    }
}
