//! A folder of manifests, read again and again; what cannot be read leaves its last good version in force.

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::kubernetes::{AuthorizationPolicy, Metadata, Named, PeerAuthentication, Pod, Service};
use super::translate;

/// Namespace and name.
pub type Name = (String, String);

/// Every object of the folder.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Objects {
    pub namespaces: BTreeMap<String, Named>,
    pub nodes: BTreeMap<String, Named>,
    pub pods: BTreeMap<Name, Pod>,
    pub services: BTreeMap<Name, Service>,
    pub policies: BTreeMap<Name, AuthorizationPolicy>,
    pub peers: BTreeMap<Name, PeerAuthentication>,
}

/// One document, as far as it matters.
#[derive(Clone, Debug)]
enum Object {
    Namespace(Named),
    Node(Named),
    Pod(Pod),
    Service(Service),
    Policy(AuthorizationPolicy),
    Peer(PeerAuthentication),
    /// Read, but of no consequence for the mesh.
    Known,
}

/// What a folder says.
#[derive(Debug, Default)]
pub struct Loaded {
    pub objects: Objects,
    /// What could not be read, by file, document and field, and what holds instead.
    pub errors: Vec<String>,
    /// What was read but will not do what it seems to say.
    pub warnings: Vec<String>,
}

/// The folder and the last good version of each of its files.
pub struct Manifests {
    folder: PathBuf,
    files: BTreeMap<PathBuf, Vec<Object>>,
    skipped: BTreeSet<String>,
}

impl Manifests {
    /// Nothing is read yet.
    pub fn new(folder: PathBuf) -> Self {
        Self {
            folder,
            files: BTreeMap::new(),
            skipped: BTreeSet::new(),
        }
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Reads the folder with its sub-folders.
    pub fn load(&mut self) -> Loaded {
        let mut found = Found::default();
        found.collect(&self.folder);
        let mut loaded = Loaded::default();
        // A folder that could not be listed may still hold what it held.
        let whole = found.problems.is_empty();
        loaded.errors.append(&mut found.problems);
        for path in &found.files {
            let file = path.strip_prefix(&self.folder).unwrap_or(path);
            let shown = file.display().to_string();
            let read = match std::fs::read_to_string(path) {
                Ok(text) => self.parse(&shown, &text),
                // It went away since the folder was listed.
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    self.files.remove(path);
                    continue;
                }
                Err(error) => Err(vec![format!("{shown}: {error}")]),
            };
            match read {
                Ok(objects) => drop(self.files.insert(path.clone(), objects)),
                Err(problems) => {
                    let holds = if self.files.contains_key(path) {
                        "the file's last good version stays in force"
                    } else {
                        "nothing of the file is in force"
                    };
                    let one = |problem| format!("{problem}; {holds}");
                    loaded.errors.extend(problems.into_iter().map(one));
                }
            }
        }
        if whole {
            self.files.retain(|path, _| found.files.contains(path));
        }
        for (path, objects) in &self.files {
            let file = path.strip_prefix(&self.folder).unwrap_or(path).display();
            for object in objects {
                if let Err(name) = loaded.objects.put(object.clone()) {
                    loaded.warnings.push(format!(
                        "{file}: {name} is there twice; the first one counts"
                    ));
                }
            }
        }
        for policy in loaded.objects.policies.values() {
            let Metadata {
                namespace, name, ..
            } = &policy.metadata;
            for said in translate::policies::reservations(policy) {
                let warning = format!("AuthorizationPolicy {namespace}/{name}: {said}");
                loaded.warnings.push(warning);
            }
        }
        loaded
    }

