//! The log of this process: set up once, its levels changed while it runs.

use std::sync::{OnceLock, PoisonError, RwLock};

use thiserror::Error;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::{Registry, reload};

use super::filter::{Filter, NoDirective};
use super::lines::{self, Lines};
use super::sink::Sink;

static LOG: OnceLock<Log> = OnceLock::new();

struct Log {
    json: bool,
    handle: reload::Handle<Targets, Registry>,
    initial: Filter,
    filter: RwLock<Filter>,
}

/// Why the log cannot be set up.
#[derive(Debug, Error)]
pub enum LogError {
    #[error("RUST_LOG={0} is no log filter: {1}; separate several with commas")]
    Filter(String, NoDirective),
    #[error("LOG_FORMAT={0} is not known; use plain or json")]
    Format(String),
    #[error("the log is already set up")]
    Twice,
}

/// Why levels cannot be changed.
#[derive(Debug, Error)]
pub enum LevelError {
    #[error("{0}")]
    Invalid(#[from] NoDirective),
    #[error("{0}")]
    Internal(String),
}

/// Writes what is queued when it is dropped: keep it until the process ends.
pub struct Guard(());

impl Drop for Guard {
    fn drop(&mut self) {
        flush();
    }
}

/// Sets the process's log up from `RUST_LOG` and `LOG_FORMAT`.
///
/// # Errors
/// When one of them cannot be understood, or the log was set up before.
pub fn init() -> Result<Guard, LogError> {
    let variable = |name| std::env::var(name).unwrap_or_default();
    let json = match &*variable("LOG_FORMAT") {
        "" | "plain" => false,
        "json" => true,
        other => return Err(LogError::Format(other.to_string())),
    };
    let wanted = variable("RUST_LOG");
    let initial =
        Filter::from_variable(&wanted).map_err(|error| LogError::Filter(wanted, error))?;
    let (layer, handle) = reload::Layer::new(initial.targets());
    let log = Log {
        json,
        handle,
        filter: RwLock::new(initial.clone()),
        initial,
    };
    LOG.set(log).map_err(|_| LogError::Twice)?;
    let lines = Lines {
        json,
        sink: Sink::process(),
    };
    tracing::subscriber::set_global_default(Registry::default().with(layer).with(lines))
        .map_err(|_| LogError::Twice)?;
    Ok(Guard(()))
}

/// Whether lines are JSON objects.
pub fn is_json() -> bool {
    LOG.get().is_some_and(|log| log.json)
}

/// The levels that are in force.
pub fn filter() -> Filter {
    LOG.get().map_or_else(Filter::default, |log| {
        log.filter
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    })
}

/// Changes levels, the initial ones if `reset` and else those in force; gives the new ones.
///
/// # Errors
/// When a level cannot be understood, or the log is not set up.
pub fn set_levels(levels: &str, reset: bool) -> Result<Filter, LevelError> {
    let unset = || LevelError::Internal("the log is not set up".to_string());
    let base = match LOG.get() {
        Some(log) if reset => log.initial.clone(),
        _ => filter(),
    };
    let new = base.with(levels)?;
    let log = LOG.get().ok_or_else(unset)?;
    log.handle
        .reload(new.targets())
        .map_err(|error| LevelError::Internal(error.to_string()))?;
    log.filter
        .write()
        .unwrap_or_else(PoisonError::into_inner)
        .clone_from(&new);
    tracing::info!("new log filter is {new}");
    Ok(new)
}

/// Waits a bounded time until everything logged is written.
pub fn flush() {
    Sink::process().flush();
}

/// The line that tells of lines that were lost.
pub(super) fn lost(count: u64) -> String {
    lines::lost(is_json(), count)
}
