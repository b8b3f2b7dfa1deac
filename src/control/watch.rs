//! From the folder to the proxies: read, translated and pushed whenever something changes.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use anyhow::Context;
use notify::event::{AccessKind, AccessMode, EventKind};
use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, timeout};

use super::manifests::{Loaded, Manifests, Objects};
use super::server::{Plane, Snapshot};
use super::translate::{self, Settings};

/// How long the folder must be quiet before it is read.
const QUIET: Duration = Duration::from_millis(50);
/// A folder that is never quiet is read this long after its first change.
const LONGEST: Duration = Duration::from_millis(150);
/// The folder is read this often even if nothing seems to happen.
const RELOAD: Duration = Duration::from_secs(30);
/// How soon to look again for a folder that is gone.
const MISSING: Duration = Duration::from_secs(1);

/// The folder and what was made of it.
pub struct Feed {
    manifests: Manifests,
    settings: Settings,
    snapshots: watch::Sender<Arc<Snapshot>>,
    errors: BTreeSet<String>,
    warnings: BTreeSet<String>,
}

/// A feed that watches its folder.
pub struct Watching {
    feed: Feed,
    plane: Arc<Plane>,
    watch: FolderWatch,
}

/// Tells of changes in one folder, wherever it is moved to.
struct FolderWatch {
    /// Device and inode.
    folder: (u64, u64),
    events: mpsc::Receiver<()>,
    _watcher: RecommendedWatcher,
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
                errors: BTreeSet::new(),
                warnings: BTreeSet::new(),
            },
            receiver,
        )
    }

    /// Reads the folder and begins to watch it.
    ///
    /// # Errors
    /// When the folder is not there or cannot be watched.
    pub fn start(mut self, plane: Arc<Plane>) -> anyhow::Result<Watching> {
        let folder = self.manifests.folder();
        anyhow::ensure!(
            folder.is_dir(),
            "{} is not a folder of manifests",
            folder.display()
        );
        let watch = FolderWatch::new(folder)
            .with_context(|| format!("cannot watch {}", folder.display()))?;
        self.reload(&plane);
        Ok(Watching {
            feed: self,
            plane,
            watch,
        })
    }

    /// Reads and translates the folder; pushes what differs.
    fn reload(&mut self, plane: &Plane) {
        let Loaded {
            objects,
            errors,
            warnings,
        } = self.manifests.load();
        let (mut errors, warnings) = (BTreeSet::from_iter(errors), BTreeSet::from_iter(warnings));
        {
            let mut tokens = plane.tokens.lock().unwrap_or_else(PoisonError::into_inner);
            for node in nodes(&objects) {
                if let Err(error) = tokens.ensure(node) {
                    errors.insert(format!("no token for node {node}: {error:#}"));
                }
            }
        }
        // What was said and still holds is not said again.
        for error in errors.difference(&self.errors) {
            tracing::error!("{error}");
        }
        for warning in warnings.difference(&self.warnings) {
            tracing::warn!("{warning}");
        }
        if errors.is_empty() && !self.errors.is_empty() {
            tracing::info!("all manifests are good again");
        }
        (self.errors, self.warnings) = (errors, warnings);
        let resources = translate::all(&objects, &self.settings);
        let (changes, next) = {
            let current = self.snapshots.borrow();
            let next = Snapshot::new(current.number() + 1, &resources, &objects);
            (next.changes(&current), next)
        };
        if changes == 0 && self.snapshots.borrow().same_places(&next) {
            return;
        }
        // The feed's own receiver is not a proxy.
        let proxies = self.snapshots.receiver_count().saturating_sub(1);
        let workloads = resources.workloads();
        tracing::info!(
            "{}, {}, {}; pushing {} to {}",
            count(workloads, "workload", "workloads"),
            count(resources.addresses.len() - workloads, "service", "services"),
            count(resources.authorizations.len(), "policy", "policies"),
            count(changes, "change", "changes"),
            count(proxies, "proxy", "proxies"),
        );
        self.snapshots.send_replace(Arc::new(next));
    }
}

