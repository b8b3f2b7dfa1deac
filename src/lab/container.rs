//! A container as the lab runs it: a command of this machine with its environment and its readiness probe.

use serde_json::Value;
use thiserror::Error;

/// Why a container cannot run here.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ContainerError {
    #[error("no containers")]
    None,
    #[error("initContainers do not run in the lab")]
    Init,
    #[error("a container without a name")]
    NoName,
    #[error(
        "container {0} has no command; in the lab a container is a command of this machine, images are not used"
    )]
    NoCommand(String),
    #[error("container {0}: {1} is not a list of strings")]
    NotStrings(String, &'static str),
    #[error("container {0}: env {1}: only value and valueFrom.fieldRef work in the lab")]
    Env(String, String),
    #[error(
        "container {0}: readinessProbe: httpGet or tcpSocket with a port number or a named port"
    )]
    Probe(String),
}

/// A process of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Container {
    pub name: String,
    /// Command and arguments, `$(NAME)` not yet replaced.
    pub command: Vec<String>,
    pub env: Vec<(String, EnvValue)>,
    pub directory: Option<String>,
    pub probe: Option<Probe>,
}

/// Where the value of a variable comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EnvValue {
    Text(String),
    /// A field path such as `status.podIP` of the pod itself.
    Field(String),
}

/// How to see that a container is ready.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Probe {
    Tcp(u16),
    Http { port: u16, path: String },
}

impl Container {
    /// The containers of a pod's `spec`.
    ///
    /// # Errors
    /// The first thing that the lab cannot run as it is written.
    pub fn all(spec: &Value) -> Result<Vec<Self>, ContainerError> {
        if spec["initContainers"]
            .as_array()
            .is_some_and(|c| !c.is_empty())
        {
            return Err(ContainerError::Init);
        }
        let containers = spec["containers"].as_array().ok_or(ContainerError::None)?;
        if containers.is_empty() {
            return Err(ContainerError::None);
        }
        containers.iter().map(Self::from_value).collect()
    }

    fn from_value(value: &Value) -> Result<Self, ContainerError> {
        let name = value["name"]
            .as_str()
            .filter(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-'))
            .ok_or(ContainerError::NoName)?
            .to_owned();
        let mut command = strings(value, "command", &name)?;
        if command.is_empty() {
            return Err(ContainerError::NoCommand(name));
        }
        command.extend(strings(value, "args", &name)?);
        let mut env = Vec::new();
        for variable in value["env"].as_array().into_iter().flatten() {
            let key = variable["name"].as_str().unwrap_or_default().to_owned();
            let field = variable.pointer("/valueFrom/fieldRef/fieldPath");
            let found = match (&variable["value"], field.and_then(Value::as_str)) {
                (Value::String(text), None) => EnvValue::Text(text.clone()),
                (Value::Null, Some(path)) => EnvValue::Field(path.to_owned()),
                (Value::Null, None) if variable["valueFrom"].is_null() => {
                    EnvValue::Text(String::new())
                }
                _ => return Err(ContainerError::Env(name, key)),
            };
            env.push((key, found));
        }
        Ok(Self {
            probe: probe(value).map_err(|()| ContainerError::Probe(name.clone()))?,
            directory: value["workingDir"].as_str().map(str::to_owned),
            name,
            command,
            env,
        })
    }

    /// The variables with fields looked up in the pod's live object.
    pub fn environment(&self, pod: &Value) -> Vec<(String, String)> {
        self.env
            .iter()
            .map(|(name, value)| {
                let value = match value {
                    EnvValue::Text(text) => text.clone(),
                    EnvValue::Field(path) => field(pod, path),
                };
                (name.clone(), value)
            })
            .collect()
    }

    /// Command and arguments with `$(NAME)` replaced from `environment`; unknown names stay.
    pub fn arguments(&self, environment: &[(String, String)]) -> Vec<String> {
        self.command
            .iter()
            .map(|word| {
                environment
                    .iter()
                    .fold(word.clone(), |word, (name, value)| {
                        word.replace(&format!("$({name})"), value)
                    })
            })
            .collect()
    }
}

fn strings(value: &Value, field: &'static str, name: &str) -> Result<Vec<String>, ContainerError> {
    let wrong = || ContainerError::NotStrings(name.to_owned(), field);
    match &value[field] {
        Value::Null => Ok(Vec::new()),
        Value::Array(words) => words
            .iter()
            .map(|w| w.as_str().map(str::to_owned).ok_or_else(wrong))
            .collect(),
        _ => Err(wrong()),
    }
}

fn probe(container: &Value) -> Result<Option<Probe>, ()> {
    let probe = &container["readinessProbe"];
    if probe.is_null() {
        return Ok(None);
    }
    let port = |port: &Value| -> Result<u16, ()> {
        let number = match port {
            Value::String(name) => container["ports"]
                .as_array()
                .into_iter()
                .flatten()
                .find(|p| p["name"] == name.as_str())
                .and_then(|p| p["containerPort"].as_u64()),
            port => port.as_u64(),
        };
        number.and_then(|n| u16::try_from(n).ok()).ok_or(())
    };
    if let Some(http) = probe.get("httpGet") {
        let path = http["path"].as_str().unwrap_or("/").to_owned();
        return Ok(Some(Probe::Http {
            port: port(&http["port"])?,
            path,
        }));
    }
    let tcp = probe.get("tcpSocket").ok_or(())?;
    Ok(Some(Probe::Tcp(port(&tcp["port"])?)))
}

/// The value at a field path; empty where there is none.
fn field(pod: &Value, path: &str) -> String {
    let mut parts = path.splitn(2, '[');
    let pointer = format!("/{}", parts.next().unwrap_or_default().replace('.', "/"));
    let found = pod.pointer(&pointer);
    let found = match parts.next() {
        Some(key) => found.and_then(|map| map.get(key.trim_matches(|c| "[]'\"".contains(c)))),
        None => found,
    };
    found.and_then(Value::as_str).unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn variables_come_from_text_and_from_the_pod() {
        let spec = json!({"containers": [{"name": "c", "command": ["echo", "$(IP):$(PORT)$(NO)"], "env": [
            {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
            {"name": "APP", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['app']"}}},
            {"name": "PORT", "value": "80"}]}]});
        let container = &Container::all(&spec).unwrap()[0];
        let pod = json!({"metadata": {"labels": {"app": "x"}}, "status": {"podIP": "10.42.0.9"}});
        let environment = container.environment(&pod);
        assert_eq!(environment[1], ("APP".into(), "x".into()));
        assert_eq!(container.arguments(&environment)[1], "10.42.0.9:80$(NO)");
    }

    #[test]
    fn probes_name_ports_by_number_or_name() {
        let spec = |port: Value| {
            json!({"containers": [{"name": "c", "command": ["x"],
                "ports": [{"name": "http", "containerPort": 9080}],
                "readinessProbe": {"httpGet": {"path": "/h", "port": port}}}]})
        };
        let expected = Probe::Http {
            port: 9080,
            path: "/h".into(),
        };
        for port in [json!(9080), json!("http")] {
            assert_eq!(
                Container::all(&spec(port)).unwrap()[0].probe,
                Some(expected.clone())
            );
        }
        assert_eq!(
            Container::all(&spec(json!("no"))),
            Err(ContainerError::Probe("c".into()))
        );
    }

    #[test]
    fn a_secret_in_the_environment_is_refused() {
        let spec = json!({"containers": [{"name": "c", "command": ["x"],
            "env": [{"name": "K", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}]}]});
        assert_eq!(
            Container::all(&spec),
            Err(ContainerError::Env("c".into(), "K".into()))
        );
    }
}
