//! The part of a mesh's `ProxyConfig` document that a node proxy reads.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::ConfigError;

/// Fields of a ProxyConfig; what it does not name is left to the defaults, unknown fields are ignored.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ProxyConfig {
    pub discovery_address: Option<String>,
    pub proxy_admin_port: Option<u16>,
    pub stats_port: Option<u16>,
    pub concurrency: Option<usize>,
    pub proxy_metadata: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct MeshConfig {
    #[serde(default)]
    default_config: ProxyConfig,
}

impl ProxyConfig {
    /// Merges the mesh config file's text with `PROXY_CONFIG`, field by field; the latter wins.
    pub fn load(mesh_config: Option<&str>, own: Option<&str>) -> Result<Self, ConfigError> {
        let base = match mesh_config {
            None => Self::default(),
            Some(text) => {
                serde_yaml_ng::from_str::<MeshConfig>(text)
                    .map_err(|e| {
                        ConfigError::ProxyConfig(format!("failed parsing mesh config file: {e}"))
                    })?
                    .default_config
            }
        };
        let own: Self = match own {
            None => Self::default(),
            Some(text) => serde_yaml_ng::from_str(text)
                .map_err(|e| ConfigError::ProxyConfig(format!("PROXY_CONFIG: {e}")))?,
        };
        let mut proxy_metadata = base.proxy_metadata;
        proxy_metadata.extend(own.proxy_metadata);
        Ok(Self {
            discovery_address: own.discovery_address.or(base.discovery_address),
            proxy_admin_port: own.proxy_admin_port.or(base.proxy_admin_port),
            stats_port: own.stats_port.or(base.stats_port),
            concurrency: own.concurrency.or(base.concurrency),
            proxy_metadata,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_fields_win_and_metadata_merges() {
        let mesh = "defaultConfig:\n  discoveryAddress: a:1\n  concurrency: 2\n  proxyMetadata: {A: x, B: x}\n";
        let merged =
            ProxyConfig::load(Some(mesh), Some("{concurrency: 4, proxyMetadata: {B: y}}")).unwrap();
        assert_eq!(merged.discovery_address.as_deref(), Some("a:1"));
        assert_eq!(merged.concurrency, Some(4));
        assert_eq!(merged.proxy_metadata["A"], "x");
        assert_eq!(merged.proxy_metadata["B"], "y");
    }

    #[test]
    fn metadata_may_be_absent_and_nonsense_is_refused() {
        assert!(ProxyConfig::load(None, Some("statsPort: 1")).is_ok());
        assert!(ProxyConfig::load(None, Some("statsPort: many")).is_err());
    }
}
