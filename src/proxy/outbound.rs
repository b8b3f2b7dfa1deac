//! A captured connection of a pod: find where it goes, wrap it, carry it.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use hbone::{Baggage, ConnectHeaders, PoolKey, Stream};
use tokio::io::Interest;
use tokio::net::TcpStream;

use super::connections::{Admission, Asked, Registration};
use super::pod::Pod;
use super::relay::relay;
use super::{Accepted, Refusal, socks5};
use crate::mesh::route::{self, Route, RouteError, RouteKind};
use crate::mesh::snapshot::Address;
use crate::mesh::{Mesh, Service, Workload};
use crate::node::sockets;
use crate::policy::egress;
use crate::telemetry::{Direction, Flow, FlowError, Reason};

/// How often one thing that is asked for may lead to another: a service's waypoint, its network's gateway.
const STEPS: usize = 4;

/// How a connection says where it goes.
#[derive(Clone, Copy)]
pub enum Entry {
    /// The kernel remembers it, since it was redirected.
    Captured,
    /// The client is asked.
    Socks5,
}

/// Serves one connection accepted on 15001.
pub fn serve(pod: Rc<Pod>, accepted: Accepted) -> impl Future<Output = ()> {
    serve_entry(pod, accepted, Entry::Captured)
}

/// Serves one connection that entered that way.
pub async fn serve_entry(pod: Rc<Pod>, accepted: Accepted, entry: Entry) {
    let Accepted {
        mut socket,
        client,
        held: _held,
    } = accepted;
    // What is only needed until the flow is open lies in a box that is gone by then.
    let begun = Box::pin(begin(&pod, &mut socket, client, entry)).await;
    let Some((flow, opened)) = begun else { return };
    let result = match opened {
        (Far::Tunnel(stream), _registration) => carry(stream, socket, &flow).await,
        (Far::Socket(far), _registration) => {
            let counters = flow.counters();
            copied(relay(socket, far, &counters.sent, &counters.received).await)
        }
    };
    flow.finish(result);
}

/// What a flow goes on through.
enum Far {
    Tunnel(Stream),
    Socket(TcpStream),
}

type Opened = (Far, Registration);

/// Learns where the flow goes and opens it; what comes to nothing has been told.
async fn begin(
    pod: &Rc<Pod>,
    socket: &mut TcpStream,
    client: SocketAddr,
    entry: Entry,
) -> Option<(Flow, Opened)> {
    let target = match entry {
        Entry::Socks5 => socks5::target(pod, socket, client).await?,
        Entry::Captured => match sockets::original_destination(socket, client) {
            Ok(target) => target,
            Err(error) => {
                tracing::error!("Failed TCP handshake {error}");
                return None;
            }
        },
    };
    let telemetry = pod.shared.telemetry.clone();
    let mut flow = Flow::new(Direction::Outbound, client, target, telemetry);
    flow.charge(pod.spec.budget.ledger());
    let opened = tokio::select! {
        opened = open(pod, client, target, &mut flow) => opened,
        // An end of what the client sends is not its end; a reset is.
        _ = socket.ready(Interest::ERROR) => {
            let text = "the client went away before the flow was open";
            Err(Refusal::Failed(FlowError::new(Reason::ClientGone, text)))
        }
    };
    if matches!(&opened, Err(Refusal::Failed(error)) if error.reason == Reason::ClientGone) {
        flow.open_now();
    }
    if matches!(entry, Entry::Socks5) {
        socks5::answer(socket, opened.as_ref().err()).await;
    }
    match opened {
        Ok(opened) => Some((flow, opened)),
        Err(refusal) => {
            flow.refuse(refusal);
            None
        }
    }
}

