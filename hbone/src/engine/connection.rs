//! One HTTP/2 connection of CONNECT streams as plain data: frames in, events and frames out, no I/O and no clock.
//!
//! Received bytes go in by `receive`, which gives one event at a time. What is to be sent collects in `control`, except
//! for DATA, whose header the caller writes in front of the payload by `data`. Whatever belongs to a stream outside of
//! the protocol, such as its socket, is kept with it as a `T`.

use slab::Slab;

use super::frame::{self, HEADER, Head, Reason, flag, kind, setting};
use super::hpack;
use super::receive::Reader;

/// Bytes that the slow readers of a tunnel may hold before their siblings feel it.
const HELD: usize = 64 << 20;

/// Which end of the connection this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Client,
    Server,
}

/// What this end grants its peer.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Bytes that the peer may send on a stream before they are consumed.
    pub stream_window: u32,
    /// The same for all streams together.
    pub connection_window: u32,
    /// Largest frame, in bytes.
    pub frame_size: u32,
    /// Largest header list, in bytes as of RFC 9113 §6.5.2.
    pub header_list: u32,
    /// Streams that the peer may have open.
    pub streams: u32,
}

/// A peer that broke the protocol: the connection ends with a GOAWAY of this reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the peer broke HTTP/2: {why} ({reason})")]
pub struct Fault {
    pub reason: Reason,
    pub why: &'static str,
}

impl Fault {
    pub fn new(reason: Reason, why: &'static str) -> Self {
        Self { reason, why }
    }
}

/// The header fields that tunnels use; the others are passed over.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fields {
    pub method: Option<Box<str>>,
    pub authority: Option<Box<str>>,
    pub status: Option<u16>,
    /// All baggage fields, joined by commas.
    pub baggage: Option<Box<str>>,
    pub forwarded: Option<Box<str>>,
    pub forwarded_network: Option<Box<str>>,
    /// The code of the reason of a refusal.
    pub reason: Option<Box<str>>,
}

/// What a received frame means to the owner of the connection.
#[derive(Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// The server's: a stream was opened.
    Request(usize, Box<Fields>),
    /// The client's: a stream was answered.
    Answer(usize, Box<Fields>),
    /// Part of a stream's bytes; tell of them by `consumed` when they are on their way.
    Data(usize, &'a [u8]),
    /// The peer sends no more on a stream.
    End(usize),
    /// A stream is broken: the peer gave it up, or was told that it broke the rules. Forget it.
    Reset(usize, Reason),
    /// A stream may send again.
    Window(usize),
    /// Every stream may send again.
    WindowOfAll,
    /// The peer will not act on streams above this one.
    GoAway(u32, Reason),
    /// A ping was answered.
    Pong,
}

/// A stream's place in the protocol.
#[derive(Clone, Debug)]
pub struct StreamState<T> {
    pub id: u32,
    /// What may be sent; less than nothing after the peer made its windows smaller.
    pub(super) send_window: i64,
    /// What the peer may still send.
    pub(super) receive_window: i64,
    /// Consumed, but the peer was not told yet.
    pub(super) owed: u32,
    /// Received and not consumed.
    pub(super) held: usize,
    pub(super) answered: bool,
    /// This end will send no more.
    pub(super) sent_end: bool,
    /// The peer will send no more.
    pub(super) received_end: bool,
    pub data: T,
}

/// What the peer grants.
#[derive(Clone, Debug)]
pub(super) struct Granted {
    pub max_frame: u32,
    pub stream_window: u32,
    pub streams: Option<u32>,
    /// The peer wants a smaller table; the next header block must acknowledge it.
    pub table_changed: bool,
}

/// The connection.
#[derive(Clone, Debug)]
pub struct Connection<T> {
    pub(super) role: Role,
    pub(super) limits: Limits,
    pub(super) granted: Granted,
    pub(super) reader: Reader,
    pub(super) decoder: hpack::Decoder,
    pub(super) streams: Slab<StreamState<T>>,
    /// Stream numbers and their places, ascending: numbers only grow.
    pub(super) places: Vec<(u32, u32)>,
    /// The number of the client's next stream.
    pub(super) next: u32,
    /// The highest number that the peer has used.
    pub(super) highest: u32,
    /// Streams of the peer above this number are not served any more.
    pub(super) accepts_up_to: u32,
    pub(super) send_window: i64,
    pub(super) receive_window: i64,
    /// Received, but the peer was not told that it may send as much again.
    pub(super) owed: usize,
    /// Received and not consumed, of all streams.
    pub(super) held: usize,
    /// Whether the peer's SETTINGS came.
    pub(super) settled: bool,
    pub(super) going_away: bool,
    /// Frames to be sent before any DATA that is read from now on.
    pub control: Vec<u8>,
    /// Scratch for header blocks.
    block: Vec<u8>,
}

/// Payload of the ping that measures when a graceful shutdown was seen.
pub(super) const SHUTDOWN_PING: [u8; 8] = *b"shutdown";
/// Payload of all other pings.
const PING: [u8; 8] = *b"warren!!";

