//! One tunnel's sockets: records in, bytes to the applications; their bytes into frames, sealed and sent at once.

use std::collections::VecDeque;
use std::io::ErrorKind;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use socket2::SockRef;
use tokio::io::{AsyncRead, ReadBuf};
use tokio::net::TcpStream;

use super::connection::{Connection, Event, Fault};
use super::fate::{Failure, Request, Shared};
use super::flow::{Carried, Flow, Outcome, send};
use super::frame::{HEADER, Reason};
use super::ready::{ReadyQueue, Token};
use super::record::Records;
use super::scratch::{SCRATCH, Scratch};
use crate::Counters;

/// Control frames that may wait for a peer that does not read, in bytes.
const CONTROL: usize = 256 << 10;
/// Capacity for control frames that an idle tunnel may keep, in bytes.
const KEPT_CONTROL: usize = 2 << 10;
/// Reads of one socket before its siblings have their turn.
const READS: usize = 2;
/// The least room in the scratch that is worth a read, in bytes.
const WORTH: usize = 16 << 10;

/// Sealed records that the socket did not take yet.
#[derive(Debug)]
struct Unsent {
    buffer: Vec<u8>,
    from: usize,
    to: usize,
}

pub struct Tunnel {
    /// Its place among the worker's tunnels.
    place: u32,
    queue: Arc<ReadyQueue>,
    socket: TcpStream,
    waker: Waker,
    records: Records,
    pub http: Connection<Flow>,
    /// The start of a record whose end has not come.
    partial: Vec<u8>,
    unsent: Option<Unsent>,
    /// Streams to be served.
    ready: Vec<u32>,
    /// Streams that wait for the tunnel's window.
    starved: Vec<u32>,
    /// Streams that wait until `unsent` is sent.
    blocked: Vec<u32>,
    pub requests: VecDeque<Request>,
    pub shared: Rc<Shared>,
    /// Whether the socket may have something to be read.
    pub readable: bool,
    pub scheduled: bool,
    /// Whether it ends with its last stream.
    pub retiring: bool,
    /// Whether it said its last word.
    pub closing: bool,
}

impl Tunnel {
    /// A tunnel whose handshake is over.
    pub fn new(
        place: u32,
        queue: &Arc<ReadyQueue>,
        socket: TcpStream,
        records: Records,
        http: Connection<Flow>,
    ) -> Self {
        let token = Token {
            tunnel: place,
            stream: None,
        };
        Self {
            place,
            waker: queue.waker(token),
            queue: queue.clone(),
            socket,
            records,
            http,
            partial: Vec::new(),
            unsent: None,
            ready: Vec::new(),
            starved: Vec::new(),
            blocked: Vec::new(),
            requests: VecDeque::new(),
            shared: Rc::default(),
            readable: true,
            scheduled: false,
            retiring: false,
            closing: false,
        }
    }

    /// Acts on what came along with the handshake: plaintext, and ciphertext after it.
    pub fn begin(
        &mut self,
        early: &[u8],
        rest: &[u8],
        scratch: &mut Scratch,
    ) -> Result<(), Failure> {
        self.act(early)?;
        if rest.is_empty() {
            return Ok(());
        }
        scratch.input[..rest.len()].copy_from_slice(rest);
        self.open(rest.len(), scratch)
    }

    /// Has a stream served in the next turn.
    pub fn list(&mut self, place: usize) {
        if let Some(stream) = self.http.stream(place)
            && !stream.data.listed
        {
            stream.data.listed = true;
            self.ready.push(place as u32);
        }
    }

    /// Carries a socket in a stream from now on.
    pub fn carry(&mut self, place: usize, socket: TcpStream, counters: Rc<Counters>) {
        let waker = self.queue.waker(Token {
            tunnel: self.place,
            stream: Some(place as u32),
        });
        if let Some(stream) = self.http.stream(place) {
            stream.data.carried = Some(Carried {
                socket,
                waker,
                counters,
            });
            self.list(place);
        }
    }

