//! `warren proxy`: the node's tunnel daemon, put together.

use std::cell::RefCell;
use std::process::ExitCode;
use std::rc::Rc;
use std::sync::Arc;

use anyhow::Context;
use hbone::TlsOptions;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, oneshot, watch};
use tokio::task::{LocalSet, spawn_local};

use crate::admin::config_dump;
use crate::admin::console::{self, Console};
use crate::admin::http::{self, Reply};
use crate::admin::ready::{Ready, Task};
use crate::config::{Config, Mode};
use crate::dns::hosts::Hosts;
use crate::identity::channel::Peer;
use crate::identity::fake_ca::FakeCa;
use crate::identity::token::Credentials;
use crate::identity::{CaClient, Certificates, Delivered, WorkloadApi, crl};
use crate::local::{self, Local};
use crate::memory;
use crate::mesh::{Store, dump};
use crate::mesh_feed::{MeshWriter, SharedMesh};
use crate::node::zds::PodHandler;
use crate::node::{sockets, zds};
use crate::policy::evaluate;
use crate::proxy::budget::{Budget, Limits};
use crate::proxy::pod::Shared;
use crate::proxy::pods::Pods;
use crate::proxy::worker::Worker;
use crate::telemetry::{Telemetry, log, metrics};
use crate::xds::demand::{Demand, Interest, demand};
use crate::{version, xds};

/// Runs the daemon until it is told to stop.
///
/// # Errors
/// Why it cannot start, in words for the operator.
pub fn run() -> anyhow::Result<ExitCode> {
    log::init()?;
    let arguments = std::env::args().skip(1).collect::<Vec<_>>().join(" ");
    let config = Config::from_environment(arguments)?;
    tracing::info!("version: {}", version::build_info());
    evaluate::log_at_info(config.policy_info_logging);
    raise_descriptor_limit();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the control thread")?;
    let code = LocalSet::new().block_on(&runtime, serve(Arc::new(config)));
    log::flush();
    code
}

/// Every flow takes descriptors, so use all that the system grants.
fn raise_descriptor_limit() {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
        && let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        tracing::warn!("the limit of open files stays at {soft}: {error}");
    }
}

/// What the node may use: half of the open files for flows, half of the memory for what waits, unless told otherwise.
fn budget(config: &Config) -> Arc<Budget> {
    let files = getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(soft, _)| soft);
    let flows = usize::try_from(files / 2).unwrap_or(usize::MAX).max(1);
    let limits = Limits {
        flows: config.flow_budgets[0].unwrap_or(flows),
        waiting: config.memory_budgets[0].unwrap_or_else(|| memory::available() / 2),
    };
    tracing::info!(
        flows = limits.flows,
        waiting_bytes = limits.waiting,
        "budget of this node"
    );
    Budget::of_node(limits)
}

