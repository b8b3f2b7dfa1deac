//! The state of a running lab: the applied objects, and the pods, services and rules that follow from them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::addresses::PodNumbers;
use super::agent::Agent;
use super::family::{Addresses, IpFamily};
use super::live::{self, LiveFolder};
use super::manifest::{Key, Object};
use super::plan::{self, PodPlan};
use super::pod::Pod;
use super::process::{ProcessSpec, Supervised};
use super::service_rules::{self, ServicePort};
use super::state::StateDir;
use super::topology::Node;
use super::wire::Capture;
use super::{dns::Zone, services};

/// How long processes may take to end.
const GRACE: Duration = Duration::from_secs(2);

/// Namespace and name.
pub type PodKey = (String, String);

/// A node with what runs on it.
pub struct Machine {
    pub node: Node,
    pub agent: Agent,
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
    live: LiveFolder,
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
    pub live: LiveFolder,
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
        for plan in plans {
            let key = (plan.namespace.clone(), plan.name.clone());
            match self.pods.get_mut(&key) {
                Some(pod) if pod.plan == plan => {}
                Some(pod) => {
                    pod.plan = plan;
                    self.settle_capture(&key);
                    self.write_pod(&key);
                }
                None => self
                    .start_pod(plan)
                    .map_err(|reason| format!("pod {}/{}: {reason}", key.0, key.1))?,
            }
        }
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

    fn start_pod(&mut self, plan: PodPlan) -> Result<(), String> {
        let key = (plan.namespace.clone(), plan.name.clone());
        let index = self.node_of(&plan).ok_or("no such node")?;
        let number = self.pod_numbers.take(index).map_err(|e| e.to_string())?;
        let folder = self.dir.join(format!("pods/{}/{}", key.0, key.1));
        let created = Pod::create(plan, &self.machines[index].node, number, &folder);
        let pod = created.map_err(|e| e.to_string())?;
        self.pods.insert(key.clone(), pod);
        // The control plane has to know the pod before the node may ask for its certificate.
        self.write_pod(&key);
        self.settle_capture(&key);
        self.write_pod(&key);
        let object = self.live_pod(&key).unwrap_or_default();
        let (myself, changed) = (Weak::clone(&self.myself), key.clone());
        let Some(pod) = self.pods.get_mut(&key) else {
            return Ok(());
        };
        let notice = move || {
            if let Some(cluster) = myself.upgrade() {
                let mut cluster = lock(&cluster);
                cluster.write_pod(&changed);
                cluster.refresh_services();
            }
        };
        pod.start(&object, &self.base, notice)
            .map_err(|e| e.to_string())
    }

    /// Captures or releases a pod as its plan says.
    fn settle_capture(&mut self, key: &PodKey) {
        let Some(pod) = self.pods.get_mut(key) else {
            return;
        };
        let agent = &self.machines[pod.node].agent;
        let is_captured = pod.capture != Capture::Outside;
        match (pod.plan.captured, is_captured) {
            (true, false) => pod.capture = agent.enroll(pod),
            (false, true) => {
                pod.capture = match agent.release(pod, true) {
                    Ok(()) => Capture::Outside,
                    Err(reason) => Capture::Failed(reason),
                }
            }
            _ => {}
        }
    }

    /// Tries again to capture the pods that could not be captured.
    pub fn retry_captures(&mut self) {
        let failed: Vec<PodKey> = self
            .pods
            .iter()
            .filter(|(_, pod)| matches!(pod.capture, Capture::Failed(_)))
            .map(|(key, _)| key.clone())
            .collect();
        for key in failed {
            if let Some(pod) = self.pods.get_mut(&key) {
                pod.capture = Capture::Outside;
            }
            self.settle_capture(&key);
            self.write_pod(&key);
        }
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
            if pod.capture != Capture::Outside {
                let _ = machine.agent.release(&pod, false);
            }
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
            ready: pod.is_ready(),
            enrolled: pod.capture == Capture::Captured,
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

    /// Ends every pod, then the proxies and the control plane.
    pub fn shut_down(&mut self) {
        let keys: Vec<PodKey> = self.pods.keys().cloned().collect();
        self.stop_pods(&keys);
        let rest = self
            .machines
            .iter()
            .map(|m| &m.proxy)
            .chain([&self.control]);
        rest.clone().for_each(Supervised::ask_to_stop);
        let deadline = Instant::now() + GRACE;
        rest.for_each(|process| process.wait_stopped(deadline));
    }
}
