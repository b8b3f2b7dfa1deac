//! What the agent knows of the cluster: the node's pods and all namespaces, as the watches tell of them.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cni::eligibility::{Candidate, Ineligible, Map, Selectors};
use k8s_openapi::api::core::v1::{Namespace, Pod};
use kube::runtime::watcher::Event;
use thiserror::Error;
use tokio::sync::{mpsc, watch};

/// The annotation that tells the rest of the mesh whether a pod is captured.
pub const REDIRECTION: &str = "ambient.istio.io/redirection";
/// Its value for captured pods.
pub const ENABLED: &str = "enabled";
/// Its value for pods that hold rules, but that no proxy serves yet.
pub const PENDING: &str = "pending";

/// A pod, as far as capturing it goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodFacts {
    pub uid: String,
    pub name: String,
    pub namespace: String,
    pub service_account: String,
    pub labels: Map,
    pub annotations: Map,
    pub host_network: bool,
    pub ips: BTreeSet<IpAddr>,
    /// Whether it has ended, for better or worse.
    pub terminal: bool,
}

impl PodFacts {
    /// What matters of a pod; none if it is not a pod of an API server.
    pub fn of(pod: Pod) -> Option<Self> {
        let (metadata, spec) = (pod.metadata, pod.spec.unwrap_or_default());
        let status = pod.status.unwrap_or_default();
        let listed = status.pod_ips.unwrap_or_default();
        let ips = listed.into_iter().map(|ip| ip.ip).chain(status.pod_ip);
        let phase = status.phase.unwrap_or_default();
        Some(Self {
            uid: metadata.uid?,
            name: metadata.name?,
            namespace: metadata.namespace?,
            service_account: spec.service_account_name.unwrap_or_default(),
            labels: metadata.labels.unwrap_or_default(),
            annotations: metadata.annotations.unwrap_or_default(),
            host_network: spec.host_network.unwrap_or_default(),
            ips: ips.filter_map(|ip| ip.parse().ok()).collect(),
            terminal: matches!(phase.as_str(), "Failed" | "Succeeded"),
        })
    }

    /// `namespace/name`.
    pub fn full_name(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    /// What the status annotation says.
    pub fn redirection(&self) -> Option<&str> {
        self.annotations.get(REDIRECTION).map(String::as_str)
    }
}

/// Why a pod is left alone, or why that cannot be told.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum Outside {
    #[error("{0}")]
    Ineligible(Ineligible),
    #[error("its namespace is excluded")]
    Excluded,
    #[error("it is a pod of the node's proxy")]
    Proxy,
    #[error("its namespace is not known yet")]
    UnknownNamespace,
}

/// Which pods are enrolled.
#[derive(Clone, Debug)]
pub struct Enrolment {
    pub selectors: Selectors,
    pub excluded: Vec<String>,
    pub system_namespace: String,
}

impl Enrolment {
    fn admit(&self, pod: &PodFacts, namespaces: &HashMap<String, Map>) -> Result<(), Outside> {
        if self.excluded.contains(&pod.namespace) {
            return Err(Outside::Excluded);
        }
        let app = pod.labels.get("app").map(String::as_str);
        if pod.namespace == self.system_namespace && app == Some("ztunnel") {
            return Err(Outside::Proxy);
        }
        let candidate = |namespace_labels| Candidate {
            labels: &pod.labels,
            annotations: &pod.annotations,
            host_network: pod.host_network,
            namespace_labels,
        };
        match namespaces.get(&pod.namespace) {
            Some(labels) => {
                let admitted = self.selectors.admit(candidate(labels));
                admitted.map_err(Outside::Ineligible)
            }
            None => Err(Outside::UnknownNamespace),
        }
    }
}

#[derive(Default)]
struct View {
    pods: HashMap<String, Arc<PodFacts>>,
    namespaces: HashMap<String, Map>,
    /// What a list has named so far, while it is being read.
    listed_pods: HashSet<String>,
    listed_namespaces: HashSet<String>,
}

/// The view of the cluster; clones share it.
#[derive(Clone)]
pub struct Cluster {
    view: Arc<Mutex<View>>,
    enrolment: Arc<Enrolment>,
    /// Pods that something has changed for.
    touched: mpsc::UnboundedSender<String>,
    /// Whether pods and namespaces have been listed once.
    listed: Arc<watch::Sender<[bool; 2]>>,
}

impl Cluster {
    /// An empty view; the UIDs of pods that may need something are sent along.
    pub fn new(enrolment: Enrolment, touched: mpsc::UnboundedSender<String>) -> Self {
        Self {
            view: Arc::default(),
            enrolment: Arc::new(enrolment),
            touched,
            listed: Arc::new(watch::Sender::new([false; 2])),
        }
    }

