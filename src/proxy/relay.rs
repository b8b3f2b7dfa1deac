//! Copies bytes between two TCP sockets: the plaintext side of the data path.
//!
//! A flow owns bytes only while a peer does not take them: reads go to one scratch of the worker. A direction that
//! moves much at a time is switched to `splice(2)` until it no longer does; small reads are cheaper copied.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::io;
use std::os::fd::AsRawFd;
use std::task::{Context, Poll, ready};

use nix::sys::socket::{MsgFlags, recv, send};
use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::TcpStream;

use super::pipes::Loan;

/// How much is copied at a time, in bytes; small enough for the processor's cache.
const SCRATCH: usize = 64 << 10;
/// A read of at least this much counts as large.
const LARGE: usize = SCRATCH / 2;
/// So many large reads in a row, and a direction is spliced.
const SUSTAINED: u8 = 8;
/// Spliced pieces below this count as small.
const SMALL: usize = 16 << 10;
/// So many small pieces in a row, and a direction is copied again.
const SPARSE: u8 = 4;
/// What a direction may move before others have their turn.
const TURN: usize = 1 << 20;

thread_local! {
    // Zeroed memory of the kernel's: a page is only there once something was read into it.
    static BUFFER: RefCell<Box<[u8]>> = RefCell::new(vec![0; SCRATCH].into_boxed_slice());
}

/// Relays until both directions have ended; a half-close is passed on, a reset is passed on as a reset.
///
/// `sent` counts bytes from `near` to `far`, `received` the others.
///
/// # Errors
/// What broke a direction; a connection that a peer reset is no error to the caller's log.
pub async fn relay(
    near: TcpStream,
    far: TcpStream,
    sent: &Cell<u64>,
    received: &Cell<u64>,
) -> io::Result<()> {
    let (mut forward, mut backward) = (Direction::default(), Direction::default());
    let result = poll_fn(|cx| {
        let forward = forward.poll(cx, &near, &far, sent)?;
        let backward = backward.poll(cx, &far, &near, received)?;
        match (forward, backward) {
            (Poll::Ready(()), Poll::Ready(())) => Poll::Ready(Ok(())),
            _ => Poll::Pending,
        }
    });
    let result = result.await;
    if result.is_err() {
        reset(near);
        reset(far);
    }
    result
}

/// Closes a socket with a reset rather than an orderly end.
pub fn reset(socket: TcpStream) {
    // A failure leaves an orderly close, which is the next best thing.
    let _ = SockRef::from(&socket).set_linger(Some(std::time::Duration::ZERO));
}

/// How a direction moves its bytes, and what speaks for changing that.
#[derive(Clone, Copy)]
enum Way {
    /// After so many large reads in a row.
    Copy(u8),
    /// After so many small pieces in a row.
    Splice(u8),
    /// The kernel does not splice these sockets.
    CopyOnly,
}

/// What a direction has read and the far socket did not take yet.
enum Held {
    Nothing,
    /// From the given position on.
    Bytes(Vec<u8>, usize),
    Pipe(Loan),
    /// Nothing, and nothing more will come.
    Ended,
}

struct Direction {
    way: Way,
    held: Held,
}

impl Default for Direction {
    fn default() -> Self {
        Self {
            way: Way::Copy(0),
            held: Held::Nothing,
        }
    }
}

