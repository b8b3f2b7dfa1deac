//! The state of a running lab: the applied objects, and the pods, services and rules that follow from them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::addresses::PodNumbers;
use super::family::{Addresses, IpFamily};
use super::live::{self, LiveObjects};
use super::manifest::{Key, Object};
use super::plan::{self, PodPlan};
use super::pod::Pod;
use super::process::{ProcessSpec, Supervised};
use super::runtime::CniFolders;
use super::service_rules::{self, ServicePort};
use super::state::StateDir;
use super::topology::Node;
use super::wire::Capture;
use super::{dns::Zone, services};

/// How long processes may take to end.
const GRACE: Duration = Duration::from_secs(2);
/// How long a node's agent may take for a running pod that joins or leaves the mesh.
const AGENT_PATIENCE: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_millis(10);
/// How many pods are added to the network at the same time.
const AT_ONCE: usize = 8;

/// Namespace and name.
pub type PodKey = (String, String);

/// A node with what runs on it.
pub struct Machine {
    pub node: Node,
    pub cni: CniFolders,
    pub agent: Supervised,
    pub proxy: Supervised,
}

/// The lab.
pub struct Cluster {
    pub machines: Vec<Machine>,
    pub control: Supervised,
    pub pods: BTreeMap<PodKey, Pod>,
    /// In the order in which they were applied.
    pub objects: Vec<Object>,
    /// By `namespace/name`.
    pub addresses: BTreeMap<String, Addresses>,
    pub families: IpFamily,
    dir: StateDir,
    live: LiveObjects,
    zone: Zone,
    pod_numbers: PodNumbers,
    rules: Vec<ServicePort>,
    /// The environment that every process of a pod starts from.
    base: Vec<(String, String)>,
    myself: Weak<Mutex<Self>>,
}

/// What a cluster is made of.
pub struct Parts {
    pub families: IpFamily,
    pub dir: StateDir,
    pub live: LiveObjects,
    pub zone: Zone,
    pub machines: Vec<Machine>,
    pub control: Supervised,
    pub base: Vec<(String, String)>,
}

