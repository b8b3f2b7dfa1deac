//! The reading half of a connection: bytes become events, however they are cut.

use super::connection::{Connection, Event, Fault, Fields, Role, SHUTDOWN_PING};
use super::frame::{self, HEADER, Head, Reason, flag, kind, setting};

/// The largest payload of a frame other than DATA and header blocks; SETTINGS may be long.
const LARGEST_CONTROL: usize = 16 << 10;
/// Frames that a header block may be cut into.
const CONTINUATIONS: u32 = 64;
/// DATA frames without bytes in a row.
const EMPTY_FRAMES: u32 = 10_000;
/// Streams that a peer may open and reset before they are answered, beyond those that were answered.
const EARLY_RESETS: u32 = 200;
/// Streams that this end resets for the peer's errors before the connection is given up.
const FAULTY_STREAMS: u32 = 1024;

/// Where in the bytes of the peer this end is.
#[derive(Clone, Debug)]
pub(super) struct Reader {
    /// Bytes of the client's preface still to come.
    preface: usize,
    head: [u8; HEADER],
    head_length: usize,
    state: State,
    /// A frame's payload as far as it came, if it is not DATA.
    payload: Vec<u8>,
    /// A header block as far as its frames came.
    block: Vec<u8>,
    continuations: u32,
    empty_frames: u32,
    early_resets: u32,
    faulty_streams: u32,
}

#[derive(Clone, Copy, Debug)]
enum State {
    Head,
    /// The first byte of a padded DATA frame.
    PadLength(Head),
    Data {
        place: Option<usize>,
        left: usize,
        padding: usize,
        end: bool,
    },
    Control(Head),
    /// Between the frames of a header block: the stream, and whether the block ends it.
    Block(u32, bool),
}

impl Reader {
    /// The stream at `place` is gone; the rest of its frame goes nowhere.
    pub fn forget(&mut self, gone: usize) {
        if let State::Data { place, .. } = &mut self.state
            && *place == Some(gone)
        {
            *place = None;
        }
    }

    pub fn new(role: Role) -> Self {
        Self {
            preface: match role {
                Role::Client => 0,
                Role::Server => frame::PREFACE.len(),
            },
            head: [0; HEADER],
            head_length: 0,
            state: State::Head,
            payload: Vec::new(),
            block: Vec::new(),
            continuations: 0,
            empty_frames: 0,
            early_resets: 0,
            faulty_streams: 0,
        }
    }
}

fn protocol(why: &'static str) -> Fault {
    Fault::new(Reason::PROTOCOL_ERROR, why)
}

fn size(why: &'static str) -> Fault {
    Fault::new(Reason::FRAME_SIZE_ERROR, why)
}

fn calm(why: &'static str) -> Fault {
    Fault::new(Reason::ENHANCE_YOUR_CALM, why)
}

/// The first bytes of a frame that `input` holds, as far as `wanted` go.
fn take<'a>(input: &mut &'a [u8], wanted: usize) -> &'a [u8] {
    let (taken, rest) = input.split_at(wanted.min(input.len()));
    *input = rest;
    taken
}

