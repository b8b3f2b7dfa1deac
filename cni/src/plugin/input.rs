//! What a container runtime gives the plugin: environment variables, and a configuration on standard input.

use std::collections::HashMap;
use std::path::PathBuf;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::outcome::{Failure, code};
use super::version::Version;
use crate::eligibility::Selectors;

/// What is asked of the plugin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    Add,
    Check,
    Del,
    Gc,
    Status,
    Version,
}

impl Command {
    fn parse(text: &str) -> Option<Self> {
        Some(match text {
            "ADD" => Self::Add,
            "CHECK" => Self::Check,
            "DEL" => Self::Del,
            "GC" => Self::Gc,
            "STATUS" => Self::Status,
            "VERSION" => Self::Version,
            _ => return None,
        })
    }

    /// The variables without which the command makes no sense.
    fn needs(self) -> &'static [&'static str] {
        match self {
            Self::Add | Self::Check => &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"],
            Self::Del => &["CNI_CONTAINERID", "CNI_IFNAME", "CNI_PATH"],
            Self::Gc | Self::Status => &["CNI_PATH"],
            Self::Version => &[],
        }
    }
}

/// The environment of a call.
#[derive(Clone, Debug)]
pub struct Call {
    pub command: Command,
    pub netns: PathBuf,
    args: String,
}

impl Call {
    /// Reads the `CNI_*` variables.
    ///
    /// # Errors
    /// Which variable is missing or makes no sense.
    pub fn read(variables: &HashMap<String, String>) -> Result<Self, Failure> {
        let get = |name: &str| variables.get(name).map_or("", String::as_str);
        let wrong = |text: String| Failure::new(code::ENVIRONMENT, text);
        let text = get("CNI_COMMAND");
        let command = Command::parse(text).ok_or_else(|| {
            wrong(format!(
                "CNI_COMMAND is {text:?}, which is no command of CNI"
            ))
        })?;
        let missing: Vec<&str> = command
            .needs()
            .iter()
            .copied()
            .filter(|name| get(name).is_empty())
            .collect();
        if !missing.is_empty() {
            let text = format!("the environment lacks {}", missing.join(", "));
            return Err(wrong(text));
        }
        Ok(Self {
            command,
            netns: get("CNI_NETNS").into(),
            args: get("CNI_ARGS").to_string(),
        })
    }

    /// The pod that `CNI_ARGS` names; keys of others are passed over.
    ///
    /// # Errors
    /// When it is not a list of `key=value`.
    pub fn pod(&self) -> Result<Pod, Failure> {
        let mut pod = Pod::default();
        for part in self.args.split(';').filter(|part| !part.is_empty()) {
            let Some((key, value)) = part.split_once('=') else {
                let text = format!("CNI_ARGS has a part that is no key=value: {part:?}");
                return Err(Failure::new(code::ENVIRONMENT, text));
            };
            match key {
                "K8S_POD_NAME" => pod.name = value.to_string(),
                "K8S_POD_NAMESPACE" => pod.namespace = value.to_string(),
                _ => {}
            }
        }
        Ok(pod)
    }
}

/// A pod by its name; empty where the runtime does not work for Kubernetes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pod {
    pub name: String,
    pub namespace: String,
}

impl Pod {
    pub fn is_named(&self) -> bool {
        !self.name.is_empty() && !self.namespace.is_empty()
    }
}

/// The plugin's entry, as the agent wrote it and a runtime completed it ([`crate::install::PluginEntry`]).
#[derive(Clone, Debug, Deserialize)]
pub struct Config {
    #[serde(rename = "cniVersion", default)]
    pub version: String,
    #[serde(rename = "prevResult", default)]
    pub previous: Option<Value>,
    #[serde(default)]
    pub plugin_log_level: String,
    #[serde(default = "run_dir")]
    pub cni_agent_run_dir: PathBuf,
    #[serde(default)]
    pub ambient_enabled: bool,
    #[serde(default)]
    pub enablement_selectors: Selectors,
    #[serde(default)]
    exclude_namespaces: Option<Vec<String>>,
    #[serde(default)]
    pub pod_namespace: String,
    #[serde(default)]
    pub agent_pod_prefix: String,
    #[serde(default)]
    pub enable_ambient_detection_retry: bool,
}

fn run_dir() -> PathBuf {
    "/var/run/istio-cni".into()
}

impl Config {
    /// Reads the configuration.
    ///
    /// # Errors
    /// What is wrong with it, and where.
    pub fn read(text: &[u8]) -> Result<Self, Failure> {
        // Of a list serde would make a configuration without values.
        let read = serde_json::from_slice::<Map<String, Value>>(text)
            .and_then(|object| serde_json::from_value(object.into()));
        read.map_err(|error| {
            let text = "the configuration on standard input cannot be understood";
            let code = if error.is_data() {
                code::CONFIGURATION
            } else {
                code::DECODE
            };
            Failure::new(code, text).because(error)
        })
    }

