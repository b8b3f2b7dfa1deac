//! A snapshot of the environment, and the settings that more than one variable makes.

use std::collections::BTreeMap;
use std::time::Duration;

use super::proxy_config::ProxyConfig;
use super::{
    ConfigError, ControlPeer, DEFAULT_ROOT, LocalXds, Mode, RootSource, WorkloadName, parse,
};

/// The variables; an empty value counts as unset, but for the addresses that it switches off.
pub struct Variables(pub BTreeMap<String, String>);

impl Variables {
    pub fn text(&self, name: &str) -> Option<&str> {
        self.0
            .get(name)
            .map(String::as_str)
            .filter(|v| !v.is_empty())
    }

    pub fn owned(&self, name: &str, default: &str) -> String {
        self.text(name).unwrap_or(default).to_string()
    }

    pub fn wrong(&self, name: &str, value: &str, reason: &str) -> ConfigError {
        ConfigError::Variable {
            name: name.to_string(),
            value: value.to_string(),
            reason: reason.to_string(),
        }
    }

    pub fn get<T>(
        &self,
        name: &str,
        default: &str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Result<T, ConfigError> {
        let value = self.text(name).unwrap_or(default);
        parse(value).map_err(|reason| self.wrong(name, value, &reason))
    }

    pub fn optional<T>(
        &self,
        name: &str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Result<Option<T>, ConfigError> {
        let value = self.text(name);
        value
            .map(|value| parse(value).map_err(|reason| self.wrong(name, value, &reason)))
            .transpose()
    }

    pub fn window(&self, name: &str, default: u32) -> Result<u32, ConfigError> {
        self.get(name, &default.to_string(), |v| match v.parse() {
            Ok(size @ 65_535..=0x7fff_ffff) => Ok(size),
            _ => Err("expected 65535 to 2147483647 bytes".to_string()),
        })
    }

    pub fn peer(&self, kind: &str, default: &str) -> Result<ControlPeer, ConfigError> {
        let name = format!("{kind}_ADDRESS");
        let address = match self.0.get(&name).map(String::as_str) {
            Some("") => None,
            Some(value) => Some(value),
            None => Some(default),
        };
        let address = address
            .map(|text| {
                let full = if text.contains("://") {
                    text.to_string()
                } else {
                    format!("https://{text}")
                };
                match full.parse::<http::Uri>() {
                    Ok(uri) if uri.scheme_str() == Some("https") && uri.host().is_some() => {
                        Ok(full)
                    }
                    Ok(_) => Err(ConfigError::Uri(format!(
                        "{name}={text}: expected https://HOST:PORT"
                    ))),
                    Err(e) => Err(ConfigError::Uri(format!("{name}={text}: {e}"))),
                }
            })
            .transpose()?;
        let name = format!("{kind}_ROOT_CA");
        let root = match self.text(&name) {
            None => RootSource::File(DEFAULT_ROOT.into()),
            Some("SYSTEM") => RootSource::System,
            Some(value) if value.contains("-----BEGIN") => RootSource::Inline(value.to_string()),
            Some(value) => RootSource::File(value.into()),
        };
        let prefix = format!("{kind}_HEADER_");
        let mut headers = Vec::new();
        for (key, value) in &self.0 {
            if let Some(header) = key.strip_prefix(&prefix) {
                let header = header.to_ascii_lowercase();
                if http::HeaderName::try_from(&header).is_err() {
                    return Err(ConfigError::Header(format!("key: {key}")));
                }
                if http::HeaderValue::try_from(value).is_err() {
                    return Err(ConfigError::Header(format!("value of {key}")));
                }
                headers.push((header, value.clone()));
            }
        }
        Ok(ControlPeer {
            address,
            root,
            alt_hostname: self
                .text(&format!("ALT_{kind}_HOSTNAME"))
                .map(str::to_string),
            headers,
        })
    }

    /// The socket of the SPIFFE Workload API, if certificates come from it; then they come from nowhere else.
    pub fn spiffe_socket(&self, fake_ca: bool) -> Result<Option<String>, ConfigError> {
        let name = "SPIFFE_ENDPOINT_SOCKET";
        let socket = self.optional(name, parse::unix_socket)?;
        let other = match (self.text("CA_ADDRESS"), fake_ca) {
            (Some(_), _) => "CA_ADDRESS",
            (None, true) => "FAKE_CA",
            (None, false) => return Ok(socket),
        };
        match socket {
            None => Ok(None),
            Some(_) => Err(ConfigError::Invalid(format!(
                "{name} and {other} are both set, but certificates come from one source: unset one of them"
            ))),
        }
    }

    pub fn metadata(&self, proxy_config: &ProxyConfig) -> BTreeMap<String, String> {
        let bare = |key: &str| key.trim_start_matches("ISTIO_META_").to_string();
        let mut metadata: BTreeMap<String, String> = proxy_config
            .proxy_metadata
            .iter()
            .map(|(k, v)| (bare(k), v.clone()))
            .collect();
        for (key, value) in &self.0 {
            if key.starts_with("ISTIO_META_") {
                metadata.insert(bare(key), value.clone());
            }
        }
        metadata
    }

    pub fn metadata_json(&self) -> BTreeMap<String, serde_json::Value> {
        let mut metadata = BTreeMap::new();
        for (key, value) in &self.0 {
            if let Some(name) = key.strip_prefix("ISTIO_METAJSON_") {
                match serde_json::from_str(value) {
                    Ok(json) => {
                        metadata.insert(name.to_string(), json);
                    }
                    Err(e) => tracing::error!("skipping {key}, which is not JSON: {e}"),
                }
            }
        }
        metadata
    }

    pub fn workers(
        &self,
        proxy_config: &ProxyConfig,
        detected: usize,
    ) -> Result<usize, ConfigError> {
        let optional = |name: &str| {
            self.text(name)
                .map(|v| parse::cpu_quantity(v).map_err(|reason| self.wrong(name, v, &reason)))
                .transpose()
        };
        let limit = optional("ZTUNNEL_RESOURCE_CPU_LIMIT")?;
        let request = optional("ZTUNNEL_RESOURCE_CPU_REQUEST")?.unwrap_or(0);
        let cores = limit
            .or(optional("ZTUNNEL_CPU_LIMIT")?)
            .unwrap_or(detected)
            .max(1);
        let default = match (limit, proxy_config.concurrency) {
            (_, Some(0)) => cores,
            (_, Some(count)) => count,
            (Some(limit), None) => limit.max(request),
            (None, None) => cores.div_ceil(4).max(request).max(2),
        };
        let workers = match self.text("ZTUNNEL_WORKER_THREADS") {
            Some(value) => parse::worker_threads(value, cores)
                .map_err(|reason| self.wrong("ZTUNNEL_WORKER_THREADS", value, &reason))?,
            None => default,
        };
        Ok(workers.clamp(1, 256))
    }

    pub fn termination_deadline(&self) -> Result<Duration, ConfigError> {
        if self.text("CONNECTION_TERMINATION_DEADLINE").is_some() {
            return self.get("CONNECTION_TERMINATION_DEADLINE", "5s", parse::duration);
        }
        match self.text("TERMINATION_GRACE_PERIOD_SECONDS") {
            None => Ok(Duration::from_secs(5)),
            Some(value) => {
                let seconds: u64 = value.parse().map_err(|_| {
                    self.wrong(
                        "TERMINATION_GRACE_PERIOD_SECONDS",
                        value,
                        "expected whole seconds",
                    )
                })?;
                let margin = if seconds > 10 { 5 } else { 1 };
                Ok(Duration::from_secs(seconds.saturating_sub(margin).max(1)))
            }
        }
    }

    /// Whom the process serves.
    pub fn mode(&self) -> Result<Mode, ConfigError> {
        let dedicated = self.get("PROXY_MODE", "shared", |v| match v {
            "shared" => Ok(false),
            "dedicated" => Ok(true),
            _ => Err("expected shared or dedicated".to_string()),
        })?;
        let name = "PROXY_WORKLOAD_INFO";
        match (dedicated, self.text(name)) {
            (false, _) => Ok(Mode::Shared),
            (true, None) => Err(ConfigError::Invalid(format!(
                "PROXY_MODE=dedicated needs {name}=namespace/name/service-account"
            ))),
            (true, Some(text)) => {
                let mut parts = text.splitn(3, '/').filter(|part| !part.is_empty());
                match [parts.next(), parts.next(), parts.next()] {
                    [Some(namespace), Some(name), Some(service_account)] => {
                        Ok(Mode::Dedicated(WorkloadName {
                            namespace: namespace.to_string(),
                            name: name.to_string(),
                            service_account: service_account.to_string(),
                        }))
                    }
                    _ => {
                        let reason = "expected namespace/name/service-account";
                        Err(self.wrong(name, text, reason))
                    }
                }
            }
        }
    }

    /// The proxy's own workload, if the environment names all of it.
    pub fn own_workload(&self) -> Option<WorkloadName> {
        Some(WorkloadName {
            namespace: self.text("POD_NAMESPACE")?.to_string(),
            name: self.text("POD_NAME")?.to_string(),
            service_account: self.text("SERVICE_ACCOUNT")?.to_string(),
        })
    }

    /// Where static state comes from, if from anywhere.
    pub fn local_xds(&self) -> Result<Option<LocalXds>, ConfigError> {
        match (self.text("LOCAL_XDS_PATH"), self.text("LOCAL_XDS")) {
            (Some(_), Some(_)) => Err(ConfigError::Invalid(
                "only one of LOCAL_XDS_PATH and LOCAL_XDS may be set".into(),
            )),
            (Some(path), None) => Ok(Some(LocalXds::File(path.into()))),
            (None, Some(text)) => Ok(Some(LocalXds::Inline(text.to_string()))),
            (None, None) => Ok(None),
        }
    }
}
