//! Kubernetes objects as the lab reads them: files, folders or standard input, several documents each.

use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use thiserror::Error;

/// Kinds that live in no namespace.
const CLUSTER_KINDS: [&str; 6] = [
    "Namespace",
    "Node",
    "GatewayClass",
    "ClusterRole",
    "ClusterRoleBinding",
    "CustomResourceDefinition",
];

/// Why manifests cannot be used; names the file and the document.
#[derive(Debug, Error)]
pub enum ManifestError {
    #[error("cannot read {path}: {reason}")]
    Unreadable {
        path: String,
        reason: std::io::Error,
    },
    #[error("{file}: document {document}: {reason}")]
    Document {
        file: String,
        document: usize,
        reason: String,
    },
    #[error("{0}: no manifests (*.yaml, *.yml, *.json) in this folder")]
    Empty(String),
}

/// What identifies an object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Key {
    pub kind: String,
    /// Empty for objects of the whole cluster.
    pub namespace: String,
    pub name: String,
}

impl Key {
    pub fn new(kind: &str, namespace: &str, name: &str) -> Self {
        Self {
            kind: kind.to_owned(),
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.kind.to_lowercase(), self.name)?;
        if !self.namespace.is_empty() {
            write!(f, " in {}", self.namespace)?;
        }
        Ok(())
    }
}

/// One object and where it came from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Object {
    pub key: Key,
    pub value: Value,
}

impl Object {
    /// The string at a JSON pointer such as `/spec/nodeName`.
    pub fn text(&self, pointer: &str) -> Option<&str> {
        self.value.pointer(pointer).and_then(Value::as_str)
    }

    /// A label or annotation map as pairs.
    pub fn label(&self, name: &str) -> Option<&str> {
        self.value
            .get("metadata")?
            .get("labels")?
            .get(name)?
            .as_str()
    }
}

/// Reads a file, a folder (not its subfolders), or standard input for `-`.
///
/// # Errors
/// The first file or document that cannot be used.
pub fn load(path: &Path) -> Result<Vec<Object>, ManifestError> {
    let unreadable = |path: &Path, reason| ManifestError::Unreadable {
        path: path.display().to_string(),
        reason,
    };
    if path == Path::new("-") {
        let mut text = String::new();
        std::io::stdin()
            .read_to_string(&mut text)
            .map_err(|e| unreadable(path, e))?;
        return parse("standard input", &text);
    }
    let files = if path.is_dir() {
        let mut files: Vec<PathBuf> = std::fs::read_dir(path)
            .and_then(|entries| entries.map(|e| e.map(|e| e.path())).collect())
            .map_err(|e| unreadable(path, e))?;
        files.retain(|f| {
            f.extension()
                .is_some_and(|e| ["yaml", "yml", "json"].iter().any(|known| e == *known))
        });
        files.sort();
        if files.is_empty() {
            return Err(ManifestError::Empty(path.display().to_string()));
        }
        files
    } else {
        vec![path.to_owned()]
    };
    let mut objects = Vec::new();
    for file in files {
        let text = std::fs::read_to_string(&file).map_err(|e| unreadable(&file, e))?;
        objects.extend(parse(&file.display().to_string(), &text)?);
    }
    Ok(objects)
}

/// The objects of one text of one or more YAML documents; lists are taken apart, empty documents skipped.
///
/// # Errors
/// The first document that is not a Kubernetes object.
pub fn parse(file: &str, text: &str) -> Result<Vec<Object>, ManifestError> {
    let mut objects = Vec::new();
    for (index, document) in serde_yaml_ng::Deserializer::from_str(text).enumerate() {
        let wrong = |reason: String| ManifestError::Document {
            file: file.to_owned(),
            document: index + 1,
            reason,
        };
        let value = Value::deserialize(document).map_err(|e| wrong(e.to_string()))?;
        if value.is_null() {
            continue;
        }
        match value.get("items").and_then(Value::as_array) {
            Some(items) if value["kind"].as_str().is_some_and(|k| k.ends_with("List")) => {
                for item in items {
                    objects.push(object(item.clone()).map_err(wrong)?);
                }
            }
            _ => objects.push(object(value).map_err(wrong)?),
        }
    }
    Ok(objects)
}

fn object(value: Value) -> Result<Object, String> {
    let text = |pointer: &str| value.pointer(pointer).and_then(Value::as_str);
    let kind = text("/kind").ok_or("no kind")?;
    if text("/apiVersion").is_none() {
        return Err(format!("{kind}: no apiVersion"));
    }
    let name = text("/metadata/name").ok_or_else(|| format!("{kind}: no metadata.name"))?;
    let namespace = if CLUSTER_KINDS.contains(&kind) {
        ""
    } else {
        text("/metadata/namespace").unwrap_or("default")
    };
    for (field, part) in [("name", name), ("namespace", namespace)] {
        // Both become file names.
        let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
        let empty_is_wrong = field == "name" && part.is_empty();
        if empty_is_wrong || part.len() > 253 || part.starts_with('.') || !part.chars().all(fits) {
            return Err(format!("{kind}: bad metadata.{field} {part:?}"));
        }
    }
    let key = Key::new(kind, namespace, name);
    let mut value = value;
    if !key.namespace.is_empty() {
        value["metadata"]["namespace"] = Value::from(key.namespace.clone());
    }
    Ok(Object { key, value })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_become_objects_with_their_namespaces() {
        let text = "apiVersion: v1\nkind: Namespace\nmetadata: {name: a}\n---\n---\napiVersion: v1\n\
                    kind: List\nitems:\n- apiVersion: v1\n  kind: Service\n  metadata: {name: s}\n";
        let objects = parse("f", text).unwrap();
        let keys: Vec<String> = objects.iter().map(|o| o.key.to_string()).collect();
        assert_eq!(keys, ["namespace/a", "service/s in default"]);
        assert_eq!(objects[1].text("/metadata/namespace"), Some("default"));
    }

    #[test]
    fn a_bad_document_is_named() {
        let error = |text: &str| parse("f.yaml", text).unwrap_err().to_string();
        let good = "apiVersion: v1\nkind: Pod\nmetadata: {name: p}\n---\n";
        assert_eq!(
            error(&format!("{good}kind: Pod\n")),
            "f.yaml: document 2: Pod: no apiVersion"
        );
        assert!(error(&format!("{good}a: [")).starts_with("f.yaml: document 2: "));
        assert_eq!(
            error("apiVersion: v1\nkind: Pod\nmetadata: {name: ../x}\n"),
            "f.yaml: document 1: Pod: bad metadata.name \"../x\""
        );
    }
}