    /// Serves whatever is ready; true when there is more to be done at once.
    pub fn serve(&mut self, scratch: &mut Scratch) -> Result<bool, Failure> {
        self.flush(scratch)?;
        let mut more = false;
        if self.readable {
            more |= self.read(scratch)?;
        }
        for place in std::mem::take(&mut self.ready) {
            self.serve_stream(place as usize, scratch)?;
        }
        self.flush(scratch)?;
        if self.unsent.is_none() {
            for place in std::mem::take(&mut self.blocked) {
                self.relist(place);
            }
        }
        if self.http.control.len() > CONTROL {
            let why = "it makes this end answer, and does not read the answers";
            return Err(Fault::new(Reason::ENHANCE_YOUR_CALM, why).into());
        }
        self.end_if_done(scratch)?;
        Ok(more || !self.ready.is_empty())
    }

    fn relist(&mut self, place: u32) {
        if let Some(stream) = self.http.stream(place as usize) {
            stream.data.listed = true;
            self.ready.push(place);
        }
    }

    /// Reads of the tunnel's socket and acts on it; true when the socket may have more.
    fn read(&mut self, scratch: &mut Scratch) -> Result<bool, Failure> {
        for _ in 0..READS {
            let kept = self.partial.len();
            scratch.input[..kept].copy_from_slice(&self.partial);
            let mut buffer = ReadBuf::new(&mut scratch.input[kept..]);
            let waker = self.waker.clone();
            let mut cx = Context::from_waker(&waker);
            let read = match Pin::new(&mut self.socket).poll_read(&mut cx, &mut buffer) {
                Poll::Pending => {
                    self.readable = false;
                    return Ok(false);
                }
                Poll::Ready(result) => {
                    result?;
                    buffer.filled().len()
                }
            };
            if read == 0 {
                return Err(Failure::Closed);
            }
            let end = kept + read;
            scratch.note(end);
            self.open(end, scratch)?;
            if end == SCRATCH {
                return Ok(true);
            }
        }
        Ok(true)
    }

    /// Acts on the records in the first `end` bytes of the scratch's input.
    fn open(&mut self, end: usize, scratch: &mut Scratch) -> Result<(), Failure> {
        let opened = self
            .records
            .open(&scratch.input[..end], &mut scratch.plain)?;
        self.partial.clear();
        self.partial
            .extend_from_slice(&scratch.input[opened.consumed..end]);
        if self.partial.is_empty() {
            self.partial = Vec::new();
        }
        let plain = std::mem::take(&mut scratch.plain);
        let result = self.act(&plain[..opened.plain]);
        scratch.plain = plain;
        result?;
        match opened.closed {
            true => Err(Failure::Closed),
            false => Ok(()),
        }
    }

    /// Acts on bytes of the peer.
    fn act(&mut self, mut plain: &[u8]) -> Result<(), Failure> {
        while let Some(event) = self.http.receive(&mut plain)? {
            match event {
                Event::Request(place, fields) => {
                    if let Some(stream) = self.http.stream(place) {
                        let ticket = stream.data.ticket.clone();
                        self.requests.push_back(Request {
                            place,
                            ticket,
                            fields,
                        });
                        self.shared.wake_acceptor();
                    }
                }
                Event::Answer(place, fields) => {
                    if let Some(stream) = self.http.stream(place) {
                        stream.data.ticket.answered(fields);
                    }
                }
                Event::Data(place, bytes) => self.deliver(place, bytes),
                Event::End(place) => self.settle(place),
                Event::Reset(place, reason) => self.reset(place, reason),
                Event::Window(place) => self.list(place),
                Event::WindowOfAll => {
                    for place in std::mem::take(&mut self.starved) {
                        self.relist(place);
                    }
                    for place in self.http.places() {
                        self.list(place);
                    }
                }
                Event::GoAway(last, reason) => self.gone_away(last, reason),
                Event::Pong => self.shared.pong.notify_waiters(),
            }
        }
        if !self.shared.settled.get() && self.http.is_settled() {
            self.shared.settled.set(true);
            self.shared.wake_acceptor();
        }
        Ok(())
    }

