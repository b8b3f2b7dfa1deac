//! HBONE arrivals at a pod: accept the tunnel, judge every CONNECT, hand it to the application.

use std::cell::Cell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use hbone::{AcceptError, Authority, Incoming, Stream};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use super::connections::{Admission, Asked, Registration};
use super::drain::Stage;
use super::outbound::carry;
use super::pod::Pod;
use super::proxy_protocol;
use super::{Accepted, Refusal};
use crate::mesh::inbound::Fault;
use crate::policy::{Context, Verdict};
use crate::telemetry::{Direction, Flow, FlowError, Reason};
use crate::xds::names;

/// How long the client of a new tunnel may take to ask for its first stream while the proxy stops.
const FIRST_STREAM: Duration = Duration::from_secs(1);

/// The error of a flow that a policy update no longer allows.
pub fn policy_change() -> FlowError {
    FlowError::new(
        Reason::PolicyChanged,
        "connection closed due to policy change",
    )
}

/// The error of a flow that policy does not let in.
pub fn rejection(verdict: &Verdict) -> Option<FlowError> {
    let reason = match verdict {
        Verdict::Unrestricted | Verdict::Allowed(_) => return None,
        Verdict::Denied(_) => Reason::PolicyDenied,
        Verdict::NotAllowed => Reason::PolicyNotAllowed,
        Verdict::Missing(_) | Verdict::NotSynced => Reason::PolicyMissing,
    };
    let told = verdict.refusal().unwrap_or_default();
    let text = format!("connection closed due to policy rejection: {told}");
    Some(FlowError::new(reason, text))
}

/// Serves one connection accepted on 15008 until its tunnel has ended.
pub async fn serve(pod: Rc<Pod>, accepted: Accepted) {
    let Accepted {
        socket,
        client,
        held: _held,
    } = accepted;
    let Ok(local) = socket.local_addr() else {
        return;
    };
    let local = hbone::canonical(local);
    let mut tunnel = match Box::pin(shake_hands(&pod, socket)).await {
        Ok(tunnel) => tunnel,
        Err(error) => {
            let telemetry = pod.shared.telemetry.clone();
            return Flow::new(Direction::Inbound, client, local, telemetry).early_deny(&error);
        }
    };
    let peer = Rc::new(Peer {
        client,
        local,
        identity: tunnel.peer().cloned(),
    });
    let mut streams = JoinSet::new();
    let fresh = Cell::new(true);
    let draining = async {
        pod.drain.reached(Stage::Draining).await;
        // Who has just come gets its flow served, rather than being sent away with it.
        if fresh.get() {
            tokio::time::sleep(FIRST_STREAM).await;
        }
    };
    tokio::pin!(draining);
    let mut told = false;
    loop {
        tokio::select! {
            incoming = tunnel.next() => match incoming {
                Some(incoming) => {
                    fresh.set(false);
                    streams.spawn_local(serve_stream(pod.clone(), peer.clone(), incoming));
                }
                None => break,
            },
            Some(_) = streams.join_next(), if !streams.is_empty() => {}
            () = &mut draining, if !told => {
                told = true;
                tunnel.graceful_shutdown();
            }
        }
    }
    // The tunnel is gone; its streams see that themselves and log how they ended.
    while streams.join_next().await.is_some() {}
}

/// Makes a tunnel of the connection.
async fn shake_hands(pod: &Pod, socket: TcpStream) -> Result<hbone::ServerTunnel, FlowError> {
    let workload = pod.workload().await?;
    let tls = pod.shared.certificates.fetch(&workload.identity).await;
    let tls = tls.map_err(|error| {
        FlowError::new(Reason::NoCertificate, format!("signing error: {error}"))
    })?;
    let (engine, config) = (pod.pool.engine(), pod.pool.config());
    let tunnel = hbone::accept(engine, socket, &tls, config).await;
    tunnel.map_err(|error| {
        let reason = match error {
            AcceptError::Revoked(_) => Reason::Revoked,
            AcceptError::Http2(_) | AcceptError::Http2Timeout(_) => Reason::Http2,
            AcceptError::Tls(_) | AcceptError::TlsTimeout(_) | AcceptError::NoAlpn => {
                Reason::Handshake
            }
        };
        FlowError::new(reason, error.to_string())
    })
}

pub(super) struct Peer {
    client: SocketAddr,
    local: SocketAddr,
    identity: Option<hbone::Identity>,
}

pub(super) async fn serve_stream(pod: Rc<Pod>, peer: Rc<Peer>, incoming: Incoming) {
    let telemetry = pod.shared.telemetry.clone();
    let mut flow = Flow::new(Direction::Inbound, peer.client, peer.local, telemetry);
    let _place = match pod.spec.budget.admit() {
        Ok(place) => place,
        Err(error) => {
            incoming.refuse(503, error.reason.code());
            return flow.early_deny(&error);
        }
    };
    flow.charge(pod.spec.budget.ledger());
    // What is only needed until the flow is open lies in a box that is gone by then.
    let opened = Box::pin(open(&pod, &peer, incoming, &mut flow)).await;
    let (stream, application, registration) = match opened {
        Ok(opened) => opened,
        Err(refusal) => return flow.refuse(refusal),
    };
    drop(peer);
    let result = tokio::select! {
        result = carry(stream, application, &flow) => result,
        () = registration.revoked() => Err(policy_change()),
    };
    flow.finish(result);
}

