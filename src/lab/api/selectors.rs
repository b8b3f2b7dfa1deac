//! Label and field selectors in queries.

use serde_json::Value;

/// What a list or a watch is about.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    pub namespace: Option<String>,
    labels: Vec<Requirement>,
    fields: Vec<(String, String, bool)>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Requirement {
    In(String, Vec<String>),
    NotIn(String, Vec<String>),
    Exists(String),
    Absent(String),
}

impl Selection {
    /// Reads the selectors of a query.
    ///
    /// # Errors
    /// What cannot be understood.
    pub fn parse(
        namespace: Option<String>,
        labels: Option<&str>,
        fields: Option<&str>,
    ) -> Result<Self, String> {
        let labels = split(labels.unwrap_or_default());
        let fields = split(fields.unwrap_or_default());
        Ok(Self {
            namespace,
            labels: labels
                .iter()
                .map(|text| requirement(text))
                .collect::<Result<_, _>>()?,
            fields: fields
                .iter()
                .map(|text| field(text))
                .collect::<Result<_, _>>()?,
        })
    }

    /// Whether an object is among what is asked for.
    pub fn takes(&self, object: &Value) -> bool {
        let metadata = &object["metadata"];
        let at_home = self
            .namespace
            .as_ref()
            .is_none_or(|namespace| metadata["namespace"] == namespace.as_str());
        at_home
            && self
                .labels
                .iter()
                .all(|wanted| wanted.holds(&metadata["labels"]))
            && self.fields.iter().all(|(path, value, equal)| {
                let pointer = format!("/{}", path.replace('.', "/"));
                let found = object.pointer(&pointer).and_then(Value::as_str);
                (found.unwrap_or_default() == value) == *equal
            })
    }
}

impl Requirement {
    fn holds(&self, labels: &Value) -> bool {
        let value = |key: &str| labels.get(key).and_then(Value::as_str);
        let listed = |key: &str, values: &[String]| {
            value(key).is_some_and(|value| values.iter().any(|known| known == value))
        };
        match self {
            Self::In(key, values) => listed(key, values),
            Self::NotIn(key, values) => !listed(key, values),
            Self::Exists(key) => value(key).is_some(),
            Self::Absent(key) => value(key).is_none(),
        }
    }
}

/// The parts between commas, but for those in parentheses.
fn split(text: &str) -> Vec<String> {
    let (mut parts, mut depth) = (vec![String::new()], 0);
    for character in text.chars() {
        match character {
            '(' => depth += 1,
            ')' => depth -= 1,
            _ => {}
        }
        match (character, depth) {
            (',', 0) => parts.push(String::new()),
            _ => {
                if let Some(part) = parts.last_mut() {
                    part.push(character);
                }
            }
        }
    }
    let parts = parts.into_iter().map(|part| part.trim().to_string());
    parts.filter(|part| !part.is_empty()).collect()
}

fn requirement(text: &str) -> Result<Requirement, String> {
    let one = |value: &str| vec![value.trim().to_string()];
    let key = |text: &str| text.trim().to_string();
    if let Some((name, value)) = text.split_once("!=") {
        return Ok(Requirement::NotIn(key(name), one(value)));
    }
    if let Some((name, value)) = text.split_once('=') {
        return Ok(Requirement::In(
            key(name),
            one(value.trim_start_matches('=')),
        ));
    }
    let words: Vec<_> = text.splitn(3, char::is_whitespace).collect();
    match words[..] {
        [name] if name.starts_with('!') => Ok(Requirement::Absent(key(&name[1..]))),
        [name] => Ok(Requirement::Exists(key(name))),
        [name, operator @ ("in" | "notin"), values] => {
            let values = values
                .trim()
                .strip_prefix('(')
                .and_then(|rest| rest.strip_suffix(')'));
            let values = values.ok_or_else(|| format!("no list in parentheses: {text}"))?;
            let values = values.split(',').map(key).collect();
            Ok(match operator {
                "in" => Requirement::In(key(name), values),
                _ => Requirement::NotIn(key(name), values),
            })
        }
        _ => Err(format!("not a label selector: {text}")),
    }
}

fn field(text: &str) -> Result<(String, String, bool), String> {
    let (path, value, equal) = match text.split_once("!=") {
        Some((path, value)) => (path, value, false),
        None => {
            let (path, value) = text
                .split_once('=')
                .ok_or_else(|| format!("not a field selector: {text}"))?;
            (path, value.trim_start_matches('='), true)
        }
    };
    const KNOWN: [&str; 4] = [
        "metadata.name",
        "metadata.namespace",
        "spec.nodeName",
        "status.phase",
    ];
    match KNOWN.contains(&path) {
        true => Ok((path.to_string(), value.to_string(), equal)),
        false => Err(format!("field label not supported: {path}")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn selectors_take_what_they_name() {
        let object = json!({
            "metadata": {"name": "p", "namespace": "n", "labels": {"app": "a", "tier": "x"}},
            "spec": {"nodeName": "node-1"},
        });
        for (labels, fields, expected) in [
            ("", "", true),
            ("app=a,tier==x", "", true),
            ("app=b", "", false),
            ("app!=b,other!=x", "", true),
            ("app in (a, b),tier notin (y)", "", true),
            ("app notin (a)", "", false),
            ("app", "", true),
            ("!app", "", false),
            ("!other", "", true),
            ("", "spec.nodeName=node-1", true),
            ("", "spec.nodeName!=node-1", false),
            ("", "metadata.name==p,metadata.namespace=n", true),
            ("", "status.phase=Running", false),
        ] {
            let selection = Selection::parse(None, Some(labels), Some(fields)).unwrap();
            assert_eq!(selection.takes(&object), expected, "{labels} {fields}");
        }
        let elsewhere = Selection::parse(Some("m".into()), None, None).unwrap();
        assert!(!elsewhere.takes(&object));
        for (labels, fields) in [
            ("a in b", ""),
            ("a like b", ""),
            ("", "spec.x=1"),
            ("", "a"),
        ] {
            assert!(
                Selection::parse(None, Some(labels), Some(fields)).is_err(),
                "{labels}{fields}"
            );
        }
    }
}
