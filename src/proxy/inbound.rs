//! HBONE arrivals at a pod: accept the tunnel, judge every CONNECT, hand it to the application.

use std::net::SocketAddr;
use std::rc::Rc;

use hbone::{Authority, Incoming};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use super::connections::Admission;
use super::drain::Stage;
use super::pod::Pod;
use super::proxy_protocol;
use crate::policy::Context;
use crate::telemetry::{Direction, Flow, FlowError};

/// The error of a flow that a policy update no longer allows.
pub fn policy_change() -> FlowError {
    FlowError {
        text: "connection closed due to policy change".to_string(),
        flag: "DENY",
    }
}

/// Serves one connection accepted on 15008 until its tunnel has ended.
pub async fn serve(pod: Rc<Pod>, socket: TcpStream, client: SocketAddr) {
    let Ok(local) = socket.local_addr() else {
        return;
    };
    let local = hbone::canonical(local);
    let refuse = |text: &str| {
        Flow::new(
            Direction::Inbound,
            client,
            local,
            pod.shared.telemetry.clone(),
        )
        .early_deny(text);
    };
    let workload = match pod.workload().await {
        Ok(workload) => workload,
        Err(error) => return refuse(&error),
    };
    let tls = match pod.shared.certificates.fetch(&workload.identity).await {
        Ok(tls) => tls,
        Err(error) => return refuse(&format!("signing error: {error}")),
    };
    let (engine, config) = (pod.pool.engine(), pod.pool.config());
    let mut tunnel = match hbone::accept(engine, socket, tls.server_config(), config).await {
        Ok(tunnel) => tunnel,
        Err(error) => return refuse(&error.to_string()),
    };
    let peer = Peer {
        client,
        local,
        identity: tunnel.peer().cloned(),
    };
    let mut streams = JoinSet::new();
    let draining = pod.drain.reached(Stage::Draining);
    tokio::pin!(draining);
    let mut told = false;
    loop {
        tokio::select! {
            incoming = tunnel.next() => match incoming {
                Some(incoming) => {
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

#[derive(Clone)]
pub(super) struct Peer {
    client: SocketAddr,
    local: SocketAddr,
    identity: Option<hbone::Identity>,
}

pub(super) async fn serve_stream(pod: Rc<Pod>, peer: Peer, mut incoming: Incoming) {
    let mut flow = Flow::new(
        Direction::Inbound,
        peer.client,
        peer.local,
        pod.shared.telemetry.clone(),
    );
    if incoming.method() != "CONNECT" {
        flow.early_deny(&format!(
            "expected method CONNECT, got {}",
            incoming.method()
        ));
        return incoming.refuse(400);
    }
    let authority: Authority = match incoming.authority().parse() {
        Ok(authority) => authority,
        Err(_) => {
            flow.early_deny(&format!(
                "no valid authority pseudo header: {}",
                incoming.authority()
            ));
            return incoming.refuse(400);
        }
    };
    let workload = match pod.workload().await {
        Ok(workload) => workload,
        Err(error) => {
            flow.early_deny(&error);
            return incoming.refuse(503);
        }
    };
    let mesh = pod.shared.mesh.load();
    let target = match mesh.inbound_target(
        &workload,
        &authority,
        peer.local.ip(),
        incoming.headers.forwarded_host().as_deref(),
    ) {
        Ok(target) => target,
        Err(refusal) => {
            drop(mesh);
            flow.early_deny(&refusal.text);
            return incoming.refuse(refusal.status);
        }
    };
    let dst = SocketAddr::new(peer.local.ip(), target.connect_port);
    let registration = pod.inbound.register(Admission {
        src: peer.client,
        dst,
        original: incoming.headers.forwarded_host(),
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
    let verdict = mesh.verdict(
        &workload,
        &Context {
            identity: peer.identity.as_ref(),
            src: peer.client,
            dst,
        },
    );
    drop(mesh);
    if let Some(reason) = verdict.refusal() {
        incoming.refuse(401);
        return flow.finish(Err(FlowError {
            text: format!("connection closed due to policy rejection: {reason}"),
            flag: "DENY",
        }));
    }
    let header = target.announced.map(|destination| {
        proxy_protocol::header(peer.client, destination, peer.identity.as_ref())
    });
    let connected = async {
        let mut application = pod.connect_application(dst, peer.client.ip()).await?;
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
            incoming.refuse(503);
            return flow.finish(Err(FlowError {
                text: format!("connection failed: {error}"),
                flag: "CONNECT",
            }));
        }
    };
    let baggage = pod
        .shared
        .config
        .response_baggage
        .then(|| pod.baggage(&workload));
    let stream = match incoming.accept(baggage.as_deref()) {
        Ok(stream) => stream,
        Err(error) => {
            return flow.finish(Err(FlowError {
                text: format!("h2 failed: {error}"),
                flag: "H2_HANDSHAKE_FAILURE",
            }));
        }
    };
    let counters = flow.counters().clone();
    let result = tokio::select! {
        result = stream.carry(application, &counters) => {
            result.map_err(|error| FlowError { text: error.to_string(), flag: error.flag() })
        }
        () = registration.revoked() => Err(policy_change()),
    };
    flow.finish(result);
}
