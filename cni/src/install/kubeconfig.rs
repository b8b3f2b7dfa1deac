//! The step that lets the plugin ask the API server: a kubeconfig with the agent's own token in it.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;
use thiserror::Error;

use super::replacement::{self, FileError};
use super::{Drift, InstallConfig};
use crate::event::KUBECONFIG;

const CLUSTER: &str = "local";
const USER: &str = "istio-cni";
const CONTEXT: &str = "istio-cni-context";

/// Where the API server is and how it is recognised.
#[derive(Clone, Debug)]
pub struct KubeconfigConfig {
    /// Its URL; see [`server_url`].
    pub server: String,
    pub trust: Trust,
    /// The file's permission bits.
    pub mode: u32,
}

/// How the plugin recognises the API server.
#[derive(Clone, Debug)]
pub enum Trust {
    /// By the `ca.crt` of the service account.
    ServiceAccount,
    /// By the certificates of this file (`KUBE_CA_FILE`).
    File(PathBuf),
    /// Not at all (`SKIP_TLS_VERIFY`).
    Nothing,
}

/// Why there is no kubeconfig.
#[derive(Debug, Error)]
pub enum KubeconfigError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error("the service account's token has not been read yet; waiting for it")]
    NoToken,
    #[error("{} holds no certificate: the plugin could not recognise the API server", .0.display())]
    NoCertificate(PathBuf),
    #[error("it cannot be put into words: {0}")]
    Format(#[from] serde_yaml_ng::Error),
}

/// The API server's URL of `KUBERNETES_SERVICE_PROTOCOL`, `_HOST` and `_PORT`.
pub fn server_url(protocol: Option<&str>, host: &str, port: &str) -> String {
    let protocol = protocol.unwrap_or("https");
    match host.contains(':') && !host.starts_with('[') {
        true => format!("{protocol}://[{host}]:{port}"),
        false => format!("{protocol}://{host}:{port}"),
    }
}

/// Writes the file unless it is as it should be; says whether it did.
pub(super) fn install(config: &InstallConfig, token: &str) -> Result<bool, KubeconfigError> {
    let (path, wanted) = (path(config), text(config, token)?);
    if is(&path, &wanted, config.kubeconfig.mode)? {
        return Ok(false);
    }
    // The agent's sockets are there too, but may come later.
    fs::create_dir_all(&config.run_dir).map_err(FileError::failed("create", &config.run_dir))?;
    replacement::prepare(&path, wanted.as_bytes())?.commit(config.kubeconfig.mode)?;
    Ok(true)
}

/// What is wrong with the file.
pub(super) fn drift(config: &InstallConfig, token: &str) -> Result<Option<Drift>, KubeconfigError> {
    let (path, wanted) = (path(config), text(config, token)?);
    let good = is(&path, &wanted, config.kubeconfig.mode)?;
    Ok((!good).then_some(Drift::Kubeconfig(path)))
}

pub(super) fn uninstall(config: &InstallConfig) -> Result<(), FileError> {
    replacement::remove(&path(config))
}

/// The file of the certificates by which the API server is recognised.
pub(super) fn ca_file(config: &InstallConfig) -> Option<PathBuf> {
    match &config.kubeconfig.trust {
        Trust::ServiceAccount => Some(config.service_account.join("ca.crt")),
        Trust::File(path) => Some(path.clone()),
        Trust::Nothing => None,
    }
}

fn path(config: &InstallConfig) -> PathBuf {
    config.run_dir.join(KUBECONFIG)
}

fn is(path: &Path, wanted: &str, mode: u32) -> Result<bool, FileError> {
    let same = replacement::read(path)?.as_deref() == Some(wanted.as_bytes());
    Ok(same && replacement::mode(path) == Some(mode))
}

fn text(config: &InstallConfig, token: &str) -> Result<String, KubeconfigError> {
    let token = token.trim();
    if token.is_empty() {
        return Err(KubeconfigError::NoToken);
    }
    let ca = match ca_file(config) {
        Some(path) => Some(certificates(&path)?),
        None => None,
    };
    let file = File {
        api_version: "v1",
        clusters: [NamedCluster {
            cluster: Cluster {
                insecure_skip_tls_verify: ca.is_none(),
                certificate_authority_data: ca,
                server: &config.kubeconfig.server,
            },
            name: CLUSTER,
        }],
        contexts: [NamedContext {
            context: Context {
                cluster: CLUSTER,
                user: USER,
            },
            name: CONTEXT,
        }],
        current_context: CONTEXT,
        kind: "Config",
        users: [NamedUser {
            name: USER,
            user: User { token },
        }],
    };
    Ok(serde_yaml_ng::to_string(&file)?)
}

fn certificates(path: &Path) -> Result<String, KubeconfigError> {
    let pem = fs::read(path).map_err(FileError::failed("read", path))?;
    let begin = b"-----BEGIN CERTIFICATE-----";
    match pem.windows(begin.len()).any(|part| part == begin) {
        true => Ok(base64(&pem)),
        false => Err(KubeconfigError::NoCertificate(path.to_path_buf())),
    }
}

/// RFC 4648 §4, padded.
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let byte = |place: usize| u32::from(chunk.get(place).copied().unwrap_or(0));
        let group = byte(0) << 16 | byte(1) << 8 | byte(2);
        for place in 0..4 {
            let digit = ALPHABET[(group >> (18 - 6 * place)) as usize & 63];
            text.push(if place > chunk.len() {
                '='
            } else {
                char::from(digit)
            });
        }
    }
    text
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct File<'a> {
    api_version: &'a str,
    clusters: [NamedCluster<'a>; 1],
    contexts: [NamedContext<'a>; 1],
    #[serde(rename = "current-context")]
    current_context: &'a str,
    kind: &'a str,
    users: [NamedUser<'a>; 1],
}

#[derive(Serialize)]
struct NamedCluster<'a> {
    cluster: Cluster<'a>,
    name: &'a str,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Cluster<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    certificate_authority_data: Option<String>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    insecure_skip_tls_verify: bool,
    server: &'a str,
}

#[derive(Serialize)]
struct NamedContext<'a> {
    context: Context<'a>,
    name: &'a str,
}

#[derive(Serialize)]
struct Context<'a> {
    cluster: &'a str,
    user: &'a str,
}

#[derive(Serialize)]
struct NamedUser<'a> {
    name: &'a str,
    user: User<'a>,
}

#[derive(Serialize)]
struct User<'a> {
    token: &'a str,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_servers_url_is_that_of_the_environment() {
        let url = server_url(None, "10.96.0.1", "443");
        assert_eq!(url, "https://10.96.0.1:443");
        let url = server_url(Some("http"), "fd00::1", "8080");
        assert_eq!(url, "http://[fd00::1]:8080");
        let url = server_url(None, "[fd00::1]", "443");
        assert_eq!(url, "https://[fd00::1]:443");
    }

    #[test]
    fn base64_matches_the_vectors_of_rfc_4648() {
        for (plain, encoded) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(base64(plain.as_bytes()), encoded);
        }
        assert_eq!(base64(&[0xfb, 0xff, 0xfe]), "+//+");
    }
}
