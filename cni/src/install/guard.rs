//! The loop that keeps the plugin installed: watch, check, put right.

use std::future::Future;
use std::panic::resume_unwind;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep};

use super::replacement::is_unfinished;
use super::watch::{Filter, FolderWatch};
use super::{Drift, InstallError, Installed, Installer};
use crate::event::KUBECONFIG;

/// How long writers are given to finish.
const SETTLE: Duration = Duration::from_millis(50);
/// How soon to look again while something is wrong or cannot be watched.
const RETRY: Duration = Duration::from_secs(2);
/// How often to look although nothing seems to happen.
const RECHECK: Duration = Duration::from_secs(60);
/// Repairs that follow each other sooner than this are a quarrel.
const CALM: Duration = Duration::from_secs(5);
/// The pause that a quarrel is given.
const PAUSE: Duration = Duration::from_secs(1);
/// The number of repairs in a quarrel after which it is spoken of.
const QUARREL: u32 = 5;

/// How it is with the plugin; told at every change.
#[derive(Debug)]
pub enum Status {
    /// Everything is in place, was checked and is watched.
    Ready,
    /// Something is not in place any more and is being put right.
    Drifted(Drift),
    /// An installation succeeded; it is checked next.
    Installed(Installed),
    /// An installation failed; it is tried again soon.
    Failed(InstallError),
}

impl Status {
    /// Whether new pods can be captured.
    pub fn is_ready(&self) -> bool {
        matches!(self, Self::Ready)
    }

    /// The `result` to count in the metric of installations, if this is the end of one.
    pub fn result(&self) -> Option<&'static str> {
        match self {
            Self::Ready | Self::Drifted(_) => None,
            Self::Installed(_) => Some("SUCCESS"),
            Self::Failed(error) if error.is_waiting() => None,
            Self::Failed(error) => Some(error.result()),
        }
    }
}

impl Installer {
    /// Installs the plugin and keeps it installed until `stop` is done; an installation that is under way is finished.
    /// Nothing is removed: that is [`Self::uninstall`], with the installer that comes back.
    ///
    /// `token` is the content of the service account's token, empty while it is unknown.
    pub async fn run(
        mut self,
        mut token: watch::Receiver<String>,
        status: impl Fn(&Status) + Send,
        stop: impl Future<Output = ()> + Send,
    ) -> Self {
        let mut stop = pin!(stop);
        let mut folders = FolderWatch::new(self.folders(), self.filter());
        let mut log = Log::default();
        let mut pace = Pace::default();
        let mut state = State::New;
        loop {
            self.token = Some(token.borrow_and_update().clone());
            // What happens from here on is told, so that nothing falls between the check and the wait.
            let watched = folders.follow();
            let drift = match state {
                State::New => Some(Drift::NotInstalled),
                _ => self.clone().blocking(|this| this.check()).await.err(),
            };
            let longest = match drift {
                None => {
                    if state != State::Ready {
                        state = State::Ready;
                        log.ready();
                        status(&Status::Ready);
                    }
                    if watched { RECHECK } else { RETRY }
                }
                Some(drift) => {
                    if matches!(state, State::Installed | State::Ready) {
                        let (pause, quarrel) = pace.repair(Instant::now());
                        log.drifted(&drift, quarrel);
                        status(&Status::Drifted(drift));
                        tokio::select! {
                            () = &mut stop => return self,
                            () = sleep(pause) => {}
                        }
                    }
                    match self.clone().blocking(|this| this.put()).await {
                        Ok(installed) => {
                            state = State::Installed;
                            log.installed(&installed);
                            status(&Status::Installed(installed));
                            continue;
                        }
                        Err(error) => {
                            state = State::Failed;
                            log.failed(&error);
                            status(&Status::Failed(error));
                            RETRY
                        }
                    }
                }
            };
            tokio::select! {
                () = &mut stop => return self,
                () = wake(&mut folders, &mut token, longest) => {}
            }
        }
    }

