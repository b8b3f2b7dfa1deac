//! Watches: the changes of a kind, one JSON object a line, for as long as the client listens.

use std::convert::Infallible;
use std::time::Duration;

use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Bytes, Frame};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;

use super::requests::{Answer, Request, Target, failure, selection};
use super::selectors::Selection;
use super::store::as_event;
use super::{ApiServer, Body};

/// Lines that may wait for a client.
const WAITING: usize = 64;
/// How long a watch lasts unless the client says.
const LIFE: Duration = Duration::from_secs(1800);

struct Watch {
    target: Target,
    selection: Selection,
    /// Changes up to this version have been told.
    version: u64,
    bookmarks: bool,
    ends: Instant,
    lines: mpsc::Sender<Bytes>,
}

impl ApiServer {
    /// Begins a watch.
    pub(super) fn watch(&self, target: &Target, request: &Request) -> Result<Body, Answer> {
        let selection = selection(target, request)?;
        let from = request.parameter("resourceVersion").unwrap_or_default();
        let initial = request.is_set("sendInitialEvents") || matches!(from, "" | "0");
        let version = match from {
            "" => 0,
            text => text
                .parse()
                .map_err(|_| failure(400, format!("resourceVersion {text} is no version")))?,
        };
        let life = request
            .parameter("timeoutSeconds")
            .and_then(|text| text.parse().ok());
        let life = life.map_or(LIFE, Duration::from_secs);
        let (lines, received) = mpsc::channel(WAITING);
        let watch = Watch {
            target: target.clone(),
            selection,
            version,
            bookmarks: request.is_set("allowWatchBookmarks"),
            ends: Instant::now() + life,
            lines,
        };
        let server = self.clone();
        let announces = request.is_set("sendInitialEvents");
        tokio::spawn(async move {
            // An error is a client that has gone.
            let _ = server.tell(watch, initial, announces).await;
        });
        let frames =
            ReceiverStream::new(received).map(|line| Ok::<_, Infallible>(Frame::data(line)));
        Ok(StreamBody::new(frames).boxed())
    }

    async fn tell(&self, mut watch: Watch, initial: bool, announces: bool) -> Result<(), Gone> {
        let mut changed = self.0.changed.subscribe();
        if initial {
            let (objects, version) = {
                let store = self.store();
                (
                    store.list(watch.target.resource, &watch.selection),
                    store.version,
                )
            };
            for object in objects {
                watch.send("ADDED", object).await?;
            }
            watch.version = version;
            if announces {
                watch.bookmark(true).await?;
            }
        }
        let mut next_bookmark = Instant::now() + self.0.options.bookmarks;
        loop {
            changed.borrow_and_update();
            let (changes, version) = {
                let store = self.store();
                (
                    store.since(watch.version, watch.target.resource),
                    store.version,
                )
            };
            let Some(changes) = changes else {
                let (_, status) =
                    failure(410, format!("too old resource version: {}", watch.version));
                return watch.send("ERROR", status).await;
            };
            for change in &changes {
                if let Some((kind, object)) = as_event(change, &watch.selection) {
                    watch.send(kind, object).await?;
                }
            }
            watch.version = version;
            tokio::select! {
                _ = changed.changed() => {}
                () = tokio::time::sleep_until(next_bookmark), if watch.bookmarks => {
                    next_bookmark += self.0.options.bookmarks;
                    watch.bookmark(false).await?;
                }
                () = tokio::time::sleep_until(watch.ends) => return Ok(()),
                () = watch.lines.closed() => return Ok(()),
            }
        }
    }
}

/// The client has gone.
struct Gone;

impl Watch {
    async fn bookmark(&self, initial_end: bool) -> Result<(), Gone> {
        let resource = self.target.resource;
        let mut metadata = json!({"resourceVersion": self.version.to_string()});
        if initial_end {
            metadata["annotations"] = json!({"k8s.io/initial-events-end": "true"});
        }
        let object = json!({"kind": resource.kind, "apiVersion": resource.api_version(), "metadata": metadata});
        self.send("BOOKMARK", object).await
    }

    async fn send(&self, kind: &str, object: Value) -> Result<(), Gone> {
        let line = format!("{}\n", json!({"type": kind, "object": object}));
        self.lines.send(line.into()).await.map_err(|_| Gone)
    }
}
