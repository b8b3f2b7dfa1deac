//! The reading half of a connection: bytes become events, however they are cut.

use super::connection::{Connection, Event, Fault, Role};
use super::frame::{self, HEADER, Head, Reason, flag, kind};

/// The largest payload of a frame other than DATA and header blocks; SETTINGS may be long.
const LARGEST_CONTROL: usize = 16 << 10;
/// DATA frames without bytes in a row.
const EMPTY_FRAMES: u32 = 10_000;
/// Streams that this end resets for the peer's errors before the connection is given up.
const FAULTY_STREAMS: u32 = 1024;

/// Where in the bytes of the peer this end is.
#[derive(Clone, Debug)]
pub(super) struct Reader {
    /// Bytes of the client's preface still to come.
    preface: usize,
    head: [u8; HEADER],
    head_length: usize,
    pub(super) state: State,
    /// A frame's payload as far as it came, if it is not DATA.
    payload: Vec<u8>,
    /// A header block as far as its frames came.
    pub(super) block: Vec<u8>,
    pub(super) continuations: u32,
    empty_frames: u32,
    pub(super) early_resets: u32,
    faulty_streams: u32,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum State {
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

pub(super) fn protocol(why: &'static str) -> Fault {
    Fault::new(Reason::PROTOCOL_ERROR, why)
}

pub(super) fn size(why: &'static str) -> Fault {
    Fault::new(Reason::FRAME_SIZE_ERROR, why)
}

pub(super) fn calm(why: &'static str) -> Fault {
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
    pub(super) fn stream_fault(
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
    pub(super) fn is_idle(&self, id: u32) -> bool {
        match self.role {
            Role::Client => id.is_multiple_of(2) || id >= self.next,
            Role::Server => id.is_multiple_of(2) || id > self.highest,
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
}