/// Finds where the flow goes and connects there.
async fn open(
    pod: &Pod,
    client: SocketAddr,
    target: SocketAddr,
    flow: &mut Flow,
) -> Result<Opened, Refusal> {
    if target.ip().is_loopback() && pod.shared.config.illegal_ports().contains(&target.port()) {
        let error = "attempted recursive call to ourselves";
        return Err(Refusal::Early(FlowError::new(Reason::Loop, error)));
    }
    let source = pod.sender();
    flow.source(source.clone());
    let route = match learn(pod, &source, client, target).await {
        Ok(route) => route,
        Err(unrouted) => {
            if let Some(service) = unrouted.service {
                flow.service(service);
            }
            flow.open();
            return Err(Refusal::Failed(unrouted.error));
        }
    };
    let chosen = route.workload.as_ref().map(|workload| workload.uid.clone());
    let (error, again) = match attempt(pod, &source, route, client, target, flow).await {
        Ok(opened) => return Ok(opened),
        Err(failed) => failed,
    };
    let Some(uid) = chosen.filter(|_| again) else {
        return Err(Refusal::Failed(error));
    };
    pod.shun(uid.clone());
    let other = choose(pod, &source, client, target).ok();
    let is_other = |route: &Route| {
        route
            .workload
            .as_ref()
            .is_some_and(|workload| workload.uid != uid)
    };
    let Some(other) = other.filter(is_other) else {
        return Err(Refusal::Failed(error));
    };
    flow.abandon_attempt(&error);
    let chosen = other.workload.as_ref().map(|workload| workload.uid.clone());
    match attempt(pod, &source, other, client, target, flow).await {
        Ok(opened) => Ok(opened),
        Err((error, again)) => {
            if let Some(uid) = chosen.filter(|_| again) {
                pod.shun(uid);
            }
            Err(Refusal::Failed(error))
        }
    }
}

/// Finds where the flow goes, asking the control plane for what that takes and is not known yet.
async fn learn(
    pod: &Pod,
    source: &Workload,
    client: SocketAddr,
    target: SocketAddr,
) -> Result<Route, Unrouted> {
    let demand = &pod.shared.demand;
    if demand.is_needed() {
        Box::pin(ask_ahead(pod, source, client, target)).await;
    }
    match choose(pod, source, client, target) {
        Err(Unrouted {
            hostname: Some(hostname),
            ..
        }) => Box::pin(resolve(pod, source, client, target, hostname)).await,
        chosen => chosen,
    }
}

/// Resolves the hostname of what was chosen, and of what is chosen then.
async fn resolve(
    pod: &Pod,
    source: &Workload,
    client: SocketAddr,
    target: SocketAddr,
    mut hostname: Arc<str>,
) -> Result<Route, Unrouted> {
    let mut steps = 0..STEPS;
    loop {
        let ipv6 = pod.shared.config.ipv6;
        pod.shared.hosts.resolve(&hostname, ipv6).await;
        let chosen = choose(pod, source, client, target);
        match (&chosen, steps.next()) {
            (
                Err(Unrouted {
                    hostname: Some(other),
                    ..
                }),
                Some(_),
            ) => hostname = other.clone(),
            _ => return chosen,
        }
    }
}

/// Why a flow goes nowhere.
struct Unrouted {
    error: FlowError,
    /// The service that was meant.
    service: Option<Arc<Service>>,
    /// What would have to be resolved first.
    hostname: Option<Arc<str>>,
}

/// Asks for what the flow is addressed to, then for what that leads to.
async fn ask_ahead(pod: &Pod, source: &Workload, client: SocketAddr, target: SocketAddr) {
    let demand = &pod.shared.demand;
    let (network, namespace) = (&source.network, Some(&*source.namespace));
    let found = |mesh: &Mesh| mesh.lookup(network, &target.ip(), namespace).is_some();
    if !found(&pod.shared.mesh.load()) {
        demand.fetch(&format!("{network}/{}", target.ip())).await;
    }
    for _ in 0..STEPS {
        let decided = {
            let mesh = pod.shared.mesh.load();
            route::decide(&mesh, source, client, target, &mut &*pod)
        };
        let missing = decided.as_ref().err().and_then(RouteError::missing);
        let Some(missing) = missing else { return };
        if !demand.fetch(missing).await {
            return;
        }
    }
}

