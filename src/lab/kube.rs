//! The lab's Kubernetes API as its node agents find it: an address, a certificate, an account.

use std::io::Read;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rustls::pki_types::PrivateKeyDer;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::runtime::Handle;

use super::addresses;
use super::api::{ApiServer, Options};
use super::family::IpFamily;
use super::state::StateDir;

/// The namespace of the mesh's own parts.
pub const SYSTEM_NAMESPACE: &str = "istio-system";
/// The account and the DaemonSet of the node agents.
const AGENT: &str = "warren-node-agent";
/// What the agent says of a pod's capture.
pub const REDIRECTION: &str = "ambient.istio.io/redirection";
const ENABLED: &str = "enabled";

/// The API server and what a client of it needs.
#[derive(Clone)]
pub struct KubeApi {
    pub server: ApiServer,
    account: PathBuf,
    families: IpFamily,
}

impl KubeApi {
    /// Serves on the bridge; there are only the objects that every cluster has.
    ///
    /// # Errors
    /// When the certificate, the account or the listener cannot be made.
    pub fn start(dir: &StateDir, families: IpFamily, runtime: &Handle) -> anyhow::Result<Self> {
        let account = dir.folder("account")?;
        let address = addresses::api_server(families);
        let rcgen::CertifiedKey { cert, signing_key } =
            rcgen::generate_simple_self_signed([address.ip().to_string()])?;
        let token = token()?;
        std::fs::write(account.join("ca.crt"), cert.pem())?;
        std::fs::write(account.join("token"), &token)?;
        let key = PrivateKeyDer::try_from(signing_key.serialize_der())
            .map_err(|reason| anyhow::anyhow!("the API server's key: {reason}"))?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let tls = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(vec![cert.der().clone()], key)?;
        let server = ApiServer::new(Options {
            tokens: Some(vec![token.clone()]),
            issue_token: Some(Box::new(move |_, _| token.clone())),
            ..Options::default()
        });
        for object in standing() {
            server.put(object);
        }
        let listener = runtime
            .block_on(TcpListener::bind(address))
            .context("the API server's port")?;
        let serving = server.clone();
        runtime.spawn(async move {
            let forever = std::future::pending::<()>();
            if let Err(reason) = serving.serve(listener, Some(Arc::new(tls)), forever).await {
                eprintln!("the API server ends: {reason}");
            }
        });
        Ok(Self {
            server,
            account,
            families,
        })
    }

    /// The variables by which a pod finds the API server.
    pub fn environment(&self) -> [(&'static str, String); 3] {
        let address = addresses::api_server(self.families);
        [
            ("KUBERNETES_SERVICE_HOST", address.ip().to_string()),
            ("KUBERNETES_SERVICE_PORT", address.port().to_string()),
            (
                "SERVICE_ACCOUNT_DIR",
                self.account.to_string_lossy().into_owned(),
            ),
        ]
    }

    /// Makes a namespace that nobody has described.
    pub fn ensure_namespace(&self, name: &str) {
        if self.server.object("namespaces", "", name).is_none() {
            self.server.put(namespace(name));
        }
    }

    /// What the agent says of a pod's capture.
    pub fn redirection(&self, namespace: &str, name: &str) -> Option<String> {
        let pod = self.server.object("pods", namespace, name)?;
        let said = pod["metadata"]["annotations"][REDIRECTION].as_str();
        said.map(str::to_owned)
    }

    /// Whether the agent has said that a pod is captured.
    pub fn is_captured(&self, namespace: &str, name: &str) -> bool {
        self.redirection(namespace, name).as_deref() == Some(ENABLED)
    }
}

/// What there is besides the user's objects.
fn standing() -> [Value; 3] {
    let metadata = json!({"name": AGENT, "namespace": SYSTEM_NAMESPACE});
    [
        namespace(SYSTEM_NAMESPACE),
        json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata}),
        // While it is there, an agent that ends leaves everything in place for the next one.
        json!({
            "apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": metadata,
            "spec": {"selector": {}, "template": {"metadata": {}, "spec": {"containers": []}}},
        }),
    ]
}

fn namespace(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
}

/// A token that says whose it is, as those of an API server do, and that nobody can guess.
fn token() -> anyhow::Result<String> {
    let claims = json!({"kubernetes.io": {
        "namespace": SYSTEM_NAMESPACE, "serviceaccount": {"name": AGENT},
    }});
    let mut secret = [0; 32];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut secret)?;
    let part = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
    Ok(format!(
        "{}.{}.{}",
        part(b"{}"),
        part(claims.to_string().as_bytes()),
        part(&secret)
    ))
}
