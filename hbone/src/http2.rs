//! The HTTP/2 parameters of tunnels.

use std::time::Duration;

use crate::Revocations;
use crate::engine::Limits;

/// Both ends' HTTP/2 parameters and limits.
#[derive(Clone, Debug)]
pub struct Http2Config {
    /// Flow-control window of a stream, in bytes.
    pub stream_window: u32,
    /// Flow-control window of a tunnel, in bytes; a multiple of the stream window, or one unread stream stalls its siblings.
    pub connection_window: u32,
    /// Largest frame accepted, in bytes.
    pub frame_size: u32,
    /// How many streams the client puts on one tunnel at a time.
    pub max_streams_per_connection: u16,
    /// After how long without a new stream the client's pool lets go of a tunnel.
    pub unused_release: Duration,
    /// Limit for the TLS handshake, and again for the HTTP/2 preface.
    pub handshake_timeout: Duration,
    /// Limit for the answer to a CONNECT.
    pub answer_timeout: Duration,
    /// Time between a tunnel's start or a ping's answer and the next ping.
    pub ping_interval: Duration,
    /// How long a ping may stay unanswered.
    pub ping_timeout: Duration,
    /// Certificates that peers must not have.
    pub revocations: Option<Revocations>,
}

impl Default for Http2Config {
    fn default() -> Self {
        Self {
            stream_window: 4 << 20,
            connection_window: 16 << 20,
            frame_size: 1 << 20,
            max_streams_per_connection: 100,
            unused_release: Duration::from_secs(300),
            handshake_timeout: Duration::from_secs(10),
            answer_timeout: Duration::from_secs(20),
            ping_interval: Duration::from_secs(10),
            ping_timeout: Duration::from_secs(20),
            revocations: None,
        }
    }
}

/// SETTINGS_MAX_HEADER_LIST_SIZE of the client, in bytes.
const CLIENT_HEADER_LIST: u32 = 16 << 10;
/// SETTINGS_MAX_HEADER_LIST_SIZE of the server, in bytes.
const SERVER_HEADER_LIST: u32 = 64 << 10;
/// SETTINGS_MAX_CONCURRENT_STREAMS of the server.
const SERVER_STREAMS: u32 = 200;

impl Http2Config {
    pub(crate) fn client(&self) -> Limits {
        self.limits(CLIENT_HEADER_LIST, 0)
    }

    pub(crate) fn server(&self) -> Limits {
        self.limits(SERVER_HEADER_LIST, SERVER_STREAMS)
    }

    fn limits(&self, header_list: u32, streams: u32) -> Limits {
        Limits {
            stream_window: self.stream_window,
            connection_window: self.connection_window,
            frame_size: self.frame_size,
            header_list,
            streams,
        }
    }
}
