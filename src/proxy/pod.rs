//! One captured pod on one worker: who it is, its tunnels, its live flows.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::config::Config;
use crate::dns::hosts::{Host, Hosts};
use crate::identity::Certificates;
use crate::mesh::Workload;
use crate::mesh::balance::{Choose, Ranking, RankingOf, Resolved};
use crate::mesh_feed::SharedMesh;
use crate::node::{Connector, PodNetns, Toward};
use crate::policy::Context;
use crate::telemetry::{FlowError, Reason, Telemetry};
use crate::xds::demand::Demand;

use super::budget::Budget;
use super::connections::Connections;
use super::drain::Drain;
use super::rankings::Rankings;
use hbone::{Dialer, Engine, Http2Config, Identity, LocalBoxFuture, Pool, TlsIdentity};
use tokio::net::TcpStream;

/// How long a flow waits for the record of its own workload.
const WORKLOAD_WAIT: Duration = Duration::from_secs(5);

/// How long an endpoint that failed is tried last.
const SHUNNED: Duration = Duration::from_secs(10);
/// So many live flows are judged anew in one go.
const RECHECKED: usize = 256;

/// What every pod of the process shares.
#[derive(Clone)]
pub struct Shared {
    pub config: Arc<Config>,
    pub mesh: SharedMesh,
    pub certificates: Certificates,
    pub telemetry: Arc<Telemetry>,
    pub revocations: Option<hbone::Revocations>,
    /// What the node may use.
    pub budget: Arc<Budget>,
    /// Asks for what the mesh does not know yet.
    pub demand: Demand,
    /// The addresses of workloads that have only a hostname.
    pub hosts: Hosts,
}

/// A pod as the node agent announced it.
#[derive(Debug)]
pub struct PodSpec {
    pub uid: String,
    pub name: String,
    pub namespace: String,
    pub service_account: String,
    pub netns: Arc<PodNetns>,
    /// The process's, but for the proxy's own workload.
    pub config: Arc<Config>,
    /// What the pod may use.
    pub budget: Arc<Budget>,
    /// Whether the listeners may take foreign source addresses.
    pub transparent: bool,
}

/// The pod's state on one worker.
pub struct Pod {
    pub spec: Arc<PodSpec>,
    pub shared: Rc<Shared>,
    pub pool: Pool,
    connector: Connector,
    /// What came from elsewhere to the pod.
    pub inbound: Connections,
    /// What the pod sends elsewhere.
    pub outbound: Connections,
    pub drain: Drain,
    rankings: RefCell<Rankings>,
    /// What stands in for the pod's workload record until that has arrived.
    provisional: RefCell<Option<Arc<Workload>>>,
    /// The baggage of the pod's workload record, rendered once per record.
    baggage: RefCell<Option<(Arc<Workload>, Rc<str>)>>,
    random: Cell<u64>,
    /// Workloads that failed a moment ago, by uid, and until when they are tried last.
    shunned: RefCell<HashMap<Arc<str>, Instant>>,
}

impl Choose for &Pod {
    fn random(&mut self, bound: u64) -> u64 {
        Pod::random(self, bound)
    }

    fn ranking(&mut self, of: RankingOf<'_>, compute: &dyn Fn() -> Ranking) -> Rc<Ranking> {
        self.rankings.borrow_mut().get(of, compute)
    }

    fn resolved(&mut self, hostname: &str) -> Resolved {
        match self.shared.hosts.get(hostname) {
            None => Resolved::NotYet,
            Some(Host::Unresolved) => Resolved::Failed,
            Some(Host::Addresses(addresses)) => Resolved::To(addresses),
        }
    }

    fn is_shunned(&self, workload_uid: &str) -> bool {
        let shunned = self.shunned.borrow();
        let until = shunned.get(workload_uid);
        until.is_some_and(|until| Instant::now() < *until)
    }
}

/// Dials tunnels from inside the pod.
struct PodDialer(Connector, Certificates);

