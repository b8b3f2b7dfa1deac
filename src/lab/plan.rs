//! Which pods should run: a pure function from the applied objects.

use std::collections::BTreeMap;

use cni::eligibility::{Candidate, MODE_LABEL, Map, Selectors};
use serde_json::{Value, json};
use thiserror::Error;

use super::container::{Container, ContainerError};
use super::manifest::{Key, Object};
use super::names;

/// Kinds that would start pods in a cluster, but not here.
const UNSUPPORTED_KINDS: [&str; 6] = [
    "StatefulSet",
    "DaemonSet",
    "ReplicaSet",
    "Job",
    "CronJob",
    "ReplicationController",
];
/// More pods than this of one deployment are a typing error.
const MOST_REPLICAS: u64 = 250;

/// Why an object cannot run in the lab.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum PlanError {
    #[error("{0}: the lab starts Pods and Deployments only")]
    Unsupported(Key),
    #[error("{0}: {1} is not a usable number of replicas (at most {MOST_REPLICAS})")]
    Replicas(Key, String),
    #[error("{0}: no spec.template")]
    NoTemplate(Key),
    #[error("{0}: hostNetwork pods do not run in the lab")]
    HostNetwork(Key),
    #[error("{0}: {1}")]
    Container(Key, ContainerError),
}

/// A pod that should run.
#[derive(Clone, Debug, PartialEq)]
pub struct PodPlan {
    pub namespace: String,
    pub name: String,
    pub uid: String,
    pub service_account: String,
    pub containers: Vec<Container>,
    /// Whether its traffic is to be captured.
    pub captured: bool,
    /// The node it asks for.
    pub node: Option<String>,
    /// The object without `status` and `spec.nodeName`.
    pub object: Value,
}

impl PodPlan {
    pub fn key(&self) -> Key {
        Key::new("Pod", &self.namespace, &self.name)
    }
}

/// Every pod that `objects` ask for, in the order in which they were given.
///
/// # Errors
/// The first object that cannot run here.
pub fn pods<'a>(
    objects: impl Iterator<Item = &'a Object> + Clone,
) -> Result<Vec<PodPlan>, PlanError> {
    let modes: BTreeMap<&str, &str> = objects
        .clone()
        .filter(|o| o.key.kind == "Namespace")
        .filter_map(|o| Some((o.key.name.as_str(), o.label(MODE_LABEL)?)))
        .collect();
    let mut pods = Vec::new();
    for object in objects {
        match object.key.kind.as_str() {
            "Pod" => pods.push(pod(&object.key, object.value.clone(), &modes)?),
            "Deployment" => deployment(object, &modes, &mut pods)?,
            kind if UNSUPPORTED_KINDS.contains(&kind) => {
                return Err(PlanError::Unsupported(object.key.clone()));
            }
            _ => {}
        }
    }
    Ok(pods)
}

fn deployment(
    deployment: &Object,
    modes: &BTreeMap<&str, &str>,
    pods: &mut Vec<PodPlan>,
) -> Result<(), PlanError> {
    let key = &deployment.key;
    let spec = &deployment.value["spec"];
    let replicas = match &spec["replicas"] {
        Value::Null => 1,
        value => value
            .as_u64()
            .filter(|n| *n <= MOST_REPLICAS)
            .ok_or_else(|| PlanError::Replicas(key.clone(), value.to_string()))?,
    };
    let template = spec
        .get("template")
        .ok_or_else(|| PlanError::NoTemplate(key.clone()))?;
    let hash = names::template_hash(template);
    let replica_set = format!("{}-{hash}", key.name);
    for number in 0..replicas {
        let name = format!("{replica_set}-{}", names::pod_suffix(&replica_set, number));
        let mut object = json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": template.get("metadata").cloned().unwrap_or_else(|| json!({})),
            "spec": template.get("spec").cloned().unwrap_or_else(|| json!({})),
        });
        let metadata = &mut object["metadata"];
        metadata["name"] = name.into();
        metadata["generateName"] = format!("{replica_set}-").into();
        metadata["namespace"] = key.namespace.clone().into();
        metadata["labels"]["pod-template-hash"] = hash.clone().into();
        metadata["ownerReferences"] = json!([{
            "apiVersion": "apps/v1", "kind": "ReplicaSet", "name": replica_set,
            "uid": names::uid("ReplicaSet", &key.namespace, &replica_set),
            "controller": true, "blockOwnerDeletion": true,
        }]);
        pods.push(pod(key, object, modes)?);
    }
    Ok(())
}

