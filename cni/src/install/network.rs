//! A CNI configuration as data: what the cluster's network consists of, and our plugin's place in it.

use serde_json::{Value, json};

use super::entry::{INCUMBENT, Object, PLUGIN};

/// The version of lists that we make; the first in which plugins are told of their predecessor's result.
const CNI_VERSION: &str = "0.3.1";
/// The name of lists made of configurations that have none.
const NAME: &str = "k8s-pod-network";

/// A configuration that a runtime can use.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Network {
    /// One plugin, a `.conf`.
    Single(Object),
    /// A list of plugins, a `.conflist`.
    List {
        /// Everything but the plugins.
        rest: Object,
        plugins: Vec<Object>,
    },
}

/// How our entry is in a list that should have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flaw {
    Missing,
    Misplaced,
    Changed,
}

impl Network {
    /// Reads the content of a file whose name says whether it should be a list.
    pub fn parse(content: &[u8], list: bool) -> Result<Self, String> {
        let mut object: Object =
            serde_json::from_slice(content).map_err(|error| error.to_string())?;
        if !list {
            kind(&object).ok_or("it has no type")?;
            return Ok(Self::Single(object));
        }
        object
            .get("name")
            .and_then(Value::as_str)
            .ok_or("it has no name")?;
        let Some(Value::Array(values)) = object.remove("plugins") else {
            return Err("it has no list of plugins".into());
        };
        let plugin = |value| match value {
            Value::Object(plugin) if kind(&plugin).is_some() => Ok(plugin),
            _ => Err("it has a plugin without a type".to_string()),
        };
        let plugins: Vec<Object> = values.into_iter().map(plugin).collect::<Result<_, _>>()?;
        match plugins.is_empty() {
            true => Err("its list of plugins is empty".into()),
            false => Ok(Self::List {
                rest: object,
                plugins,
            }),
        }
    }

    /// Our plugin alone, for runtimes that are told elsewhere to call it.
    pub fn alone(mut entry: Object) -> Self {
        entry.insert("cniVersion".into(), CNI_VERSION.into());
        Self::Single(entry)
    }

    /// The types of its plugins, in their order.
    pub fn types(&self) -> Vec<&str> {
        self.plugins().filter_map(kind).collect()
    }

    /// The plugins that make the cluster's network, without ours and the one whose place it takes.
    pub fn foreign_types(&self) -> Vec<&str> {
        let mut types = self.types();
        types.retain(|kind| ![PLUGIN, INCUMBENT].contains(kind));
        types
    }

    /// The same network with our plugin as its last.
    pub fn with(&self, entry: &Object) -> Self {
        let (rest, plugins) = match self {
            Self::List { rest, plugins } => (rest.clone(), plugins.clone()),
            Self::Single(plugin) => {
                // Address management and cached results go by the network's name, so pods that are there keep theirs.
                let name = plugin.get("name").and_then(Value::as_str);
                let name = name.filter(|name| !name.is_empty()).unwrap_or(NAME);
                let rest = Object::from_iter([
                    ("name".to_string(), name.into()),
                    ("cniVersion".to_string(), CNI_VERSION.into()),
                ]);
                let mut plugin = plugin.clone();
                plugin.remove("cniVersion");
                (rest, vec![plugin])
            }
        };
        let foreign = |plugin: &Object| ![Some(PLUGIN), Some(INCUMBENT)].contains(&kind(plugin));
        let kept = plugins.into_iter().filter(foreign);
        Self::List {
            rest,
            plugins: kept.chain([entry.clone()]).collect(),
        }
    }

    /// The same network without our plugin, or `None` if nothing else is in it.
    pub fn without(&self) -> Option<Self> {
        match self {
            Self::Single(plugin) => (kind(plugin) != Some(PLUGIN)).then(|| self.clone()),
            Self::List { rest, plugins } => {
                let mut plugins = plugins.clone();
                plugins.retain(|plugin| kind(plugin) != Some(PLUGIN));
                (!plugins.is_empty()).then(|| Self::List {
                    rest: rest.clone(),
                    plugins,
                })
            }
        }
    }

    /// What is wrong with our entry, of a network that is not as [`Self::with`] would have it.
    pub fn flaw(&self) -> Flaw {
        let types = self.types();
        match types.iter().position(|kind| *kind == PLUGIN) {
            None => Flaw::Missing,
            Some(place) if place + 1 < types.len() => Flaw::Misplaced,
            Some(_) => Flaw::Changed,
        }
    }

