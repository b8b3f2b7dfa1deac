//! The objects, and what has become of them lately.

use std::collections::{BTreeMap, VecDeque};
use std::time::SystemTime;

use serde_json::{Value, json};

use super::resources::Resource;
use super::selectors::Selection;

/// How many changes are remembered for watches that lag behind.
const HISTORY: usize = 4096;

/// Group and plural, namespace, name.
pub type Key = (&'static str, &'static str, String, String);

/// The key of an object.
pub fn key(resource: &Resource, namespace: &str, name: &str) -> Key {
    let namespace = if resource.namespaced { namespace } else { "" };
    (
        resource.group,
        resource.plural,
        namespace.to_string(),
        name.to_string(),
    )
}

/// One change.
#[derive(Clone, Debug)]
pub struct Change {
    pub version: u64,
    pub resource: &'static Resource,
    pub before: Option<Value>,
    pub after: Option<Value>,
}

/// What a change is to a watch that selects.
pub fn as_event(change: &Change, selection: &Selection) -> Option<(&'static str, Value)> {
    let selected = |object: &Option<Value>| {
        object
            .as_ref()
            .is_some_and(|object| selection.takes(object))
    };
    let object = match &change.after {
        Some(after) => after.clone(),
        // What goes is shown as it last was, at the version of its end.
        None => {
            let mut last = change.before.clone()?;
            last["metadata"]["resourceVersion"] = change.version.to_string().into();
            last
        }
    };
    match (selected(&change.before), selected(&change.after)) {
        (false, true) => Some(("ADDED", object)),
        (true, true) => Some(("MODIFIED", object)),
        (true, false) => Some(("DELETED", object)),
        (false, false) => None,
    }
}

/// Everything that is stored.
#[derive(Default)]
pub struct Store {
    objects: BTreeMap<Key, Value>,
    history: VecDeque<Change>,
    /// The version of the last change.
    pub version: u64,
    /// Changes up to this one are forgotten.
    pub forgotten: u64,
}

impl Store {
    pub fn get(&self, key: &Key) -> Option<&Value> {
        self.objects.get(key)
    }

    /// The objects of a kind that are selected, in the order of their names.
    pub fn list(&self, resource: &Resource, selection: &Selection) -> Vec<Value> {
        let of_kind =
            |(key, _): &(&Key, &Value)| (key.0, key.1) == (resource.group, resource.plural);
        let kept = self
            .objects
            .iter()
            .filter(of_kind)
            .map(|(_, object)| object);
        kept.filter(|object| selection.takes(object))
            .cloned()
            .collect()
    }

    /// Stores an object in the place of another of its name; gives it as it is stored. One that changes nothing is
    /// no change.
    pub fn put(&mut self, resource: &'static Resource, mut object: Value) -> Value {
        let text = |pointer: &str| {
            let value = object.pointer(pointer).and_then(Value::as_str);
            value.unwrap_or_default().to_string()
        };
        let key = key(
            resource,
            &text("/metadata/namespace"),
            &text("/metadata/name"),
        );
        let before = self.objects.get(&key).cloned();
        object["apiVersion"] = resource.api_version().into();
        object["kind"] = resource.kind.into();
        for (name, fresh) in [("uid", uid(self.version)), ("creationTimestamp", now())] {
            let kept = before
                .as_ref()
                .map(|before| before["metadata"][name].clone());
            if object["metadata"][name].is_null() {
                object["metadata"][name] =
                    kept.filter(|kept| !kept.is_null()).unwrap_or(json!(fresh));
            }
        }
        if let Some(before) = &before {
            object["metadata"]["resourceVersion"] = before["metadata"]["resourceVersion"].clone();
            if object == *before {
                return object;
            }
        }
        self.version += 1;
        object["metadata"]["resourceVersion"] = self.version.to_string().into();
        self.objects.insert(key, object.clone());
        self.remember(resource, before, Some(object.clone()));
        object
    }