/// Asks the control plane for what a request takes and is not known yet: who calls, and what for.
async fn ask_ahead(pod: &Pod, peer: &Peer, authority: &Authority) {
    let (demand, config) = (&pod.shared.demand, &pod.shared.config);
    let network = &config.network;
    let known = |ip| pod.shared.mesh.load().lookup(network, &ip, None).is_some();
    let addressed = match authority {
        Authority::Addr(address) => Some(address.ip().to_canonical()),
        Authority::Host(..) => None,
    };
    let ips = [Some(peer.client.ip()), addressed];
    let keys = ips.into_iter().flatten().filter(|ip| !known(*ip));
    let mut keys: Vec<_> = keys.map(|ip| format!("{network}/{ip}")).collect();
    if let Authority::Host(hostname, _) = authority {
        let namespace = &pod.spec.namespace;
        keys.extend(names::keys(hostname, namespace, &config.cluster_domain));
    }
    let asked = keys.iter().map(|key| demand.fetch(key));
    futures_util::future::join_all(asked).await;
}

/// Judges a request, connects to the application and answers.
async fn open(
    pod: &Pod,
    peer: &Peer,
    mut incoming: Incoming,
    flow: &mut Flow,
) -> Result<(Stream, TcpStream, Registration), Refusal> {
    let early = |incoming: Incoming, status, error: FlowError| {
        incoming.refuse(status, error.reason.code());
        Refusal::Early(error)
    };
    if incoming.method() != "CONNECT" {
        let text = format!("expected method CONNECT, got {}", incoming.method());
        let error = FlowError::new(Reason::BadRequest, text);
        return Err(early(incoming, 400, error));
    }
    let authority: Authority = match incoming.authority().parse() {
        Ok(authority) => authority,
        Err(_) => {
            let text = format!("no valid authority pseudo header: {}", incoming.authority());
            let error = FlowError::new(Reason::BadRequest, text);
            return Err(early(incoming, 400, error));
        }
    };
    let workload = match pod.workload().await {
        Ok(workload) => workload,
        Err(error) => return Err(early(incoming, 503, error)),
    };
    if pod.shared.demand.is_needed() {
        Box::pin(ask_ahead(pod, peer, &authority)).await;
    }
    let mesh = pod.shared.mesh.load();
    let forwarded_host = incoming.headers.forwarded_host();
    let target = match mesh.inbound_target(
        &workload,
        &authority,
        peer.local.ip(),
        forwarded_host.as_deref(),
        pod.shared.config.illegal_ports(),
    ) {
        Ok(target) => target,
        Err(refusal) => {
            let reason = match refusal.fault {
                Fault::WrongAddress => Reason::WrongAddress,
                Fault::Loop => Reason::Loop,
                Fault::UnknownHost => Reason::UnknownHost,
                Fault::UnknownPort => Reason::UnknownPort,
                Fault::NoAddress => Reason::NoAddress,
            };
            let error = FlowError::new(reason, refusal.text);
            return Err(early(incoming, refusal.status, error));
        }
    };
    let dst = SocketAddr::new(peer.local.ip(), target.connect_port);
    let registration = pod.inbound.register(Admission {
        src: peer.client,
        dst,
        original: forwarded_host.map_or(Asked::Nothing, |host| Asked::Host(host.into())),
        protocol: if peer.identity.is_some() {
            "HBONE"
        } else {
            "TCP"
        },
        identity: peer.identity.clone(),
    });
    flow.hbone_addr(incoming.authority().to_string());
    flow.mtls(peer.identity.clone());
    if pod.shared.config.response_baggage
        && let Some(baggage) = incoming.headers.baggage()
    {
        flow.derived_source(baggage);
    }
    let network = &pod.shared.config.network;
    let elsewhere = incoming
        .headers
        .forwarded_network()
        .is_some_and(|other| !other.eq_ignore_ascii_case(network));
    if !elsewhere && let Some(source) = mesh.workload_by_ip(network, &peer.client.ip()) {
        flow.source(source.clone());
    }
    flow.destination(workload.clone());
    if let Some(service) = target.service {
        flow.service(service);
    }
    flow.open();
    let context = Context {
        identity: peer.identity.as_ref(),
        src: peer.client,
        dst,
    };
    let verdict = mesh.verdict(&workload, &context);
    drop(mesh);
    if let Some(error) = rejection(&verdict) {
        incoming.refuse(401, error.reason.code());
        return Err(Refusal::Failed(error));
    }
    let header = target.announced.map(|destination| {
        proxy_protocol::header(peer.client, destination, peer.identity.as_ref())
    });
    let over_loopback = header.is_some() && pod.shared.config.localhost_app_tunnel;
    let connected = async {
        let mut application = match over_loopback {
            true => pod.connect_loopback(dst).await?,
            false => pod.connect_application(dst, peer.client.ip()).await?,
        };
        if let Some(header) = header {
            application.write_all(&header).await?;
        }
        Ok::<_, std::io::Error>(application)
    };
    let connected = tokio::select! {
        connected = connected => connected,
        () = incoming.cancelled() => Err(std::io::Error::other("the client gave up")),
    };
    let application = match connected {
        Ok(application) => application,
        Err(error) => {
            incoming.refuse(503, Reason::Unreachable.code());
            return Err(Refusal::Failed(FlowError::new(
                Reason::Unreachable,
                format!("connection failed: {error}"),
            )));
        }
    };
    let responds = pod.shared.config.response_baggage;
    let baggage = responds.then(|| pod.baggage(&workload));
    match incoming.accept(baggage.as_deref()) {
        Ok(stream) => Ok((stream, application, registration)),
        Err(error) => Err(Refusal::Failed(FlowError::new(
            Reason::Http2,
            format!("h2 failed: {error}"),
        ))),
    }
}
