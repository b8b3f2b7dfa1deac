//! The access log's lines.

use std::cell::Cell;
use std::fmt::{self, Display, Write};
use std::net::SocketAddr;
use std::time::SystemTime;

use tracing::Level;

use super::flow::FlowError;
use super::lines::{self, Json};
use super::log;
use super::sink::Sink;
use super::time::push_timestamp;

/// A buffer that grew beyond this, in bytes, is not kept for the next line.
const KEPT: usize = 4096;

thread_local! {
    /// The buffer of the line before.
    static BUFFER: Cell<String> = const { Cell::new(String::new()) };
}

/// One line, field by field in the documented order.
pub struct Line {
    text: String,
    json: bool,
    fields: bool,
}

impl Line {
    /// Begins a line.
    pub fn new(json: bool, level: &Level, message: &str) -> Self {
        let mut text = BUFFER.take();
        text.clear();
        if json {
            lines::start_json(&mut text, level, "access");
            let _ = write!(text, ",\"message\":{}", Json(message));
        } else {
            push_timestamp(&mut text, SystemTime::now());
            for piece in ["\t", lines::level(level), "\taccess\t", message, "\t"] {
                text.push_str(piece);
            }
        }
        Self {
            text,
            json,
            fields: false,
        }
    }

    fn key(&mut self, key: &str) {
        let (before, after) = match (self.json, self.fields) {
            (true, _) => (",\"", "\":"),
            (false, true) => (" ", "="),
            (false, false) => ("", "="),
        };
        self.text.push_str(before);
        self.text.push_str(key);
        self.text.push_str(after);
        self.fields = true;
    }

    /// An address: bare, but a string in JSON.
    pub fn address(&mut self, key: &str, value: impl Display) {
        match self.json {
            true => self.quoted(key, value),
            false => {
                self.key(key);
                let _ = write!(self.text, "{value}");
            }
        }
    }

    /// Something in quotes that holds nothing to escape.
    pub fn quoted(&mut self, key: &str, value: impl Display) {
        self.key(key);
        let _ = write!(self.text, "\"{value}\"");
    }

    /// A text in quotes; left out when empty.
    pub fn text(&mut self, key: &str, value: &str) {
        if value.is_empty() {
            return;
        }
        self.key(key);
        if is_plain(value) {
            self.text.push('"');
            self.text.push_str(value);
            self.text.push('"');
            return;
        }
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

    /// Ends the line and lets something be done with it, newline included.
    pub fn with_text<T>(mut self, work: impl FnOnce(&str) -> T) -> T {
        self.text.push_str(if self.json { "}\n" } else { "\n" });
        let result = work(&self.text);
        if self.text.capacity() <= KEPT {
            BUFFER.set(self.text);
        }
        result
    }

    /// Ends the line and logs it.
    pub fn log(self) {
        self.with_text(|line| Sink::process().line(line));
    }
}

/// Whether a text is the same with and without escapes.
fn is_plain(text: &str) -> bool {
    text.bytes()
        .all(|byte| matches!(byte, b' '..=b'~') && byte != b'"' && byte != b'\\')
}

/// A connection refused before enough was known of it.
pub fn early_deny(src: SocketAddr, dst: SocketAddr, direction: &str, error: &FlowError) {
    if tracing::enabled!(target: "access", Level::WARN) {
        let mut line = Line::new(log::is_json(), &Level::WARN, "connection failed");
        line.address("src.addr", src);
        line.address("dst.addr", dst);
        line.text("direction", direction);
        line.text("reason", error.reason.code());
        line.text("error", &error.text);
        line.log();
    }
}

/// A number of milliseconds as `"<n>ms"`.
pub struct Millis(pub std::time::Duration);

impl fmt::Display for Millis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}ms", self.0.as_millis())
    }
}
