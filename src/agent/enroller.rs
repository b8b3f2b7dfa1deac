//! Brings each pod to where it should be: captured and served, or left alone without a trace.
//!
//! Two sources ask for the same pod, the plugin and the watch; whoever comes first holds the pod's lock, and the other
//! finds the work done. The order of an addition is rules, self-test, proxy, probes, status; a pod is told to be
//! captured only when all of that is true.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fmt;
use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex as PlainMutex, MutexGuard, PoisonError};

use cni::host::{Host, HostError};
use cni::scan::{self, Wanted};
use cni::selftest::{self, Proof, SelfTestError};
use cni::zds::{WorkloadInfo, ZdsError, ZdsServer};
use cni::{CaptureConfig, CaptureError, netns};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, Patch, PatchParams};
use serde_json::{Value, json};
use thiserror::Error;
use tokio::sync::{Mutex, OwnedMutexGuard};

use super::cluster::{Cluster, ENABLED, Outside, PENDING, PodFacts, REDIRECTION};
use super::journal::Journal;
use super::metrics::Metrics;
use super::settings::{Settings, with_wishes};

/// Why a pod is not where it should be.
#[derive(Debug, Error)]
pub enum EnrolError {
    #[error("its network namespace {path} cannot be opened: {error}")]
    Open { path: PathBuf, error: io::Error },
    #[error("its network namespace was not found among the node's processes")]
    NoNamespace,
    #[error("{0} is the network namespace of the node itself")]
    HostNamespace(PathBuf),
    #[error("the journal cannot be written: {0}")]
    Journal(io::Error),
    #[error("its traffic cannot be captured: {0}")]
    Capture(#[from] CaptureError),
    #[error(transparent)]
    SelfTest(#[from] SelfTestError),
    #[error("the proxy does not serve it: {0}")]
    Proxy(#[from] ZdsError),
    #[error("its probes cannot be let through: {0}")]
    Probes(#[from] HostError),
    #[error("its status cannot be written: {0}")]
    Status(Box<kube::Error>),
    #[error("the work on it ended unexpectedly")]
    Aborted,
}

impl EnrolError {
    /// Whether the pod talks in clear text; otherwise its rules are in place, and it cannot talk yet.
    fn leaves_open(&self) -> bool {
        !matches!(self, Self::Proxy(_) | Self::Probes(_) | Self::Status(_))
    }
}

/// Where a pod is on its way.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Stage {
    /// Nothing is known to have been done.
    #[default]
    Clean,
    /// It is enrolled and talks in clear text.
    Uncaptured(String),
    /// It holds rules, but cannot talk yet.
    Pending(String),
    Captured,
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Clean => f.write_str("clean"),
            Self::Uncaptured(reason) => write!(f, "NOT CAPTURED: {reason}"),
            Self::Pending(reason) => write!(f, "pending: {reason}"),
            Self::Captured => f.write_str("captured"),
        }
    }
}

/// A pod that is or may be captured.
#[derive(Default)]
pub struct Known {
    pub name: String,
    pub(super) info: WorkloadInfo,
    pub(super) ips: BTreeSet<IpAddr>,
    pub(super) netns: Option<Arc<OwnedFd>>,
    pub config: CaptureConfig,
    pub stage: Stage,
}

impl Known {
    /// Its network namespace, if it is at hand.
    pub fn netns(&self) -> Option<Arc<OwnedFd>> {
        self.netns.clone()
    }
}

/// Who a pod is, as proxies are told.
pub(super) fn info(pod: &PodFacts) -> WorkloadInfo {
    WorkloadInfo {
        name: pod.name.clone(),
        namespace: pod.namespace.clone(),
        service_account: pod.service_account.clone(),
    }
}

type Entry = Arc<Mutex<Known>>;

/// What the plugin knows of a pod that is being started.
#[derive(Clone, Debug)]
pub struct Given {
    pub netns: PathBuf,
    pub ips: BTreeSet<IpAddr>,
}

/// Everything that capturing pods needs.
pub struct Enroller {
    pub cluster: Cluster,
    pub zds: ZdsServer,
    pub host: Host,
    /// Where the namespaces of the pods are that the plugin told of.
    pub places: Journal,
    /// Where those of the pods are that may hold rules.
    pub journal: Journal,
    pub metrics: Arc<Metrics>,
    pub settings: Arc<Settings>,
    pub client: kube::Client,
    /// The namespaces that belong to the node, which no pod may claim.
    pub foreign: HashSet<(u64, u64)>,
    pub known: PlainMutex<HashMap<String, Entry>>,
    /// What was last told of the pods that cannot be brought to where they should be.
    pub reported: PlainMutex<HashMap<String, String>>,
}

impl Enroller {
    /// Captures a pod that a runtime is about to start.
    ///
    /// # Errors
    /// Why it is not captured; the runtime is to try again.
    pub async fn add_given(&self, pod: &PodFacts, given: Given) -> Result<(), EnrolError> {
        let mut known = self.lock(&pod.uid).await;
        let added = self.add(&mut known, pod, Some(given)).await;
        drop(known);
        if added.is_ok() {
            self.reported().remove(&pod.uid);
        }
        self.publish();
        added
    }