impl<T: Default> Connection<T> {
    /// A connection whose first frames are ready to be sent.
    pub fn new(role: Role, limits: Limits, assumed_streams: u32) -> Self {
        let mut control = Vec::with_capacity(128);
        let mut settings = vec![
            (setting::INITIAL_WINDOW_SIZE, limits.stream_window),
            (setting::MAX_FRAME_SIZE, limits.frame_size),
            (setting::MAX_HEADER_LIST_SIZE, limits.header_list),
        ];
        match role {
            Role::Client => {
                control.extend_from_slice(frame::PREFACE);
                settings.push((setting::ENABLE_PUSH, 0));
            }
            Role::Server => settings.push((setting::MAX_CONCURRENT_STREAMS, limits.streams)),
        }
        frame::put_settings(&mut control, &settings);
        let more = limits
            .connection_window
            .saturating_sub(frame::DEFAULT_WINDOW);
        if more > 0 {
            frame::put(&mut control, kind::WINDOW_UPDATE, 0, 0, &more.to_be_bytes());
        }
        Self {
            role,
            granted: Granted {
                max_frame: frame::SMALLEST_MAX_FRAME,
                stream_window: frame::DEFAULT_WINDOW,
                streams: (role == Role::Client).then_some(assumed_streams),
                table_changed: false,
            },
            reader: Reader::new(role),
            decoder: hpack::Decoder::default(),
            streams: Slab::new(),
            places: Vec::new(),
            next: 1,
            highest: 0,
            accepts_up_to: u32::MAX,
            send_window: i64::from(frame::DEFAULT_WINDOW),
            receive_window: i64::from(limits.connection_window.max(frame::DEFAULT_WINDOW)),
            owed: 0,
            held: 0,
            settled: false,
            going_away: false,
            control,
            block: Vec::new(),
            limits,
        }
    }

    /// Whether the peer's SETTINGS came, which proves that it speaks HTTP/2.
    pub fn is_settled(&self) -> bool {
        self.settled
    }

    /// Whether another stream may be opened by this client.
    pub fn has_room(&self) -> bool {
        !self.is_ending()
            && self
                .granted
                .streams
                .is_none_or(|most| self.streams.len() < most as usize)
    }

    /// Whether no stream can be opened any more.
    pub fn is_ending(&self) -> bool {
        self.going_away || self.next > (1 << 31) - 1
    }

    /// Streams that are open or wait for an answer.
    pub fn streams(&self) -> usize {
        self.streams.len()
    }

    pub fn stream(&mut self, place: usize) -> Option<&mut StreamState<T>> {
        self.streams.get_mut(place)
    }

    /// Every stream's place.
    pub fn places(&self) -> Vec<usize> {
        self.places
            .iter()
            .map(|(_, place)| *place as usize)
            .collect()
    }

