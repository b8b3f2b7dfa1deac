//! Tells that something changed in one of several folders.
//!
//! Folders rather than files are watched, because files are replaced and a watch goes with the file. Where the kernel
//! grants no watch, [`FolderWatch::follow`] says so and the caller has to look from time to time.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use notify::event::{AccessKind, AccessMode, EventKind};
use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::mpsc;

/// Which paths are of interest.
pub(super) type Filter = Arc<dyn Fn(&Path) -> bool + Send + Sync>;

pub(super) struct FolderWatch {
    folders: Vec<PathBuf>,
    filter: Filter,
    /// Device and inode of each folder that is watched.
    places: Vec<Option<(u64, u64)>>,
    watching: Option<(RecommendedWatcher, mpsc::Receiver<()>)>,
    /// What was last said about a folder that cannot be watched.
    complaint: Option<String>,
}

impl FolderWatch {
    /// Watches nothing until [`Self::follow`] is called.
    pub fn new(folders: Vec<PathBuf>, filter: Filter) -> Self {
        Self {
            folders,
            filter,
            places: Vec::new(),
            watching: None,
            complaint: None,
        }
    }

    /// Watches what is at the folders' paths now; false if changes may go unnoticed.
    pub fn follow(&mut self) -> bool {
        let places: Vec<_> = self.folders.iter().map(|path| place(path).ok()).collect();
        let complete = places.iter().all(Option::is_some);
        if complete && self.watching.is_some() && places == self.places {
            return true;
        }
        let complaint = match self.rewatch() {
            Ok(()) => None,
            Err(error) => Some(format!(
                "cannot watch the CNI folders and looks at them from time to time instead: {error}"
            )),
        };
        if complaint != self.complaint
            && let Some(complaint) = &complaint
        {
            tracing::warn!("{complaint}");
        }
        self.complaint = complaint;
        // A place that is none makes the next call try again.
        self.places = match self.complaint {
            None => places,
            Some(_) => Vec::new(),
        };
        complete && self.complaint.is_none()
    }

    /// Waits for the next change, or for ever if nothing is watched.
    pub async fn changed(&mut self) {
        if let Some((_, events)) = &mut self.watching
            && events.recv().await.is_some()
        {
            return;
        }
        std::future::pending().await
    }

    /// Watches the folders that are there.
    fn rewatch(&mut self) -> notify::Result<()> {
        let (happened, events) = mpsc::channel(1);
        let filter = self.filter.clone();
        self.watching = None;
        let mut watcher = notify::recommended_watcher(move |event| {
            if matters(&event, &filter) {
                // One signal that waits stands for any number of changes.
                let _ = happened.try_send(());
            }
        })?;
        let mut result = Ok(());
        for folder in self.folders.iter().filter(|folder| folder.exists()) {
            // One that fails is no reason not to watch the others.
            result = watcher
                .watch(folder, RecursiveMode::NonRecursive)
                .and(result);
        }
        self.watching = Some((watcher, events));
        result
    }
}

fn place(folder: &Path) -> io::Result<(u64, u64)> {
    let metadata = std::fs::metadata(folder)?;
    Ok((metadata.dev(), metadata.ino()))
}

/// Whether something changed; that somebody reads a file, as this program does, is no change.
fn matters(event: &notify::Result<notify::Event>, filter: &Filter) -> bool {
    let Ok(event) = event else {
        return true;
    };
    let is_read = matches!(event.kind, EventKind::Access(kind) if kind != AccessKind::Close(AccessMode::Write));
    let paths = &event.paths;
    !is_read && (paths.is_empty() || paths.iter().any(|path| filter(path)))
}