/// The lab, for one at a time.
pub fn lock(cluster: &Mutex<Cluster>) -> MutexGuard<'_, Cluster> {
    cluster.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Cluster {
    /// A lab without objects.
    pub fn new(parts: Parts) -> Arc<Mutex<Self>> {
        Arc::new_cyclic(|myself| {
            Mutex::new(Self {
                machines: parts.machines,
                control: parts.control,
                pods: BTreeMap::new(),
                objects: Vec::new(),
                addresses: BTreeMap::new(),
                families: parts.families,
                dir: parts.dir,
                live: parts.live,
                zone: parts.zone,
                pod_numbers: PodNumbers::default(),
                rules: Vec::new(),
                base: parts.base,
                myself: Weak::clone(myself),
            })
        })
    }

    /// Merges objects into those that are there, by kind, namespace and name.
    ///
    /// # Errors
    /// What cannot run here; then nothing has changed.
    pub fn apply(&mut self, objects: Vec<Object>) -> Result<Vec<String>, String> {
        let mut all = self.objects.clone();
        let mut report = Vec::new();
        for object in objects {
            let found = all.iter_mut().find(|known| known.key == object.key);
            let word = match found {
                Some(known) if known.value == object.value => "unchanged",
                Some(known) => {
                    known.value = object.value.clone();
                    "configured"
                }
                None => {
                    all.push(object.clone());
                    "created"
                }
            };
            report.push(format!("{} {word}", object.key));
        }
        self.change_to(all)?;
        Ok(report)
    }

    /// Removes objects.
    ///
    /// # Errors
    /// What cannot run any more; then nothing has changed.
    pub fn delete(&mut self, keys: &[Key]) -> Result<Vec<String>, String> {
        let known = |key: &Key| self.objects.iter().any(|o| o.key == *key);
        let report = keys
            .iter()
            .map(|key| format!("{key} {}", if known(key) { "deleted" } else { "not found" }))
            .collect();
        let mut left = self.objects.clone();
        left.retain(|object| !keys.contains(&object.key));
        self.change_to(left)?;
        Ok(report)
    }

    fn change_to(&mut self, objects: Vec<Object>) -> Result<(), String> {
        let plans = plan::pods(objects.iter()).map_err(|e| e.to_string())?;
        if let Some(plan) = plans.iter().find(|p| self.node_of(p).is_none()) {
            let node = plan.node.as_deref().unwrap_or_default();
            return Err(format!("{}: there is no node {node}", plan.key()));
        }
        let addresses = services::addresses(self.families, &objects).map_err(|e| e.to_string())?;
        let before = std::mem::replace(&mut self.objects, objects);
        self.addresses = addresses;
        self.write_objects(&before).map_err(|e| e.to_string())?;
        self.change_pods(plans)?;
        self.refresh_services();
        Ok(())
    }

    /// Brings the live folder in line, but for pods.
    fn write_objects(&self, before: &[Object]) -> std::io::Result<()> {
        for object in &self.objects {
            match object.key.kind.as_str() {
                "Pod" => {}
                "Service" => {
                    let wish = services::wish(object);
                    let families = wish.families(self.families).unwrap_or_default();
                    let addresses = self.addresses.get(&wish.service);
                    let service = live::service(object, addresses, &families);
                    self.live.write(&object.key, &service)?;
                }
                _ if before.contains(object) => {}
                _ => self.live.write(&object.key, &object.value)?,
            }
        }
        for gone in before {
            if gone.key.kind != "Pod" && !self.objects.iter().any(|o| o.key == gone.key) {
                self.live.remove(&gone.key)?;
            }
        }
        Ok(())
    }

    fn change_pods(&mut self, plans: Vec<PodPlan>) -> Result<(), String> {
        let wanted: BTreeMap<PodKey, &PodPlan> = plans
            .iter()
            .map(|p| ((p.namespace.clone(), p.name.clone()), p))
            .collect();
        let restarted = |pod: &Pod, plan: &PodPlan| {
            pod.plan.containers != plan.containers
                || pod.plan.service_account != plan.service_account
        };
        let gone: Vec<PodKey> = self
            .pods
            .iter()
            .filter(|(key, pod)| wanted.get(*key).is_none_or(|plan| restarted(pod, plan)))
            .map(|(key, _)| key.clone())
            .collect();
        self.stop_pods(&gone);
        for plan in &plans {
            self.live.kube.ensure_namespace(&plan.namespace);
        }
        let mut fresh = Vec::new();
        for plan in plans {
            let key = (plan.namespace.clone(), plan.name.clone());
            match self.pods.get_mut(&key) {
                Some(pod) if pod.plan == plan => {}
                Some(pod) => {
                    pod.plan = plan;
                    self.write_pod(&key);
                    self.settle_capture(&key);
                }
                None => {
                    self.create_pod(plan)
                        .map_err(|reason| format!("pod {}/{}: {reason}", key.0, key.1))?;
                    fresh.push(key);
                }
            }
        }
        self.start_pods(&fresh);
        Ok(())
    }

    /// The node a pod asks for, or the one with the fewest pods.
    fn node_of(&self, plan: &PodPlan) -> Option<usize> {
        match &plan.node {
            Some(name) => self.machines.iter().position(|m| m.node.name == *name),
            None => (0..self.machines.len())
                .min_by_key(|index| self.pods.values().filter(|p| p.node == *index).count()),
        }
    }

    /// Makes a pod's namespaces; nothing runs in them yet.
    fn create_pod(&mut self, plan: PodPlan) -> Result<(), String> {
        let key = (plan.namespace.clone(), plan.name.clone());
        let index = self.node_of(&plan).ok_or("no such node")?;
        let number = self.pod_numbers.take(index).map_err(|e| e.to_string())?;
        let folder = self.dir.join(format!("pods/{}/{}", key.0, key.1));
        let created = Pod::create(plan, &self.machines[index].node, number, &folder);
        let pod = created.map_err(|e| e.to_string())?;
        self.pods.insert(key.clone(), pod);
        self.write_pod(&key);
        Ok(())
    }

    /// Adds pods to the network and starts what runs in them, as a kubelet does: what the network refuses does not run.
    fn start_pods(&mut self, keys: &[PodKey]) {
        for some in keys.chunks(AT_ONCE) {
            let this = &*self;
            let added: Vec<_> = std::thread::scope(|scope| {
                let add = |key| scope.spawn(move || this.add_to_network(key));
                let adding: Vec<_> = some.iter().map(add).collect();
                let added = adding.into_iter().map(|thread| thread.join());
                added
                    .map(|added| added.unwrap_or_else(|_| Err("it panicked".to_owned())))
                    .collect()
            });
            for (key, added) in some.iter().zip(added) {
                let Some(pod) = self.pods.get_mut(key) else {
                    continue;
                };
                pod.connected = added.is_ok();
                if let Err(reason) = added.and_then(|()| self.run_pod(key))
                    && let Some(pod) = self.pods.get_mut(key)
                {
                    pod.capture = Capture::Failed(reason);
                }
            }
        }
    }

    fn add_to_network(&self, key: &PodKey) -> Result<(), String> {
        let pod = self.pods.get(key).ok_or("no such pod")?;
        let machine = &self.machines[pod.node];
        machine.cni.add(&machine.node, pod)
    }

    fn run_pod(&mut self, key: &PodKey) -> Result<(), String> {
        self.follow_capture(key);
        let object = self.live_pod(key).unwrap_or_default();
        let (myself, changed) = (Weak::clone(&self.myself), key.clone());
        let Some(pod) = self.pods.get_mut(key) else {
            return Ok(());
        };
        let notice = move || {
            if let Some(cluster) = myself.upgrade() {
                let mut cluster = lock(&cluster);
                cluster.write_pod(&changed);
                cluster.refresh_services();
            }
        };
        let kubelet = self.machines[pod.node].node.namespaces.clone();
        pod.start(&object, &self.base, kubelet, notice)
            .map_err(|e| e.to_string())
    }

    /// Waits until the node's agent has done to a running pod what its labels ask for.
    fn settle_capture(&mut self, key: &PodKey) {
        let Some(pod) = self.pods.get(key).filter(|pod| pod.connected) else {
            return;
        };
        let (captured, wanted) = (
            || self.live.kube.is_captured(&key.0, &key.1),
            pod.plan.captured,
        );
        let deadline = Instant::now() + AGENT_PATIENCE;
        while captured() != wanted && Instant::now() < deadline {
            std::thread::sleep(LOOK);
        }
        self.follow_capture(key);
    }

    /// Takes over what the node's agent says of a pod; says whether that is news.
    fn follow_capture(&mut self, key: &PodKey) -> bool {
        let Some(pod) = self.pods.get_mut(key) else {
            return false;
        };
        let said = self.live.kube.redirection(&key.0, &key.1);
        let now = match (pod.plan.captured, said.as_deref()) {
            (true, Some("enabled")) => Capture::Captured,
            (false, None) => Capture::Outside,
            (true, _) => Capture::Failed(format!(
                "see warren lab logs agent/{}",
                self.machines[pod.node].node.name
            )),
            (false, Some(_)) => Capture::Failed("its rules are still being taken out".to_owned()),
        };
        let news = pod.capture != now;
        pod.capture = now;
        if news {
            self.write_pod(key);
        }
        news
    }

    /// Takes over what the agents say of all running pods.
    pub fn follow_captures(&mut self) {
        let started = self.pods.iter().filter(|(_, pod)| pod.connected);
        let keys: Vec<PodKey> = started.map(|(key, _)| key.clone()).collect();
        for key in keys {
            self.follow_capture(&key);
        }
    }

    /// Tries again to start the pods that the network refused.
    pub fn retry_pods(&mut self) {
        let waiting = self.pods.iter().filter(|(_, pod)| !pod.connected);
        let keys: Vec<PodKey> = waiting.map(|(key, _)| key.clone()).collect();
        self.start_pods(&keys);
    }

    fn stop_pods(&mut self, keys: &[PodKey]) {
        for pod in keys.iter().filter_map(|key| self.pods.get(key)) {
            pod.ask_to_stop();
        }
        let deadline = Instant::now() + GRACE;
        for key in keys {
            let Some(pod) = self.pods.remove(key) else {
                continue;
            };
            // A failed removal must not keep the rest from going.
            let _ = self.live.remove(&pod.plan.key());
            pod.wait_stopped(deadline);
            let machine = &self.machines[pod.node];
            let _ = machine.cni.remove(&machine.node, &pod);
            let _ = machine.node.remove_pod(pod.number);
            self.pod_numbers.give_back(pod.node, pod.number);
        }
    }

    fn live_pod(&self, key: &PodKey) -> Option<Value> {
        let pod = self.pods.get(key)?;
        let node = &self.machines[pod.node].node;
        let status = live::PodStatus {
            node: &node.name,
            node_addresses: &node.addresses,
            addresses: &pod.addresses,
            connected: pod.connected,
            ready: pod.is_ready(),
            restarts: pod.restarts(),
        };
        Some(live::pod(&pod.plan, &status))
    }

    fn write_pod(&self, key: &PodKey) {
        if let (Some(pod), Some(object)) = (self.pods.get(key), self.live_pod(key))
            && let Err(e) = self.live.write(&pod.plan.key(), &object)
        {
            eprintln!("cannot write {}: {e}", pod.plan.key());
        }
    }

    /// Brings names and node rules in line with the services and their ready pods.
    fn refresh_services(&mut self) {
        self.zone.replace(services::names(self));
        let rules = services::ports(self);
        if rules == self.rules {
            return;
        }
        for machine in &self.machines {
            if let Err(e) = service_rules::apply(&machine.node.namespaces, self.families, &rules) {
                eprintln!("{}: {e}", machine.node.name);
            }
        }
        self.rules = rules;
    }

    /// Starts a command in a pod.
    ///
    /// # Errors
    /// When there is no such pod or command.
    pub fn exec(
        &self,
        key: &PodKey,
        command: Vec<String>,
        streams: [std::process::Stdio; 3],
    ) -> Result<std::process::Child, String> {
        let pod = self.pods.get(key).ok_or("no such pod")?;
        if let (false, Capture::Failed(reason)) = (pod.connected, &pod.capture) {
            return Err(format!("the pod has not started: {reason}"));
        }
        let object = self.live_pod(key).unwrap_or_default();
        pod.exec(command, &object, &self.base, streams)
            .map_err(|e| e.to_string())
    }

    /// Starts a command in a node's namespaces.
    ///
    /// # Errors
    /// When there is no such node or command.
    pub fn exec_on_node(
        &self,
        name: &str,
        command: Vec<String>,
        [stdin, stdout, stderr]: [std::process::Stdio; 3],
    ) -> Result<std::process::Child, String> {
        let named = |machine: &&Machine| machine.node.name == name;
        let machine = self.machines.iter().find(named).ok_or_else(|| {
            let names: Vec<&str> = self.machines.iter().map(|m| m.node.name.as_str()).collect();
            format!("there is no node {name}; there are: {}", names.join(", "))
        })?;
        let spec = ProcessSpec {
            command,
            env: self.base.clone(),
            directory: "/".into(),
            log: machine.node.folder.join("exec.log"),
            namespaces: Some(machine.node.namespaces.clone()),
        };
        spec.spawn(stdin, stdout, stderr).map_err(|e| e.to_string())
    }

    /// Ends every pod, then the agents, the proxies and the control plane.
    pub fn shut_down(&mut self) {
        let keys: Vec<PodKey> = self.pods.keys().cloned().collect();
        self.stop_pods(&keys);
        let rest = self
            .machines
            .iter()
            .flat_map(|m| [&m.agent, &m.proxy])
            .chain([&self.control]);
        rest.clone().for_each(Supervised::ask_to_stop);
        let deadline = Instant::now() + GRACE;
        rest.for_each(|process| process.wait_stopped(deadline));
    }
}