    /// Opens a stream with a CONNECT; `fields` writes what follows the authority. None when there is no room.
    pub fn open(
        &mut self,
        authority: &str,
        fields: impl FnOnce(&mut hpack::Encoder<'_>),
    ) -> Option<usize> {
        if !self.has_room() {
            return None;
        }
        let id = self.next;
        self.next += 2;
        self.put_block(id, false, |encoder| {
            encoder.connect(authority);
            fields(encoder);
        });
        Some(self.insert(id))
    }

    /// Answers a stream; with `end`, nothing else is sent on it.
    pub fn answer(
        &mut self,
        place: usize,
        status: u16,
        end: bool,
        fields: impl FnOnce(&mut hpack::Encoder<'_>),
    ) {
        let Some(stream) = self.streams.get_mut(place) else {
            return;
        };
        stream.answered = true;
        stream.sent_end |= end;
        let id = stream.id;
        self.put_block(id, end, |encoder| {
            encoder.status(status);
            fields(encoder);
        });
    }

    fn put_block(&mut self, id: u32, end: bool, fields: impl FnOnce(&mut hpack::Encoder<'_>)) {
        let mut block = std::mem::take(&mut self.block);
        block.clear();
        let mut encoder = hpack::Encoder(&mut block);
        if std::mem::take(&mut self.granted.table_changed) {
            encoder.empty_table();
        }
        fields(&mut encoder);
        frame::put_headers(
            &mut self.control,
            id,
            end,
            &block,
            self.granted.max_frame as usize,
        );
        self.block = block;
    }

    pub(super) fn insert(&mut self, id: u32) -> usize {
        let place = self.streams.insert(StreamState {
            id,
            send_window: i64::from(self.granted.stream_window),
            receive_window: i64::from(self.limits.stream_window),
            owed: 0,
            held: 0,
            answered: false,
            sent_end: false,
            received_end: false,
            data: T::default(),
        });
        self.places.push((id, place as u32));
        place
    }

    pub(super) fn place(&self, id: u32) -> Option<usize> {
        let at = self.places.binary_search_by_key(&id, |(id, _)| *id).ok()?;
        Some(self.places[at].1 as usize)
    }

    /// How many bytes the stream may send now.
    pub fn room(&self, place: usize) -> usize {
        let stream = self
            .streams
            .get(place)
            .map_or(0, |stream| stream.send_window);
        stream.min(self.send_window).max(0) as usize
    }

    /// Whether the stream waits for a window of its own rather than for the connection's.
    pub fn is_window_shut(&self, place: usize) -> bool {
        self.streams
            .get(place)
            .is_none_or(|stream| stream.send_window <= 0)
    }

    /// The largest payload of a DATA frame.
    pub fn max_frame(&self) -> usize {
        self.granted.max_frame as usize
    }

    /// Accounts for `length` bytes to be sent, `end` being the last; gives the frame's header.
    ///
    /// The length must not be above `room` and `max_frame`.
    pub fn data(&mut self, place: usize, length: usize, end: bool) -> [u8; HEADER] {
        let mut id = 0;
        if let Some(stream) = self.streams.get_mut(place) {
            stream.send_window -= length as i64;
            stream.sent_end |= end;
            id = stream.id;
        }
        self.send_window -= length as i64;
        Head {
            length: length as u32,
            kind: kind::DATA,
            flags: if end { flag::END_STREAM } else { 0 },
            stream: id,
        }
        .bytes()
    }

    /// Says that `length` bytes of a stream are on their way, so that as many may follow.
    pub fn consumed(&mut self, place: usize, length: usize) {
        let threshold = self.limits.stream_window / 4;
        if let Some(stream) = self.streams.get_mut(place) {
            stream.held -= length;
            stream.owed += length as u32;
            if stream.owed >= threshold && !stream.received_end {
                let owed = std::mem::take(&mut stream.owed);
                stream.receive_window += i64::from(owed);
                let (id, owed) = (stream.id, owed.to_be_bytes());
                frame::put(&mut self.control, kind::WINDOW_UPDATE, 0, id, &owed);
            }
        }
        self.held -= length;
        self.grant();
    }

    /// Lets the peer send as much as it has sent, unless slow readers already hold too much.
    pub(super) fn grant(&mut self) {
        if self.owed >= self.limits.connection_window as usize / 4 && self.held <= HELD {
            let owed = std::mem::take(&mut self.owed) as u32;
            self.receive_window += i64::from(owed);
            frame::put(
                &mut self.control,
                kind::WINDOW_UPDATE,
                0,
                0,
                &owed.to_be_bytes(),
            );
        }
    }

    /// Forgets a stream; one that has not ended both ways is reset with `reason`.
    pub fn close(&mut self, place: usize, reason: Reason) -> Option<T> {
        let stream = self.streams.get(place)?;
        if !(stream.sent_end && stream.received_end) {
            let id = stream.id;
            self.put_reset(id, reason);
        }
        self.forget(place)
    }

    pub(super) fn put_reset(&mut self, id: u32, reason: Reason) {
        frame::put(
            &mut self.control,
            kind::RST_STREAM,
            0,
            id,
            &reason.0.to_be_bytes(),
        );
    }

    /// Forgets a stream without a word, after a reset by the peer.
    pub fn forget(&mut self, place: usize) -> Option<T> {
        let stream = self.streams.try_remove(place)?;
        self.reader.forget(place);
        if let Ok(at) = self.places.binary_search_by_key(&stream.id, |(id, _)| *id) {
            self.places.remove(at);
        }
        self.held -= stream.held;
        self.grant();
        Some(stream.data)
    }

    /// Asks for a sign of life.
    pub fn ping(&mut self) {
        frame::put(&mut self.control, kind::PING, 0, 0, &PING);
    }

    /// Tells the peer to open its next streams elsewhere, without refusing those that are under way.
    pub fn shut_down(&mut self) {
        self.put_go_away(i32::MAX as u32, Reason::NO_ERROR);
        frame::put(&mut self.control, kind::PING, 0, 0, &SHUTDOWN_PING);
    }

    pub(super) fn put_go_away(&mut self, last: u32, reason: Reason) {
        let mut payload = [0; 8];
        payload[..4].copy_from_slice(&last.to_be_bytes());
        payload[4..].copy_from_slice(&reason.0.to_be_bytes());
        frame::put(&mut self.control, kind::GOAWAY, 0, 0, &payload);
    }

    /// The last word to a peer.
    pub fn go_away(&mut self, reason: Reason) {
        self.put_go_away(self.highest, reason);
    }

    /// Whether a graceful shutdown was seen by the peer, so that no new stream can come.
    pub fn is_shut_down(&self) -> bool {
        self.accepts_up_to != u32::MAX
    }
}

impl<T> StreamState<T> {
    /// Whether both directions have ended.
    pub fn is_over(&self) -> bool {
        self.sent_end && self.received_end
    }

    /// The peer broke it off in peace: nothing follows in either direction.
    pub fn end_both(&mut self) {
        self.sent_end = true;
        self.received_end = true;
    }

    pub fn is_answered(&self) -> bool {
        self.answered
    }

    pub fn has_sent_end(&self) -> bool {
        self.sent_end
    }

    pub fn has_received_end(&self) -> bool {
        self.received_end
    }
}