impl Direction {
    /// Moves what can be moved; ready once the half-close was passed on.
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        from: &TcpStream,
        to: &TcpStream,
        count: &Cell<u64>,
    ) -> Poll<io::Result<()>> {
        let mut left = TURN;
        loop {
            while let Held::Bytes(..) | Held::Pipe(_) = self.held {
                if !self.write_out(to, count)? {
                    ready!(to.poll_write_ready(cx))?;
                }
            }
            if let Held::Ended = self.held {
                return Poll::Ready(Ok(()));
            }
            ready!(from.poll_read_ready(cx))?;
            if left == 0 {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            match self.read(from, to, count)? {
                None => {}
                Some(0) => {
                    self.held = Held::Ended;
                    match SockRef::from(to).shutdown(std::net::Shutdown::Write) {
                        Err(e) if e.kind() != io::ErrorKind::NotConnected => return Err(e).into(),
                        _ => {}
                    }
                }
                Some(read) => left = left.saturating_sub(read),
            }
        }
    }

    /// Reads once and writes what the far socket takes; none when there is nothing, 0 at the end.
    fn read(
        &mut self,
        from: &TcpStream,
        to: &TcpStream,
        count: &Cell<u64>,
    ) -> io::Result<Option<usize>> {
        if let Way::Splice(small) = self.way
            && let Some(pipe) = Loan::take()
        {
            match self.splice(pipe, from, to, count) {
                Err(e) if e.kind() == io::ErrorKind::InvalidInput => self.way = Way::CopyOnly,
                Ok(Some(read)) => {
                    self.way = match small + 1 {
                        _ if read >= SMALL => Way::Splice(0),
                        SPARSE => Way::Copy(0),
                        small => Way::Splice(small),
                    };
                    return Ok(Some(read));
                }
                other => return other,
            }
        }
        let read = BUFFER.with_borrow_mut(|buffer| self.copy(buffer, from, to, count))?;
        if let (Way::Copy(large), Some(read)) = (self.way, read) {
            self.way = match large + 1 {
                _ if read < LARGE => Way::Copy(0),
                SUSTAINED => Way::Splice(0),
                large => Way::Copy(large),
            };
        }
        Ok(read)
    }

    fn copy(
        &mut self,
        buffer: &mut [u8],
        from: &TcpStream,
        to: &TcpStream,
        count: &Cell<u64>,
    ) -> io::Result<Option<usize>> {
        let size = buffer.len();
        let Some(read) = attempt(from, Interest::READABLE, size, || {
            Ok(recv(from.as_raw_fd(), buffer, MsgFlags::empty())?)
        })?
        else {
            return Ok(None);
        };
        let written = write(to, &buffer[..read], count)?;
        if written < read {
            self.held = Held::Bytes(buffer[written..read].to_vec(), 0);
        }
        Ok(Some(read))
    }

    fn splice(
        &mut self,
        mut pipe: Loan,
        from: &TcpStream,
        to: &TcpStream,
        count: &Cell<u64>,
    ) -> io::Result<Option<usize>> {
        // Less than asked for may also mean that the pipe has no more places, so it says nothing about the socket.
        let Some(read) = attempt(from, Interest::READABLE, 0, || pipe.fill(from))? else {
            return Ok(None);
        };
        if !empty(&mut pipe, to, count)? {
            self.held = Held::Pipe(pipe);
        }
        Ok(Some(read))
    }

    /// Writes what is held; gives whether all of it went.
    fn write_out(&mut self, to: &TcpStream, count: &Cell<u64>) -> io::Result<bool> {
        let done = match &mut self.held {
            Held::Nothing | Held::Ended => return Ok(true),
            Held::Bytes(bytes, written) => {
                *written += write(to, &bytes[*written..], count)?;
                *written == bytes.len()
            }
            Held::Pipe(pipe) => empty(pipe, to, count)?,
        };
        if done {
            self.held = Held::Nothing;
        }
        Ok(done)
    }
}

/// Writes what the socket takes; gives how much.
fn write(to: &TcpStream, bytes: &[u8], count: &Cell<u64>) -> io::Result<usize> {
    if bytes.is_empty() {
        return Ok(0);
    }
    let sent = attempt(to, Interest::WRITABLE, bytes.len(), || {
        Ok(send(to.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL)?)
    })?;
    let sent = sent.unwrap_or(0);
    count.set(count.get() + sent as u64);
    Ok(sent)
}

/// Moves on what a pipe holds; gives whether all of it went.
fn empty(pipe: &mut Loan, to: &TcpStream, count: &Cell<u64>) -> io::Result<bool> {
    while !pipe.is_empty() {
        match attempt(to, Interest::WRITABLE, 0, || pipe.drain(to))? {
            Some(moved) => count.set(count.get() + moved as u64),
            None => return Ok(false),
        }
    }
    Ok(true)
}

/// Does a read or a write if the socket is ready; none when it is not.
///
/// What moved less than `full` has exhausted the socket: readiness ends then as if the next call had failed, which
/// saves that call.
fn attempt(
    socket: &TcpStream,
    interest: Interest,
    full: usize,
    work: impl FnOnce() -> io::Result<usize>,
) -> io::Result<Option<usize>> {
    let mut short = None;
    let result = socket.try_io(interest, || match work() {
        Ok(moved) if moved > 0 && moved < full => {
            short = Some(moved);
            Err(io::ErrorKind::WouldBlock.into())
        }
        result => result,
    });
    match result {
        Ok(moved) => Ok(Some(moved)),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(short),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
#[path = "relay_tests.rs"]
mod tests;
