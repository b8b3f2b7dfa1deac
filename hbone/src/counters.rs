//! What a carried socket has moved.

use std::cell::Cell;

/// Bytes of one flow, counted as they move, by the worker that carries it.
#[derive(Debug, Default)]
pub struct Counters {
    /// Bytes read from the carried socket and sent into the tunnel.
    pub sent: Cell<u64>,
    /// Bytes taken from the tunnel and written to the carried socket.
    pub received: Cell<u64>,
}
