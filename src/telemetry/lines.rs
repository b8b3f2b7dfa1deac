//! How an event becomes a line, plain or JSON. One event is one line, whatever a peer put into it.

use std::fmt::{self, Write};
use std::time::SystemTime;

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;
use tracing_subscriber::registry::{LookupSpan, SpanRef};

use super::sink::Sink;
use super::time::push_timestamp;

/// Writes every event to a sink.
pub struct Lines {
    pub json: bool,
    pub sink: &'static Sink,
}

/// A span's fields, rendered once.
struct SpanFields(String);

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Lines {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        let mut fields = Fields::new(self.json);
        attributes.record(&mut fields);
        span.extensions_mut().insert(SpanFields(fields.text));
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        let mut fields = Fields::new(self.json);
        values.record(&mut fields);
        if let Some(known) = span.extensions_mut().get_mut::<SpanFields>() {
            if !known.0.is_empty() && !fields.text.is_empty() {
                known.0.push_str(if self.json { "," } else { " " });
            }
            known.0.push_str(&fields.text);
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let mut fields = Fields::new(self.json);
        event.record(&mut fields);
        let metadata = event.metadata();
        let spans = context
            .event_scope(event)
            .into_iter()
            .flat_map(|scope| scope.from_root());
        let mut line = String::with_capacity(160 + fields.text.len());
        if self.json {
            start_json(&mut line, metadata.level(), metadata.target());
            if let Some(message) = &fields.message {
                let _ = write!(line, ",\"message\":{}", Json(message));
            }
            if !fields.text.is_empty() {
                let _ = write!(line, ",{}", fields.text);
            }
            for span in spans {
                let name = Json(span.name());
                with_fields(&span, |fields| {
                    let _ = write!(line, ",{name}:{{{fields}}}");
                });
            }
            line.push_str("}\n");
        } else {
            push_timestamp(&mut line, SystemTime::now());
            let target = metadata.target();
            let target = target.strip_prefix("warren::").unwrap_or(target);
            let _ = write!(line, "\t{}\t{target}", level(metadata.level()));
            for span in spans {
                let _ = write!(line, ":{}", span.name());
                with_fields(&span, |fields| {
                    if !fields.is_empty() {
                        let _ = write!(line, "{{{fields}}}");
                    }
                });
            }
            let message = fields.message.as_deref().unwrap_or_default();
            let _ = writeln!(line, "\t{}\t{}", OneLine(message), fields.text);
        }
        self.sink.line(&line);
    }
}

fn with_fields<'a, S: LookupSpan<'a>>(span: &SpanRef<'a, S>, show: impl FnOnce(&str)) {
    let extensions = span.extensions();
    show(
        extensions
            .get::<SpanFields>()
            .map_or("", |fields| &fields.0),
    );
}

/// The line that tells of lines that were lost because the output was too slow.
pub fn lost(json: bool, count: u64) -> String {
    let message = format!("{count} log lines were dropped: the output is too slow");
    let mut line = String::new();
    if json {
        start_json(&mut line, &Level::WARN, "log");
        let _ = writeln!(line, ",\"message\":{}}}", Json(&message));
    } else {
        push_timestamp(&mut line, SystemTime::now());
        let _ = writeln!(line, "\twarn\tlog\t{message}\t");
    }
    line
}

/// A level as it is written.
pub fn level(level: &Level) -> &'static str {
    match *level {
        Level::ERROR => "error",
        Level::WARN => "warn",
        Level::INFO => "info",
        Level::DEBUG => "debug",
        Level::TRACE => "trace",
    }
}

/// Begins a JSON line: level, time and scope.
pub fn start_json(line: &mut String, event: &Level, scope: &str) {
    let _ = write!(line, "{{\"level\":\"{}\",\"time\":\"", level(event));
    push_timestamp(line, SystemTime::now());
    let _ = write!(line, "\",\"scope\":{}", Json(scope));
}

/// A text as a JSON string (RFC 8259 §7).
pub struct Json<'a>(pub &'a str);

impl fmt::Display for Json<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_char('"')?;
        let mut plain = 0;
        for (at, byte) in self.0.bytes().enumerate() {
            if byte >= b' ' && byte != b'"' && byte != b'\\' {
                continue;
            }
            f.write_str(&self.0[plain..at])?;
            plain = at + 1;
            match byte {
                b'\n' => f.write_str("\\n")?,
                b'\r' => f.write_str("\\r")?,
                b'\t' => f.write_str("\\t")?,
                b'"' | b'\\' => write!(f, "\\{}", char::from(byte))?,
                _ => write!(f, "\\u{byte:04x}")?,
            }
        }
        f.write_str(&self.0[plain..])?;
        f.write_char('"')
    }
}

/// A text without anything that could end or split its line.
pub struct OneLine<'a>(pub &'a str);

impl fmt::Display for OneLine<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for piece in self.0.split_inclusive(char::is_control) {
            match piece.chars().next_back().filter(|last| last.is_control()) {
                None => f.write_str(piece)?,
                Some(last) => {
                    f.write_str(piece.strip_suffix(last).unwrap_or(piece))?;
                    write!(f, "{}", last.escape_default())?;
                }
            }
        }
        Ok(())
    }
}

/// Collects an event's or span's fields as text, the message apart.
struct Fields {
    json: bool,
    message: Option<String>,
    text: String,
}

impl Fields {
    fn new(json: bool) -> Self {
        Self {
            json,
            message: None,
            text: String::new(),
        }
    }