    /// Runs work that waits for the disk where it holds nobody up.
    async fn blocking<T: Send + 'static>(self, work: impl FnOnce(Self) -> T + Send + 'static) -> T {
        match spawn_blocking(move || work(self)).await {
            Ok(result) => result,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => resume_unwind(panic),
                // The runtime shuts down, and this task with it.
                Err(_) => std::future::pending().await,
            },
        }
    }

    /// Tells which paths the installation depends on. In the run folder, sockets and logs come and go.
    fn filter(&self) -> Filter {
        let run_dir = self.config.run_dir.clone();
        Arc::new(move |path: &Path| {
            let in_run_dir = path.parent() == Some(&run_dir);
            let is_kubeconfig = path.file_name().is_some_and(|name| name == KUBECONFIG);
            !is_unfinished(path) && (!in_run_dir || is_kubeconfig)
        })
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    New,
    Failed,
    Installed,
    Ready,
}

/// Waits until it is time to check again.
async fn wake(folders: &mut FolderWatch, token: &mut watch::Receiver<String>, longest: Duration) {
    let renewed = async {
        if token.changed().await.is_err() {
            // There will be no other token.
            std::future::pending().await
        }
    };
    tokio::select! {
        () = folders.changed() => {}
        () = renewed => {}
        () = sleep(longest) => {}
    }
    sleep(SETTLE).await;
}

/// Tells quarrels with other programs from single mishaps.
#[derive(Default)]
struct Pace {
    last: Option<Instant>,
    quick: u32,
}

impl Pace {
    /// How long to wait with a repair that is due now, and whether it is time to speak of a quarrel.
    fn repair(&mut self, now: Instant) -> (Duration, bool) {
        let quick = self.last.is_some_and(|last| now - last < CALM);
        self.last = Some(now);
        self.quick = if quick { self.quick + 1 } else { 0 };
        let pause = if quick { PAUSE } else { Duration::ZERO };
        (pause, self.quick > QUARREL)
    }
}

/// Who may be undoing the installation.
fn culprit(drift: &Drift) -> &'static str {
    match drift.to_string().contains("cilium") {
        true => "Cilium does so unless it is installed with cni.exclusive=false",
        false => "look for another program that manages the node's CNI files",
    }
}

/// What operators read; what was said and still holds is not said again.
#[derive(Default)]
struct Log {
    failure: Option<String>,
    warnings: Vec<String>,
    quarrel: bool,
}

impl Log {
    fn ready(&mut self) {
        self.failure = None;
        tracing::info!("the CNI plugin is in place");
    }

    fn drifted(&mut self, drift: &Drift, quarrel: bool) {
        tracing::warn!("{drift}; putting it right");
        if quarrel && !self.quarrel {
            let hint = culprit(drift);
            tracing::warn!("something keeps undoing the installation of the CNI plugin: {hint}");
        }
        self.quarrel = quarrel;
    }

    fn installed(&mut self, installed: &Installed) {
        for path in &installed.written {
            tracing::info!("wrote {}", path.display());
        }
        for warning in &installed.warnings {
            if !self.warnings.contains(warning) {
                tracing::warn!("{warning}");
            }
        }
        self.warnings.clone_from(&installed.warnings);
    }

    fn failed(&mut self, error: &InstallError) {
        let text = error.to_string();
        if self.failure.as_ref() == Some(&text) {
            return;
        }
        match error.is_waiting() {
            true => tracing::info!("{text}"),
            false => tracing::error!("{text}"),
        }
        self.failure = Some(text);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_repairs_that_follow_each_other_quickly_are_slowed_down_and_spoken_of() {
        let start = Instant::now();
        let mut pace = Pace::default();
        assert_eq!(pace.repair(start), (Duration::ZERO, false));
        for number in 1..=QUARREL + 1 {
            let now = start + number * Duration::from_secs(1);
            assert_eq!(pace.repair(now), (PAUSE, number > QUARREL));
        }
        let later = start + Duration::from_secs(60);
        assert_eq!(pace.repair(later), (Duration::ZERO, false));
    }

    #[test]
    fn cilium_is_known_by_its_files() {
        let missing = |name: &str| Drift::EntryMissing(name.into());
        let hint = culprit(&missing("/etc/cni/net.d/05-cilium.conflist"));
        assert!(hint.contains("cni.exclusive=false"), "{hint}");
        let hint = culprit(&missing("/etc/cni/net.d/10-calico.conflist"));
        assert!(!hint.contains("Cilium"), "{hint}");
    }

    #[test]
    fn waiting_is_not_counted_as_a_failure() {
        let waiting = InstallError::Kubeconfig(super::super::KubeconfigError::NoToken);
        assert_eq!(Status::Failed(waiting).result(), None);
        assert_eq!(Status::Ready.result(), None);
    }
}