    fn parse(&mut self, file: &str, text: &str) -> Result<Vec<Object>, Vec<String>> {
        let (mut objects, mut problems) = (Vec::new(), Vec::new());
        for (index, document) in serde_yaml_ng::Deserializer::from_str(text).enumerate() {
            let wrong = |reason: String| format!("{file}: document {}: {reason}", index + 1);
            let value = match Value::deserialize(document) {
                Ok(Value::Null) => continue,
                Ok(value) => value,
                Err(error) => {
                    // The rest of a broken file cannot be told apart.
                    problems.push(wrong(error.to_string()));
                    break;
                }
            };
            let list = value["kind"]
                .as_str()
                .is_some_and(|kind| kind.ends_with("List"));
            let items = match value {
                Value::Object(mut list_object) if list => match list_object.remove("items") {
                    Some(Value::Array(items)) => items,
                    None | Some(Value::Null) => Vec::new(),
                    Some(_) => {
                        problems.push(wrong("items: is not a list".to_string()));
                        continue;
                    }
                },
                other => vec![other],
            };
            for (number, item) in items.into_iter().enumerate() {
                match self.object(item) {
                    Ok(object) => objects.push(object),
                    Err(reason) if list => {
                        problems.push(wrong(format!("items[{number}]: {reason}")))
                    }
                    Err(reason) => problems.push(wrong(reason)),
                }
            }
        }
        if problems.is_empty() {
            Ok(objects)
        } else {
            Err(problems)
        }
    }

    fn object(&mut self, mut value: Value) -> Result<Object, String> {
        without_nulls(&mut value);
        let kind = value["kind"]
            .as_str()
            .ok_or("kind: is missing")?
            .to_string();
        let group = value["apiVersion"]
            .as_str()
            .ok_or("apiVersion: is missing")?;
        let group = group
            .split_once('/')
            .map_or("", |(group, _)| group)
            .to_string();
        if value["metadata"]["name"].as_str().is_none_or(str::is_empty) {
            return Err(format!("{kind}: metadata.name: is missing"));
        }
        if value["metadata"]["namespace"].is_null() && !matches!(&*kind, "Namespace" | "Node") {
            value["metadata"]["namespace"] = "default".into();
        }
        match (&*group, &*kind) {
            ("", "Namespace") => typed(&kind, value).map(Object::Namespace),
            ("", "Node") => typed(&kind, value).map(Object::Node),
            ("", "Pod") => {
                let pod: Pod = typed(&kind, value)?;
                let name = &pod.metadata.name;
                pod_addresses(&pod).map_err(|error| format!("{kind} {name}: {error}"))?;
                Ok(Object::Pod(pod))
            }
            ("", "Service") => {
                let service: Service = typed(&kind, value)?;
                let name = &service.metadata.name;
                cluster_addresses(&service).map_err(|error| format!("{kind} {name}: {error}"))?;
                Ok(Object::Service(service))
            }
            ("security.istio.io", "AuthorizationPolicy") => {
                let policy: AuthorizationPolicy = typed(&kind, value)?;
                translate::policies::check(&policy)
                    .map_err(|error| format!("{kind} {}: {error}", policy.metadata.name))?;
                Ok(Object::Policy(policy))
            }
            ("security.istio.io", "PeerAuthentication") => typed(&kind, value).map(Object::Peer),
            ("", "ServiceAccount" | "ConfigMap" | "Secret" | "Event" | "Endpoints")
            | ("apps", "Deployment" | "ReplicaSet") => Ok(Object::Known),
            _ => {
                let full = if group.is_empty() {
                    kind
                } else {
                    format!("{kind} of {group}")
                };
                if self.skipped.insert(full.clone()) {
                    tracing::info!(
                        "skipping objects of kind {full}: they mean nothing to this control plane"
                    );
                }
                Ok(Object::Known)
            }
        }
    }
}