    /// The version in which the runtime speaks.
    ///
    /// # Errors
    /// When the plugin does not know it.
    pub fn version(&self) -> Result<Version, Failure> {
        Version::parse(&self.version).ok_or_else(|| {
            let text = format!("cniVersion {:?} is not supported", self.version);
            let details = format!(
                "supported are {}",
                Version::ALL.map(Version::name).join(", ")
            );
            Failure::new(code::VERSION, text).because(details)
        })
    }

    pub fn excludes(&self, namespace: &str) -> bool {
        let excluded = self.exclude_namespaces.iter().flatten();
        excluded.into_iter().any(|excluded| excluded == namespace)
    }

    /// Whether this is a pod of the agent itself, which starts when nothing else of ours is there.
    pub fn is_agent(&self, pod: &Pod) -> bool {
        !self.agent_pod_prefix.is_empty()
            && pod.name.starts_with(&self.agent_pod_prefix)
            && pod.namespace == self.pod_namespace
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(variables: &[(&str, &str)]) -> Result<Call, Failure> {
        let own = |(name, value): &(&str, &str)| (name.to_string(), value.to_string());
        Call::read(&variables.iter().map(own).collect())
    }

    const ADD: [(&str, &str); 5] = [
        ("CNI_COMMAND", "ADD"),
        ("CNI_CONTAINERID", "c"),
        ("CNI_NETNS", "/var/run/netns/n"),
        ("CNI_IFNAME", "eth0"),
        ("CNI_PATH", "/opt/cni/bin"),
    ];

    #[test]
    fn what_a_command_needs_must_be_there() {
        assert_eq!(call(&ADD).unwrap().command, Command::Add);
        for place in 1..ADD.len() {
            let mut some = ADD.to_vec();
            let (name, _) = some.remove(place);
            let failure = call(&some).unwrap_err();
            assert_eq!(failure.code, code::ENVIRONMENT);
            assert_eq!(failure.msg, format!("the environment lacks {name}"));
        }
        let mut some = ADD.to_vec();
        some[0].1 = "DEL";
        some[2].1 = "";
        assert_eq!(call(&some).unwrap().command, Command::Del);
        some[0].1 = "add";
        assert!(call(&some).unwrap_err().msg.contains(r#""add""#));
        assert!(call(&[]).is_err());
        assert!(call(&[("CNI_COMMAND", "VERSION")]).is_ok());
    }

    #[test]
    fn pods_are_named_in_any_order_and_others_keys_are_passed_over() {
        let pod = |args: &str| {
            let mut variables = ADD.to_vec();
            variables.push(("CNI_ARGS", args));
            call(&variables).unwrap().pod()
        };
        let named = Pod {
            name: "a".to_string(),
            namespace: "b".to_string(),
        };
        let args = "K8S_POD_UID=u;IgnoreUnknown=1;K8S_POD_NAME=a;K8S_POD_NAMESPACE=b;X=y=z;";
        assert_eq!(pod(args).unwrap(), named);
        assert_eq!(pod("").unwrap(), Pod::default());
        assert!(!pod("K8S_POD_NAME=a").unwrap().is_named());
        assert!(
            pod("K8S_POD_NAME")
                .unwrap_err()
                .msg
                .contains("K8S_POD_NAME")
        );
    }

    #[test]
    fn the_configuration_is_the_one_that_the_agent_writes() {
        let text = br#"{"cniVersion":"1.0.0","name":"n","type":"warren-cni","ipam":{},"dns":{},
            "plugin_log_level":"info","cni_agent_run_dir":"/run/w","ambient_enabled":true,
            "enablement_selectors":[{"podSelector":{"matchLabels":{"a":"b"}}}],"exclude_namespaces":null,
            "pod_namespace":"warren-system","agent_pod_prefix":"warren-node-agent-",
            "native_nftables":false,"enable_ambient_detection_retry":true,"runtimeConfig":{}}"#;
        let config = Config::read(text).unwrap();
        assert_eq!(config.version().unwrap(), Version::V1_0_0);
        assert!(!config.excludes("kube-system"));
        let pod = |namespace: &str, name: &str| Pod {
            name: name.to_string(),
            namespace: namespace.to_string(),
        };
        assert!(config.is_agent(&pod("warren-system", "warren-node-agent-x")));
        assert!(!config.is_agent(&pod("demo", "warren-node-agent-x")));
        assert!(!config.is_agent(&pod("warren-system", "warren-node-agent")));

        let config = Config::read(br#"{"exclude_namespaces":["a"]}"#).unwrap();
        assert!(config.excludes("a") && !config.excludes("b"));
        assert!(!config.is_agent(&pod("", "")));
        assert_eq!(config.version().unwrap(), Version::V0_1_0);
        for (text, code) in [
            ("", code::DECODE),
            ("{", code::DECODE),
            ("[]", code::CONFIGURATION),
            (r#"{"ambient_enabled":"yes"}"#, code::CONFIGURATION),
        ] {
            assert_eq!(Config::read(text.as_bytes()).unwrap_err().code, code);
        }
        let unknown = Config::read(br#"{"cniVersion":"9.0"}"#).unwrap();
        assert_eq!(unknown.version().unwrap_err().code, code::VERSION);
    }
}