    /// Brings a pod to where it should be; says whether it is there.
    pub async fn reconcile(&self, uid: String) -> bool {
        let (kind, name, result) = match self.cluster.pod(&uid) {
            None => ("delete", uid.clone(), self.forget(&uid).await),
            Some(pod) => ("update", pod.full_name(), self.follow(&pod).await),
        };
        match result {
            Ok(false) => true,
            Ok(true) => {
                self.metrics.reconciles.count(kind);
                self.reported().remove(&uid);
                self.publish();
                true
            }
            Err(error) => {
                self.metrics.reconciles.count(kind);
                self.report(&uid, &name, &error);
                self.publish();
                false
            }
        }
    }

    /// Tells of a failure, once for as long as it stays the same.
    pub fn report(&self, uid: &str, name: &str, error: &EnrolError) {
        let text = error.to_string();
        let before = self.reported().insert(uid.to_string(), text.clone());
        if before.as_ref() == Some(&text) {
            tracing::debug!(pod = name, "still: {text}");
        } else if error.leaves_open() {
            tracing::error!(
                pod = name,
                "enrolled but NOT CAPTURED, will be tried again: {text}"
            );
        } else {
            tracing::warn!(pod = name, "will be tried again: {text}");
        }
    }

    fn reported(&self) -> MutexGuard<'_, HashMap<String, String>> {
        self.reported.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers where the namespace of a pod is that may be enrolled later.
    ///
    /// # Errors
    /// When that cannot be written.
    pub fn note_place(&self, uid: &str, netns: &Path) -> Result<(), EnrolError> {
        let noted = self.places.note(uid, &self.settings.on_host(netns));
        noted.map_err(EnrolError::Journal)
    }

    /// A pod that no longer exists; says whether anything was to be done.
    async fn forget(&self, uid: &str) -> Result<bool, EnrolError> {
        self.places.forget(uid).map_err(EnrolError::Journal)?;
        if !self.knows(uid) {
            return Ok(false);
        }
        let mut known = self.lock(uid).await;
        self.remove(&mut known, uid, None).await?;
        Ok(true)
    }

    /// A pod that exists; says whether anything was to be done.
    async fn follow(&self, pod: &PodFacts) -> Result<bool, EnrolError> {
        let marked = pod.redirection().is_some();
        let wanted = match self.cluster.admit(pod) {
            // The namespace's arrival brings the pod back here.
            Err(Outside::UnknownNamespace) => return Ok(false),
            admitted => admitted.is_ok() && !pod.terminal,
        };
        if !wanted {
            if !self.knows(&pod.uid) && !marked {
                return Ok(false);
            }
            let mut known = self.lock(&pod.uid).await;
            self.remove(&mut known, &pod.uid, Some(pod)).await?;
            return Ok(true);
        }
        // A pod without addresses is one that the runtime is starting, and the plugin tells of it.
        if pod.ips.is_empty() {
            return Ok(false);
        }
        let mut known = self.lock(&pod.uid).await;
        if known.stage == Stage::Captured {
            return self.refresh(&mut known, pod).await;
        }
        self.add(&mut known, pod, None).await?;
        Ok(true)
    }

    async fn add(
        &self,
        known: &mut OwnedMutexGuard<Known>,
        pod: &PodFacts,
        given: Option<Given>,
    ) -> Result<(), EnrolError> {
        self.metrics.reconciles.count("add");
        let result = self.try_add(known, pod, given).await;
        if let Err(error) = &result {
            known.stage = match error.leaves_open() {
                true => Stage::Uncaptured(error.to_string()),
                false => Stage::Pending(error.to_string()),
            };
            if matches!(error, EnrolError::Proxy(_)) && pod.redirection() != Some(PENDING) {
                // The reason for which it is pending is the error to tell of.
                let _ = self.annotate(pod, json!(PENDING)).await;
            }
        }
        result
    }

