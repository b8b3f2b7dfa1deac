//! The diagnostics log: what is enabled, and how an event becomes a line.

use std::fmt::{self, Write};
use std::sync::{OnceLock, PoisonError, RwLock};
use std::time::SystemTime;

use thiserror::Error;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::{Context, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::{EnvFilter, Layer, Registry, reload};

use super::sink::Sink;
use super::time::push_timestamp;

/// What is logged unless something else is asked for.
pub const DEFAULT_FILTER: &str = "hickory_server::server=off,info";

static LOG: OnceLock<Log> = OnceLock::new();

struct Log {
    json: bool,
    handle: reload::Handle<EnvFilter, Registry>,
    initial: String,
    filter: RwLock<String>,
}

/// A filter that cannot be used.
#[derive(Debug, Error)]
pub enum LogError {
    #[error(
        "RUST_LOG={0} is no log filter: {1}; write levels such as info, or target=level, separated by commas"
    )]
    Filter(String, String),
    #[error("LOG_FORMAT={0} is not known; use plain or json")]
    Format(String),
    #[error("the log is already set up")]
    Twice,
}

/// Sets the process's log up from `RUST_LOG` and `LOG_FORMAT`.
///
/// # Errors
/// When one of them cannot be understood, or the log was set up before.
pub fn init() -> Result<(), LogError> {
    let variable = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
    let json = match variable("LOG_FORMAT").as_deref() {
        None | Some("plain") => false,
        Some("json") => true,
        Some(other) => return Err(LogError::Format(other.to_string())),
    };
    let initial = match variable("RUST_LOG") {
        None => DEFAULT_FILTER.to_string(),
        Some(wanted) => format!("{DEFAULT_FILTER},{wanted}"),
    };
    let parsed = parse(&initial).map_err(|error| LogError::Filter(initial.clone(), error))?;
    let (layer, handle) = reload::Layer::new(parsed);
    let subscriber = Registry::default().with(layer).with(Lines { json });
    let log = Log {
        json,
        handle,
        filter: RwLock::new(initial.clone()),
        initial,
    };
    LOG.set(log).map_err(|_| LogError::Twice)?;
    tracing::subscriber::set_global_default(subscriber).map_err(|_| LogError::Twice)
}

/// Whether lines are JSON objects.
pub fn is_json() -> bool {
    LOG.get().is_some_and(|log| log.json)
}

/// The filter that is in force.
pub fn filter() -> String {
    LOG.get().map_or_else(
        || DEFAULT_FILTER.to_string(),
        |log| {
            log.filter
                .read()
                .unwrap_or_else(PoisonError::into_inner)
                .clone()
        },
    )
}

/// Adds directives to the filter, to the initial one if `reset`; gives the new filter.
///
/// # Errors
/// The directives, if one is neither a level nor `target=level` (or `target:level`).
pub fn set_filter(directives: &str, reset: bool) -> Result<String, String> {
    let Some(log) = LOG.get() else {
        return Err("the log is not set up".to_string());
    };
    let mut new = if reset { log.initial.clone() } else { filter() };
    for directive in directives
        .split(',')
        .map(str::trim)
        .filter(|directive| !directive.is_empty())
    {
        let (target, level) = match directive.rsplit_once(['=', ':']) {
            Some((target, level)) => (target.trim_end_matches(':'), level),
            None => ("", directive),
        };
        if !["off", "error", "warn", "info", "debug", "trace"]
            .contains(&level.to_ascii_lowercase().as_str())
        {
            return Err(directives.to_string());
        }
        new.push(',');
        if !target.is_empty() {
            new.push_str(target);
            new.push('=');
        }
        new.push_str(level);
    }
    let parsed = parse(&new)?;
    log.handle
        .reload(parsed)
        .map_err(|error| error.to_string())?;
    log.filter
        .write()
        .unwrap_or_else(PoisonError::into_inner)
        .clone_from(&new);
    tracing::info!("new log filter is {new}");
    Ok(new)
}

/// Reads a filter; targets of the incumbent mean the same places here.
fn parse(filter: &str) -> Result<EnvFilter, String> {
    EnvFilter::builder()
        .parse(filter.replace("ztunnel", "warren"))
        .map_err(|error| error.to_string())
}

/// Waits a bounded time until everything logged is written.
pub fn flush() {
    Sink::process().flush();
}

struct Lines {
    json: bool,
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
        let mut line = String::with_capacity(160);
        if self.json {
            start_json(&mut line, metadata.level(), metadata.target());
            let _ = write!(line, ",\"message\":{}", Json(&fields.message));
            if !fields.text.is_empty() {
                let _ = write!(line, ",{}", fields.text);
            }
            for span in context
                .event_scope(event)
                .into_iter()
                .flat_map(|scope| scope.from_root())
            {
                let extensions = span.extensions();
                let fields = extensions
                    .get::<SpanFields>()
                    .map_or("", |fields| &fields.0);
                let _ = write!(line, ",{}:{{{fields}}}", Json(span.name()));
            }
            line.push_str("}\n");
        } else {
            push_timestamp(&mut line, SystemTime::now());
            let target = metadata.target();
            let target = target.strip_prefix("warren::").unwrap_or(target);
            let _ = write!(line, "\t{}\t{target}", level(metadata.level()));
            for span in context
                .event_scope(event)
                .into_iter()
                .flat_map(|scope| scope.from_root())
            {
                let _ = write!(line, ":{}", span.name());
                if let Some(fields) = span
                    .extensions()
                    .get::<SpanFields>()
                    .filter(|fields| !fields.0.is_empty())
                {
                    let _ = write!(line, "{{{}}}", fields.0);
                }
            }
            let _ = writeln!(line, "\t{}\t{}", fields.message, fields.text);
        }
        Sink::process().line(line);
    }
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

/// A text as a JSON string.
pub struct Json<'a>(pub &'a str);

impl fmt::Display for Json<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_char('"')?;
        for c in self.0.chars() {
            match c {
                '"' => f.write_str("\\\"")?,
                '\\' => f.write_str("\\\\")?,
                '\n' => f.write_str("\\n")?,
                '\r' => f.write_str("\\r")?,
                '\t' => f.write_str("\\t")?,
                c if c < ' ' => write!(f, "\\u{:04x}", u32::from(c))?,
                c => f.write_char(c)?,
            }
        }
        f.write_char('"')
    }
}

/// Collects an event's or span's fields as text, the message apart.
struct Fields {
    json: bool,
    message: String,
    text: String,
}

impl Fields {
    fn new(json: bool) -> Self {
        Self {
            json,
            message: String::new(),
            text: String::new(),
        }
    }

    fn add(&mut self, field: &Field, plain: fmt::Arguments<'_>, json: fmt::Arguments<'_>) {
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

    fn bare(&mut self, field: &Field, value: impl fmt::Display) {
        self.add(field, format_args!("{value}"), format_args!("{value}"));
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            let _ = write!(self.message, "{value:?}");
            return;
        }
        let text = format!("{value:?}");
        self.add(
            field,
            format_args!("{text}"),
            format_args!("{}", Json(&text)),
        );
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            self.message.push_str(value);
            return;
        }
        self.add(
            field,
            format_args!("{value:?}"),
            format_args!("{}", Json(value)),
        );
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.bare(field, value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.bare(field, value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.bare(field, value);
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.bare(field, value);
    }
}
