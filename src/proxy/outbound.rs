//! A captured connection of a pod: find where it goes, wrap it, carry it.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use hbone::{ConnectHeaders, PoolKey};
use tokio::net::TcpStream;

use super::connections::Admission;
use super::pod::Pod;
use super::relay::relay;
use crate::config::ILLEGAL_PORTS;
use crate::mesh::Workload;
use crate::mesh::route::{self, Route, RouteKind};
use crate::node::sockets;
use crate::telemetry::{Direction, Flow, FlowError};

/// Serves one connection accepted on 15001.
pub async fn serve(pod: Rc<Pod>, socket: TcpStream, client: SocketAddr) {
    let target = match sockets::original_destination(&socket, client) {
        Ok(target) => target,
        Err(error) => {
            tracing::warn!("failed to read SO_ORIGINAL_DST: {error}");
            return;
        }
    };
    let flow = Flow::new(
        Direction::Outbound,
        client,
        target,
        pod.shared.telemetry.clone(),
    );
    if target.ip().is_loopback() && ILLEGAL_PORTS.contains(&target.port()) {
        flow.early_deny("attempted recursive call to ourselves");
        return;
    }
    let source = match pod.workload().await {
        Ok(source) => source,
        Err(error) => return flow.early_deny(&error),
    };
    let route = {
        let mesh = pod.shared.mesh.load();
        route::decide(&mesh, &source, client, target, &mut |bound| {
            pod.random(bound)
        })
    };
    match route {
        Err(error) => flow.early_deny(&error.to_string()),
        Ok(route) => {
            let _registration = pod.outbound.register(Admission {
                src: client,
                dst: route.connect,
                original: Some(target.to_string()),
                protocol: if route.kind == RouteKind::Hbone {
                    "HBONE"
                } else {
                    "TCP"
                },
                identity: None,
            });
            follow(&pod, socket, client, source, route, flow).await;
        }
    }
}

async fn follow(
    pod: &Rc<Pod>,
    socket: TcpStream,
    client: SocketAddr,
    source: Arc<Workload>,
    route: Route,
    mut flow: Flow,
) {
    flow.source(source.clone());
    flow.dst_addr(route.connect);
    if let Some(workload) = &route.workload {
        flow.destination(workload.clone());
    }
    if let Some(service) = &route.service {
        flow.service(service.clone());
    }
    let result = match route.kind {
        RouteKind::Hbone => tunnel(pod, socket, client, &source, &route, &mut flow).await,
        RouteKind::Tcp | RouteKind::Passthrough => {
            flow.open();
            plain(pod, socket, &route, &flow).await
        }
    };
    flow.finish(result);
}

async fn tunnel(
    pod: &Rc<Pod>,
    socket: TcpStream,
    client: SocketAddr,
    source: &Arc<Workload>,
    route: &Route,
    flow: &mut Flow,
) -> Result<(), FlowError> {
    let authority = route.authority.clone().unwrap_or_default();
    flow.mtls(Some(source.identity.clone()));
    flow.hbone_addr(authority.clone());
    flow.open();
    let mut forwarded = format!("for=\"{client}\"");
    if let Some(service) = &route.service {
        forwarded.push_str(";host=");
        forwarded.push_str(&service.hostname);
    }
    let headers = ConnectHeaders {
        authority,
        baggage: Some(pod.baggage(source).to_string()),
        forwarded: Some(forwarded),
        traceparent: Some(pod.traceparent()),
        forwarded_network: None,
    };
    let key = PoolKey {
        src: source.identity.clone(),
        expected: route.expected.clone(),
        dst: route.connect,
        src_ip: client.ip(),
    };
    let tls = || {
        let (certificates, identity) = (pod.shared.certificates.clone(), source.identity.clone());
        async move { certificates.fetch(&identity).await.map_err(Into::into) }
    };
    let tunnelled = pod
        .pool
        .open(&key, tls, &headers)
        .await
        .map_err(|error| FlowError {
            text: error.to_string(),
            flag: error.flag(),
        })?;
    tunnelled
        .stream
        .carry(socket, flow.counters())
        .await
        .map_err(|error| FlowError {
            text: error.to_string(),
            flag: error.flag(),
        })
}

async fn plain(
    pod: &Rc<Pod>,
    socket: TcpStream,
    route: &Route,
    flow: &Flow,
) -> Result<(), FlowError> {
    let far = pod
        .connect(route.connect)
        .await
        .map_err(|error| FlowError {
            text: format!("io error: {error}"),
            flag: "CONNECT",
        })?;
    copied(
        relay(
            socket,
            far,
            &flow.counters().sent,
            &flow.counters().received,
        )
        .await,
    )
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
            Err(FlowError {
                text: format!("io error: {error}"),
                flag: "CONNECT",
            })
        }
        _ => Ok(()),
    }
}