    async fn try_add(
        &self,
        known: &mut Known,
        pod: &PodFacts,
        given: Option<Given>,
    ) -> Result<(), EnrolError> {
        known.name = pod.full_name();
        known.info = info(pod);
        let started_by_plugin = given.is_some();
        let ips = match &given {
            Some(given) if !given.ips.is_empty() => given.ips.clone(),
            _ => pod.ips.clone(),
        };
        let netns = self.namespace(known, &pod.uid, &ips, given).await?;
        known.netns = Some(netns.clone());
        let config = with_wishes(&self.settings.capture, &pod.annotations, &known.name);
        known.config = config.clone();
        let proof = {
            let netns = netns.clone();
            blocking(move || {
                cni::capture(netns.as_fd(), &config)?;
                let proof = selftest::prove(netns.as_fd(), &config);
                if proof.is_err() && started_by_plugin {
                    // The runtime takes the namespace down; should it not, nothing of ours is to stay.
                    let _ = cni::remove(netns.as_fd());
                }
                Ok::<_, EnrolError>(proof?)
            })
            .await?
        };
        let proof = proof.inspect_err(|error| {
            if matches!(error, EnrolError::SelfTest(_)) {
                self.metrics
                    .self_test_failures
                    .fetch_add(1, Ordering::Relaxed);
            }
        })?;
        let handed = netns.try_clone().map_err(|error| EnrolError::Open {
            path: PathBuf::from(&known.name),
            error,
        })?;
        self.zds.add(&pod.uid, known.info.clone(), handed).await?;
        self.let_probes_through(&pod.uid, &known.ips, &ips).await?;
        known.ips = ips;
        if pod.redirection() != Some(ENABLED) {
            self.annotate(pod, json!(ENABLED)).await?;
        }
        known.stage = Stage::Captured;
        let proof = match proof {
            Proof::Captured => "the self-test came through",
            Proof::Served => "a proxy listens in it already",
            Proof::Isolated => "it has no route to anywhere yet",
        };
        tracing::info!(pod = %known.name, uid = %pod.uid, "captured; {proof}");
        Ok(())
    }

    /// A pod that is captured, and of which something may have changed; says whether it has.
    async fn refresh(&self, known: &mut Known, pod: &PodFacts) -> Result<bool, EnrolError> {
        let mut changed = false;
        if known.ips != pod.ips {
            self.let_probes_through(&pod.uid, &known.ips, &pod.ips)
                .await?;
            known.ips.clone_from(&pod.ips);
            changed = true;
        }
        let config = with_wishes(&self.settings.capture, &pod.annotations, &known.name);
        if config != known.config
            && let Some(netns) = known.netns.clone()
        {
            let wished = config.clone();
            blocking(move || cni::capture(netns.as_fd(), &wished)).await??;
            known.config = config;
            changed = true;
            tracing::info!(pod = %known.name, "captured anew as its annotations now say");
        }
        if pod.redirection() != Some(ENABLED) {
            self.annotate(pod, json!(ENABLED)).await?;
            changed = true;
        }
        Ok(changed)
    }

    /// Undoes everything. `running` is the pod if it still exists; one that has ended takes its rules with it.
    async fn remove(
        &self,
        known: &mut Known,
        uid: &str,
        running: Option<&PodFacts>,
    ) -> Result<(), EnrolError> {
        let running_ips = running.map(|pod| pod.ips.clone()).unwrap_or_default();
        let ips: Vec<_> = known.ips.union(&running_ips).copied().collect();
        let (host, owner) = (self.host.clone(), uid.to_string());
        blocking(move || {
            ips.iter().try_for_each(|ip| {
                if !host.remove(*ip, &owner)? {
                    tracing::debug!(%ip, "is another pod's by now, and left to it");
                }
                Ok::<_, HostError>(())
            })
        })
        .await??;
        if let Some(pod) = running.filter(|pod| !pod.terminal) {
            known.name = pod.full_name();
            match self.namespace(known, uid, &pod.ips, None).await {
                Ok(netns) => blocking(move || cni::remove(netns.as_fd())).await??,
                Err(error) => tracing::warn!(pod = %known.name, "its rules stay: {error}"),
            }
        }
        self.zds.remove(uid).await?;
        if let Some(pod) = running
            && pod.redirection().is_some()
        {
            match self.annotate(pod, Value::Null).await {
                Err(error) if pod.terminal => tracing::debug!("{}: {error}", known.name),
                result => result?,
            }
        }
        self.journal.forget(uid).map_err(EnrolError::Journal)?;
        tracing::info!(pod = %known.name, uid, "let go");
        self.known().remove(uid);
        Ok(())
    }