    /// Writes a stream's bytes to its socket; what it does not take waits.
    fn deliver(&mut self, place: usize, bytes: &[u8]) {
        let Some(stream) = self.http.stream(place) else {
            return;
        };
        let flow = &mut stream.data;
        let mut taken = 0;
        if flow.is_drained()
            && let Some(carried) = &mut flow.carried
        {
            match carried.write(bytes) {
                Ok(written) => taken = written,
                Err(error) => return self.break_off(place, Outcome::Write(Rc::new(error))),
            }
        }
        if taken < bytes.len() {
            if flow.written > flow.pending.len() / 2 {
                flow.pending.drain(..flow.written);
                flow.written = 0;
            }
            flow.pending.extend_from_slice(&bytes[taken..]);
            flow.note_waiting();
        }
        self.http.consumed(place, taken);
    }

    /// Writes what waits for a stream's socket.
    fn deliver_pending(&mut self, place: usize) {
        let Some(stream) = self.http.stream(place) else {
            return;
        };
        let flow = &mut stream.data;
        let Some(carried) = flow
            .carried
            .as_mut()
            .filter(|_| flow.written < flow.pending.len())
        else {
            return self.settle(place);
        };
        match carried.write(&flow.pending[flow.written..]) {
            Ok(written) => {
                flow.written += written;
                if flow.is_drained() {
                    flow.pending = Vec::new();
                    flow.written = 0;
                }
                flow.note_waiting();
                self.http.consumed(place, written);
                self.settle(place);
            }
            Err(error) => self.break_off(place, Outcome::Write(Rc::new(error))),
        }
    }

    /// Passes on the peer's end of a stream when all before it is written, and forgets a stream that is over.
    fn settle(&mut self, place: usize) {
        let Some(stream) = self.http.stream(place) else {
            return;
        };
        if !stream.has_received_end() || !stream.data.is_drained() || stream.data.carried.is_none()
        {
            return;
        }
        if stream.is_over() {
            if let Some(flow) = self.http.close(place, Reason::NO_ERROR) {
                flow.end();
            }
        } else if !stream.data.shut
            && let Some(carried) = &stream.data.carried
        {
            let shut = SockRef::from(&carried.socket).shutdown(std::net::Shutdown::Write);
            stream.data.shut = true;
            if let Err(error) = shut
                && error.kind() != ErrorKind::NotConnected
            {
                self.break_off(place, Outcome::Write(Rc::new(error)));
            }
        }
    }

    fn break_off(&mut self, place: usize, outcome: Outcome) {
        // RFC 9113 §8.5: an error of the TCP connection is a CONNECT_ERROR of the stream.
        if let Some(flow) = self.http.close(place, Reason::CONNECT_ERROR) {
            flow.finish(outcome);
        }
    }

    /// The peer gave up a stream.
    fn reset(&mut self, place: usize, reason: Reason) {
        if let Some(stream) = self.http.stream(place)
            && stream.is_answered()
            && stream.data.carried.is_some()
        {
            // What the peer already sent still counts (RFC 9113 §8.1). Without an error it has what it wants; but
            // proxies also end with one what ended in peace behind them. Who cancels before the end of its data has been
            // cut off itself, or gives up: that is no end.
            let peaceful =
                reason == Reason::NO_ERROR || reason == Reason::CANCEL && stream.has_received_end();
            stream.data.broken = Some(reason).filter(|_| !peaceful);
            stream.end_both();
            return self.settle(place);
        }
        if let Some(flow) = self.http.forget(place) {
            flow.finish(match reason {
                Reason::REFUSED_STREAM => Outcome::Unprocessed,
                reason => Outcome::Reset(reason),
            });
        }
    }