async fn serve(config: Arc<Config>) -> anyhow::Result<ExitCode> {
    sockets::check_privileges(&config)?;
    let ready = Ready::default();
    let starting = [ready.register("proxy"), ready.register("dns proxy")];
    let tag = std::env::var("ISTIO_META_ISTIO_VERSION").unwrap_or_else(|_| "unknown".to_string());
    let telemetry = Arc::new(Telemetry::new(&tag));
    let certificates = certificates(&config)?;
    spawn_local(certificates.clone().run());
    spawn_local(memory::follow(telemetry.clone()));
    let mesh = SharedMesh::new(Store::new("").snapshot());
    let lists = config.crl.clone().map(crl::load).transpose()?;
    let revocations = lists.as_ref().map(|lists| lists.revocations.clone());
    if let Some(lists) = lists {
        spawn_local(lists.follow(telemetry.clone()));
    }
    let budget = budget(&config);
    let (demand, interest) = match config.on_demand {
        true => {
            let (demand, interest) = demand();
            (demand, Some(interest))
        }
        false => (Demand::default(), None),
    };
    let shared = Shared {
        revocations,
        budget,
        demand,
        hosts: Hosts::default(),
        config: config.clone(),
        mesh: mesh.clone(),
        certificates: certificates.clone(),
        telemetry: telemetry.clone(),
    };
    let workers: std::io::Result<Vec<_>> = (0..config.workers)
        .map(|index| Worker::start(index, shared.clone()))
        .collect();
    let workers = workers.context("cannot start the data-plane workers")?;
    serve_readiness(&workers[0], &config, &ready).await?;
    let pods = Rc::new(Pods::new(shared, workers, ready.clone()));
    let quit = Arc::new(Notify::new());
    let dumped = Rc::new(Dumped {
        config: config.clone(),
        pods: pods.clone(),
        mesh: mesh.clone(),
        certificates: certificates.clone(),
        local: RefCell::default(),
    });
    serve_http(&config, &dumped, &telemetry, &quit)?;

    let state = ready.register("state manager");
    let (synced, arrived) = oneshot::channel();
    let done = move || {
        drop(state);
        let _ = synced.send(());
    };
    let writer = MeshWriter::new(config.node.clone(), mesh, certificates);
    let writer = Rc::new(writer);
    if let Some(source) = config.local_xds.clone() {
        let local = Local::load(source)?;
        *dumped.local.borrow_mut() = local.state();
        let told = dumped.clone();
        let told = move |state| *told.local.borrow_mut() = state;
        spawn_local(local.follow(writer.clone(), told));
    }
    follow_control_plane(&config, writer, &telemetry, interest, done)?;
    let work = async {
        // Pods are only served once it is known who may talk to whom.
        let _ = arrived.await;
        let code = serve_pods(&config, &pods, starting).await;
        code.unwrap_or_else(|error| {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        })
    };
    let code = tokio::select! {
        code = work => code,
        reason = told_to_stop(&quit) => {
            tracing::info!("{reason}");
            ExitCode::SUCCESS
        }
    };
    tokio::select! {
        () = pods.stop(config.termination_deadline) => {}
        _ = interrupted() => {}
    }
    tracing::info!("shutdown complete");
    Ok(code)
}

/// Serves whom this process is there for; only ends when it cannot go on.
async fn serve_pods(config: &Config, pods: &Pods, starting: [Task; 2]) -> anyhow::Result<ExitCode> {
    let refused = |error: String| anyhow::anyhow!(error);
    if let Mode::Dedicated(name) = &config.mode {
        pods.ready(true);
        pods.serve_here(name).await.map_err(refused)?;
        drop(starting);
        return std::future::pending().await;
    }
    if let Some(name) = &config.own_workload
        && let Err(error) = pods.serve_own(name).await
    {
        tracing::error!("the proxy's own metrics cannot be reached through the mesh: {error}");
    }
    drop(starting);
    let ended = zds::follow(&config.zds_path, pods).await;
    ended.context("the node agent broke the protocol")?;
    Ok(ExitCode::SUCCESS)
}

fn certificates(config: &Config) -> anyhow::Result<Certificates> {
    let tls = TlsOptions {
        tls12: config.tls12,
        pqc: config.pqc,
    };
    if let Some(socket) = &config.spiffe_socket {
        let (deliver, delivered) = watch::channel(Delivered::default());
        spawn_local(WorkloadApi::new(socket, tls).run(deliver));
        return Ok(Certificates::pushed(delivered));
    }
    if config.fake_ca {
        tracing::warn!("FAKE_CA=true: certificates are signed here and prove nothing");
        return Ok(Certificates::new(Arc::new(FakeCa::open(tls)?)));
    }
    let peer = Peer::new(config, &config.ca).context("CA_ADDRESS is empty")?;
    let credentials =
        Credentials::new(config.token.clone(), &config.cluster_id, &config.ca.headers)?;
    Ok(Certificates::new(Arc::new(CaClient::new(
        &peer,
        credentials,
        config.secret_ttl,
        config.mode == Mode::Shared,
    )?)))
}