    fn add(&mut self, field: &Field, plain: impl fmt::Display, json: impl fmt::Display) {
        if field.name().starts_with("log.") {
            return;
        }
        if !self.text.is_empty() {
            self.text.push(if self.json { ',' } else { ' ' });
        }
        let _ = if self.json {
            write!(self.text, "{}:{json}", Json(field.name()))
        } else {
            write!(self.text, "{}={plain}", field.name())
        };
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let text = format!("{value:?}");
        if field.name() == "message" {
            self.message = Some(text);
        } else {
            self.add(field, OneLine(&text), Json(&text));
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            self.message = Some(value.to_string());
        } else {
            self.add(field, format_args!("{value:?}"), Json(value));
        }
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.add(field, value, value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.add(field, value, value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.add(field, value, value);
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        // JSON has no infinities (RFC 8259 §6).
        if value.is_finite() {
            self.add(field, value, value);
        } else {
            self.add(field, value, Json(&value.to_string()));
        }
    }
}

#[cfg(test)]
mod tests {
    use tracing_subscriber::Registry;
    use tracing_subscriber::layer::SubscriberExt;

    use super::*;
    use crate::telemetry::sink::tests::Output;

    /// What `log` writes, the time of each line replaced by `T`.
    fn written(json: bool, log: impl FnOnce()) -> String {
        let output = Output::default();
        let sink: &'static Sink = Box::leak(Box::new(Sink::to(output.clone(), |_| String::new())));
        let lines = Registry::default().with(Lines { json, sink });
        tracing::subscriber::with_default(lines, log);
        sink.flush();
        let text = output.text();
        let timeless = |line: &str| match line.find("Z\t").or_else(|| line.find("Z\"")) {
            Some(end) => format!("{}T{}\n", &line[..end - 26], &line[end + 1..]),
            None => format!("{line}\n"),
        };
        text.lines().map(timeless).collect()
    }

    fn events() {
        let address = std::net::SocketAddr::from(([10, 0, 0, 1], 80));
        tracing::info!(target: "warren::proxy::outbound", %address, count = 3, on = true, name = "a \"b\"", "began");
        let outer = tracing::info_span!(target: "warren::proxy", "proxy", wl = "ns/name");
        let _outer = outer.enter();
        let inner =
            tracing::info_span!(target: "warren::proxy", "outbound", id = tracing::field::Empty);
        let _inner = inner.enter();
        inner.record("id", 7);
        tracing::warn!(target: "hbone::pool", "no fields");
        tracing::error!(target: "warren::xds", code = -1, ratio = 0.5);
    }

    #[test]
    fn plain_lines_are_split_by_tabs() {
        assert_eq!(
            written(false, events),
            "T\tinfo\tproxy::outbound\tbegan\taddress=10.0.0.1:80 count=3 on=true name=\"a \\\"b\\\"\"\n\
             T\twarn\thbone::pool:proxy{wl=\"ns/name\"}:outbound{id=7}\tno fields\t\n\
             T\terror\txds:proxy{wl=\"ns/name\"}:outbound{id=7}\t\tcode=-1 ratio=0.5\n"
        );
    }

    #[test]
    fn json_lines_are_objects_in_a_fixed_order() {
        let text = written(true, events);
        assert_eq!(
            text,
            "{\"level\":\"info\",\"time\":\"T\",\"scope\":\"warren::proxy::outbound\",\"message\":\"began\",\
             \"address\":\"10.0.0.1:80\",\"count\":3,\"on\":true,\"name\":\"a \\\"b\\\"\"}\n\
             {\"level\":\"warn\",\"time\":\"T\",\"scope\":\"hbone::pool\",\"message\":\"no fields\",\
             \"proxy\":{\"wl\":\"ns/name\"},\"outbound\":{\"id\":7}}\n\
             {\"level\":\"error\",\"time\":\"T\",\"scope\":\"warren::xds\",\"code\":-1,\"ratio\":0.5,\
             \"proxy\":{\"wl\":\"ns/name\"},\"outbound\":{\"id\":7}}\n"
        );
        for line in text.lines() {
            serde_json::from_str::<serde_json::Value>(line).unwrap();
        }
    }

    #[test]
    fn what_a_peer_sends_cannot_make_a_line_of_its_own() {
        let nasty = "x\n2026\terror\taccess\u{1b}[2J\u{7f}ü";
        let log = || tracing::info!(target: "t", shown = %nasty, quoted = nasty, odd = f64::INFINITY, "{nasty}");
        let bare = "x\\n2026\\terror\\taccess\\u{1b}[2J\\u{7f}ü";
        assert_eq!(
            written(false, log),
            format!("T\tinfo\tt\t{bare}\tshown={bare} quoted={nasty:?} odd=inf\n")
        );
        let line = written(true, log);
        let parsed: serde_json::Value = serde_json::from_str(&line).unwrap();
        for key in ["message", "shown", "quoted"] {
            assert_eq!(parsed[key], nasty, "{key}");
        }
        assert_eq!(parsed["odd"], "inf");
        assert_eq!(line.lines().count(), 1);
    }

    #[test]
    fn lost_lines_are_told_in_the_format_of_the_log() {
        let plain = lost(false, 3);
        assert!(
            plain.ends_with("Z\twarn\tlog\t3 log lines were dropped: the output is too slow\t\n")
        );
        let json: serde_json::Value = serde_json::from_str(&lost(true, 3)).unwrap();
        assert_eq!(
            (&json["level"], &json["scope"]),
            (&"warn".into(), &"log".into())
        );
    }
}
