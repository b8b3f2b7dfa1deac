//! The embedded control plane: a folder of Kubernetes manifests, served to proxies as workloads, services, policies
//! and certificates.

pub mod ca;
mod kubernetes;
mod listen;
mod manifests;
mod server;
mod subscription;
mod tokens;
mod translate;
mod watch;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

use crate::telemetry::log;

/// The longest life of a certificate that can be asked for, in seconds: ten years.
const LONGEST_LIFE: u64 = 10 * 365 * 86_400;

/// Arguments of `warren control`.
#[derive(Args, Clone, Debug)]
pub struct ControlArgs {
    /// The folder of Kubernetes manifests (*.yaml, *.yml, *.json, with sub-folders); changes are seen at once
    #[arg(long, value_name = "DIR")]
    pub manifests: PathBuf,
    /// Where to serve discovery and certificates
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:15012")]
    pub listen: SocketAddr,
    /// Where the root certificate, its key and the nodes' tokens are kept
    #[arg(long, value_name = "DIR")]
    pub state_dir: PathBuf,
    /// The trust domain of all identities
    #[arg(long, default_value = "cluster.local")]
    pub trust_domain: String,
    /// The DNS domain of services
    #[arg(long, default_value = "cluster.local")]
    pub cluster_domain: String,
    /// The name of the cluster
    #[arg(long, default_value = "Kubernetes")]
    pub cluster_id: String,
    /// The name of the network that pods are on
    #[arg(long, default_value = "")]
    pub network: String,
    /// The namespace whose policies are for the whole mesh
    #[arg(long, default_value = "istio-system")]
    pub root_namespace: String,
    /// The longest life of a workload's certificate, such as 24h or 90s
    #[arg(long, value_name = "DURATION", default_value = "24h", value_parser = lifetime)]
    pub workload_cert_ttl: Duration,
    /// A further name or address that proxies call this control plane by
    #[arg(long, value_name = "NAME")]
    pub san: Vec<String>,
    /// A node to make a token for, besides those that the manifests name
    #[arg(long, value_name = "NAME")]
    pub node: Vec<String>,
}

/// Runs the control plane until it is told to stop.
///
/// # Errors
/// Why it cannot start.
pub fn main(arguments: ControlArgs) -> anyhow::Result<ExitCode> {
    log::init()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let result = runtime.block_on(async {
        let mut terminated = signal(SignalKind::terminate())?;
        let shutdown = async move {
            tokio::select! {
                _ = terminated.recv() => {}
                _ = tokio::signal::ctrl_c() => {}
            }
        };
        serve(&arguments, shutdown).await
    });
    log::flush();
    result.map(|()| ExitCode::SUCCESS)
}

/// A number with a unit: `90s`, `15m`, `24h` or `7d`.
fn lifetime(text: &str) -> Result<Duration, String> {
    let units = [("s", 1), ("m", 60), ("h", 3600), ("d", 86_400)];
    let seconds = units.iter().find_map(|(unit, seconds)| {
        let number: u64 = text.strip_suffix(unit)?.parse().ok()?;
        number.checked_mul(*seconds)
    });
    match seconds {
        Some(seconds @ 1..=LONGEST_LIFE) => Ok(Duration::from_secs(seconds)),
        _ => Err("expected a time such as 90s, 15m, 24h or 7d".to_string()),
    }
}

/// Serves until `shutdown` is over; the runtime must be a tokio one.
///
/// # Errors
/// Why it cannot start.
pub async fn serve(
    arguments: &ControlArgs,
    shutdown: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    let state = &arguments.state_dir;
    std::fs::create_dir_all(state).with_context(|| format!("cannot make {}", state.display()))?;
    let authority = ca::Authority::open(state, arguments.workload_cert_ttl)?;
    let mut tokens = tokens::Tokens::open(state.join("tokens"))?;
    for node in &arguments.node {
        tokens.ensure(node)?;
    }
    let settings = translate::Settings {
        cluster_id: arguments.cluster_id.clone(),
        cluster_domain: arguments.cluster_domain.clone(),
        trust_domain: arguments.trust_domain.clone(),
        network: arguments.network.clone(),
        root_namespace: arguments.root_namespace.clone(),
    };
    let (feed, snapshots) = watch::Feed::new(arguments.manifests.clone(), settings);
    let plane = Arc::new(server::Plane {
        snapshots,
        tokens: Mutex::new(tokens),
        authority,
        trust_domain: arguments.trust_domain.clone(),
    });
    let feed = feed.start(plane.clone())?;
    let mut names = vec![arguments.listen.ip().to_string(), "localhost".to_string()];
    names.extend(["warren-control", "istiod.istio-system.svc"].map(str::to_string));
    names.extend(arguments.san.iter().cloned());
    let tls = listen::tls(&plane, &names)?;
    let listener = listen::bind(arguments.listen)?;
    tracing::info!(
        "serving {} on {}, trust domain {}; proxies trust {}",
        arguments.manifests.display(),
        listener.local_addr()?,
        plane.trust_domain,
        state.join("root-cert.pem").display()
    );
    let result = tokio::select! {
        served = listen::serve(listener, tls, plane, shutdown) => served,
        () = feed.run() => Ok(()),
    };
    tracing::info!("stopped");
    result
}

#[cfg(test)]
mod tests;
