//! The frames other than DATA, each acted on when it is complete.

use super::connection::{Connection, Event, Fault, Fields, Role, SHUTDOWN_PING};
use super::frame::{self, Head, Reason, flag, kind, setting};
use super::receive::{State, calm, protocol, size};

/// The field of a refusal that says why, as a code.
pub const REASON: &str = "x-warren-reason";

/// Frames that a header block may be cut into.
const CONTINUATIONS: u32 = 64;
/// Streams that a peer may open and reset before they are answered, beyond those that were answered.
const EARLY_RESETS: u32 = 200;

impl<T: Default> Connection<T> {
    pub(super) fn act(
        &mut self,
        head: Head,
        payload: &[u8],
    ) -> Result<Option<Event<'static>>, Fault> {
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
        if self.role == Role::Client || id.is_multiple_of(2) {
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
            name if name == REASON.as_bytes() => self.reason = Some(text.into()),
            _ => {}
        }
    }
}
