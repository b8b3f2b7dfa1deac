//! The administration endpoints.

use std::rc::Rc;
use std::sync::Arc;

use tokio::sync::Notify;

use super::http::{Reply, Request};
use super::profiles;
use crate::telemetry::log::{self, LevelError};

const PAGES: [(&str, &str); 6] = [
    (
        "debug/pprof/profile",
        "CPU profile for pprof (?seconds=1..300&amp;frequency=1..1000)",
    ),
    (
        "debug/pprof/heap",
        "heap profile for pprof, once heap profiling is active",
    ),
    (
        "debug/pprof/heap/profiling",
        "switch heap profiling (?activate=true|false)",
    ),
    ("quitquitquit", "shut down the server (POST)"),
    ("config_dump", "dump the current configuration and state"),
    ("logging", "query or change the log level (POST)"),
];

const LOGGING_HELP: &str = "usage: POST /logging\t\t\t\t\t\t(to list current level)
usage: POST /logging?level=<level>\t\t\t\t(to change the level of everything)
usage: POST /logging?level=<target>=<level>,<target>=<level>\t(to change the levels of some targets)
usage: POST /logging?reset\t\t\t\t\t(to return to the initial levels)
levels: off, error, warn, info, debug, trace
";

/// What the console shows and switches.
pub trait Console {
    /// The whole configuration dump.
    fn config_dump(&self) -> impl Future<Output = serde_json::Value>;
}

/// Answers a request to the administration server.
pub async fn answer<C: Console>(console: Rc<C>, quit: Arc<Notify>, request: Request) -> Reply {
    match (&*request.path, &*request.method) {
        ("/", _) => Reply::of("text/html; charset=utf-8", index()),
        ("/config_dump", _) => match serde_json::to_vec_pretty(&console.config_dump().await) {
            Ok(body) => Reply::of("application/json", body),
            Err(error) => Reply::text(500, error.to_string()),
        },
        ("/logging", "POST") => logging(&request),
        ("/logging", _) => Reply::text(405, format!("Invalid HTTP method\n {LOGGING_HELP}")),
        ("/quitquitquit", "POST") => {
            quit.notify_one();
            Reply::text(200, "shutdown now\n")
        }
        ("/quitquitquit", _) => Reply::empty(405),
        ("/debug/pprof/profile", _) => profiles::cpu(&request).await,
        ("/debug/pprof/heap", _) => profiles::heap().await,
        ("/debug/pprof/heap/profiling", _) => profiles::heap_profiling(&request),
        _ => Reply::empty(404),
    }
}

fn index() -> String {
    let row = |(path, what): &(&str, &str)| {
        format!("<tr><td><a href=\"{path}\">{path}</a></td><td>{what}</td></tr>\n")
    };
    let rows: String = PAGES.iter().map(row).collect();
    format!(
        "<!DOCTYPE html>\n<html><head><title>Ztunnel Admin</title></head><body>\n<h1>Ztunnel Admin</h1>\n<table>\n{rows}</table>\n</body></html>\n"
    )
}

fn logging(request: &Request) -> Reply {
    let levels = request.parameter("level").unwrap_or_default();
    let reset = request.parameter("reset").is_some();
    if levels.is_empty() && !reset {
        return current(&log::filter());
    }
    match log::set_levels(&levels, reset) {
        Ok(filter) => current(&filter),
        Err(LevelError::Invalid(_)) => Reply::text(
            400,
            format!("Invalid level provided: {levels}\n{LOGGING_HELP}"),
        ),
        Err(LevelError::Internal(error)) => {
            Reply::text(400, format!("Failed to set new level: {error}\n"))
        }
    }
}

fn current(filter: &impl std::fmt::Display) -> Reply {
    Reply::text(200, format!("current log level is {filter}\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Empty;

    impl Console for Empty {
        async fn config_dump(&self) -> serde_json::Value {
            serde_json::json!({ "workloads": [] })
        }
    }

    async fn ask(method: &str, target: &str) -> (u16, String) {
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let request = Request {
            method: method.into(),
            path: path.into(),
            query: query.into(),
            ..Request::default()
        };
        let reply = answer(Rc::new(Empty), Arc::new(Notify::new()), request).await;
        (reply.status, String::from_utf8(reply.body).unwrap())
    }

    #[tokio::test]
    async fn every_path_answers_as_it_should() {
        assert!(ask("GET", "/").await.1.contains("Ztunnel Admin"));
        assert_eq!(
            ask("GET", "/config_dump").await.1,
            "{\n  \"workloads\": []\n}"
        );
        assert_eq!(ask("GET", "/quitquitquit").await, (405, String::new()));
        assert_eq!(
            ask("POST", "/quitquitquit").await,
            (200, "shutdown now\n".to_string())
        );
        assert_eq!(ask("GET", "/nothing").await.0, 404);
        assert!(
            ask("GET", "/logging")
                .await
                .1
                .starts_with("Invalid HTTP method\n ")
        );
        assert!(
            ask("POST", "/logging")
                .await
                .1
                .starts_with("current log level is ")
        );
        let (status, body) = ask("POST", "/logging?level=loud").await;
        assert_eq!(
            (status, body.starts_with("Invalid level provided: loud\n")),
            (400, true)
        );
    }
}
