//! The pods of the node, each served by every worker.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cni::zds::WorkloadInfo;
use serde_json::{Value, json};

use super::budget::{Budget, Limits};
use super::pod::{PodSpec, Shared};
use super::worker::Worker;
use crate::admin::ready::{Ready, Task};
use crate::config::{Config, WorkloadName};
use crate::node::zds::PodHandler;
use crate::node::{PodNetns, sockets};
use crate::telemetry::Telemetry;

/// Serves the pods that the node agent names.
pub struct Pods {
    shared: Shared,
    workers: Vec<Worker>,
    served: Mutex<BTreeMap<String, Arc<PodSpec>>>,
    ready: Ready,
    waiting: Mutex<Option<Task>>,
}

const READY_TASK: &str = "workload proxy manager";

impl Pods {
    /// No pods yet, and not ready until the agent has named them all.
    pub fn new(shared: Shared, workers: Vec<Worker>, ready: Ready) -> Self {
        let waiting = Mutex::new(Some(ready.register(READY_TASK)));
        Self {
            shared,
            workers,
            served: Mutex::default(),
            ready,
            waiting,
        }
    }

    /// Lets every pod's flows end within the deadline, then cuts them.
    pub async fn stop(&self, deadline: Duration) {
        futures_util::future::join_all(self.workers.iter().map(|worker| worker.stop(deadline)))
            .await;
        self.served().clear();
    }

    /// Brings the byte metrics of open flows up to date.
    pub async fn settle(&self) {
        let settled = self
            .workers
            .iter()
            .map(|worker| worker.ask(|_| crate::telemetry::settle()));
        let _ = tokio::time::timeout(
            Duration::from_millis(500),
            futures_util::future::join_all(settled),
        )
        .await;
        let budget = &self.shared.budget;
        for (name, help, value) in [
            (
                "warren_flows",
                "The number of open connections and streams (unstable)",
                budget.flows() as u64,
            ),
            (
                "warren_flow_budget",
                "The number of connections and streams that may be open (unstable)",
                budget.limits().flows as u64,
            ),
            (
                "warren_waiting_bytes",
                "The number of bytes that wait for slow readers (unstable)",
                budget.ledger().waiting(),
            ),
            (
                "warren_memory_budget_bytes",
                "The number of bytes that may wait for slow readers (unstable)",
                budget.limits().waiting,
            ),
        ] {
            let value = i64::try_from(value).unwrap_or(i64::MAX);
            self.telemetry().set(name, help, value);
        }
    }

    /// The pods with their open connections, for the configuration dump.
    pub async fn dump(&self) -> Value {
        let mut state = serde_json::Map::new();
        for (uid, spec) in self.served().iter() {
            let info = json!({
                "name": spec.name, "namespace": spec.namespace, "serviceAccount": spec.service_account,
            });
            let connections = json!({ "inbound": [], "outbound": [] });
            state.insert(
                uid.clone(),
                json!({
                    "state": "Up", "info": info, "connections": connections,
                    "flows": spec.budget.flows(), "waitingBytes": spec.budget.ledger().waiting(),
                }),
            );
        }
        let answers = self
            .workers
            .iter()
            .map(|worker| worker.ask(|pods| pods.connections()));
        let limit = Duration::from_secs(2);
        let answers = tokio::time::timeout(limit, futures_util::future::join_all(answers))
            .await
            .unwrap_or_default();
        for (uid, direction, connection) in answers.into_iter().flatten().flatten() {
            if let Some(list) = state
                .get_mut(&uid)
                .and_then(|pod| pod["connections"][direction].as_array_mut())
            {
                list.push(connection);
            }
        }
        Value::Object(state)
    }

    fn served(&self) -> MutexGuard<'_, BTreeMap<String, Arc<PodSpec>>> {
        self.served.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn telemetry(&self) -> &Telemetry {
        &self.shared.telemetry
    }

    fn count(&self) {
        let active = self.served().len() as i64;
        let help = "The total number current workloads with active proxies (unstable)";
        self.telemetry()
            .set("workload_manager_active_proxy_count", help, active);
    }

    /// Serves one workload in the process's own network namespace, for as long as the process runs.
    ///
    /// # Errors
    /// Why its listeners cannot be opened.
    pub async fn serve_here(&self, name: &WorkloadName) -> Result<(), String> {
        let listen = |netns: &PodNetns| sockets::listen(netns, &self.shared.config);
        let config = self.shared.config.clone();
        self.serve_in_own(name, config, listen).await
    }

    /// Serves HBONE for the proxy's own workload, which is not captured: its metrics are reached so.
    ///
    /// # Errors
    /// Why its listeners cannot be opened.
    pub async fn serve_own(&self, name: &WorkloadName) -> Result<(), String> {
        let config = Arc::new(Config {
            packet_mark: None,
            original_source: Some(false),
            ..Config::clone(&self.shared.config)
        });
        let listeners = config.clone();
        let listen = move |_: &PodNetns| sockets::listen_for_own(&listeners);
        self.serve_in_own(name, config, listen).await
    }

