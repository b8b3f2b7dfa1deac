//! The plugin's questions to the API server, by the kubeconfig that the agent wrote.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hyper::{Method, StatusCode, Uri};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::exchange::{Asked, exchange};
use super::input::Pod;
use super::trust;
use crate::eligibility::Map;

/// How long one request may take.
const PATIENCE: Duration = Duration::from_secs(2);

/// What enrolment depends on, of a pod.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct PodObject {
    pub metadata: Metadata,
    pub spec: PodSpec,
}

/// The same, of its namespace.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct NamespaceObject {
    pub metadata: Metadata,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Metadata {
    #[serde(deserialize_with = "map")]
    pub labels: Map,
    #[serde(deserialize_with = "map")]
    pub annotations: Map,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PodSpec {
    pub host_network: bool,
}

fn map<'d, D: serde::Deserializer<'d>>(deserializer: D) -> Result<Map, D::Error> {
    Ok(Option::<Map>::deserialize(deserializer)?.unwrap_or_default())
}

/// The API server.
pub struct ApiServer {
    host: String,
    port: u16,
    authority: String,
    tls: Option<Arc<ClientConfig>>,
    token: Option<String>,
}

impl ApiServer {
    /// The server of a kubeconfig's first context, which is the only one in the agent's.
    ///
    /// # Errors
    /// What is wrong with the file.
    pub fn of_kubeconfig(path: &Path) -> Result<Self, String> {
        let text = std::fs::read_to_string(path).map_err(|error| error.to_string())?;
        let file: Kubeconfig = serde_yaml_ng::from_str(&text).map_err(|error| error.to_string())?;
        let cluster = file.clusters.into_iter().next();
        let cluster = cluster.ok_or("it names no cluster")?.cluster;
        let user = file.users.into_iter().next().map(|user| user.user);
        let server: Uri = cluster
            .server
            .parse()
            .map_err(|error| format!("server {:?}: {error}", cluster.server))?;
        let host = server.host().ok_or("its server has no host")?;
        let secure = match server.scheme_str() {
            Some("https") => true,
            Some("http") => false,
            _ => {
                return Err(format!(
                    "server {:?} is neither http nor https",
                    cluster.server
                ));
            }
        };
        let tls = match secure {
            true => Some(Arc::new(cluster.tls()?)),
            false => None,
        };
        Ok(Self {
            host: host.trim_matches(['[', ']']).to_string(),
            port: server.port_u16().unwrap_or(if secure { 443 } else { 80 }),
            authority: server
                .authority()
                .map_or("", |name| name.as_str())
                .to_string(),
            tls,
            token: user.and_then(|user| user.token),
        })
    }

    /// A pod.
    ///
    /// # Errors
    /// Why it cannot be read.
    pub async fn pod(&self, pod: &Pod) -> Result<PodObject, String> {
        let Pod { name, namespace } = pod;
        self.get(&format!("/api/v1/namespaces/{namespace}/pods/{name}"))
            .await
    }

    /// A namespace.
    ///
    /// # Errors
    /// Why it cannot be read.
    pub async fn namespace(&self, name: &str) -> Result<NamespaceObject, String> {
        self.get(&format!("/api/v1/namespaces/{name}")).await
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, String> {
        let asked = Asked {
            method: Method::GET,
            host: &self.authority,
            path,
            token: self.token.as_deref(),
            body: String::new(),
        };
        let got = async {
            let socket = TcpStream::connect((self.host.as_str(), self.port)).await;
            let socket = socket.map_err(|error| error.to_string())?;
            match &self.tls {
                None => exchange(socket, asked).await,
                Some(tls) => {
                    let name = ServerName::try_from(self.host.clone());
                    let name = name.map_err(|error| error.to_string())?;
                    let connecting = TlsConnector::from(tls.clone()).connect(name, socket);
                    let stream = connecting.await.map_err(|error| error.to_string())?;
                    exchange(stream, asked).await
                }
            }
        };
        let answered = timeout(PATIENCE, got).await;
        let answered = answered.unwrap_or_else(|_| Err(format!("no answer within {PATIENCE:?}")));
        let (status, body) = answered.map_err(|error| format!("{}: {error}", self.authority))?;
        if status != StatusCode::OK {
            let message = serde_json::from_slice::<Said>(&body)
                .unwrap_or_default()
                .message;
            return Err(format!(
                "{}: {status} for {path}: {message}",
                self.authority
            ));
        }
        serde_json::from_slice(&body)
            .map_err(|error| format!("{}: {path}: {error}", self.authority))
    }
}

/// A `Status` of Kubernetes.
#[derive(Default, Deserialize)]
struct Said {
    #[serde(default)]
    message: String,
}

#[derive(Deserialize)]
struct Kubeconfig {
    #[serde(default)]
    clusters: Vec<NamedCluster>,
    #[serde(default)]
    users: Vec<NamedUser>,
}

#[derive(Deserialize)]
struct NamedCluster {
    cluster: Cluster,
}

#[derive(Deserialize)]
struct NamedUser {
    user: User,
}

#[derive(Deserialize)]
struct User {
    #[serde(default)]
    token: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Cluster {
    server: String,
    #[serde(default)]
    certificate_authority_data: Option<String>,
    #[serde(default)]
    insecure_skip_tls_verify: bool,
}

impl Cluster {
    fn tls(&self) -> Result<ClientConfig, String> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = ClientConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?;
        if self.insecure_skip_tls_verify {
            let verifier = Arc::new(trust::Anyone(provider));
            let builder = builder
                .dangerous()
                .with_custom_certificate_verifier(verifier);
            return Ok(builder.with_no_client_auth());
        }
        let data = self.certificate_authority_data.as_deref().unwrap_or("");
        let pem = STANDARD
            .decode(data)
            .map_err(|error| format!("certificate-authority-data: {error}"))?;
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(&pem) {
            let certificate = certificate.map_err(|error| error.to_string())?;
            roots.add(certificate).map_err(|error| error.to_string())?;
        }
        if roots.is_empty() {
            return Err("certificate-authority-data holds no certificate".to_string());
        }
        Ok(builder.with_root_certificates(roots).with_no_client_auth())
    }
}