/// `source` is the object to blame for what is wrong.
fn pod(
    source: &Key,
    mut object: Value,
    modes: &BTreeMap<&str, &str>,
) -> Result<PodPlan, PlanError> {
    let text = |pointer: &str| object.pointer(pointer).and_then(Value::as_str);
    let namespace = source.namespace.clone();
    let name = text("/metadata/name").unwrap_or(&source.name).to_owned();
    let service_account = text("/spec/serviceAccountName")
        .filter(|sa| !sa.is_empty())
        .unwrap_or("default")
        .to_owned();
    let node = text("/spec/nodeName").map(str::to_owned);
    if object.pointer("/spec/hostNetwork") == Some(&Value::Bool(true)) {
        return Err(PlanError::HostNetwork(source.clone()));
    }
    let containers = Container::all(&object["spec"])
        .map_err(|reason| PlanError::Container(source.clone(), reason))?;
    let captured = captured(&object, modes.get(namespace.as_str()).copied());
    let uid =
        text("/metadata/uid").map_or_else(|| names::uid("Pod", &namespace, &name), str::to_owned);
    object["metadata"]["uid"] = uid.clone().into();
    object["spec"]["serviceAccountName"] = service_account.clone().into();
    if let Some(parts) = object.as_object_mut() {
        parts.remove("status");
    }
    Ok(PodPlan {
        namespace,
        name,
        uid,
        service_account,
        containers,
        captured,
        node,
        object,
    })
}

/// Whether a pod is enrolled, by the rule of the node agent.
fn captured(pod: &Value, namespace_mode: Option<&str>) -> bool {
    let map = |name: &str| -> Map {
        let entries = pod["metadata"][name].as_object().into_iter().flatten();
        entries
            .filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned())))
            .collect()
    };
    let mode = namespace_mode.map(|mode| (MODE_LABEL.to_owned(), mode.to_owned()));
    let candidate = Candidate {
        labels: &map("labels"),
        annotations: &map("annotations"),
        host_network: false,
        namespace_labels: &mode.into_iter().collect(),
    };
    Selectors::default().admit(candidate).is_ok()
}

#[cfg(test)]
mod tests {
    use super::super::manifest::parse;
    use super::*;

    const DEPLOYMENT: &str = "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: curl}\n\
        spec:\n  replicas: 2\n  template:\n    metadata: {labels: {app: curl}}\n    spec:\n      \
        containers: [{name: c, command: [sleep, infinity]}]\n";

    fn plan(text: &str) -> Result<Vec<PodPlan>, PlanError> {
        pods(parse("f", text).unwrap().iter())
    }

    #[test]
    fn a_deployment_becomes_pods_with_names_of_a_replica_set() {
        let pods = plan(DEPLOYMENT).unwrap();
        assert_eq!(pods.len(), 2);
        let object = &pods[0].object;
        let owner = object["metadata"]["ownerReferences"][0]["name"]
            .as_str()
            .unwrap();
        let hash = object["metadata"]["labels"]["pod-template-hash"]
            .as_str()
            .unwrap();
        assert_eq!(owner, format!("curl-{hash}"));
        assert_eq!(object["metadata"]["generateName"], format!("{owner}-"));
        assert!(pods[0].name.starts_with(&format!("{owner}-")));
        assert_ne!(pods[0].name, pods[1].name);
        assert_eq!(object["metadata"]["labels"]["app"], "curl");
        assert_eq!(pods[0].service_account, "default");
    }

    #[test]
    fn labels_of_pod_and_namespace_decide_capture() {
        let cases = [
            (None, None, false),
            (Some("ambient"), None, true),
            (Some("ambient"), Some("none"), false),
            (Some("none"), Some("ambient"), true),
            (Some("ambient"), Some("other"), true),
            (None, Some("ambient"), true),
        ];
        for (namespace, pod, expected) in cases {
            let object = json!({"metadata": {"labels": {MODE_LABEL: pod}}});
            assert_eq!(
                captured(&object, namespace),
                expected,
                "{namespace:?} {pod:?}"
            );
        }
        let sidecar = json!({"metadata": {"annotations": {"sidecar.istio.io/status": "{}"}}});
        assert!(!captured(&sidecar, Some("ambient")));
    }

    #[test]
    fn what_cannot_run_is_refused_by_name() {
        let error = |text: &str| plan(text).unwrap_err().to_string();
        assert_eq!(
            error(&DEPLOYMENT.replace("replicas: 2", "replicas: -1")),
            "deployment/curl in default: -1 is not a usable number of replicas (at most 250)"
        );
        assert_eq!(
            error(&DEPLOYMENT.replace("Deployment", "DaemonSet")),
            "daemonset/curl in default: the lab starts Pods and Deployments only"
        );
        assert!(
            error(&DEPLOYMENT.replace("command: [sleep, infinity]", "image: curl"))
                .contains("no command")
        );
        assert!(
            error(&DEPLOYMENT.replace("containers:", "hostNetwork: true\n      containers:"))
                .contains("hostNetwork")
        );
    }
}
