//! `warren node-agent`: captures the pods of a node, hands them to the node's proxy, and keeps the CNI plugin in place.

mod cluster;
mod enroller;
mod guard;
mod journal;
mod metrics;
mod queue;
mod resume;
mod settings;
mod shutdown;
mod sockets;
mod token;

use std::fmt::Write;
use std::net::{Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;
use std::pin::pin;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use anyhow::Context;
use cni::host::{Host, HostConfig};
use cni::install::{self, InstallConfig, Installer, KubeconfigConfig, PluginEntry, Status, Trust};
use cni::zds::ZdsServer;
use cni::{backend, netns};
use futures_util::{Stream, StreamExt};
use k8s_openapi::api::core::v1::{Namespace, Pod};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{JoinHandle, LocalSet};

use crate::admin::http::{self, Reply, Request};
use crate::telemetry::log;
use crate::version;

pub use settings::NodeAgentArgs;

use cluster::{Cluster, Enrolment};
use enroller::Enroller;
use journal::Journal;
use metrics::Metrics;
use settings::Settings;
use shutdown::Ending;

/// How often, and with which pauses, the node's rules are tried before the agent gives up.
const HOST_RULES: (u32, Duration) = (11, Duration::from_secs(2));
/// How long a connection to the API server may take.
const CONNECT: Duration = Duration::from_secs(5);
/// The content type of metrics.
const OPENMETRICS: &str = "application/openmetrics-text;charset=utf-8;version=1.0.0";

/// Runs the agent until it is told to stop.
///
/// # Errors
/// Why it cannot start, in words for the operator.
pub fn main(arguments: NodeAgentArgs) -> anyhow::Result<ExitCode> {
    log::init()?;
    let settings = Settings::new(arguments)?;
    tracing::info!("version: {}", version::build_info());
    // A second installation of the same provider changes nothing.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the agent's thread")?;
    let result = LocalSet::new().block_on(&runtime, run(settings));
    log::flush();
    result.map(|()| ExitCode::SUCCESS)
}

/// What readiness depends on, and what is told with it.
struct Health {
    installed: Mutex<Result<(), String>>,
    watching: AtomicBool,
    metrics: Arc<Metrics>,
    enroller: OnceLock<Arc<Enroller>>,
}

async fn run(mut settings: Settings) -> anyhow::Result<()> {
    let mut terminated = signal(SignalKind::terminate())?;
    let mut interrupted = signal(SignalKind::interrupt())?;
    let health = Arc::new(Health {
        installed: Mutex::new(Err("not installed yet".to_string())),
        watching: AtomicBool::new(!settings.ambient),
        metrics: Arc::default(),
        enroller: OnceLock::new(),
    });
    serve_http(&settings, &health)?;
    let client = connect(&settings).await?;
    let host = match settings.ambient {
        true => Some(open_host(&mut settings).await?),
        false => None,
    };
    let settings = Arc::new(settings);
    let (tokens, token) = watch::channel(String::new());
    let renewing = token::follow(
        client.clone(),
        &settings.arguments.service_account_dir,
        &tokens,
    );
    let (stop, stopped) = oneshot::channel::<()>();
    let installing = keep_installed(&settings, token, &health, async {
        let _ = stopped.await;
    })?;
    let capturing = async {
        match &host {
            Some(host) => capture(&settings, &client, host.clone(), &health).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        result = capturing => result?,
        () = renewing => {}
        _ = terminated.recv() => {}
        _ = interrupted.recv() => {}
    }
    drop(stop);
    let installer = match installing {
        Some(installing) => Some(installing.await?),
        None => None,
    };
    let ending = shutdown::decide(&client, &settings).await;
    tracing::info!("{ending}");
    if let Ending::Clean(_) = ending {
        if let Some(installer) = installer {
            installer.uninstall()?;
        }
        if let Some(host) = host {
            let removed = tokio::task::spawn_blocking(move || host.remove_all()).await?;
            removed.context("the node's rules cannot be removed")?;
        }
    }
    Ok(())
}

/// Captures pods for ever.
async fn capture(
    settings: &Arc<Settings>,
    client: &Client,
    host: Host,
    health: &Arc<Health>,
) -> anyhow::Result<()> {
    let arguments = &settings.arguments;
    let run_dir = &arguments.cni_agent_run_dir;
    let (touch, touched) = mpsc::unbounded_channel();
    let enrolment = Enrolment {
        selectors: settings.selectors.clone(),
        excluded: settings.excluded.clone(),
        system_namespace: arguments.system_namespace.clone(),
    };
    let cluster = Cluster::new(enrolment, touch);
    let host_netns = netns::open(&settings.host_netns)?.into();
    let enroller = Arc::new(Enroller {
        cluster: cluster.clone(),
        zds: ZdsServer::default(),
        host,
        places: Journal::open(run_dir.join("netns"))?,
        journal: Journal::open(run_dir.join("pods"))?,
        metrics: health.metrics.clone(),
        settings: settings.clone(),
        client: client.clone(),
        foreign: Enroller::own_namespaces(&host_netns)?,
        known: Default::default(),
        reported: Default::default(),
    });
    let _ = health.enroller.set(enroller.clone());
    let events = sockets::bind(&run_dir.join(cni::event::EVENT_SOCKET))?;
    let log = sockets::bind(&run_dir.join(cni::event::LOG_SOCKET))?;
    let on_node =
        watcher::Config::default().fields(&format!("spec.nodeName={}", arguments.node_name));
    let pods = watcher(Api::<Pod>::all(client.clone()), on_node);
    let namespaces = watcher(
        Api::<Namespace>::all(client.clone()),
        watcher::Config::default(),
    );
    let watching = async {
        tokio::join!(
            follow("pods", pods, |event| cluster.pod_event(event)),
            follow("namespaces", namespaces, |event| cluster
                .namespace_event(event)),
        )
    };
    let working = async {
        cluster.synced().await;
        enroller.resume().await?;
        enroller
            .zds
            .listen(&arguments.ztunnel_uds_address)
            .with_context(|| {
                format!(
                    "cannot listen for proxies at {}",
                    arguments.ztunnel_uds_address.display()
                )
            })?;
        health.watching.store(true, Ordering::Relaxed);
        enroller.publish();
        tracing::info!(node = %arguments.node_name, "watching pods");
        let worker = enroller.clone();
        let work = move |uid| {
            let worker = worker.clone();
            async move { worker.reconcile(uid).await }
        };
        tokio::join!(queue::run(touched, work), enroller.guard());
        Ok(())
    };
    tokio::select! {
        _ = watching => Ok(()),
        result = working => result,
        () = sockets::serve_events(events, enroller.clone()) => Ok(()),
        () = sockets::serve_log(log) => Ok(()),
    }
}

/// Takes in everything that a watch tells; it is begun anew, with pauses, when it fails.
async fn follow<K>(
    what: &str,
    events: impl Stream<Item = Result<watcher::Event<K>, watcher::Error>> + Send,
    take: impl Fn(watcher::Event<K>),
) where
    K: kube::Resource + Clone + std::fmt::Debug + Send + 'static,
{
    let mut events = pin!(events.default_backoff());
    let mut failing = false;
    while let Some(event) = events.next().await {
        match event {
            Ok(event) => {
                if std::mem::take(&mut failing) {
                    tracing::info!("watching {what} again");
                }
                take(event);
            }
            Err(error) => {
                if std::mem::replace(&mut failing, true) {
                    tracing::debug!("{what} cannot be watched still: {error}");
                } else {
                    tracing::warn!("{what} cannot be watched, will be tried again: {error}");
                }
            }
        }
    }
}

/// The API server, as the environment of a pod names it, or as a kubeconfig does.
async fn connect(settings: &Settings) -> anyhow::Result<Client> {
    let config = match std::env::var_os("KUBECONFIG") {
        Some(_) => kube::Config::infer()
            .await
            .context("KUBECONFIG cannot be used")?,
        None => in_cluster(settings)?,
    };
    Client::try_from(config).context("cannot use the API server")
}

fn in_cluster(settings: &Settings) -> anyhow::Result<kube::Config> {
    let server = api_server()?;
    let mut config = kube::Config::new(server.parse().context("the address of the API server")?);
    let folder = &settings.arguments.service_account_dir;
    let file = folder.join("token");
    if file.exists() {
        config.auth_info.token_file = Some(file.display().to_string());
    }
    let ca = folder.join("ca.crt");
    if ca.exists() {
        config.root_cert_file = Some(ca);
    }
    config.accept_invalid_certs = settings.skip_tls_verify;
    config.connect_timeout = Some(CONNECT);
    Ok(config)
}

/// Puts the rules for probes into the node's namespace; other programs may be changing them at the same time.
async fn open_host(settings: &mut Settings) -> anyhow::Result<Host> {
    let path = settings.host_netns.clone();
    let netns = netns::open(&path).with_context(|| {
        format!(
            "{} cannot be opened: mount the node's /proc, and give the agent the capability SYS_PTRACE",
            path.display()
        )
    })?;
    let choice = backend::choose(netns.as_fd(), settings.native_nftables);
    if let Some(note) = choice.note {
        tracing::warn!("{note}");
    }
    settings.capture.backend = choice.backend;
    let mut failure = None;
    for attempt in 0..HOST_RULES.0 {
        if attempt > 0 {
            tokio::time::sleep(HOST_RULES.1).await;
        }
        let config = HostConfig {
            backend: settings.capture.backend,
            ipv6: settings.capture.captures_ipv6(),
            probe_v4: settings.capture.probe_v4,
            probe_v6: settings.capture.probe_v6,
            proc: settings.proc.clone(),
            branch_eni: settings.branch_eni,
        };
        let netns = netns.try_clone()?;
        let opened =
            tokio::task::spawn_blocking(move || anyhow::Ok(Host::open(netns.into(), config)?));
        match opened.await? {
            Ok(host) => return Ok(host),
            Err(error) => {
                tracing::warn!("the node's rules for probes: {error:#}");
                failure = Some(error);
            }
        }
    }
    let failure = failure.unwrap_or_else(|| anyhow::anyhow!("never tried"));
    Err(failure.context("the node's rules for probes cannot be made"))
}

/// Keeps the plugin installed until `stop` is over; then the installer comes back.
fn keep_installed(
    settings: &Settings,
    token: watch::Receiver<String>,
    health: &Arc<Health>,
    stop: impl Future<Output = ()> + Send + 'static,
) -> anyhow::Result<Option<JoinHandle<Installer>>> {
    if !settings.install {
        health.installed(Ok(()));
        return Ok(None);
    }
    let installer = Installer::new(install_config(settings)?);
    let health = health.clone();
    let told = move |status: &Status| {
        let ready = status.is_ready();
        health
            .metrics
            .install_ready
            .store(ready.into(), Ordering::Relaxed);
        if let Some(result) = status.result() {
            health.metrics.installs.count(result);
        }
        health.installed(match status {
            Status::Ready => Ok(()),
            Status::Installed(_) => Err("not checked yet".to_string()),
            Status::Failed(error) => Err(error.to_string()),
            Status::Drifted(drift) => Err(drift.to_string()),
        });
    };
    Ok(Some(tokio::spawn(installer.run(token, told, stop))))
}

fn install_config(settings: &Settings) -> anyhow::Result<InstallConfig> {
    let a = &settings.arguments;
    let named = |text: &String| (!text.is_empty()).then(|| text.clone());
    let trust = match (settings.skip_tls_verify, named(&a.kube_ca_file)) {
        (true, _) => Trust::Nothing,
        (false, Some(file)) => Trust::File(file.into()),
        (false, None) => Trust::ServiceAccount,
    };
    Ok(InstallConfig {
        bin_source: a.cni_bin_source_dir.clone(),
        bin_targets: vec![a.mounted_cni_bin_dir.clone()],
        conf_dir: a.mounted_cni_net_dir.clone(),
        conf_name: named(&a.cni_conf_name),
        chained: settings.chained,
        owned: settings.owned.clone(),
        group_read: settings.group_read,
        run_dir: a.cni_agent_run_dir.clone(),
        service_account: a.service_account_dir.clone(),
        kubeconfig: KubeconfigConfig {
            server: api_server()?,
            trust,
            mode: settings.kubeconfig_mode,
        },
        entry: PluginEntry {
            log_level: a.plugin_log_level.clone(),
            ambient_enabled: settings.ambient,
            enablement_selectors: settings.selectors.clone(),
            exclude_namespaces: settings.excluded.clone(),
            pod_namespace: a.pod_namespace.clone(),
            agent_pod_prefix: format!("{}-", a.daemonset_name),
            native_nftables: settings.native_nftables,
            enable_ambient_detection_retry: settings.plugin_retries,
        },
    })
}

/// The API server's URL, as Kubernetes tells it to every container.
fn api_server() -> anyhow::Result<String> {
    let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let required = |name| {
        variable(name).with_context(|| {
            format!("{name} is not set: outside a pod it must name the API server, with KUBERNETES_SERVICE_PORT beside it")
        })
    };
    Ok(install::server_url(
        variable("KUBERNETES_SERVICE_PROTOCOL").as_deref(),
        &required("KUBERNETES_SERVICE_HOST")?,
        &required("KUBERNETES_SERVICE_PORT")?,
    ))
}

impl Health {
    fn installed(&self, state: Result<(), String>) {
        *self
            .installed
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = state;
    }

    /// Whether the agent does its work, with everything an operator should know.
    fn reply(&self) -> Reply {
        let mut text = String::new();
        let installed = self
            .installed
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let watching = self.watching.load(Ordering::Relaxed);
        let _ = match &installed {
            Ok(()) => writeln!(text, "plugin: installed"),
            Err(reason) => writeln!(text, "plugin: NOT INSTALLED: {reason}"),
        };
        let _ = writeln!(
            text,
            "pods: {}",
            if watching {
                "watched"
            } else {
                "NOT WATCHED yet"
            }
        );
        if let Some(enroller) = self.enroller.get() {
            let overview = enroller.overview();
            let _ = writeln!(
                text,
                "proxies connected: {}",
                *enroller.zds.connected().borrow()
            );
            let _ = writeln!(text, "captured: {}", overview.captured);
            for (name, reason) in overview.pending {
                let _ = writeln!(text, "pending: {name}: {reason}");
            }
            for (name, reason) in overview.uncaptured {
                let _ = writeln!(text, "NOT CAPTURED: {name}: {reason}");
            }
        }
        Reply::text(
            if installed.is_ok() && watching {
                200
            } else {
                503
            },
            text,
        )
    }
}

fn serve_http(settings: &Settings, health: &Arc<Health>) -> anyhow::Result<()> {
    let any = |port| SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
    let asked = health.clone();
    let handler = move |request: Request| {
        let health = asked.clone();
        async move {
            match request.path.as_str() {
                "/healthz" => Reply::text(200, "ok\n"),
                "/readyz" => health.reply(),
                _ => Reply::text(404, "there is /healthz and /readyz here\n"),
            }
        }
    };
    let listener = http::listen(any(settings.arguments.health_port))?;
    tokio::task::spawn_local(http::serve(listener, "health", handler));
    let Some(port) = u16::try_from(settings.arguments.monitoring_port)
        .ok()
        .filter(|port| *port > 0)
    else {
        return Ok(());
    };
    let asked = health.clone();
    let handler = move |request: Request| {
        let health = asked.clone();
        async move {
            if request.path != "/metrics" {
                return Reply::text(404, "there is /metrics here\n");
            }
            if let Some(enroller) = health.enroller.get() {
                enroller.publish();
            }
            Reply::of(OPENMETRICS, health.metrics.encode()).compressed_for(&request)
        }
    };
    let listener = http::listen(any(port))?;
    tokio::task::spawn_local(http::serve(listener, "metrics", handler));
    Ok(())
}
