//! Whether an agent that ends takes everything with it, or leaves it for the next one.

use std::fmt;

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{Node, NodeSelector, NodeSelectorTerm};
use kube::Api;

use super::settings::Settings;

/// What to do, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The plugin, its configuration and the node's rules stay: pods go on as they are, and new ones of the mesh wait.
    Keep(&'static str),
    /// All of it goes.
    Clean(String),
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Keep(reason) => write!(f, "everything stays in place: {reason}"),
            Self::Clean(reason) => write!(f, "cleaning up: {reason}"),
        }
    }
}

/// Decides by what has become of the agent's DaemonSet.
pub async fn decide(client: &kube::Client, settings: &Settings) -> Ending {
    if settings.always_clean {
        return Ending::Clean("AMBIENT_DISABLE_SAFE_UPGRADE is set".to_string());
    }
    // With a configuration of our own a reboot must find it again, so a doubtful answer is asked for anew.
    let (attempts, in_doubt) = match settings.owned {
        Some(_) => (3, Some("the DaemonSet cannot be read")),
        None => (1, None),
    };
    let mut failure = String::new();
    for attempt in 0..attempts {
        if attempt > 0 {
            tokio::time::sleep(std::time::Duration::from_secs(1)).await;
        }
        match ask(client, settings).await {
            Ok(ending) => return ending,
            Err(error) => failure = error.to_string(),
        }
    }
    match in_doubt {
        Some(reason) => Ending::Keep(reason),
        None => Ending::Clean(format!("the DaemonSet cannot be read: {failure}")),
    }
}

async fn ask(client: &kube::Client, settings: &Settings) -> Result<Ending, kube::Error> {
    let arguments = &settings.arguments;
    let sets: Api<DaemonSet> = Api::namespaced(client.clone(), &arguments.pod_namespace);
    let set = match sets.get(&arguments.daemonset_name).await {
        Ok(set) => set,
        Err(kube::Error::Api(status)) if status.code == 404 => {
            return Ok(Ending::Clean("the DaemonSet is gone".to_string()));
        }
        // The account is gone with everything else of the installation.
        Err(kube::Error::Api(status)) if status.code == 401 => {
            return Ok(Ending::Clean(
                "the agent's account is no longer valid".to_string(),
            ));
        }
        Err(error) => return Err(error),
    };
    if set.metadata.deletion_timestamp.is_some() {
        return Ok(Ending::Clean("the DaemonSet is being deleted".to_string()));
    }
    let required = required_affinity(&set);
    let Some(required) = required else {
        return Ok(Ending::Keep("the DaemonSet is still there"));
    };
    let nodes: Api<Node> = Api::all(client.clone());
    let node = nodes.get(&arguments.node_name).await?;
    Ok(match is_selected(&required, &node) {
        true => Ending::Keep("the DaemonSet is still there"),
        false => Ending::Clean("the DaemonSet is no longer for this node".to_string()),
    })
}

fn required_affinity(set: &DaemonSet) -> Option<NodeSelector> {
    let pod = set.spec.template.spec.as_ref()?;
    let affinity = pod.affinity.as_ref()?.node_affinity.as_ref()?;
    affinity
        .required_during_scheduling_ignored_during_execution
        .clone()
}

/// Whether any term selects the node; a term that says nothing selects none.
fn is_selected(required: &NodeSelector, node: &Node) -> bool {
    required
        .node_selector_terms
        .iter()
        .any(|term| satisfies(term, node))
}

fn satisfies(term: &NodeSelectorTerm, node: &Node) -> bool {
    let labels = node.metadata.labels.clone().unwrap_or_default();
    let name = node.metadata.name.clone().unwrap_or_default();
    let expressions = term.match_expressions.iter().flatten();
    let fields = term.match_fields.iter().flatten();
    let by_label = expressions.clone().all(|wanted| {
        holds(
            labels.get(&wanted.key),
            &wanted.operator,
            wanted.values.as_deref(),
        )
    });
    let by_field = fields.clone().all(|wanted| {
        let value = (wanted.key == "metadata.name").then_some(&name);
        holds(value, &wanted.operator, wanted.values.as_deref())
    });
    let says_something = expressions.count() + fields.count() > 0;
    says_something && by_label && by_field
}

fn holds(value: Option<&String>, operator: &str, values: Option<&[String]>) -> bool {
    let values = values.unwrap_or_default();
    let listed = value.is_some_and(|value| values.contains(value));
    let number = |text: &String| text.parse::<i64>().ok();
    let pair = value.and_then(number).zip(values.first().and_then(number));
    match operator {
        "In" => listed,
        "NotIn" => !listed,
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        "Gt" => pair.is_some_and(|(value, bound)| value > bound),
        "Lt" => pair.is_some_and(|(value, bound)| value < bound),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn selected(terms: serde_json::Value) -> bool {
        let required = serde_json::from_value(json!({"nodeSelectorTerms": terms})).unwrap();
        let labels = json!({"os": "linux", "cores": "8"});
        let node = json!({"metadata": {"name": "n1", "labels": labels}});
        is_selected(&required, &serde_json::from_value(node).unwrap())
    }

    #[test]
    fn a_node_is_selected_by_any_term_that_it_satisfies_whole() {
        let label = |key: &str, operator: &str, values: &[&str]| json!({"key": key, "operator": operator, "values": values});
        let by = |expressions: serde_json::Value| json!([{"matchExpressions": expressions}]);
        for (terms, expected) in [
            (by(json!([label("os", "In", &["linux"])])), true),
            (by(json!([label("os", "NotIn", &["linux"])])), false),
            (by(json!([label("gpu", "NotIn", &["a"])])), true),
            (by(json!([label("gpu", "Exists", &[])])), false),
            (by(json!([label("gpu", "DoesNotExist", &[])])), true),
            (by(json!([label("cores", "Gt", &["4"])])), true),
            (by(json!([label("cores", "Lt", &["4"])])), false),
            (
                by(json!([
                    label("os", "In", &["linux"]),
                    label("gpu", "Exists", &[])
                ])),
                false,
            ),
            (
                json!([{"matchFields": [label("metadata.name", "In", &["n1"])]}]),
                true,
            ),
            (
                json!([{"matchFields": [label("metadata.name", "In", &["n2"])]}]),
                false,
            ),
            (json!([{}]), false),
            (json!([]), false),
            (
                json!([{}, {"matchExpressions": [label("os", "Exists", &[])]}]),
                true,
            ),
        ] {
            assert_eq!(selected(terms.clone()), expected, "{terms}");
        }
    }
}