    /// Waits until everything has been listed once.
    pub async fn synced(&self) {
        let mut listed = self.listed.subscribe();
        let _ = listed.wait_for(|listed| *listed == [true; 2]).await;
    }

    /// Whether everything has been listed once.
    pub fn is_synced(&self) -> bool {
        *self.listed.borrow() == [true; 2]
    }

    /// The pod of a UID.
    pub fn pod(&self, uid: &str) -> Option<Arc<PodFacts>> {
        self.view().pods.get(uid).cloned()
    }

    /// All pods of the node.
    pub fn pods(&self) -> Vec<Arc<PodFacts>> {
        self.view().pods.values().cloned().collect()
    }

    /// The pod of a name; the one that has not ended if there are two.
    pub fn pod_named(&self, namespace: &str, name: &str) -> Option<Arc<PodFacts>> {
        let view = self.view();
        let named = |pod: &&Arc<PodFacts>| pod.namespace == namespace && pod.name == name;
        let found = view.pods.values().filter(named);
        found.min_by_key(|pod| pod.terminal).cloned()
    }

    /// Whether a pod is to be captured.
    ///
    /// # Errors
    /// Why not.
    pub fn admit(&self, pod: &PodFacts) -> Result<(), Outside> {
        self.enrolment.admit(pod, &self.view().namespaces)
    }

    fn view(&self) -> MutexGuard<'_, View> {
        self.view.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has a pod looked at.
    pub fn touch(&self, uid: &str) {
        // Nobody listens any more only when the agent ends.
        let _ = self.touched.send(uid.to_string());
    }

    /// Takes in what the watch of pods tells.
    pub fn pod_event(&self, event: Event<Pod>) {
        match event {
            Event::Init => self.view().listed_pods.clear(),
            Event::Apply(pod) => self.apply_pod(pod, false),
            Event::InitApply(pod) => self.apply_pod(pod, true),
            Event::Delete(pod) => {
                let uid = pod.metadata.uid.unwrap_or_default();
                self.view().pods.remove(&uid);
                self.touch(&uid);
            }
            Event::InitDone => {
                let mut view = self.view();
                let listed = std::mem::take(&mut view.listed_pods);
                let gone: Vec<_> = view
                    .pods
                    .extract_if(|uid, _| !listed.contains(uid))
                    .collect();
                drop(view);
                gone.iter().for_each(|(uid, _)| self.touch(uid));
                self.listed.send_modify(|listed| listed[0] = true);
            }
        }
    }

    fn apply_pod(&self, pod: Pod, listing: bool) {
        let Some(facts) = PodFacts::of(pod) else {
            return;
        };
        let uid = facts.uid.clone();
        let mut view = self.view();
        if listing {
            view.listed_pods.insert(uid.clone());
        }
        let facts = Arc::new(facts);
        let before = view.pods.insert(uid.clone(), facts.clone());
        drop(view);
        if before.is_none_or(|before| before != facts) {
            self.touch(&uid);
        }
    }

    /// Takes in what the watch of namespaces tells.
    pub fn namespace_event(&self, event: Event<Namespace>) {
        match event {
            Event::Init => self.view().listed_namespaces.clear(),
            Event::Apply(namespace) => self.apply_namespace(namespace, false),
            Event::InitApply(namespace) => self.apply_namespace(namespace, true),
            // Its pods are told of one by one; until then nothing changes for them.
            Event::Delete(namespace) => {
                let name = namespace.metadata.name.unwrap_or_default();
                self.view().namespaces.remove(&name);
            }
            Event::InitDone => {
                let mut view = self.view();
                let listed = std::mem::take(&mut view.listed_namespaces);
                view.namespaces.retain(|name, _| listed.contains(name));
                drop(view);
                self.listed.send_modify(|listed| listed[1] = true);
            }
        }
    }