/// Finds where the flow goes; else says why not, and which service was meant.
fn choose(
    pod: &Pod,
    source: &Workload,
    client: SocketAddr,
    target: SocketAddr,
) -> Result<Route, Unrouted> {
    let mesh = pod.shared.mesh.load();
    let found = mesh.lookup(&source.network, &target.ip(), Some(&source.namespace));
    let refused = |reason, text| Unrouted {
        error: FlowError::new(reason, text),
        service: found.and_then(Address::service).cloned(),
        hostname: None,
    };
    let known = || found.is_some();
    if let Err(refusal) = pod.shared.config.egress.judge(target, known) {
        let reason = match refusal {
            egress::Refusal::Denied(..) => Reason::EgressDenied,
            egress::Refusal::Unknown(_) => Reason::EgressUnknown,
        };
        let text = format!("connection closed due to policy rejection: {refusal}");
        return Err(refused(reason, text));
    }
    route::decide(&mesh, source, client, target, &mut &*pod).map_err(|error| Unrouted {
        hostname: match &error {
            RouteError::NotResolved { hostname, .. } => Some(hostname.clone()),
            _ => None,
        },
        ..refused(unrouted(&error), error.to_string())
    })
}

fn unrouted(error: &RouteError) -> Reason {
    match error {
        RouteError::NoHealthyUpstream(_) => Reason::NoEndpoint,
        RouteError::UnknownWaypoint(_) => Reason::NoWaypoint,
        RouteError::UnknownGateway(_) => Reason::NoGateway,
        RouteError::NoDestination(_) | RouteError::NoRecords(_) => Reason::NoAddress,
        RouteError::NotResolved { .. } | RouteError::Unresolvable(_) => Reason::UnknownHost,
        RouteError::NoService(_) => Reason::NoService,
        RouteError::NobodyExpected { .. } => Reason::NobodyExpected,
    }
}

/// Opens the flow along a route; the error tells whether another endpoint may be tried.
async fn attempt(
    pod: &Pod,
    source: &Arc<Workload>,
    route: Route,
    client: SocketAddr,
    target: SocketAddr,
    flow: &mut Flow,
) -> Result<Opened, (FlowError, bool)> {
    let registration = pod.outbound.register(Admission {
        src: client,
        dst: route.connect,
        original: Asked::Address(target),
        protocol: match route.kind {
            RouteKind::Hbone => "HBONE",
            RouteKind::Tcp | RouteKind::Passthrough => "TCP",
        },
        identity: None,
    });
    flow.dst_addr(route.connect);
    if let Some(workload) = &route.workload {
        if workload.addresses.is_empty() && !workload.hostname.is_empty() {
            count_resolution(pod, source, &workload.hostname);
        }
        flow.destination(workload.clone());
    }
    if let Some(service) = &route.service {
        flow.service(service.clone());
    }
    let far = connect(pod, source, route, client, flow).await?;
    Ok((far, registration))
}

/// Counts a flow whose destination was found by resolving its hostname.
fn count_resolution(pod: &Pod, source: &Workload, hostname: &str) {
    let labels = [
        ("source_workload", &*source.workload_name),
        ("source_canonical_service", &source.canonical_name),
        ("source_canonical_revision", &source.canonical_revision),
        ("source_workload_namespace", &source.namespace),
        ("source_principal", source.identity.as_str()),
        ("source_app", &source.canonical_name),
        ("source_version", &source.canonical_revision),
        ("source_cluster", &source.cluster_id),
        ("hostname", hostname),
    ];
    let labels = labels.map(|(name, value)| match value {
        "" => (name, "unknown"),
        value => (name, value),
    });
    pod.shared.telemetry.add(
        "istio_on_demand_dns",
        "The total number of requests that used on-demand DNS (unstable)",
        &labels,
        1,
    );
}

/// Connects along the route; the error tells whether another endpoint may be tried.
async fn connect(
    pod: &Pod,
    source: &Arc<Workload>,
    route: Route,
    client: SocketAddr,
    flow: &mut Flow,
) -> Result<Far, (FlowError, bool)> {
    match route.kind {
        RouteKind::Hbone => match tunnel(pod, source, route, client, flow).await {
            Ok(stream) => Ok(Far::Tunnel(stream)),
            Err(error) => {
                let again = error.is_of_the_endpoint();
                Err((error.into(), again))
            }
        },
        RouteKind::Tcp | RouteKind::Passthrough => {
            flow.open();
            match pod.connect(route.connect).await {
                Ok(far) => Ok(Far::Socket(far)),
                Err(error) => {
                    let text = format!("io error: {error}");
                    Err((FlowError::new(Reason::Unreachable, text), true))
                }
            }
        }
    }
}