impl<T: Default> Connection<T> {
    /// Reads on in `input`, up to the next event; none when `input` is used up.
    ///
    /// # Errors
    /// When the peer broke the protocol; the connection is of no use then.
    pub fn receive<'a>(&mut self, input: &mut &'a [u8]) -> Result<Option<Event<'a>>, Fault> {
        if self.reader.preface > 0 {
            let start = frame::PREFACE.len() - self.reader.preface;
            let bytes = take(input, self.reader.preface);
            if !frame::PREFACE[start..].starts_with(bytes) {
                return Err(protocol("not an HTTP/2 preface"));
            }
            self.reader.preface -= bytes.len();
        }
        loop {
            if let State::Data {
                place,
                left,
                padding,
                end,
            } = self.reader.state
            {
                if left == 0 && padding == 0 {
                    self.reader.state = State::Head;
                    if let Some(place) = place.filter(|_| end)
                        && let Some(stream) = self.streams.get_mut(place)
                    {
                        stream.received_end = true;
                        return Ok(Some(Event::End(place)));
                    }
                    continue;
                }
                if input.is_empty() {
                    return Ok(None);
                }
                if left > 0 {
                    let bytes = take(input, left);
                    let left = left - bytes.len();
                    self.reader.state = State::Data {
                        place,
                        left,
                        padding,
                        end,
                    };
                    // The stream may have been closed while its frame came.
                    if let Some(place) = place {
                        return Ok(Some(Event::Data(place, bytes)));
                    }
                } else {
                    let padding = padding - take(input, padding).len();
                    self.reader.state = State::Data {
                        place,
                        left,
                        padding,
                        end,
                    };
                }
                continue;
            }
            if input.is_empty() {
                return Ok(None);
            }
            match self.reader.state {
                State::Head | State::Block(..) => {
                    let have = self.reader.head_length;
                    let bytes = take(input, HEADER - have);
                    self.reader.head[have..have + bytes.len()].copy_from_slice(bytes);
                    self.reader.head_length += bytes.len();
                    if self.reader.head_length == HEADER {
                        self.reader.head_length = 0;
                        let head = Head::parse(&self.reader.head);
                        if let Some(event) = self.begin(head)? {
                            return Ok(Some(event));
                        }
                    }
                }
                State::PadLength(head) => {
                    let padding = usize::from(take(input, 1)[0]);
                    if let Some(event) = self.begin_data(head, padding)? {
                        return Ok(Some(event));
                    }
                }
                State::Control(head) => {
                    let left = head.length as usize - self.reader.payload.len();
                    let bytes = take(input, left);
                    self.reader.payload.extend_from_slice(bytes);
                    if bytes.len() == left
                        && let Some(event) = self.finish(head)?
                    {
                        return Ok(Some(event));
                    }
                }
                State::Data { .. } => {}
            }
        }
    }

    /// A frame's head is complete.
    fn begin(&mut self, head: Head) -> Result<Option<Event<'static>>, Fault> {
        if let State::Block(stream, _) = self.reader.state
            && (head.kind, head.stream) != (kind::CONTINUATION, stream)
        {
            return Err(protocol("a header block was interrupted"));
        }
        if !self.settled && (head.kind != kind::SETTINGS || head.flags & flag::ACK != 0) {
            return Err(protocol("the first frame is not SETTINGS"));
        }
        if head.length > self.limits.frame_size {
            return Err(size("a frame is larger than allowed"));
        }
        match head.kind {
            kind::DATA => {
                self.account(head)?;
                if head.flags & flag::PADDED == 0 {
                    return self.begin_data(head, 0);
                }
                if head.length == 0 {
                    return Err(size("a padded frame without a pad length"));
                }
                self.reader.state = State::PadLength(head);
                Ok(None)
            }
            _ => {
                let block = matches!(head.kind, kind::HEADERS | kind::CONTINUATION);
                if !block && head.length as usize > LARGEST_CONTROL {
                    return Err(size("a control frame is too large"));
                }
                if block
                    && self.reader.block.len() + head.length as usize
                        > self.limits.header_list as usize * 2
                {
                    return Err(calm("a header block is too large"));
                }
                self.reader.payload.clear();
                self.reader.state = match (head.kind, self.reader.state) {
                    // The block's stream and end stay known in the CONTINUATION's head.
                    (kind::CONTINUATION, State::Block(_, end)) => State::Control(Head {
                        flags: head.flags & flag::END_HEADERS | if end { 0x80 } else { 0 },
                        ..head
                    }),
                    (kind::CONTINUATION, _) => {
                        return Err(protocol("a CONTINUATION without HEADERS"));
                    }
                    _ => State::Control(head),
                };
                if head.length == 0
                    && let State::Control(head) = self.reader.state
                {
                    return self.finish(head);
                }
                Ok(None)
            }
        }
    }

    /// Holds a DATA frame against the windows; all of it counts, padding too (RFC 9113 §6.9).
    fn account(&mut self, head: Head) -> Result<(), Fault> {
        let length = i64::from(head.length);
        if head.stream == 0 {
            return Err(protocol("DATA without a stream"));
        }
        if length > self.receive_window {
            return Err(Fault::new(
                Reason::FLOW_CONTROL_ERROR,
                "more DATA than the tunnel's window",
            ));
        }
        if head.length == 0 && head.flags & flag::END_STREAM == 0 {
            self.reader.empty_frames += 1;
            if self.reader.empty_frames > EMPTY_FRAMES {
                return Err(calm("too many empty DATA frames"));
            }
        } else {
            self.reader.empty_frames = 0;
        }
        self.receive_window -= length;
        self.owed += head.length as usize;
        self.grant();
        Ok(())
    }

    fn begin_data(&mut self, head: Head, padding: usize) -> Result<Option<Event<'static>>, Fault> {
        let mut event = None;
        let overhead = usize::from(head.flags & flag::PADDED != 0) + padding;
        let Some(left) = (head.length as usize).checked_sub(overhead) else {
            return Err(protocol("more padding than frame"));
        };
        let mut place = self.place(head.stream);
        if place.is_none() && self.is_idle(head.stream) {
            return Err(protocol("DATA on a stream that was never opened"));
        }
        if let Some(at) = place {
            let stream = &mut self.streams[at];
            let length = i64::from(head.length);
            let wrong = if stream.received_end {
                Some(Reason::STREAM_CLOSED)
            } else if length > stream.receive_window {
                Some(Reason::FLOW_CONTROL_ERROR)
            } else if !stream.answered && self.role == Role::Client {
                Some(Reason::PROTOCOL_ERROR)
            } else {
                None
            };
            if let Some(reason) = wrong {
                event = self.stream_fault(at, reason)?;
                place = None;
            } else {
                stream.receive_window -= length;
                stream.held += left;
                stream.owed += overhead as u32;
                self.held += left;
            }
        }
        self.reader.state = State::Data {
            place,
            left,
            padding,
            end: head.flags & flag::END_STREAM != 0,
        };
        Ok(event)
    }

    /// Resets a stream for what the peer did.
    fn stream_fault(
        &mut self,
        place: usize,
        reason: Reason,
    ) -> Result<Option<Event<'static>>, Fault> {
        self.reader.faulty_streams += 1;
        if self.reader.faulty_streams > FAULTY_STREAMS {
            return Err(calm("too many streams with errors"));
        }
        let id = self.streams[place].id;
        self.put_reset(id, reason);
        Ok(Some(Event::Reset(place, reason)))
    }

    /// Whether a stream of that number was never opened.
    fn is_idle(&self, id: u32) -> bool {
        match self.role {
            Role::Client => id % 2 == 0 || id >= self.next,
            Role::Server => id % 2 == 0 || id > self.highest,
        }
    }

    /// A frame other than DATA is complete.
    fn finish(&mut self, head: Head) -> Result<Option<Event<'static>>, Fault> {
        self.reader.state = State::Head;
        let payload = std::mem::take(&mut self.reader.payload);
        let result = self.act(head, &payload);
        self.reader.payload = payload;
        result
    }

    fn act(&mut self, head: Head, payload: &[u8]) -> Result<Option<Event<'static>>, Fault> {
        match head.kind {
            kind::HEADERS => self.headers(head, payload),
            kind::CONTINUATION => {
                self.reader.continuations += 1;
                if self.reader.continuations > CONTINUATIONS {
                    return Err(calm("a header block is in too many pieces"));
                }
                self.reader.block.extend_from_slice(payload);
                let end = head.flags & 0x80 != 0;
                if head.flags & flag::END_HEADERS == 0 {
                    self.reader.state = State::Block(head.stream, end);
                    return Ok(None);
                }
                self.block(head.stream, end)
            }
            kind::RST_STREAM => {
                let code: [u8; 4] = payload.try_into().map_err(|_| size("RST_STREAM"))?;
                if self.is_idle(head.stream) {
                    return Err(protocol("RST_STREAM on a stream that was never opened"));
                }
                let Some(place) = self.place(head.stream) else {
                    return Ok(None);
                };
                if !self.streams[place].answered && self.role == Role::Server {
                    self.reader.early_resets += 1;
                    if self.reader.early_resets > EARLY_RESETS {
                        return Err(calm("too many streams reset before their answer"));
                    }
                }
                Ok(Some(Event::Reset(place, Reason(u32::from_be_bytes(code)))))
            }
            kind::SETTINGS => self.settings(head, payload),
            kind::PUSH_PROMISE => Err(protocol("PUSH_PROMISE, which was forbidden")),
            kind::PING => {
                let opaque: [u8; 8] = payload.try_into().map_err(|_| size("PING"))?;
                if head.stream != 0 {
                    return Err(protocol("PING on a stream"));
                }
                if head.flags & flag::ACK == 0 {
                    frame::put(&mut self.control, kind::PING, flag::ACK, 0, &opaque);
                    return Ok(None);
                }
                if opaque == SHUTDOWN_PING && self.accepts_up_to == u32::MAX {
                    self.accepts_up_to = self.highest;
                    self.put_go_away(self.highest, Reason::NO_ERROR);
                    return Ok(None);
                }
                Ok(Some(Event::Pong))
            }
            kind::GOAWAY => {
                let [a, b, c, d, e, f, g, h, ..] = *payload else {
                    return Err(size("GOAWAY"));
                };
                self.going_away = true;
                let last = u32::from_be_bytes([a & 0x7f, b, c, d]);
                Ok(Some(Event::GoAway(
                    last,
                    Reason(u32::from_be_bytes([e, f, g, h])),
                )))
            }
            kind::WINDOW_UPDATE => self.window_update(head, payload),
            // PRIORITY and whatever else there may be one day (RFC 9113 §5.5).
            _ => Ok(None),
        }
    }

    fn headers(&mut self, head: Head, payload: &[u8]) -> Result<Option<Event<'static>>, Fault> {
        let mut block = payload;
        let mut padding = 0;
        if head.flags & flag::PADDED != 0 {
            let (first, rest) = block.split_first().ok_or_else(|| size("HEADERS"))?;
            (padding, block) = (usize::from(*first), rest);
        }
        if head.flags & flag::PRIORITY != 0 {
            block = block.get(5..).ok_or_else(|| size("HEADERS"))?;
        }
        let length = block.len().checked_sub(padding);
        let length = length.ok_or_else(|| protocol("more padding than frame"))?;
        self.reader.block.clear();
        self.reader.block.extend_from_slice(&block[..length]);
        self.reader.continuations = 0;
        let end = head.flags & flag::END_STREAM != 0;
        if head.flags & flag::END_HEADERS == 0 {
            self.reader.state = State::Block(head.stream, end);
            return Ok(None);
        }
        self.block(head.stream, end)
    }

    /// A header block is complete.
    fn block(&mut self, id: u32, end: bool) -> Result<Option<Event<'static>>, Fault> {
        let block = std::mem::take(&mut self.reader.block);
        let mut fields = Box::<Fields>::default();
        let limit = self.limits.header_list as usize;
        let whole = self
            .decoder
            .decode(&block, limit, |name, value| fields.set(name, value));
        // One long block must not be held for the life of the tunnel.
        if block.capacity() <= 2048 {
            self.reader.block = block;
        }
        let whole =
            whole.map_err(|_| Fault::new(Reason::COMPRESSION_ERROR, "unreadable headers"))?;
        if let Some(place) = self.place(id) {
            return self.more_headers(place, fields, end);
        }
        if !self.is_idle(id) {
            return Ok(None);
        }
        if self.role == Role::Client || id % 2 == 0 {
            return Err(protocol("HEADERS on a stream that was never opened"));
        }
        self.highest = id;
        if id > self.accepts_up_to {
            return Ok(None);
        }
        if self.streams.len() >= self.limits.streams as usize {
            self.put_reset(id, Reason::REFUSED_STREAM);
            return Ok(None);
        }
        if !whole {
            self.put_reset(id, Reason::ENHANCE_YOUR_CALM);
            return Ok(None);
        }
        let place = self.insert(id);
        self.streams[place].received_end = end;
        Ok(Some(Event::Request(place, fields)))
    }

    /// Headers of a known stream: the answer, or trailers.
    fn more_headers(
        &mut self,
        place: usize,
        fields: Box<Fields>,
        end: bool,
    ) -> Result<Option<Event<'static>>, Fault> {
        let stream = &mut self.streams[place];
        if self.role == Role::Client && !stream.answered {
            match fields.status {
                Some(100..200) if !end => return Ok(None),
                Some(_) => {
                    stream.answered = true;
                    stream.received_end |= end;
                    return Ok(Some(Event::Answer(place, fields)));
                }
                None => {}
            }
        } else if end && !stream.received_end {
            stream.received_end = true;
            return Ok(Some(Event::End(place)));
        }
        self.stream_fault(place, Reason::PROTOCOL_ERROR)
    }

    fn settings(&mut self, head: Head, payload: &[u8]) -> Result<Option<Event<'static>>, Fault> {
        if head.stream != 0 {
            return Err(protocol("SETTINGS on a stream"));
        }
        if head.flags & flag::ACK != 0 {
            return match payload.is_empty() {
                true => Ok(None),
                false => Err(size("SETTINGS acknowledgement")),
            };
        }
        if !payload.len().is_multiple_of(6) {
            return Err(size("SETTINGS"));
        }
        let mut widened = false;
        for item in payload.chunks_exact(6) {
            let id = u16::from_be_bytes([item[0], item[1]]);
            let value = u32::from_be_bytes([item[2], item[3], item[4], item[5]]);
            match id {
                setting::HEADER_TABLE_SIZE => self.granted.table_changed |= value < 4096,
                setting::ENABLE_PUSH if value > 1 => return Err(protocol("ENABLE_PUSH")),
                setting::MAX_CONCURRENT_STREAMS => self.granted.streams = Some(value),
                setting::INITIAL_WINDOW_SIZE => {
                    if i64::from(value) > frame::LARGEST_WINDOW {
                        return Err(Fault::new(
                            Reason::FLOW_CONTROL_ERROR,
                            "INITIAL_WINDOW_SIZE",
                        ));
                    }
                    let more = i64::from(value) - i64::from(self.granted.stream_window);
                    for (_, stream) in &mut self.streams {
                        stream.send_window += more;
                        if stream.send_window > frame::LARGEST_WINDOW {
                            return Err(Fault::new(
                                Reason::FLOW_CONTROL_ERROR,
                                "a window overflows",
                            ));
                        }
                    }
                    self.granted.stream_window = value;
                    widened |= more > 0;
                }
                setting::MAX_FRAME_SIZE => {
                    if !(frame::SMALLEST_MAX_FRAME..=frame::LARGEST_MAX_FRAME).contains(&value) {
                        return Err(protocol("MAX_FRAME_SIZE"));
                    }
                    self.granted.max_frame = value;
                }
                _ => {}
            }
        }
        self.settled = true;
        frame::put(&mut self.control, kind::SETTINGS, flag::ACK, 0, &[]);
        Ok(widened.then_some(Event::WindowOfAll))
    }

    fn window_update(
        &mut self,
        head: Head,
        payload: &[u8],
    ) -> Result<Option<Event<'static>>, Fault> {
        let more: [u8; 4] = payload.try_into().map_err(|_| size("WINDOW_UPDATE"))?;
        let more = i64::from(u32::from_be_bytes(more) & 0x7fff_ffff);
        if head.stream == 0 {
            let shut = self.send_window <= 0;
            self.send_window += more;
            if more == 0 {
                return Err(protocol("WINDOW_UPDATE of nothing"));
            }
            if self.send_window > frame::LARGEST_WINDOW {
                return Err(Fault::new(
                    Reason::FLOW_CONTROL_ERROR,
                    "the tunnel's window overflows",
                ));
            }
            return Ok((shut && self.send_window > 0).then_some(Event::WindowOfAll));
        }
        let Some(place) = self.place(head.stream) else {
            return match self.is_idle(head.stream) {
                true => Err(protocol("WINDOW_UPDATE on a stream that was never opened")),
                false => Ok(None),
            };
        };
        let stream = &mut self.streams[place];
        let shut = stream.send_window <= 0;
        stream.send_window += more;
        if more == 0 {
            return self.stream_fault(place, Reason::PROTOCOL_ERROR);
        } else if stream.send_window > frame::LARGEST_WINDOW {
            return self.stream_fault(place, Reason::FLOW_CONTROL_ERROR);
        } else if shut && stream.send_window > 0 {
            return Ok(Some(Event::Window(place)));
        }
        Ok(None)
    }
}

impl Fields {
    fn set(&mut self, name: &[u8], value: &[u8]) {
        let Ok(text) = std::str::from_utf8(value) else {
            return;
        };
        match name {
            b":method" => self.method = Some(text.into()),
            b":authority" => self.authority = Some(text.into()),
            b":status" => self.status = text.parse().ok(),
            b"baggage" => {
                self.baggage = Some(match self.baggage.take() {
                    None => text.into(),
                    Some(before) => format!("{before},{text}").into(),
                });
            }
            b"forwarded" => self.forwarded = Some(text.into()),
            b"x-forwarded-network" => self.forwarded_network = Some(text.into()),
            b"traceparent" => self.traceparent = Some(text.into()),
            _ => {}
        }
    }
}