    /// The content of its file.
    pub fn text(&self) -> String {
        let value = match self {
            Self::Single(plugin) => Value::Object(plugin.clone()),
            Self::List { rest, plugins } => {
                let mut list = rest.clone();
                list.insert("plugins".into(), json!(plugins));
                Value::Object(list)
            }
        };
        format!("{value:#}\n")
    }

    fn plugins(&self) -> impl Iterator<Item = &Object> {
        match self {
            Self::Single(plugin) => std::slice::from_ref(plugin).iter(),
            Self::List { plugins, .. } => plugins.iter(),
        }
    }
}

fn kind(plugin: &Object) -> Option<&str> {
    let kind = plugin.get("type")?.as_str()?;
    (!kind.is_empty()).then_some(kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry() -> Object {
        Object::from_iter([("type".to_string(), PLUGIN.into()), ("a".into(), 1.into())])
    }

    fn list(text: &str) -> Network {
        Network::parse(text.as_bytes(), true).unwrap()
    }

    #[test]
    fn our_entry_becomes_the_last_and_the_rest_stays() {
        let before = list(
            r#"{"cniVersion":"1.0.0","name":"net","disableCheck":true,
                "plugins":[{"type":"istio-cni"},{"type":"calico","x":{"y":[1,2]}},
                           {"type":"warren-cni","old":1},{"type":"portmap"}]}"#,
        );
        let expected = r#"{
  "cniVersion": "1.0.0",
  "disableCheck": true,
  "name": "net",
  "plugins": [
    {
      "type": "calico",
      "x": {
        "y": [
          1,
          2
        ]
      }
    },
    {
      "type": "portmap"
    },
    {
      "a": 1,
      "type": "warren-cni"
    }
  ]
}
"#;
        let after = before.with(&entry());
        assert_eq!(after.text(), expected);
        assert_eq!(after.with(&entry()), after);
    }

    #[test]
    fn a_single_plugin_becomes_a_list_under_its_own_name() {
        let text = br#"{"cniVersion":"0.2.0","name":"mynet","type":"bridge","ipam":{}}"#;
        let single = Network::parse(text, false).unwrap();
        let expected = list(
            r#"{"cniVersion":"0.3.1","name":"mynet",
                "plugins":[{"name":"mynet","type":"bridge","ipam":{}},{"type":"warren-cni","a":1}]}"#,
        );
        assert_eq!(single.with(&entry()), expected);
        let nameless = Network::parse(br#"{"type":"bridge"}"#, false).unwrap();
        let text = nameless.with(&entry()).text();
        assert!(text.contains(r#""name": "k8s-pod-network""#), "{text}");
    }

    #[test]
    fn taking_our_entry_out_undoes_putting_it_in() {
        let before = list(r#"{"name":"n","z":1,"plugins":[{"type":"a"},{"type":"b"}]}"#);
        assert_eq!(before.with(&entry()).without(), Some(before.clone()));
        assert_eq!(before.without(), Some(before));
        let ours = list(r#"{"name":"n","plugins":[{"type":"warren-cni"}]}"#);
        assert_eq!(ours.without(), None);
        assert_eq!(Network::alone(entry()).without(), None);
    }

    #[test]
    fn what_a_runtime_would_not_load_is_refused() {
        for (text, is_list, problem) in [
            ("", true, "EOF"),
            ("[]", true, "invalid type"),
            ("{\"name\":\"n\"", true, "EOF"),
            (r#"{"plugins":[{"type":"a"}]}"#, true, "no name"),
            (r#"{"name":"n"}"#, true, "no list of plugins"),
            (r#"{"name":"n","plugins":{}}"#, true, "no list of plugins"),
            (r#"{"name":"n","plugins":[]}"#, true, "is empty"),
            (r#"{"name":"n","plugins":[{}]}"#, true, "without a type"),
            (r#"{"name":"n","plugins":[7]}"#, true, "without a type"),
            (r#"{"name":"n"}"#, false, "no type"),
            (r#"{"type":7}"#, false, "no type"),
            (r#"{"type":""}"#, false, "no type"),
        ] {
            let refused = Network::parse(text.as_bytes(), is_list).unwrap_err();
            assert!(refused.contains(problem), "{text}: {refused}");
        }
    }

    #[test]
    fn flaws_are_told_apart() {
        let flaw = |plugins: &str| list(&format!(r#"{{"name":"n","plugins":[{plugins}]}}"#)).flaw();
        assert_eq!(flaw(r#"{"type":"a"},{"type":"istio-cni"}"#), Flaw::Missing);
        assert_eq!(
            flaw(r#"{"type":"warren-cni"},{"type":"a"}"#),
            Flaw::Misplaced
        );
        assert_eq!(flaw(r#"{"type":"a"},{"type":"warren-cni"}"#), Flaw::Changed);
    }
}