impl Watching {
    /// Follows the folder for ever, also when another one takes its place.
    pub async fn run(mut self) {
        loop {
            let watched = self.rewatch();
            let longest = if watched { RELOAD } else { MISSING };
            if timeout(longest, self.watch.changed()).await.is_ok() {
                self.watch.quiet().await;
            }
            self.feed.reload(&self.plane);
        }
    }

    /// Watches what is at the folder's path now; false if there is nothing.
    fn rewatch(&mut self) -> bool {
        let folder = self.feed.manifests.folder();
        match place(folder) {
            Ok(place) if place == self.watch.folder => true,
            Ok(_) => match FolderWatch::new(folder) {
                Ok(watch) => {
                    self.watch = watch;
                    // What happened before the new watch is not told by it.
                    self.feed.reload(&self.plane);
                    true
                }
                Err(error) => {
                    tracing::warn!("cannot watch {}: {error:#}", folder.display());
                    false
                }
            },
            Err(_) => false,
        }
    }
}

impl FolderWatch {
    fn new(folder: &Path) -> anyhow::Result<Self> {
        let (happened, events) = mpsc::channel(1);
        let mut watcher = notify::recommended_watcher(move |event| {
            if matters(&event) {
                // One signal that waits stands for any number of changes.
                let _ = happened.try_send(());
            }
        })?;
        watcher.watch(folder, RecursiveMode::Recursive)?;
        Ok(Self {
            folder: place(folder)?,
            events,
            _watcher: watcher,
        })
    }

    async fn changed(&mut self) {
        if self.events.recv().await.is_none() {
            // The watcher is dead; only the clock is left.
            std::future::pending().await
        }
    }

    /// Waits until no more changes come, so that files are read whole.
    async fn quiet(&mut self) {
        let end = Instant::now() + LONGEST;
        while Instant::now() < end && timeout(QUIET, self.changed()).await.is_ok() {
            // A writer may tell of thousands of changes.
            sleep(QUIET / 10).await;
        }
    }
}

/// The nodes that are there or that pods are on.
fn nodes(objects: &Objects) -> BTreeSet<&String> {
    let of_pods = objects.pods.values().map(|pod| &pod.spec.node_name);
    let known = objects.nodes.keys().chain(of_pods);
    known.filter(|node| !node.is_empty()).collect()
}

fn count(number: usize, one: &str, many: &str) -> String {
    format!("{number} {}", if number == 1 { one } else { many })
}

fn place(folder: &Path) -> std::io::Result<(u64, u64)> {
    let metadata = std::fs::metadata(folder)?;
    Ok((metadata.dev(), metadata.ino()))
}

/// Whether something changed; that somebody reads a file, as this program does, is no change.
fn matters(event: &notify::Result<notify::Event>) -> bool {
    match event {
        Ok(event) => {
            !matches!(event.kind, EventKind::Access(kind) if kind != AccessKind::Close(AccessMode::Write))
        }
        Err(_) => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("wrn-watch-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        std::fs::write(path.join("a.yaml"), "kind: X\n").unwrap();
        path
    }

    #[tokio::test]
    async fn reading_a_file_is_no_change_and_writing_one_is() {
        let folder = folder("read");
        let mut watch = FolderWatch::new(&folder).unwrap();
        std::fs::read_to_string(folder.join("a.yaml")).unwrap();
        let none = timeout(Duration::from_millis(300), watch.changed()).await;
        std::fs::write(folder.join("a.yaml"), "kind: Y\n").unwrap();
        let some = timeout(Duration::from_secs(10), watch.changed()).await;
        std::fs::remove_dir_all(folder).unwrap();
        assert!(none.is_err() && some.is_ok());
    }

    #[tokio::test]
    async fn a_folder_that_is_written_to_all_the_time_is_read_all_the_same() {
        let folder = folder("busy");
        let mut watch = FolderWatch::new(&folder).unwrap();
        let file = folder.join("a.yaml");
        let writer = tokio::spawn(async move {
            loop {
                std::fs::write(&file, "kind: Y\n").unwrap();
                sleep(Duration::from_millis(5)).await;
            }
        });
        watch.changed().await;
        let quiet = timeout(Duration::from_secs(20), watch.quiet()).await;
        writer.abort();
        assert!(writer.await.unwrap_err().is_cancelled());
        std::fs::remove_dir_all(folder).unwrap();
        assert!(quiet.is_ok());
    }
}
