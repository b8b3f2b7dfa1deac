//! The buffers of a worker: what moves between sockets and tunnels passes through them, nothing stays.

use super::record::Records;

/// How much is read, sealed and sent at a time, in bytes.
pub const SCRATCH: usize = 512 << 10;
/// Room beside it for frame headers, and for control frames after the last DATA.
const MARGIN: usize = 16 << 10;
/// What makes buffers worth being given back, in bytes.
const LARGE: usize = 64 << 10;
/// Send buffers that are kept when tunnels have taken one each.
const SPARE: usize = 2;

/// One set for all tunnels of a worker. The memory is the kernel's until it is first used.
#[derive(Debug)]
pub struct Scratch {
    /// Frames to be sealed.
    pub out: Vec<u8>,
    /// How much of `out` is filled.
    pub filled: usize,
    /// Records to be sent.
    pub sealed: Vec<u8>,
    /// Records as they came.
    pub input: Vec<u8>,
    /// What was in them.
    pub plain: Vec<u8>,
    spare: Vec<Vec<u8>>,
    /// Whether much was moved since the last rest, and whether there was before.
    large: [bool; 2],
}

impl Default for Scratch {
    fn default() -> Self {
        Self {
            out: vec![0; SCRATCH + MARGIN],
            filled: 0,
            sealed: sealed(),
            input: vec![0; SCRATCH],
            plain: vec![0; SCRATCH],
            spare: Vec::new(),
            large: [false; 2],
        }
    }
}

fn sealed() -> Vec<u8> {
    vec![0; Records::sealed(SCRATCH + MARGIN)]
}

impl Scratch {
    /// Notes that `length` bytes were moved at a time.
    pub fn note(&mut self, length: usize) {
        self.large[0] |= length >= LARGE;
    }

    /// Gives the memory back to the kernel if nothing much was moved since the last call.
    pub fn rest(&mut self) {
        match self.large {
            [false, true] => *self = Self::default(),
            [large, before] => self.large = [false, large || before],
        }
    }

    /// Gives away the send buffer with what was not sent of it.
    pub fn take_sealed(&mut self) -> Vec<u8> {
        let next = self.spare.pop().unwrap_or_else(sealed);
        std::mem::replace(&mut self.sealed, next)
    }

    /// Takes a send buffer back.
    pub fn give_back(&mut self, buffer: Vec<u8>) {
        if self.spare.len() < SPARE {
            self.spare.push(buffer);
        }
    }

    /// Appends as much of `bytes` as there is room for; gives how much.
    pub fn put(&mut self, bytes: &[u8]) -> usize {
        let length = bytes.len().min(self.out.len() - self.filled);
        self.out[self.filled..self.filled + length].copy_from_slice(&bytes[..length]);
        self.filled += length;
        length
    }

    /// How many bytes of DATA may be read behind a frame header now, if their peer takes frames of `max_frame`.
    pub fn room(&self, max_frame: usize) -> usize {
        let free = SCRATCH.saturating_sub(self.filled);
        let headers = free.div_ceil(max_frame) * super::frame::HEADER;
        free.saturating_sub(headers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_buffers_are_given_back_after_a_quiet_while() {
        let mut scratch = Scratch::default();
        let before = scratch.out.as_ptr();
        scratch.give_back(sealed());
        scratch.note(LARGE);
        scratch.rest();
        scratch.note(LARGE);
        scratch.rest();
        assert_eq!((scratch.spare.len(), scratch.out.as_ptr()), (1, before));
        scratch.note(LARGE - 1);
        scratch.rest();
        assert_eq!(scratch.spare.len(), 0);
    }

    #[test]
    fn there_is_room_for_every_header() {
        let mut scratch = Scratch::default();
        for max_frame in [16 << 10, 1 << 20] {
            let room = scratch.room(max_frame);
            let headers = room.div_ceil(max_frame) * super::super::frame::HEADER;
            assert!(room > SCRATCH - 1024 && room + headers <= SCRATCH);
        }
        assert_eq!(scratch.put(&[1; 100]), 100);
        assert_eq!(
            scratch.put(&vec![1; SCRATCH + MARGIN]),
            SCRATCH + MARGIN - 100
        );
    }
}