/// Opens a stream for the flow.
async fn tunnel(
    pod: &Pod,
    source: &Arc<Workload>,
    route: Route,
    client: SocketAddr,
    flow: &mut Flow,
) -> Result<Stream, hbone::OpenError> {
    let authority = route.authority.unwrap_or_default();
    flow.mtls(Some(source.identity.clone()));
    flow.hbone_addr(authority.clone());
    if route.beyond.is_none() {
        flow.open();
    }
    let host = route.service.as_ref().map(|service| &*service.hostname);
    let headers = ConnectHeaders {
        authority,
        baggage: Some(pod.baggage(source).to_string()),
        forwarded: Some(forwarded(client, host)),
        traceparent: Some(pod.traceparent()),
        forwarded_network: None,
    };
    let key = PoolKey {
        src: source.identity.clone(),
        expected: route.expected,
        dst: route.connect,
        src_ip: client.ip(),
    };
    let tls = || {
        let (certificates, identity) = (pod.shared.certificates.clone(), source.identity.clone());
        async move { certificates.fetch(&identity).await.map_err(Into::into) }
    };
    let Some(beyond) = route.beyond else {
        return Ok(pod.pool.open(&key, tls, &headers).await?.stream);
    };
    let beyond = hbone::Beyond {
        gateway: key,
        authority: headers.authority.clone(),
        expected: beyond.expected,
        shared: beyond.is_waypoint,
    };
    let opened = Box::pin(open_beyond(pod, &beyond, headers)).await;
    // Who serves the flow is only known now.
    if let Ok((_, Some(workload))) = &opened {
        flow.destination(workload.clone());
    }
    flow.open();
    Ok(opened?.0)
}

/// Opens a stream to another network, in a tunnel through a stream to its gateway; tells who serves it there.
async fn open_beyond(
    pod: &Pod,
    beyond: &hbone::Beyond,
    headers: ConnectHeaders,
) -> Result<(Stream, Option<Arc<Workload>>), hbone::OpenError> {
    let certificates = &pod.shared.certificates;
    let source = &beyond.gateway.src;
    let own = certificates.fetch(source).await;
    let own = own.map_err(|error| hbone::OpenError::Identity(Rc::new(error)))?;
    let inner = ConnectHeaders {
        forwarded_network: Some(pod.shared.config.network.clone()),
        ..headers.clone()
    };
    let gateway = async {
        let tls = || {
            let (certificates, identity) = (certificates.clone(), source.clone());
            async move { certificates.fetch(&identity).await.map_err(Into::into) }
        };
        let outer = pod.pool.open(&beyond.gateway, tls, &headers).await?;
        Ok(outer.stream)
    };
    let inner = pod.pool.open_through(beyond, own, &inner, gateway).await?;
    let baggage = inner.baggage.as_deref().map(Baggage::parse);
    let workload = inner
        .peer
        .map(|peer| Arc::new(Workload::as_told(peer, baggage.unwrap_or_default())));
    Ok((inner.stream, workload))
}

/// A `forwarded` header (RFC 7239).
fn forwarded(client: SocketAddr, host: Option<&str>) -> String {
    match host {
        Some(host) => format!("for=\"{client}\";host={host}"),
        None => format!("for=\"{client}\""),
    }
}

/// Has the tunnel carry the flow's bytes until both directions have ended.
pub async fn carry(stream: Stream, socket: TcpStream, flow: &Flow) -> Result<(), FlowError> {
    stream
        .carry(socket, flow.counters())
        .await
        .map_err(|error| FlowError::new(Reason::from(&error), error.to_string()))
}

/// What an ended relay means to the log: a connection that a peer broke off is complete.
pub fn copied(result: std::io::Result<()>) -> Result<(), FlowError> {
    use std::io::ErrorKind::{BrokenPipe, ConnectionReset, NotConnected, UnexpectedEof};
    match result {
        Err(error)
            if !matches!(
                error.kind(),
                BrokenPipe | ConnectionReset | NotConnected | UnexpectedEof
            ) =>
        {
            Err(FlowError::new(Reason::Broken, format!("io error: {error}")))
        }
        _ => Ok(()),
    }
}
