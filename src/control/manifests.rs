//! A folder of manifests, read again and again; what cannot be read leaves its last good version in force.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::kubernetes::{AuthorizationPolicy, Named, PeerAuthentication, Pod, Service};
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

    /// Reads the folder with its sub-folders; gives the objects and every problem, by file, document and field.
    pub fn load(&mut self) -> (Objects, Vec<String>) {
        let (mut paths, mut problems) = (Vec::new(), Vec::new());
        collect(&self.folder, &mut paths, &mut problems);
        let unreadable = !problems.is_empty();
        paths.sort();
        for path in &paths {
            let shown = path
                .strip_prefix(&self.folder)
                .unwrap_or(path)
                .display()
                .to_string();
            let read =
                std::fs::read_to_string(path).map_err(|error| vec![format!("{shown}: {error}")]);
            match read.and_then(|text| self.parse(&shown, &text)) {
                Ok(objects) => {
                    self.files.insert(path.clone(), objects);
                }
                Err(errors) => problems.extend(errors),
            }
        }
        // A folder that could not be listed may still hold what it held.
        if !unreadable {
            self.files.retain(|path, _| paths.contains(path));
        }
        let mut objects = Objects::default();
        for (path, object) in self
            .files
            .iter()
            .flat_map(|(path, all)| all.iter().map(move |object| (path, object)))
        {
            if let Err(name) = objects.put(object.clone()) {
                problems.push(format!(
                    "{}: {name} is there twice; the first one counts",
                    path.display()
                ));
            }
        }
        (objects, problems)
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
            let items = match value.get("items") {
                Some(Value::Array(items)) if list => items.clone(),
                _ => vec![value],
            };
            for item in items {
                match self.object(item) {
                    Ok(object) => objects.push(object),
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
            ("", "Pod") => typed(&kind, value).map(Object::Pod),
            ("", "Service") => typed(&kind, value).map(Object::Service),
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
        let name = |metadata: &super::kubernetes::Metadata| {
            (metadata.namespace.clone(), metadata.name.clone())
        };
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

fn collect(folder: &Path, paths: &mut Vec<PathBuf>, problems: &mut Vec<String>) {
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) => return problems.push(format!("{}: {error}", folder.display())),
    };
    for entry in entries.flatten() {
        let path = entry.path();
        let hidden = entry.file_name().to_string_lossy().starts_with('.');
        let manifest = path
            .extension()
            .is_some_and(|end| ["yaml", "yml", "json"].iter().any(|known| end == *known));
        if path.is_dir() && !hidden {
            collect(&path, paths, problems);
        } else if manifest && !hidden {
            paths.push(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let path =
                std::env::temp_dir().join(format!("wrn-manifests-{}-{name}", std::process::id()));
            std::fs::create_dir_all(&path).unwrap();
            Self(path)
        }

        fn write(&self, name: &str, text: &str) {
            std::fs::write(self.0.join(name), text).unwrap();
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    const SERVICE: &str = "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: a}\nspec:\n  ports: [{port: 80}]\n";

    #[test]
    fn a_bad_document_is_named_and_the_files_last_good_version_stays() {
        let folder = Folder::new("bad");
        folder.write("a.yaml", SERVICE);
        folder.write(
            "b.yaml",
            "apiVersion: v1\nkind: Namespace\nmetadata: {name: b}\n",
        );
        let mut manifests = Manifests::new(folder.0.clone());
        let (objects, problems) = manifests.load();
        assert_eq!(
            (
                objects.services.len(),
                objects.namespaces.len(),
                problems.len()
            ),
            (1, 1, 0)
        );
        folder.write(
            "a.yaml",
            &format!(
                "{SERVICE}---\n{}",
                SERVICE.replace("port: 80", "port: eighty")
            ),
        );
        let (objects, problems) = manifests.load();
        assert_eq!(objects.services.len(), 1);
        assert_eq!(problems.len(), 1);
        assert!(
            problems[0].starts_with("a.yaml: document 2: Service web: spec.ports[0].port: invalid"),
            "{problems:?}"
        );
        folder.write("a.yaml", "apiVersion: v1\nkind: Service\n");
        let (objects, problems) = manifests.load();
        assert_eq!(
            (objects.services.len(), &*problems[0]),
            (1, "a.yaml: document 1: Service: metadata.name: is missing")
        );
        std::fs::remove_file(folder.0.join("a.yaml")).unwrap();
        let (objects, problems) = manifests.load();
        assert_eq!((objects.services.len(), problems.len()), (0, 0));
    }

    #[test]
    fn what_is_unknown_is_skipped_and_what_is_double_is_told() {
        let folder = Folder::new("double");
        folder.write("a.yaml", &format!("{SERVICE}---\n\n---\n{SERVICE}---\napiVersion: x/v1\nkind: Foo\nmetadata: {{name: f}}\n"));
        let (objects, problems) = Manifests::new(folder.0.clone()).load();
        assert_eq!(objects.services.len(), 1);
        assert_eq!(problems.len(), 1);
        assert!(
            problems[0].ends_with("Service a/web is there twice; the first one counts"),
            "{problems:?}"
        );
    }

    #[test]
    fn a_policy_that_would_not_mean_what_it_says_is_refused() {
        let folder = Folder::new("policy");
        folder.write(
            "p.yaml",
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p, namespace: a}\nspec:\n  rules:\n  - to:\n    - operation: {ports: [http]}\n",
        );
        let (objects, problems) = Manifests::new(folder.0.clone()).load();
        assert!(objects.policies.is_empty());
        assert_eq!(
            problems,
            [
                "p.yaml: document 1: AuthorizationPolicy p: spec.rules[0].to[0].operation.ports[0]: \"http\" is not a port number"
            ]
        );
    }
}