    async fn serve_in_own(
        &self,
        name: &WorkloadName,
        config: Arc<Config>,
        listen: impl FnOnce(&PodNetns) -> std::io::Result<Vec<sockets::Listeners>>,
    ) -> Result<(), String> {
        let told = |error: std::io::Error| error.to_string();
        let netns = Arc::new(PodNetns::current().map_err(told)?);
        let listeners = listen(&netns).map_err(told)?;
        let spec = Arc::new(PodSpec {
            uid: format!("own/{}/{}", name.namespace, name.name),
            name: name.name.clone(),
            namespace: name.namespace.clone(),
            service_account: name.service_account.clone(),
            netns,
            config,
            budget: self.budget(),
            transparent: listeners.iter().all(|listeners| listeners.transparent),
        });
        self.start(&spec, listeners).await?;
        tracing::info!(
            namespace = name.namespace,
            name = name.name,
            "serving the workload of this process"
        );
        Ok(())
    }

    /// A pod's part of the node's budget: half of it, unless told otherwise.
    fn budget(&self) -> Arc<Budget> {
        let (config, node) = (&self.shared.config, &self.shared.budget);
        let limits = Limits {
            flows: config.flow_budgets[1].unwrap_or(node.limits().flows.div_ceil(2)),
            waiting: config.memory_budgets[1].unwrap_or(node.limits().waiting / 2),
        };
        Budget::of_pod(limits, node)
    }

    async fn start(
        &self,
        spec: &Arc<PodSpec>,
        listeners: Vec<sockets::Listeners>,
    ) -> Result<(), String> {
        for (worker, listeners) in self.workers.iter().zip(listeners) {
            if let Err(error) = worker.add(spec.clone(), listeners).await {
                self.cut(&spec.uid).await;
                return Err(error.to_string());
            }
        }
        Ok(())
    }

    async fn cut(&self, uid: &str) {
        let cut = self
            .workers
            .iter()
            .map(|worker| worker.remove(uid, Duration::ZERO));
        futures_util::future::join_all(cut).await;
    }

    /// Lets a pod's flows end by themselves for a while, in the background.
    fn drain(&self, uid: &str) {
        let deadline = self.shared.config.termination_deadline;
        let (workers, uid) = (self.workers.clone(), uid.to_string());
        tokio::task::spawn_local(async move {
            let drain = workers.iter().map(|worker| worker.remove(&uid, deadline));
            futures_util::future::join_all(drain).await;
        });
    }
}

impl PodHandler for Pods {
    async fn add(
        &self,
        uid: &str,
        info: &WorkloadInfo,
        netns: Arc<PodNetns>,
    ) -> Result<(), String> {
        let known = self.served().get(uid).map(|spec| spec.netns.id());
        if known == Some(netns.id()) {
            return Ok(());
        }
        if known.is_some() {
            tracing::info!(uid, name = info.name, "pod has a new network namespace");
            self.remove(uid).await;
        }
        if !sockets::is_netns(&*netns) {
            return Err("the descriptor is not of a network namespace".to_string());
        }
        tracing::info!(
            uid,
            name = info.name,
            namespace = info.namespace,
            "pod received, starting proxy"
        );
        let listeners =
            sockets::listen(&netns, &self.shared.config).map_err(|error| error.to_string())?;
        let spec = Arc::new(PodSpec {
            uid: uid.to_string(),
            name: info.name.clone(),
            namespace: info.namespace.clone(),
            service_account: info.service_account.clone(),
            netns,
            config: self.shared.config.clone(),
            budget: self.budget(),
            transparent: listeners.iter().all(|listeners| listeners.transparent),
        });
        self.start(&spec, listeners).await?;
        self.served().insert(uid.to_string(), spec);
        self.telemetry().add(
            "workload_manager_proxies_started",
            "The total number of proxies that were started (unstable)",
            &[],
            1,
        );
        self.count();
        Ok(())
    }

    async fn remove(&self, uid: &str) {
        let Some(spec) = self.served().remove(uid) else {
            return;
        };
        tracing::info!(
            uid,
            name = spec.name,
            namespace = spec.namespace,
            "pod delete request, shutting down proxy"
        );
        // A pod that goes on living was only taken out of the mesh; its flows need not break for that.
        match sockets::is_connected(&spec.netns) {
            true => self.drain(uid),
            false => self.cut(uid).await,
        }
        self.telemetry().add(
            "workload_manager_proxies_stopped",
            "The total number of proxies that were stopped (unstable)",
            &[],
            1,
        );
        self.count();
    }

    fn served(&self) -> Vec<String> {
        Pods::served(self).keys().cloned().collect()
    }

    fn ready(&self, ready: bool) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if ready {
            waiting.take();
        } else if waiting.is_none() {
            *waiting = Some(self.ready.register(READY_TASK));
        }
    }

    fn pending(&self, count: usize) {
        let help = "The total number of pending workloads (unstable)";
        self.telemetry()
            .set("workload_manager_pending_proxy_count", help, count as i64);
    }
}