    /// The peer will not act on the streams above `last`.
    fn gone_away(&mut self, last: u32, reason: Reason) {
        for place in self.http.places() {
            if let Some(stream) = self.http.stream(place)
                && stream.id > last
                && !stream.is_answered()
                && let Some(flow) = self.http.forget(place)
            {
                flow.finish(match reason {
                    Reason::NO_ERROR => Outcome::Unprocessed,
                    reason => Outcome::Reset(reason),
                });
            }
        }
    }

    /// Serves one stream's socket: writes what waits for it, and reads it into frames.
    fn serve_stream(&mut self, place: usize, scratch: &mut Scratch) -> Result<(), Failure> {
        let Some(stream) = self.http.stream(place) else {
            return Ok(());
        };
        stream.data.listed = false;
        self.deliver_pending(place);
        for _ in 0..READS {
            match self.http.stream(place) {
                Some(stream)
                    if stream.data.carried.is_some()
                        && stream.is_answered()
                        && !stream.has_sent_end() => {}
                _ => return Ok(()),
            }
            if scratch.room(self.http.max_frame()) < WORTH {
                self.flush(scratch)?;
            }
            self.put_control(scratch);
            if self.unsent.is_some() || !self.http.control.is_empty() {
                self.wait(place, |tunnel| &mut tunnel.blocked);
                return Ok(());
            }
            let window = self.http.room(place);
            if window == 0 {
                if !self.http.is_window_shut(place) {
                    self.wait(place, |tunnel| &mut tunnel.starved);
                }
                return Ok(());
            }
            let wanted = window.min(scratch.room(self.http.max_frame()));
            let Some(stream) = self.http.stream(place) else {
                return Ok(());
            };
            let Some(carried) = &mut stream.data.carried else {
                return Ok(());
            };
            let start = scratch.filled + HEADER;
            let mut buffer = ReadBuf::new(&mut scratch.out[start..start + wanted]);
            let mut cx = Context::from_waker(&carried.waker);
            match Pin::new(&mut carried.socket).poll_read(&mut cx, &mut buffer) {
                Poll::Pending => return Ok(()),
                Poll::Ready(Err(error)) => {
                    self.break_off(place, Outcome::Read(Rc::new(error)));
                    return Ok(());
                }
                Poll::Ready(Ok(())) => {}
            }
            let read = buffer.filled().len();
            if read == 0 {
                let head = self.http.data(place, 0, true);
                scratch.put(&head);
                self.settle(place);
                return Ok(());
            }
            let sent = &carried.counters.sent;
            sent.set(sent.get() + read as u64);
            self.frame(place, read, scratch);
        }
        self.list(place);
        Ok(())
    }

    fn wait(&mut self, place: usize, list: impl FnOnce(&mut Self) -> &mut Vec<u32>) {
        if let Some(stream) = self.http.stream(place) {
            stream.data.listed = true;
            list(self).push(place as u32);
        }
    }

    /// Makes frames of `length` bytes that lie in the scratch behind the room for one header.
    fn frame(&mut self, place: usize, length: usize, scratch: &mut Scratch) {
        let (most, start) = (self.http.max_frame(), scratch.filled);
        let frames = length.div_ceil(most);
        // From the last one on, each moves up by the headers before it.
        for index in (1..frames).rev() {
            let from = start + HEADER + index * most;
            let size = most.min(length - index * most);
            scratch
                .out
                .copy_within(from..from + size, from + index * HEADER);
        }
        for index in 0..frames {
            let at = start + index * (most + HEADER);
            let size = most.min(length - index * most);
            scratch.out[at..at + HEADER].copy_from_slice(&self.http.data(place, size, false));
        }
        scratch.filled += length + frames * HEADER;
    }

    fn put_control(&mut self, scratch: &mut Scratch) {
        if !self.http.control.is_empty() && self.unsent.is_none() {
            let put = scratch.put(&self.http.control);
            self.http.control.drain(..put);
            if self.http.control.capacity() > KEPT_CONTROL && self.http.control.is_empty() {
                self.http.control = Vec::new();
            }
        }
    }

