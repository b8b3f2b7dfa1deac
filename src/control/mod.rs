//! The embedded control plane: a folder of Kubernetes manifests, served to proxies as workloads, services, policies
//! and certificates.

mod ca;
mod kubernetes;
mod listen;
mod manifests;
mod server;
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

/// Arguments of `warren control`.
#[derive(Args, Clone, Debug)]
pub struct ControlArgs {
    /// The folder of Kubernetes manifests (*.yaml, *.yml, *.json, with sub-folders); changes are seen at once
    #[arg(long, value_name = "DIR")]
    manifests: PathBuf,
    /// Where to serve discovery and certificates
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:15012")]
    listen: SocketAddr,
    /// Where the root certificate, its key and the nodes' tokens are kept
    #[arg(long, value_name = "DIR")]
    state_dir: PathBuf,
    /// The trust domain of all identities
    #[arg(long, default_value = "cluster.local")]
    trust_domain: String,
    /// The DNS domain of services
    #[arg(long, default_value = "cluster.local")]
    cluster_domain: String,
    /// The name of the cluster
    #[arg(long, default_value = "Kubernetes")]
    cluster_id: String,
    /// The name of the network that pods are on
    #[arg(long, default_value = "")]
    network: String,
    /// The namespace whose policies are for the whole mesh
    #[arg(long, default_value = "istio-system")]
    root_namespace: String,
    /// The longest life of a workload's certificate, in hours
    #[arg(long, value_name = "HOURS", default_value_t = 24)]
    certificate_hours: u64,
    /// A further name or address that proxies call this control plane by
    #[arg(long, value_name = "NAME")]
    san: Vec<String>,
    /// A node to make a token for, besides the Node objects of the manifests
    #[arg(long, value_name = "NAME")]
    node: Vec<String>,
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
        serve(arguments, shutdown).await
    });
    log::flush();
    result.map(|()| ExitCode::SUCCESS)
}

async fn serve(arguments: ControlArgs, shutdown: impl Future<Output = ()>) -> anyhow::Result<()> {
    let state = &arguments.state_dir;
    std::fs::create_dir_all(state).with_context(|| format!("cannot make {}", state.display()))?;
    let life = Duration::from_secs(arguments.certificate_hours.max(1).saturating_mul(3600));
    let authority = ca::Authority::open(state, life)?;
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
        arguments.listen,
        plane.trust_domain,
        state.join("root-cert.pem").display()
    );
    tokio::select! {
        served = listen::serve(listener, tls, plane, shutdown) => served,
        () = feed.run() => Ok(()),
    }
}

#[cfg(test)]
mod tests;
