//! The buffers of a worker: what moves between sockets and tunnels passes through them, nothing stays.

use super::record::Records;

/// How much is read, sealed and sent at a time, in bytes.
pub const SCRATCH: usize = 512 << 10;
/// Room beside it for frame headers, and for control frames after the last DATA.
const MARGIN: usize = 16 << 10;
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
        }
    }
}

fn sealed() -> Vec<u8> {
    vec![0; Records::sealed(SCRATCH + MARGIN)]
}

impl Scratch {
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