    fn apply_namespace(&self, namespace: Namespace, listing: bool) {
        let metadata = namespace.metadata;
        let Some(name) = metadata.name else { return };
        let labels = metadata.labels.unwrap_or_default();
        let mut view = self.view();
        if listing {
            view.listed_namespaces.insert(name.clone());
        }
        let before = view.namespaces.insert(name.clone(), labels.clone());
        if before == Some(labels) {
            return;
        }
        let pods = view.pods.values().filter(|pod| pod.namespace == name);
        let touched: Vec<_> = pods.map(|pod| pod.uid.clone()).collect();
        drop(view);
        touched.iter().for_each(|uid| self.touch(uid));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn enrolment() -> Enrolment {
        Enrolment {
            selectors: Selectors::default(),
            excluded: vec!["kube-system".into()],
            system_namespace: "istio-system".into(),
        }
    }

    fn cluster() -> (Cluster, mpsc::UnboundedReceiver<String>) {
        let (touched, receiver) = mpsc::unbounded_channel();
        (Cluster::new(enrolment(), touched), receiver)
    }

    fn pod(uid: &str, namespace: &str, mode: Option<&str>) -> Pod {
        let mut labels = serde_json::Map::new();
        labels.extend(mode.map(|mode| ("istio.io/dataplane-mode".into(), json!(mode))));
        serde_json::from_value(json!({
            "metadata": {"uid": uid, "name": format!("p-{uid}"), "namespace": namespace, "labels": labels},
            "spec": {"containers": [], "serviceAccountName": "sa"},
            "status": {"podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}]},
        }))
        .unwrap()
    }

    fn namespace(name: &str, mode: &str) -> Namespace {
        let labels = json!({"istio.io/dataplane-mode": mode});
        serde_json::from_value(json!({"metadata": {"name": name, "labels": labels}})).unwrap()
    }

    fn drain(receiver: &mut mpsc::UnboundedReceiver<String>) -> BTreeSet<String> {
        std::iter::from_fn(|| receiver.try_recv().ok()).collect()
    }

    fn set(uids: &[&str]) -> BTreeSet<String> {
        uids.iter().map(|uid| uid.to_string()).collect()
    }

    #[test]
    fn a_pods_addresses_and_end_are_read_from_its_status() {
        let facts = PodFacts::of(pod("1", "a", None)).unwrap();
        assert_eq!(facts.ips.len(), 2);
        assert_eq!(facts.full_name(), "a/p-1");
        assert!(!facts.terminal);
        let mut ended = pod("1", "a", None);
        ended.status.as_mut().unwrap().phase = Some("Succeeded".into());
        assert!(PodFacts::of(ended).unwrap().terminal);
        assert_eq!(PodFacts::of(Pod::default()), None);
    }

    #[test]
    fn changes_touch_the_pods_they_concern_and_repetitions_none() {
        let (cluster, mut touched) = cluster();
        cluster.pod_event(Event::Apply(pod("1", "a", None)));
        cluster.pod_event(Event::Apply(pod("2", "b", None)));
        assert_eq!(drain(&mut touched), set(&["1", "2"]));
        cluster.pod_event(Event::Apply(pod("1", "a", None)));
        assert_eq!(drain(&mut touched), set(&[]));
        cluster.namespace_event(Event::Apply(namespace("a", "ambient")));
        assert_eq!(drain(&mut touched), set(&["1"]));
        cluster.namespace_event(Event::Apply(namespace("a", "ambient")));
        assert_eq!(drain(&mut touched), set(&[]));
        cluster.pod_event(Event::Delete(pod("2", "b", None)));
        assert_eq!(drain(&mut touched), set(&["2"]));
        assert!(cluster.pod("2").is_none());
    }

    #[test]
    fn what_a_new_list_leaves_out_is_gone() {
        let (cluster, mut touched) = cluster();
        assert!(!cluster.is_synced());
        for uids in [&["1", "2"][..], &["2"]] {
            cluster.pod_event(Event::Init);
            for uid in uids {
                cluster.pod_event(Event::InitApply(pod(uid, "a", None)));
            }
            cluster.pod_event(Event::InitDone);
        }
        assert_eq!(drain(&mut touched), set(&["1", "2"]));
        assert!(cluster.pod("1").is_none() && cluster.pod("2").is_some());
        cluster.namespace_event(Event::Init);
        cluster.namespace_event(Event::InitDone);
        assert!(cluster.is_synced());
    }

    #[test]
    fn excluded_namespaces_and_the_proxy_are_never_enrolled() {
        let (cluster, _touched) = cluster();
        let facts = |pod| PodFacts::of(pod).unwrap();
        let ambient = Some("ambient");
        for name in ["a", "kube-system", "istio-system"] {
            cluster.namespace_event(Event::Apply(namespace(name, "ambient")));
        }
        assert_eq!(cluster.admit(&facts(pod("1", "a", None))), Ok(()));
        let excluded = cluster.admit(&facts(pod("1", "kube-system", ambient)));
        assert_eq!(excluded, Err(Outside::Excluded));
        let mut proxy = pod("1", "istio-system", ambient);
        let labels = proxy.metadata.labels.get_or_insert_default();
        labels.insert("app".into(), "ztunnel".into());
        assert_eq!(cluster.admit(&facts(proxy)), Err(Outside::Proxy));
        let unknown = cluster.admit(&facts(pod("1", "new", ambient)));
        assert_eq!(unknown, Err(Outside::UnknownNamespace));
    }
}