    /// A pod's network namespace: the one given, the one at hand, the one it had before this agent began, or that
    /// of one of its processes.
    async fn namespace(
        &self,
        known: &Known,
        uid: &str,
        ips: &BTreeSet<IpAddr>,
        given: Option<Given>,
    ) -> Result<Arc<OwnedFd>, EnrolError> {
        if let Some(given) = given {
            let path = self.settings.on_host(&given.netns);
            let netns = netns::open(&path).map_err(|error| EnrolError::Open {
                path: path.clone(),
                error,
            })?;
            if self.is_foreign(&netns) {
                return Err(EnrolError::HostNamespace(path));
            }
            for journal in [&self.journal, &self.places] {
                journal.note(uid, &path).map_err(EnrolError::Journal)?;
            }
            return Ok(Arc::new(netns.into()));
        }
        if let Some(netns) = &known.netns {
            return Ok(netns.clone());
        }
        let ips: Vec<_> = ips.iter().copied().collect();
        if let Some(netns) = self.place(uid, &ips)? {
            return Ok(Arc::new(netns.into()));
        }
        let wanted = vec![Wanted {
            uid: uid.to_string(),
            ips,
        }];
        let (proc, foreign) = (self.settings.proc.clone(), self.foreign.clone());
        let found = blocking(move || scan::scan(&proc, &wanted, &foreign)).await?;
        let found = found.map_err(|error| EnrolError::Open {
            path: self.settings.proc.clone(),
            error,
        })?;
        let (_, found) = found.into_iter().next().ok_or(EnrolError::NoNamespace)?;
        let noted = self.journal.note(uid, &found.path);
        noted.map_err(EnrolError::Journal)?;
        Ok(Arc::new(found.netns.into()))
    }

    /// The namespace that was noted, if it is still the pod's; it counts as changed from now on.
    pub(super) fn place(&self, uid: &str, ips: &[IpAddr]) -> Result<Option<File>, EnrolError> {
        for journal in [&self.journal, &self.places] {
            let Some(path) = journal.place(uid) else {
                continue;
            };
            let Ok(netns) = netns::open(&path) else {
                continue;
            };
            let own = scan::holds_any(&netns, ips).unwrap_or(false);
            if own && !self.is_foreign(&netns) {
                self.journal.note(uid, &path).map_err(EnrolError::Journal)?;
                return Ok(Some(netns));
            }
        }
        Ok(None)
    }

    fn is_foreign(&self, netns: &File) -> bool {
        netns::id(netns).is_ok_and(|id| self.foreign.contains(&id))
    }

    async fn let_probes_through(
        &self,
        uid: &str,
        before: &BTreeSet<IpAddr>,
        ips: &BTreeSet<IpAddr>,
    ) -> Result<(), EnrolError> {
        let old: Vec<_> = before.difference(ips).copied().collect();
        let all: Vec<_> = ips.iter().copied().collect();
        let (host, uid) = (self.host.clone(), uid.to_string());
        blocking(move || {
            for ip in all {
                host.add(ip, &uid)?;
            }
            for ip in old {
                host.remove(ip, &uid)?;
            }
            Ok::<_, HostError>(())
        })
        .await??;
        Ok(())
    }

    /// Writes a pod's status annotation; a pod that is gone needs none.
    async fn annotate(&self, pod: &PodFacts, value: Value) -> Result<(), EnrolError> {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &pod.namespace);
        // The UID makes sure that a pod of the same name is not taken for this one.
        let patch = json!({"metadata": {"uid": pod.uid, "annotations": {REDIRECTION: value}}});
        let written = pods
            .patch_status(&pod.name, &PatchParams::default(), &Patch::Merge(patch))
            .await;
        match written {
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
            Err(error) => Err(EnrolError::Status(Box::new(error))),
            Ok(_) => Ok(()),
        }
    }

    /// Waits until nobody else works on a pod.
    pub(super) async fn lock(&self, uid: &str) -> OwnedMutexGuard<Known> {
        loop {
            let entry = self.known().entry(uid.to_string()).or_default().clone();
            let guard = entry.clone().lock_owned().await;
            // Whoever held the lock before may have let go of the pod.
            let current = self.known().get(uid).cloned();
            if current.is_some_and(|current| Arc::ptr_eq(&current, &entry)) {
                return guard;
            }
        }
    }

    fn knows(&self, uid: &str) -> bool {
        self.known().contains_key(uid)
    }

    pub(super) fn known(&self) -> MutexGuard<'_, HashMap<String, Entry>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Runs what may wait for the kernel or for a program.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, EnrolError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|_| EnrolError::Aborted)
}
