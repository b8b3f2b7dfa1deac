//! Looks again and again whether the pods that are told to be captured are, and puts right what is not.

use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::time::Duration;

use cni::{Outcome, selftest};

use super::enroller::{EnrolError, Enroller, Known, Stage, blocking};

/// How long after a pod's rules a proxy may begin to listen before that is told of.
const LISTENS: Duration = Duration::from_secs(2);

/// How the pods are, for people and for metrics.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Overview {
    pub captured: usize,
    /// Names and reasons.
    pub pending: Vec<(String, String)>,
    pub uncaptured: Vec<(String, String)>,
}

impl Enroller {
    /// Looks at everything, for ever.
    pub async fn guard(&self) {
        let round = Duration::from_secs(self.settings.arguments.capture_check_interval);
        loop {
            tokio::time::sleep(round).await;
            self.check_all().await;
        }
    }

    /// One look at the node's rules and at every pod.
    pub async fn check_all(&self) {
        let host = self.host.clone();
        let ensured = blocking(move || host.ensure()).await;
        match ensured.and_then(|outcome| Ok(outcome?)) {
            Ok(Outcome::Unchanged) => {}
            Ok(_) => {
                self.metrics.repairs.fetch_add(1, Ordering::Relaxed);
                tracing::warn!("the node's rules for probes were damaged and are put right");
            }
            Err(error) => tracing::error!("the node's rules for probes: {error}"),
        }
        let uids: Vec<_> = self.known().keys().cloned().collect();
        for uid in uids {
            let Some(entry) = self.known().get(&uid).cloned() else {
                continue;
            };
            // A pod that is being worked on will be looked at in the next round.
            let Ok(mut known) = entry.try_lock_owned() else {
                continue;
            };
            match known.stage {
                Stage::Captured => self.check(&mut known).await,
                Stage::Uncaptured(_) => self.cluster.touch(&uid),
                _ => {}
            }
        }
        self.publish();
    }

    /// What is wrong with a pod that is to be captured, as its namespace shows it.
    ///
    /// # Errors
    /// When its rules cannot be read.
    pub async fn inspect(&self, uid: &str) -> Result<Option<String>, EnrolError> {
        let known = self.lock(uid).await;
        let (config, netns) = (known.config.clone(), known.netns());
        match (&known.stage, netns) {
            (Stage::Captured, Some(netns)) => {
                blocking(move || Ok(cni::verify(netns.as_fd(), &config)?)).await?
            }
            // An earlier agent captured it, and it cannot be looked into.
            (Stage::Captured, None) => Ok(None),
            (stage, _) => Ok(Some(stage.to_string())),
        }
    }

    async fn check(&self, known: &mut Known) {
        let Some(netns) = known.netns() else {
            return;
        };
        let (config, looked) = (known.config.clone(), netns.clone());
        let found = blocking(move || cni::verify(looked.as_fd(), &config)).await;
        match found.and_then(|found| Ok(found?)) {
            Ok(None) => return self.check_served(known, netns).await,
            Ok(Some(difference)) => {
                tracing::error!(pod = %known.name, "enrolled but NOT CAPTURED as it should be: {difference}");
            }
            Err(error) => tracing::error!(pod = %known.name, "its rules cannot be read: {error}"),
        }
        let config = known.config.clone();
        let repaired = blocking(move || cni::capture(netns.as_fd(), &config)).await;
        match repaired.and_then(|outcome| Ok(outcome?)) {
            Ok(_) => {
                self.metrics.repairs.fetch_add(1, Ordering::Relaxed);
                tracing::info!(pod = %known.name, "its rules are put right");
            }
            Err(error) => known.stage = uncaptured(&known.name, &error),
        }
    }

    async fn check_served(&self, known: &Known, netns: std::sync::Arc<std::os::fd::OwnedFd>) {
        // Without a proxy nobody listens anywhere, which is told of elsewhere.
        if *self.zds.connected().borrow() == 0 {
            return;
        }
        for _ in 0..2 {
            let looked = netns.clone();
            match blocking(move || selftest::is_served(looked.as_fd())).await {
                Ok(Ok(false)) => {}
                _ => return,
            }
            tokio::time::sleep(LISTENS).await;
        }
        tracing::error!(
            pod = %known.name,
            "captured, but no proxy listens in it: its connections are refused; look at the proxy's log"
        );
    }

    /// How the pods are now.
    pub fn overview(&self) -> Overview {
        let mut overview = Overview::default();
        for entry in self.known().values() {
            // One that is being worked on counts once it is done.
            let Ok(known) = entry.try_lock() else {
                continue;
            };
            let name = known.name.clone();
            match &known.stage {
                Stage::Clean => {}
                Stage::Captured => overview.captured += 1,
                Stage::Pending(reason) => overview.pending.push((name, reason.clone())),
                Stage::Uncaptured(reason) => overview.uncaptured.push((name, reason.clone())),
            }
        }
        overview.pending.sort();
        overview.uncaptured.sort();
        overview
    }

    /// Brings the gauges up to date.
    pub fn publish(&self) {
        let overview = self.overview();
        let count = |number: usize| i64::try_from(number).unwrap_or(i64::MAX);
        let metrics = &self.metrics;
        for (gauge, number) in [
            (&metrics.captured, overview.captured),
            (&metrics.pending, overview.pending.len()),
            (&metrics.uncaptured, overview.uncaptured.len()),
            (&metrics.proxies, *self.zds.connected().borrow()),
        ] {
            gauge.store(count(number), Ordering::Relaxed);
        }
    }
}

fn uncaptured(name: &str, error: &EnrolError) -> Stage {
    tracing::error!(pod = %name, "enrolled but NOT CAPTURED: {error}");
    Stage::Uncaptured(error.to_string())
}