    /// Removes an object.
    pub fn delete(&mut self, resource: &'static Resource, key: &Key) -> Option<Value> {
        let before = self.objects.remove(key)?;
        self.version += 1;
        self.remember(resource, Some(before.clone()), None);
        Some(before)
    }

    fn remember(
        &mut self,
        resource: &'static Resource,
        before: Option<Value>,
        after: Option<Value>,
    ) {
        self.history.push_back(Change {
            version: self.version,
            resource,
            before,
            after,
        });
        if self.history.len() > HISTORY
            && let Some(oldest) = self.history.pop_front()
        {
            self.forgotten = oldest.version;
        }
    }

    /// Forgets every change so far.
    pub fn compact(&mut self) {
        self.history.clear();
        self.forgotten = self.version;
    }

    /// The changes of a kind after a version, unless they are forgotten.
    pub fn since(&self, version: u64, resource: &Resource) -> Option<Vec<Change>> {
        if version < self.forgotten {
            return None;
        }
        let later = self
            .history
            .iter()
            .filter(|change| change.version > version && change.resource == resource);
        Some(later.cloned().collect())
    }
}

fn uid(version: u64) -> String {
    let mut bytes = [0; 16];
    // A collision would need the same second of the same process.
    let seed = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let seed = seed.unwrap_or_default().as_nanos() as u64;
    bytes[..8].copy_from_slice(&seed.to_be_bytes());
    bytes[8..].copy_from_slice(&version.to_be_bytes());
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let parts = [
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..],
    ];
    parts.join("-")
}

fn now() -> String {
    let mut text = String::new();
    crate::telemetry::time::push_timestamp(&mut text, SystemTime::now());
    // Seconds are enough for Kubernetes.
    text.get(..19)
        .map_or(text.clone(), |seconds| format!("{seconds}Z"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(name: &str, node: &str) -> Value {
        json!({"metadata": {"name": name, "namespace": "n"}, "spec": {"nodeName": node}})
    }

    #[test]
    fn a_change_is_to_a_watch_what_it_makes_of_its_selection() {
        let resource = Resource::named("", "pods").unwrap();
        let mut store = Store::default();
        store.put(resource, pod("a", ""));
        store.put(resource, pod("a", "one"));
        store.put(resource, pod("a", "one"));
        store.put(resource, pod("a", "two"));
        store.delete(resource, &key(resource, "n", "a"));
        let kinds = |fields: &str| -> Vec<_> {
            let selection = Selection::parse(None, None, Some(fields)).unwrap();
            let changes = store.since(0, resource).unwrap();
            changes
                .iter()
                .filter_map(|change| as_event(change, &selection).map(|(kind, _)| kind))
                .collect()
        };
        assert_eq!(kinds(""), ["ADDED", "MODIFIED", "MODIFIED", "DELETED"]);
        assert_eq!(kinds("spec.nodeName=one"), ["ADDED", "DELETED"]);
        assert_eq!(kinds("spec.nodeName=three"), [""; 0]);
        assert_eq!(store.version, 4);
        store.compact();
        assert!(store.since(3, resource).is_none());
        assert!(store.since(4, resource).unwrap().is_empty());
    }

    #[test]
    fn what_is_replaced_keeps_its_identity() {
        let resource = Resource::named("", "pods").unwrap();
        let mut store = Store::default();
        let first = store.put(resource, pod("a", "one"));
        let second = store.put(resource, pod("a", "two"));
        assert_eq!(first["metadata"]["uid"], second["metadata"]["uid"]);
        assert_ne!(
            first["metadata"]["resourceVersion"],
            second["metadata"]["resourceVersion"]
        );
        let uid = first["metadata"]["uid"].as_str().unwrap();
        assert_eq!(
            uid.split('-').map(str::len).collect::<Vec<_>>(),
            [8, 4, 4, 4, 12]
        );
    }
}
