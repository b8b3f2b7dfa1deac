//! Which pods are enrolled. The plugin, the node agent and the lab ask the same function.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

/// The label by which pods and namespaces ask for the mesh.
pub const MODE_LABEL: &str = "istio.io/dataplane-mode";
/// Its value that asks to be in.
pub const AMBIENT: &str = "ambient";
/// Its value that asks to be out.
pub const NONE: &str = "none";
/// What the sidecar injector leaves on pods that have a proxy of their own.
const SIDECAR_ANNOTATION: &str = "sidecar.istio.io/status";

/// Labels or annotations of an object.
pub type Map = BTreeMap<String, String>;

/// What enrolment depends on.
#[derive(Clone, Copy, Debug)]
pub struct Candidate<'a> {
    pub labels: &'a Map,
    pub annotations: &'a Map,
    pub host_network: bool,
    pub namespace_labels: &'a Map,
}

/// A Kubernetes label selector; an empty one matches everything.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct LabelSelector {
    #[serde(skip_serializing_if = "Map::is_empty")]
    pub match_labels: Map,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub match_expressions: Vec<Requirement>,
}

/// One expression of a selector.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Requirement {
    pub key: String,
    pub operator: Operator,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub values: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Operator {
    In,
    NotIn,
    Exists,
    DoesNotExist,
}

impl LabelSelector {
    /// Whether the labels satisfy every part of the selector.
    pub fn matches(&self, labels: &Map) -> bool {
        let equal = |(key, value): (&String, &String)| labels.get(key) == Some(value);
        self.match_labels.iter().all(equal)
            && self
                .match_expressions
                .iter()
                .all(|requirement| requirement.matches(labels))
    }
}

impl Requirement {
    fn matches(&self, labels: &Map) -> bool {
        let value = labels.get(&self.key);
        let listed = value.is_some_and(|value| self.values.contains(value));
        match self.operator {
            Operator::In => listed,
            Operator::NotIn => !listed,
            Operator::Exists => value.is_some(),
            Operator::DoesNotExist => value.is_none(),
        }
    }
}

/// A selector of pods and one of their namespaces; both must match.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct SelectorPair {
    pub pod_selector: LabelSelector,
    pub namespace_selector: LabelSelector,
}

/// Which pods are enrolled: those that any of the pairs matches.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Selectors(pub Vec<SelectorPair>);

impl Default for Selectors {
    /// Pods that ask for it, and those of namespaces that ask for it unless they ask to be left out.
    fn default() -> Self {
        let ambient = LabelSelector {
            match_labels: Map::from([(MODE_LABEL.into(), AMBIENT.into())]),
            ..LabelSelector::default()
        };
        let not_out = LabelSelector {
            match_expressions: vec![Requirement {
                key: MODE_LABEL.into(),
                operator: Operator::NotIn,
                values: vec![NONE.into()],
            }],
            ..LabelSelector::default()
        };
        let by_pod = SelectorPair {
            pod_selector: ambient.clone(),
            ..SelectorPair::default()
        };
        let by_namespace = SelectorPair {
            pod_selector: not_out,
            namespace_selector: ambient,
        };
        Self(vec![by_pod, by_namespace])
    }
}

impl Selectors {
    /// Reads a list of pairs, as YAML or JSON.
    ///
    /// # Errors
    /// What is wrong with it, and where.
    pub fn parse(text: &str) -> Result<Self, String> {
        let selectors: Self = serde_yaml_ng::from_str(text).map_err(|error| error.to_string())?;
        for pair in &selectors.0 {
            for selector in [&pair.pod_selector, &pair.namespace_selector] {
                selector.match_expressions.iter().try_for_each(check)?;
            }
        }
        Ok(selectors)
    }

    /// Whether a pod is to be captured, or why not.
    ///
    /// # Errors
    /// The reason for which it is left alone.
    pub fn admit(&self, pod: Candidate<'_>) -> Result<(), Ineligible> {
        if pod.host_network {
            return Err(Ineligible::HostNetwork);
        }
        if pod.annotations.contains_key(SIDECAR_ANNOTATION) {
            return Err(Ineligible::Sidecar);
        }
        let matches = |pair: &SelectorPair| {
            pair.pod_selector.matches(pod.labels)
                && pair.namespace_selector.matches(pod.namespace_labels)
        };
        match self.0.iter().any(matches) {
            true => Ok(()),
            false => Err(Ineligible::NotSelected),
        }
    }
}

fn check(requirement: &Requirement) -> Result<(), String> {
    let needs_values = matches!(requirement.operator, Operator::In | Operator::NotIn);
    match (needs_values, requirement.values.is_empty()) {
        (true, false) | (false, true) => Ok(()),
        (true, true) => Err(format!(
            "the expression on {} lists no values",
            requirement.key
        )),
        (false, false) => Err(format!(
            "the expression on {} takes no values",
            requirement.key
        )),
    }
}

/// Why a pod is left alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ineligible {
    HostNetwork,
    Sidecar,
    NotSelected,
}