impl Dialer for PodDialer {
    fn dial(&self, destination: SocketAddr) -> LocalBoxFuture<'_, io::Result<TcpStream>> {
        Box::pin(self.0.connect(destination, Toward::Elsewhere))
    }

    fn is_current(&self, source: &Identity, certificate: &Arc<TlsIdentity>) -> bool {
        let newest = self.1.cached(source);
        newest.is_some_and(|newest| Arc::ptr_eq(&newest, certificate))
    }
}

impl Pod {
    /// A pod that has no flows yet.
    pub fn new(spec: Arc<PodSpec>, shared: Rc<Shared>, engine: Engine, drain: Drain) -> Self {
        let config = &shared.config;
        let http2 = Http2Config {
            stream_window: config.stream_window,
            connection_window: config.connection_window,
            frame_size: config.frame_size,
            max_streams_per_connection: config.pool_max_streams,
            unused_release: config.pool_unused_release,
            revocations: shared.revocations.clone(),
            ..Http2Config::default()
        };
        let connector = Connector::new(spec.netns.clone(), config.clone());
        let dialer = PodDialer(connector.clone(), shared.certificates.clone());
        let seed = std::hash::RandomState::new().build_hasher().finish();
        Self {
            pool: Pool::new(engine, Rc::new(http2), Rc::new(dialer)),
            connector,
            spec,
            shared,
            inbound: Connections::default(),
            outbound: Connections::default(),
            drain,
            rankings: RefCell::default(),
            provisional: RefCell::new(None),
            baggage: RefCell::new(None),
            random: Cell::new(seed | 1),
            shunned: RefCell::default(),
        }
    }

    /// Connects to an application of the pod, with the client's address if the pod allows that.
    ///
    /// # Errors
    /// The kernel's error, or that nobody answered in time.
    pub async fn connect_application(
        &self,
        application: SocketAddr,
        client: IpAddr,
    ) -> io::Result<TcpStream> {
        let client = self.spec.transparent.then_some(client);
        let toward = Toward::Application(client);
        self.connector.connect(application, toward).await
    }

    /// Connects to the port of an application of the pod over loopback.
    ///
    /// # Errors
    /// The kernel's error, or that nobody answered in time.
    pub async fn connect_loopback(&self, application: SocketAddr) -> io::Result<TcpStream> {
        let loopback = match application {
            SocketAddr::V4(_) => IpAddr::V4(Ipv4Addr::LOCALHOST),
            SocketAddr::V6(_) => IpAddr::V6(Ipv6Addr::LOCALHOST),
        };
        let target = SocketAddr::new(loopback, application.port());
        let toward = Toward::Application(None);
        self.connector.connect(target, toward).await
    }

    /// Connects to something elsewhere from inside the pod.
    ///
    /// # Errors
    /// The kernel's error, or that nobody answered in time.
    pub async fn connect(&self, destination: SocketAddr) -> io::Result<TcpStream> {
        self.connector.connect(destination, Toward::Elsewhere).await
    }

    /// Whom the pod sends as: its workload record, or until that has arrived, what the node agent said of it.
    pub fn sender(&self) -> Arc<Workload> {
        if let Some(known) = self.known_workload() {
            return known;
        }
        let mut cache = self.provisional.borrow_mut();
        let workload = cache.get_or_insert_with(|| {
            let (spec, config) = (&self.spec, &self.shared.config);
            let mesh = self.shared.mesh.load();
            let trust_domain = mesh.local_trust_domain().unwrap_or(&config.trust_domain);
            let identity = Identity::new(trust_domain, &spec.namespace, &spec.service_account);
            tracing::info!(
                name = spec.name,
                namespace = spec.namespace,
                "the pod sends before its record has arrived, as {identity}"
            );
            Arc::new(Workload {
                name: spec.name.as_str().into(),
                network: config.network.as_str().into(),
                node: config.node.as_str().into(),
                cluster_id: config.cluster_id.as_str().into(),
                ..Workload::of(identity)
            })
        });
        workload.clone()
    }