/// Readiness is served by a worker on purpose: it shows that the data path is alive.
async fn serve_readiness(worker: &Worker, config: &Config, ready: &Ready) -> anyhow::Result<()> {
    let (listener, ready) = (http::listen(config.readiness)?, ready.clone());
    let started = worker.ask(move |_| {
        spawn_local(http::serve(listener, "readiness", move |request| {
            let reply = ready.answer(&request);
            async move { reply }
        }));
    });
    started.await.context("the data-plane worker has stopped")
}

fn serve_http(
    config: &Arc<Config>,
    dumped: &Rc<Dumped>,
    telemetry: &Arc<Telemetry>,
    quit: &Arc<Notify>,
) -> anyhow::Result<()> {
    let scraped = (dumped.pods.clone(), telemetry.clone());
    spawn_local(http::serve(
        http::listen(config.stats)?,
        "stats",
        move |request: http::Request| {
            let (pods, telemetry) = scraped.clone();
            async move {
                if !matches!(&*request.path, "/metrics" | "/stats/prometheus") {
                    return Reply::empty(404);
                }
                pods.settle().await;
                let content_type = match request.accepts(metrics::MEDIA_TYPE) {
                    true => metrics::CONTENT_TYPE,
                    false => metrics::PLAIN_TYPE,
                };
                Reply::of(content_type, telemetry.encode()).compressed_for(&request)
            }
        },
    ));
    for address in sockets::addresses(config.admin, config.ipv6 && sockets::has_ipv6()) {
        let (dumped, quit) = (dumped.clone(), quit.clone());
        let handler = move |request| console::answer(dumped.clone(), quit.clone(), request);
        spawn_local(http::serve(http::listen(address)?, "admin", handler));
    }
    Ok(())
}

fn follow_control_plane(
    config: &Arc<Config>,
    mesh: Rc<MeshWriter>,
    telemetry: &Arc<Telemetry>,
    interest: Option<Interest>,
    synced: impl FnOnce() + Send + 'static,
) -> anyhow::Result<()> {
    let Some(peer) = Peer::new(config, &config.xds) else {
        mesh.needs_no_policies();
        synced();
        return Ok(());
    };
    let credentials = Credentials::new(
        config.token.clone(),
        &config.cluster_id,
        &config.xds.headers,
    )?;
    let telemetry = telemetry.clone();
    let client =
        xds::client::Client::new(config, peer, credentials, mesh, telemetry, interest, synced);
    spawn_local(client.run());
    Ok(())
}

struct Dumped {
    config: Arc<Config>,
    pods: Rc<Pods>,
    mesh: SharedMesh,
    certificates: Certificates,
    /// What the local source says.
    local: RefCell<Arc<local::State>>,
}

impl Console for Dumped {
    async fn config_dump(&self) -> Value {
        let mesh = self.mesh.load().clone();
        json!({
            "certificates": self.certificates.dump(),
            "config": config_dump::config(&self.config),
            "policies": dump::policies(&mesh),
            "services": dump::services(&mesh),
            "stagedServices": dump::staged_services(&mesh),
            "staticConfig": self.local.borrow().dump(),
            "version": version::dump(),
            "workloads": dump::workloads(&mesh),
            "workloadState": self.pods.dump().await,
        })
    }
}

async fn told_to_stop(quit: &Notify) -> &'static str {
    let terminated = async {
        match signal(SignalKind::terminate()) {
            Ok(mut signal) => drop(signal.recv().await),
            Err(error) => {
                tracing::error!("SIGTERM will not be seen: {error}");
                std::future::pending::<()>().await;
            }
        }
    };
    tokio::select! {
        () = terminated => "received signal SIGTERM, starting shutdown",
        _ = interrupted() => "received signal SIGINT, starting shutdown",
        () = quit.notified() => "received explicit shutdown signal",
    }
}

async fn interrupted() {
    if let Err(error) = tokio::signal::ctrl_c().await {
        tracing::error!("SIGINT will not be seen: {error}");
        std::future::pending::<()>().await;
    }
}
