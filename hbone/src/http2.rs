//! The HTTP/2 parameters of tunnels, and the pings that find dead ones.

use std::time::Duration;

use h2::{Ping, PingPong};
use tokio::time::{sleep, timeout};

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
        }
    }
}

/// SETTINGS_MAX_HEADER_LIST_SIZE of the client, in bytes.
const CLIENT_HEADER_LIST: u32 = 16 << 10;
/// SETTINGS_MAX_HEADER_LIST_SIZE of the server, in bytes.
const SERVER_HEADER_LIST: u32 = 64 << 10;
/// SETTINGS_MAX_CONCURRENT_STREAMS of the server.
const SERVER_STREAMS: u32 = 200;
/// How much a stream may hold back for its peer, in bytes: enough to keep the tunnel busy, little enough to stay in the cache.
const SEND_BUFFER: usize = 400 << 10;
/// Streams reset before they were accepted that a peer may pile up (RFC 9113 §10.5, rapid reset).
const PENDING_ACCEPT_RESETS: usize = 20;
/// Streams that we reset because of a peer's errors before the tunnel is given up.
const LOCAL_ERROR_RESETS: usize = 1024;

impl Http2Config {
    pub(crate) fn client(&self) -> h2::client::Builder {
        let mut builder = h2::client::Builder::new();
        builder
            .initial_window_size(self.stream_window)
            .initial_connection_window_size(self.connection_window)
            .max_frame_size(self.frame_size)
            .max_header_list_size(CLIENT_HEADER_LIST)
            .enable_push(false)
            .initial_max_send_streams(usize::from(self.max_streams_per_connection))
            .max_send_buffer_size(SEND_BUFFER)
            .max_pending_accept_reset_streams(PENDING_ACCEPT_RESETS)
            .max_local_error_reset_streams(Some(LOCAL_ERROR_RESETS))
            .data_frame_budget(self.connection_window as usize);
        builder
    }

    pub(crate) fn server(&self) -> h2::server::Builder {
        let mut builder = h2::server::Builder::new();
        builder
            .initial_window_size(self.stream_window)
            .initial_connection_window_size(self.connection_window)
            .max_frame_size(self.frame_size)
            .max_header_list_size(SERVER_HEADER_LIST)
            .max_concurrent_streams(SERVER_STREAMS)
            .max_send_buffer_size(SEND_BUFFER)
            .max_pending_accept_reset_streams(PENDING_ACCEPT_RESETS)
            .max_local_error_reset_streams(Some(LOCAL_ERROR_RESETS))
            .data_frame_budget(self.connection_window as usize);
        builder
    }
}

/// Pings until one stays unanswered or the tunnel is gone; then the tunnel is dead.
pub(crate) async fn watch(mut pings: PingPong, config: &Http2Config) -> Dead {
    loop {
        sleep(config.ping_interval).await;
        match timeout(config.ping_timeout, pings.ping(Ping::opaque())).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => return Dead::Error(error),
            Err(_) => return Dead::Silent,
        }
    }
}

/// Why a tunnel is given up.
pub(crate) enum Dead {
    /// The peer does not answer pings.
    Silent,
    /// The tunnel ended under the ping.
    Error(h2::Error),
}