    /// The pod's own workload record; waits a bounded time for it to arrive.
    ///
    /// # Errors
    /// For the log, when it does not arrive.
    pub async fn workload(&self) -> Result<Arc<Workload>, FlowError> {
        match self.known_workload() {
            Some(workload) => Ok(workload),
            // In a box of its own: flows hardly ever wait.
            None => Box::pin(self.awaited_workload()).await,
        }
    }

    async fn awaited_workload(&self) -> Result<Arc<Workload>, FlowError> {
        let mut changes = self.shared.mesh.subscribe();
        let arrival = async {
            loop {
                if let Some(workload) = self.known_workload() {
                    return Some(workload);
                }
                if changes.changed().await.is_err() {
                    return None;
                }
            }
        };
        if let Ok(Some(workload)) = tokio::time::timeout(WORKLOAD_WAIT, arrival).await {
            return Ok(workload);
        }
        let PodSpec {
            name,
            namespace,
            service_account,
            ..
        } = &*self.spec;
        let who = format!("{service_account}.{namespace} ({name})");
        tracing::warn!("timed out waiting for workload '{who}' from xds");
        let text = format!("failed to fetch information about local workload: {who}");
        Err(FlowError::new(Reason::UnknownSelf, text))
    }

    /// The pod's own workload record, if it has arrived.
    pub fn known_workload(&self) -> Option<Arc<Workload>> {
        let PodSpec {
            name,
            namespace,
            service_account,
            ..
        } = &*self.spec;
        self.shared
            .mesh
            .load()
            .local_workload(namespace, name, service_account)
            .cloned()
    }

    /// What the pod says of itself in a `baggage` header.
    pub fn baggage(&self, workload: &Arc<Workload>) -> Rc<str> {
        let mut cache = self.baggage.borrow_mut();
        if let Some((known, text)) = &*cache
            && Arc::ptr_eq(known, workload)
        {
            return text.clone();
        }
        let text: Rc<str> = workload.baggage().to_string().into();
        *cache = Some((workload.clone(), text.clone()));
        text
    }

    /// Has a workload tried last for a while.
    pub fn shun(&self, workload_uid: Arc<str>) {
        let now = Instant::now();
        let mut shunned = self.shunned.borrow_mut();
        shunned.retain(|_, until| now < *until);
        shunned.insert(workload_uid, now + SHUNNED);
    }

    /// A pseudo-random number below `bound`, for balancing and trace ids; not for secrets.
    pub fn random(&self, bound: u64) -> u64 {
        let mut x = self.random.get();
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        self.random.set(x);
        if bound == 0 { 0 } else { x % bound }
    }

    /// A W3C `traceparent` for a new flow.
    pub fn traceparent(&self) -> String {
        let part = || self.random(u64::MAX);
        format!("00-{:016x}{:016x}-{:016x}-00", part(), part(), part())
    }

    /// Judges the admitted flows anew and cuts those that policy no longer allows; lets others have their turn meanwhile.
    pub async fn recheck(&self) {
        let Some(workload) = self.known_workload() else {
            return;
        };
        let mut next = Some(0);
        while let Some(first) = next {
            let mesh = self.shared.mesh.load();
            let (cut, rest) = self.inbound.revoke(first, RECHECKED, |flow| {
                let context = Context {
                    identity: flow.identity.as_ref(),
                    src: flow.src,
                    dst: flow.dst,
                };
                let verdict = mesh.verdict(&workload, &context);
                verdict.is_allowed() || !verdict.is_certain()
            });
            drop(mesh);
            for flow in cut {
                let identity = flow
                    .identity
                    .as_ref()
                    .map_or_else(|| "None".to_string(), ToString::to_string);
                tracing::info!(
                    "connection {}({identity})->{} ({}) closed because it's no longer allowed after a policy update",
                    flow.src,
                    flow.dst,
                    workload.uid,
                );
            }
            next = rest;
            if next.is_some() {
                tokio::task::yield_now().await;
            }
        }
    }
}