impl Objects {
    fn put(&mut self, object: Object) -> Result<(), String> {
        let name = |metadata: &Metadata| (metadata.namespace.clone(), metadata.name.clone());
        fn insert<K: Ord, V>(map: &mut BTreeMap<K, V>, key: K, value: V) -> bool {
            match map.entry(key) {
                std::collections::btree_map::Entry::Vacant(entry) => {
                    entry.insert(value);
                    true
                }
                std::collections::btree_map::Entry::Occupied(_) => false,
            }
        }
        let (new, what) = match object {
            Object::Namespace(object) => {
                let key = object.metadata.name.clone();
                let what = format!("Namespace {key}");
                (insert(&mut self.namespaces, key, object), what)
            }
            Object::Node(object) => {
                let key = object.metadata.name.clone();
                let what = format!("Node {key}");
                (insert(&mut self.nodes, key, object), what)
            }
            Object::Pod(object) => {
                let key = name(&object.metadata);
                let what = format!("Pod {}/{}", key.0, key.1);
                (insert(&mut self.pods, key, object), what)
            }
            Object::Service(object) => {
                let key = name(&object.metadata);
                let what = format!("Service {}/{}", key.0, key.1);
                (insert(&mut self.services, key, object), what)
            }
            Object::Policy(object) => {
                let key = name(&object.metadata);
                let what = format!("AuthorizationPolicy {}/{}", key.0, key.1);
                (insert(&mut self.policies, key, object), what)
            }
            Object::Peer(object) => {
                let key = name(&object.metadata);
                let what = format!("PeerAuthentication {}/{}", key.0, key.1);
                (insert(&mut self.peers, key, object), what)
            }
            Object::Known => return Ok(()),
        };
        if new { Ok(()) } else { Err(what) }
    }
}

/// Reads a whole object; the error begins with the field's path.
fn typed<T: DeserializeOwned>(kind: &str, value: Value) -> Result<T, String> {
    let name = value["metadata"]["name"]
        .as_str()
        .unwrap_or_default()
        .to_string();
    // Written out and read again, because only the reader of text knows the path of what it does not like.
    let text = serde_yaml_ng::to_string(&value).map_err(|error| error.to_string())?;
    serde_yaml_ng::from_str(&text).map_err(|error| {
        let error = error.to_string();
        let error = error.split(" at line ").next().unwrap_or_default();
        format!("{kind} {name}: {error}")
    })
}

/// Takes out fields that are null, which is to say that they are not there.
fn without_nulls(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.retain(|_, field| !field.is_null());
            fields.values_mut().for_each(without_nulls);
        }
        Value::Array(items) => items.iter_mut().for_each(without_nulls),
        _ => {}
    }
}

fn pod_addresses(pod: &Pod) -> Result<(), String> {
    let status = &pod.status;
    if !status.pod_ip.is_empty() {
        address("status.podIP", &status.pod_ip)?;
    }
    for (number, entry) in status.pod_ips.iter().enumerate() {
        address(&format!("status.podIPs[{number}].ip"), &entry.ip)?;
    }
    Ok(())
}

fn cluster_addresses(service: &Service) -> Result<(), String> {
    let spec = &service.spec;
    let all = std::iter::once(("spec.clusterIP".to_string(), &spec.cluster_ip));
    let several = spec.cluster_ips.iter().enumerate();
    let all = all.chain(several.map(|(number, ip)| (format!("spec.clusterIPs[{number}]"), ip)));
    for (path, ip) in all.filter(|(_, ip)| !matches!(&***ip, "" | "None")) {
        address(&path, ip)?;
    }
    Ok(())
}

fn address(path: &str, text: &str) -> Result<IpAddr, String> {
    text.parse()
        .map_err(|_| format!("{path}: {text:?} is not an IP address"))
}

/// The manifests below a folder, in order.
#[derive(Default)]
struct Found {
    files: BTreeSet<PathBuf>,
    problems: Vec<String>,
    /// The folders that were seen, so that links in a circle end.
    folders: BTreeSet<PathBuf>,
}

impl Found {
    fn collect(&mut self, folder: &Path) {
        let listed = folder.canonicalize().and_then(|real| {
            let new = self.folders.insert(real);
            Ok(new.then_some(std::fs::read_dir(folder)?))
        });
        let entries = match listed {
            Ok(Some(entries)) => entries,
            Ok(None) => return,
            Err(error) => {
                let problem = format!("{}: {error}; what it held stays", folder.display());
                return self.problems.push(problem);
            }
        };
        for entry in entries.flatten() {
            let path = entry.path();
            if entry.file_name().to_string_lossy().starts_with('.') {
                continue;
            }
            let manifest = path
                .extension()
                .is_some_and(|end| ["yaml", "yml", "json"].iter().any(|known| end == *known));
            if path.is_dir() {
                self.collect(&path);
            } else if manifest {
                self.files.insert(path);
            }
        }
    }
}

#[cfg(test)]
#[path = "manifests_tests.rs"]
mod tests;
