//! From the folder to the proxies: read, translated and pushed whenever something changes.

use std::path::PathBuf;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use anyhow::Context;
use notify::{RecursiveMode, Watcher};
use tokio::sync::{mpsc, watch};

use super::manifests::Manifests;
use super::server::{Plane, Snapshot};
use super::translate::{self, Settings};

/// How long the folder must be quiet before it is read.
const QUIET: Duration = Duration::from_millis(20);
/// The folder is read this often even if nothing seems to happen.
const RELOAD: Duration = Duration::from_secs(30);

/// The folder and what was made of it.
pub struct Feed {
    manifests: Manifests,
    settings: Settings,
    snapshots: watch::Sender<Arc<Snapshot>>,
    problems: Vec<String>,
}

/// A feed that watches its folder.
pub struct Watching {
    feed: Feed,
    plane: Arc<Plane>,
    events: mpsc::Receiver<()>,
    _watcher: notify::RecommendedWatcher,
}

impl Feed {
    /// A feed that has read nothing yet, and where its snapshots arrive.
    pub fn new(folder: PathBuf, settings: Settings) -> (Self, watch::Receiver<Arc<Snapshot>>) {
        let (snapshots, receiver) = watch::channel(Arc::default());
        (
            Self {
                manifests: Manifests::new(folder),
                settings,
                snapshots,
                problems: Vec::new(),
            },
            receiver,
        )
    }

    /// Reads the folder and begins to watch it.
    ///
    /// # Errors
    /// When the folder is not there or cannot be watched.
    pub fn start(mut self, plane: Arc<Plane>) -> anyhow::Result<Watching> {
        let folder = self.manifests.folder().to_path_buf();
        anyhow::ensure!(
            folder.is_dir(),
            "{} is not a folder of manifests",
            folder.display()
        );
        let (happened, events) = mpsc::channel(1);
        let mut watcher = notify::recommended_watcher(move |_| {
            // One signal that waits stands for any number of changes.
            let _ = happened.try_send(());
        })?;
        watcher
            .watch(&folder, RecursiveMode::Recursive)
            .with_context(|| format!("cannot watch {}", folder.display()))?;
        self.reload(&plane);
        Ok(Watching {
            feed: self,
            plane,
            events,
            _watcher: watcher,
        })
    }

    /// Reads and translates the folder; pushes what differs.
    fn reload(&mut self, plane: &Plane) {
        let (objects, problems) = self.manifests.load();
        for problem in problems
            .iter()
            .filter(|problem| !self.problems.contains(problem))
        {
            tracing::error!("{problem}; its last good version stays in force");
        }
        self.problems = problems;
        {
            let mut tokens = plane.tokens.lock().unwrap_or_else(PoisonError::into_inner);
            for node in objects.nodes.keys() {
                if let Err(error) = tokens.ensure(node) {
                    tracing::error!("no token for node {node}: {error:#}");
                }
            }
        }
        let resources = translate::all(&objects, &self.settings);
        let (changes, next) = {
            let current = self.snapshots.borrow();
            let next = Snapshot::new(current.number() + 1, &resources, &objects);
            (next.changes(&current), next)
        };
        if changes == 0 && self.snapshots.borrow().same_places(&next) {
            return;
        }
        let (addresses, policies) = next.counts();
        // The feed's own receiver is not a proxy.
        let proxies = self.snapshots.receiver_count().saturating_sub(1);
        tracing::info!(
            "{addresses} workloads and services, {policies} policies; pushing {changes} changes to {proxies} proxies"
        );
        self.snapshots.send_replace(Arc::new(next));
    }
}

impl Watching {
    /// Follows the folder for ever.
    pub async fn run(mut self) {
        loop {
            tokio::select! {
                event = self.events.recv() => {
                    if event.is_none() {
                        tracing::error!("the folder is no longer watched");
                        return;
                    }
                    tokio::time::sleep(QUIET).await;
                    while self.events.try_recv().is_ok() {}
                }
                () = tokio::time::sleep(RELOAD) => {}
            }
            self.feed.reload(&self.plane);
        }
    }
}
