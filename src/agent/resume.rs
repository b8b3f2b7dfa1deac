//! What an agent does first: it finds the pods that an earlier one has captured, and takes them over.

use std::collections::{BTreeSet, HashSet};
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use cni::scan::{self, Wanted};
use cni::{Outcome, netns};

use super::cluster::{ENABLED, PodFacts};
use super::enroller::{EnrolError, Enroller, Stage, blocking};
use super::settings::with_wishes;

impl Enroller {
    /// Takes over every pod that may hold rules. Proxies must not be listened to before: a proxy lets go of pods that
    /// it is not told of.
    ///
    /// # Errors
    /// When the probes' addresses cannot be brought up to date. What concerns single pods is told in the log, and
    /// tried again.
    pub async fn resume(&self) -> Result<(), EnrolError> {
        let noted = self.journal.entries();
        let pods = self.cluster.pods();
        let held: Vec<_> = pods
            .iter()
            .filter(|pod| !pod.terminal)
            .filter(|pod| pod.redirection().is_some() || noted.contains_key(&pod.uid))
            .collect();
        for journal in [&self.journal, &self.places] {
            for uid in journal.entries().keys() {
                // Its namespace went with it.
                if !pods.iter().any(|pod| pod.uid == *uid) {
                    journal.forget(uid).map_err(EnrolError::Journal)?;
                }
            }
        }
        let mut missing = Vec::new();
        for pod in &held {
            match self.place(&pod.uid, &ips(pod))? {
                Some(netns) => self.take_over(pod, Some(netns.into())).await,
                None => missing.push(*pod),
            }
        }
        let wanted = missing.iter().map(|pod| Wanted {
            uid: pod.uid.clone(),
            ips: ips(pod),
        });
        let wanted: Vec<_> = wanted.collect();
        let (proc, foreign) = (self.settings.proc.clone(), self.foreign.clone());
        let found = blocking(move || scan::scan(&proc, &wanted, &foreign)).await?;
        let mut found = found.unwrap_or_else(|error| {
            tracing::error!("the node's processes cannot be listed: {error}");
            Default::default()
        });
        for pod in missing {
            let netns = found.remove(&pod.uid);
            if let Some(netns) = &netns {
                let noted = self.journal.note(&pod.uid, &netns.path);
                noted.map_err(EnrolError::Journal)?;
            }
            self.take_over(pod, netns.map(|found| found.netns.into()))
                .await;
        }
        self.prune(&held).await
    }

    /// One pod: known again, and its rules as they should be.
    async fn take_over(&self, pod: &PodFacts, netns: Option<OwnedFd>) {
        let mut known = self.lock(&pod.uid).await;
        known.name = pod.full_name();
        known.info = super::enroller::info(pod);
        known.ips.clone_from(&pod.ips);
        known.config = with_wishes(&self.settings.capture, &pod.annotations, &known.name);
        known.netns = netns.map(Arc::new);
        if pod.redirection() != Some(ENABLED) {
            // Whatever is half done is done again, or undone, by its turn in the queue.
            return;
        }
        let handed = known
            .netns
            .as_ref()
            .and_then(|netns| netns.try_clone().ok());
        match handed {
            Some(netns) => self.zds.know(&pod.uid, known.info.clone(), netns),
            None => self.zds.keep(&pod.uid),
        }
        known.stage = Stage::Captured;
        let reconciles = self.settings.reconcile && self.cluster.admit(pod).is_ok();
        let Some(netns) = known.netns.clone().filter(|_| reconciles) else {
            return;
        };
        let config = known.config.clone();
        let outcome = blocking(move || cni::capture(netns.as_fd(), &config)).await;
        match outcome.and_then(|outcome| Ok(outcome?)) {
            Ok(Outcome::Unchanged) => {}
            Ok(outcome) => {
                tracing::warn!(pod = %known.name, "its rules were not as they should be: {outcome:?}");
            }
            Err(error) => {
                tracing::error!(pod = %known.name, "enrolled but NOT CAPTURED: {error}");
                known.stage = Stage::Uncaptured(error.to_string());
            }
        }
    }

    /// Makes the probes' addresses those of the pods that are captured.
    async fn prune(&self, held: &[&Arc<PodFacts>]) -> Result<(), EnrolError> {
        let captured = held.iter().filter(|pod| pod.redirection() == Some(ENABLED));
        let captured: Vec<_> = captured.map(|pod| (pod.uid.clone(), ips(pod))).collect();
        let host = self.host.clone();
        blocking(move || {
            let mut owned: HashSet<(IpAddr, String)> = HashSet::new();
            for (uid, ips) in &captured {
                for ip in ips {
                    host.add(*ip, uid)?;
                    owned.insert((*ip, uid.clone()));
                }
            }
            // The addresses of such a pod are not known, and might be taken for nobody's.
            if captured.iter().any(|(_, ips)| ips.is_empty()) {
                return Ok(());
            }
            for (ip, uid) in host.entries()? {
                if !owned.contains(&(ip, uid.clone())) {
                    host.remove(ip, &uid)?;
                }
            }
            Ok(())
        })
        .await?
    }

    /// The namespaces of the node and of the agent.
    ///
    /// # Errors
    /// When they cannot be examined.
    pub fn own_namespaces(host: &OwnedFd) -> std::io::Result<HashSet<(u64, u64)>> {
        let own = netns::open(Path::new("/proc/self/ns/net"))?;
        Ok([netns::id(host)?, netns::id(&own)?].into())
    }
}

fn ips(pod: &PodFacts) -> Vec<IpAddr> {
    let ips: &BTreeSet<_> = &pod.ips;
    ips.iter().copied().collect()
}
