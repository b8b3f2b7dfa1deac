//! The access log's lines.

use std::fmt::{self, Display, Write};
use std::net::SocketAddr;
use std::time::SystemTime;

use tracing::Level;

use super::lines::{self, Json};
use super::log;
use super::sink::Sink;
use super::time::push_timestamp;

/// One line, field by field in the documented order.
pub struct Line {
    text: String,
    json: bool,
    fields: bool,
}

impl Line {
    /// Begins a line.
    pub fn new(json: bool, level: &Level, message: &str) -> Self {
        let mut text = String::with_capacity(640);
        if json {
            lines::start_json(&mut text, level, "access");
            let _ = write!(text, ",\"message\":{}", Json(message));
        } else {
            push_timestamp(&mut text, SystemTime::now());
            let _ = write!(text, "\t{}\taccess\t{message}\t", lines::level(level));
        }
        Self {
            text,
            json,
            fields: false,
        }
    }

    fn key(&mut self, key: &str) {
        let _ = if self.json {
            write!(self.text, ",\"{key}\":")
        } else if self.fields {
            write!(self.text, " {key}=")
        } else {
            write!(self.text, "{key}=")
        };
        self.fields = true;
    }

    /// An address: bare, but a string in JSON.
    pub fn address(&mut self, key: &str, value: impl Display) {
        self.key(key);
        let _ = if self.json {
            write!(self.text, "\"{value}\"")
        } else {
            write!(self.text, "{value}")
        };
    }

    /// A text in quotes; left out when empty.
    pub fn text(&mut self, key: &str, value: &str) {
        if value.is_empty() {
            return;
        }
        self.key(key);
        let _ = if self.json {
            write!(self.text, "{}", Json(value))
        } else {
            write!(self.text, "{value:?}")
        };
    }

    /// A number.
    pub fn number(&mut self, key: &str, value: u64) {
        self.key(key);
        let _ = write!(self.text, "{value}");
    }

    /// The whole line with its newline.
    pub fn end(mut self) -> String {
        self.text.push_str(if self.json { "}\n" } else { "\n" });
        self.text
    }
}

/// A connection refused before enough was known of it.
pub fn early_deny(src: SocketAddr, dst: SocketAddr, direction: &str, error: &str) {
    if tracing::enabled!(target: "access", Level::WARN) {
        let mut line = Line::new(log::is_json(), &Level::WARN, "connection failed");
        line.address("src.addr", src);
        line.address("dst.addr", dst);
        line.text("direction", direction);
        line.text("error", error);
        Sink::process().line(&line.end());
    }
}

/// A number of milliseconds as `"<n>ms"`.
pub struct Millis(pub std::time::Duration);

impl fmt::Display for Millis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}ms", self.0.as_millis())
    }
}