    /// Seals and sends what there is, as far as the socket takes it.
    pub fn flush(&mut self, scratch: &mut Scratch) -> Result<(), Failure> {
        loop {
            if let Some(mut unsent) = self.unsent.take() {
                let waker = self.waker.clone();
                let bytes = &unsent.buffer[unsent.from..unsent.to];
                unsent.from += send(&mut self.socket, &waker, bytes)?;
                if unsent.from < unsent.to {
                    self.unsent = Some(unsent);
                    return Ok(());
                }
                scratch.give_back(unsent.buffer);
            }
            self.put_control(scratch);
            if scratch.filled == 0 && !self.records.wants_to_seal() {
                return Ok(());
            }
            let filled = std::mem::take(&mut scratch.filled);
            scratch.note(filled);
            let sealed = self
                .records
                .seal(&scratch.out[..filled], &mut scratch.sealed)?;
            self.send_sealed(sealed, scratch)?;
            if self.unsent.is_some() {
                return Ok(());
            }
        }
    }

    fn send_sealed(&mut self, length: usize, scratch: &mut Scratch) -> Result<(), Failure> {
        let waker = self.waker.clone();
        let sent = send(&mut self.socket, &waker, &scratch.sealed[..length])?;
        if sent < length {
            self.unsent = Some(Unsent {
                buffer: scratch.take_sealed(),
                from: sent,
                to: length,
            });
        }
        Ok(())
    }

    /// Says goodbye when the tunnel has served its last stream.
    fn end_if_done(&mut self, scratch: &mut Scratch) -> Result<(), Failure> {
        let last = self.retiring || self.http.is_ending() || self.http.is_shut_down();
        if last && !self.closing && self.http.streams() == 0 && self.unsent.is_none() {
            self.closing = true;
            self.http.go_away(Reason::NO_ERROR);
            self.flush(scratch)?;
            if self.unsent.is_none() {
                let sealed = self.records.close(&mut scratch.sealed)?;
                self.send_sealed(sealed, scratch)?;
            }
            // The peer answers by closing; until then its last frames must find somebody.
            let _ = SockRef::from(&self.socket).shutdown(std::net::Shutdown::Write);
        }
        Ok(())
    }

    /// Ends it for everybody; the peer is told why if it takes it at once.
    pub fn end(mut self, failure: Failure, scratch: &mut Scratch) {
        scratch.filled = 0;
        if self.unsent.is_none() {
            let told = match &failure {
                Failure::Protocol(fault) => {
                    self.http.go_away(fault.reason);
                    self.flush(scratch).is_ok()
                }
                Failure::Silent | Failure::Stopped | Failure::Revoked | Failure::Expired => {
                    self.http.go_away(Reason::NO_ERROR);
                    self.flush(scratch).is_ok()
                }
                Failure::Records(error) => {
                    let sealed = self.records.abort(error, &mut scratch.sealed);
                    sealed.is_ok_and(|length| self.send_sealed(length, scratch).is_ok())
                }
                Failure::Closed | Failure::Io(_) => false,
            };
            tracing::trace!(told, "HBONE tunnel ends: {failure}");
        }
        scratch.filled = 0;
        if let Some(unsent) = self.unsent.take() {
            scratch.give_back(unsent.buffer);
        }
        for place in self.http.places() {
            let over = self
                .http
                .stream(place)
                .is_some_and(|stream| stream.is_over());
            match self.http.forget(place) {
                // All of it came, and only its application is slow.
                Some(flow) if over && flow.carried.is_some() && !flow.is_drained() => {
                    tokio::task::spawn_local(flow.write_out());
                }
                Some(flow) => flow.finish(Outcome::Tunnel(failure.clone())),
                None => {}
            }
        }
        *self.shared.ended.borrow_mut() = Some(failure);
        self.shared.wake_acceptor();
        self.shared.over.notify_waiters();
    }
}
