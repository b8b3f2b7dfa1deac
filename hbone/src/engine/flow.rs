//! What the engine keeps of a stream beside its place in the protocol, and how it tells the stream's owner.

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::AsRawFd;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::io::AsyncWrite;
use tokio::net::TcpStream;

use super::connection::Fields;
use super::fate::Failure;
use super::frame::Reason;

use crate::Counters;

/// How often it is looked whether an application has taken what came before a reset.
const LOOK: Duration = Duration::from_millis(100);
/// So many looks in a row that found nothing taken, and the application is reset anyway.
const PATIENCE: u32 = 600;

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
    /// Why the peer reset the stream, which the socket learns once all that came before is written.
    pub broken: Option<Reason>,
}

/// The socket that a stream carries.
#[derive(Debug)]
pub struct Carried {
    pub socket: TcpStream,
    pub waker: Waker,
    pub counters: Rc<Counters>,
}

impl Carried {
    /// Writes as much as the socket takes, and has it report when it takes more.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = send(&mut self.socket, &self.waker, bytes)?;
        let received = &self.counters.received;
        received.set(received.get() + written as u64);
        Ok(written)
    }
}

/// Writes as much as a socket takes, and has it report when it takes more.
pub fn send(socket: &mut TcpStream, waker: &Waker, bytes: &[u8]) -> io::Result<usize> {
    let mut cx = Context::from_waker(waker);
    let mut written = 0;
    while written < bytes.len() {
        match Pin::new(&mut *socket).poll_write(&mut cx, &bytes[written..]) {
            Poll::Pending => break,
            Poll::Ready(result) => written += result?,
        }
    }
    Ok(written)
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

    /// Writes what waits for the socket without the engine, then ends as the peer ended it.
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
        match (self.is_drained(), outcome) {
            (true, Outcome::Ended) => self.end(),
            (true, outcome) => self.finish(outcome),
            (false, _) => self.finish(Outcome::Reset(Reason::CANCEL)),
        }
    }

    /// Ends it as the peer did, whose every byte is written: in peace, or by a reset.
    pub fn end(mut self) {
        let Some(reason) = self.broken else {
            return self.finish(Outcome::Ended);
        };
        // A reset would take from a slow application what it was written already.
        if let Some(carried) = self.carried.take_if(|carried| unread(&carried.socket) > 0) {
            tokio::task::spawn_local(reset_when_read(carried.socket));
        }
        self.finish(Outcome::Reset(reason));
    }

    /// Ends it: the owner is told, and unless it ended in peace, so is the application, by a reset.
    pub fn finish(self, outcome: Outcome) {
        if !matches!(outcome, Outcome::Ended)
            && let Some(carried) = &self.carried
        {
            reset(&carried.socket);
        }
        self.ticket.finish(outcome);
    }
}

/// Has the socket's closing be a reset.
fn reset(socket: &TcpStream) {
    // A failure leaves an orderly close, which is the next best thing.
    let _ = socket2::SockRef::from(socket).set_linger(Some(Duration::ZERO));
}

/// Resets a socket when its application has what was written, or takes nothing of it for a while.
async fn reset_when_read(socket: TcpStream) {
    let (mut left, mut looks) = (unread(&socket), 0);
    while left > 0 && looks < PATIENCE {
        tokio::time::sleep(LOOK).await;
        let now = unread(&socket);
        looks = if now < left { 0 } else { looks + 1 };
        left = now;
    }
    reset(&socket);
}

/// How many written bytes have not arrived at the other end of the socket.
fn unread(socket: &TcpStream) -> libc::c_int {
    let mut bytes = 0;
    // SAFETY: the call writes one int, to a place that lives as long as it takes.
    match unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) } {
        0 => bytes,
        _ => 0,
    }
}