impl fmt::Display for Ineligible {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::HostNetwork => "it uses the node's network",
            Self::Sidecar => "it has a sidecar proxy",
            Self::NotSelected => "neither it nor its namespace asks for the mesh",
        })
    }
}

/// The comma-separated names of a setting; blanks and empty ones do not count.
pub fn names(text: &str) -> Vec<String> {
    let names = text.split(',').map(str::trim);
    names
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect()
}

/// A switch in an annotation, in the spellings that Go's strconv.ParseBool takes.
pub fn switch(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(value: Option<&str>) -> Map {
        let label = |value: &str| (MODE_LABEL.to_string(), value.to_string());
        value.map(label).into_iter().collect()
    }

    fn admitted(namespace: Option<&str>, pod: Option<&str>) -> bool {
        let candidate = Candidate {
            labels: &labels(pod),
            annotations: &Map::new(),
            host_network: false,
            namespace_labels: &labels(namespace),
        };
        Selectors::default().admit(candidate).is_ok()
    }

    #[test]
    fn the_pods_own_label_decides_before_its_namespaces() {
        for (namespace, pod, expected) in [
            (None, Some("ambient"), true),
            (Some("none"), Some("ambient"), true),
            (Some("ambient"), Some("ambient"), true),
            (Some("ambient"), None, true),
            (Some("ambient"), Some("other"), true),
            (Some("ambient"), Some("none"), false),
            (None, None, false),
            (None, Some("none"), false),
            (Some("other"), None, false),
            (Some("none"), Some("other"), false),
        ] {
            assert_eq!(admitted(namespace, pod), expected, "{namespace:?} {pod:?}");
        }
    }

    #[test]
    fn pods_with_a_sidecar_or_the_nodes_network_are_left_alone() {
        let ambient = labels(Some(AMBIENT));
        let sidecar = Map::from([(SIDECAR_ANNOTATION.to_string(), String::new())]);
        let none = Map::new();
        let candidate = |annotations, host_network| Candidate {
            labels: &ambient,
            annotations,
            host_network,
            namespace_labels: &none,
        };
        let selectors = Selectors::default();
        assert_eq!(selectors.admit(candidate(&none, false)), Ok(()));
        assert_eq!(
            selectors.admit(candidate(&sidecar, false)),
            Err(Ineligible::Sidecar)
        );
        assert_eq!(
            selectors.admit(candidate(&none, true)),
            Err(Ineligible::HostNetwork)
        );
    }

    #[test]
    fn selectors_are_read_as_kubernetes_writes_them() {
        let text = "
- podSelector: {matchLabels: {team: a}}
  namespaceSelector:
    matchExpressions:
    - {key: env, operator: In, values: [prod, stage]}
    - {key: old, operator: DoesNotExist}
- namespaceSelector: {matchExpressions: [{key: all, operator: Exists}]}
";
        let selectors = Selectors::parse(text).unwrap();
        let map = |pairs: &[(&str, &str)]| -> Map {
            pairs
                .iter()
                .map(|(key, value)| (key.to_string(), value.to_string()))
                .collect()
        };
        let admits = |pod: &[(&str, &str)], namespace: &[(&str, &str)]| {
            let candidate = Candidate {
                labels: &map(pod),
                annotations: &Map::new(),
                host_network: false,
                namespace_labels: &map(namespace),
            };
            selectors.admit(candidate).is_ok()
        };
        assert!(admits(&[("team", "a")], &[("env", "prod")]));
        assert!(!admits(&[("team", "b")], &[("env", "prod")]));
        assert!(!admits(&[("team", "a")], &[("env", "prod"), ("old", "")]));
        assert!(!admits(&[("team", "a")], &[("env", "test")]));
        assert!(admits(&[], &[("all", "")]));
        assert!(!admits(&[], &[]));
        let json = serde_json::to_string(&selectors).unwrap();
        assert_eq!(Selectors::parse(&json).unwrap(), selectors);
        // No selector selects nothing; one that says nothing selects everything.
        assert!(Selectors::parse("[]").unwrap().0.is_empty());
        assert!(Selectors::parse("[{}]").unwrap().0[0] == SelectorPair::default());
    }

    #[test]
    fn selectors_that_say_nothing_sensible_are_refused() {
        for (text, part) in [
            ("podSelector: {}", "invalid type"),
            ("- podselector: {}", "unknown field"),
            (
                "- podSelector: {matchExpressions: [{key: a, operator: Like}]}",
                "unknown variant",
            ),
            (
                "- podSelector: {matchExpressions: [{key: a, operator: In}]}",
                "on a lists no values",
            ),
            (
                "- podSelector: {matchExpressions: [{key: a, operator: Exists, values: [b]}]}",
                "on a takes no values",
            ),
        ] {
            let error = Selectors::parse(text).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn names_and_switches_tolerate_what_people_write() {
        assert_eq!(names(" kube-system , ,a,"), ["kube-system", "a"]);
        assert!(names("").is_empty());
        assert_eq!(switch("True"), Some(true));
        assert_eq!(switch("f"), Some(false));
        assert_eq!(switch("yes"), None);
    }
}
