//! Plaintext that arrives at a pod: judged without an identity, then handed on as it came.

use std::net::SocketAddr;
use std::rc::Rc;

use tokio::net::TcpStream;

use super::connections::Admission;
use super::outbound::copied;
use super::pod::Pod;
use super::relay::relay;
use crate::config::ILLEGAL_PORTS;
use crate::node::sockets;
use crate::policy::Context;
use crate::telemetry::{Direction, Flow, FlowError};

/// Serves one connection accepted on 15006.
pub async fn serve(pod: Rc<Pod>, socket: TcpStream, client: SocketAddr) {
    let target = match sockets::original_destination(&socket, client) {
        Ok(target) => target,
        Err(error) => {
            tracing::warn!("failed to read SO_ORIGINAL_DST: {error}");
            return;
        }
    };
    let mut flow = Flow::new(
        Direction::Inbound,
        client,
        target,
        pod.shared.telemetry.clone(),
    );
    if ILLEGAL_PORTS.contains(&target.port()) {
        return flow.early_deny("attempted recursive call to ourselves");
    }
    let workload = match pod.workload().await {
        Ok(workload) => workload,
        Err(error) => return flow.early_deny(&error),
    };
    let registration = pod.inbound.register(Admission {
        src: client,
        dst: target,
        original: Some(target.to_string()),
        protocol: "TCP",
        identity: None,
    });
    let verdict = {
        let mesh = pod.shared.mesh.load();
        if let Some(source) = mesh.workload_by_ip(&pod.shared.config.network, &client.ip()) {
            flow.source(source.clone());
        }
        flow.destination(workload.clone());
        if let Some(service) = mesh.inbound_service(&workload, target.port(), None) {
            flow.service(service);
        }
        mesh.verdict(
            &workload,
            &Context {
                identity: None,
                src: client,
                dst: target,
            },
        )
    };
    flow.open();
    if let Some(reason) = verdict.refusal() {
        return flow.finish(Err(FlowError {
            text: format!("connection closed due to policy rejection: {reason}"),
            flag: "DENY",
        }));
    }
    let far = match pod.connect_application(target, client.ip()).await {
        Ok(far) => far,
        Err(error) => {
            return flow.finish(Err(FlowError {
                text: format!("connection failed: {error}"),
                flag: "CONNECT",
            }));
        }
    };
    let counters = flow.counters().clone();
    // The near side is the client: what it sends is what the workload receives.
    let result = tokio::select! {
        result = relay(socket, far, &counters.received, &counters.sent) => copied(result),
        () = registration.revoked() => Err(super::inbound::policy_change()),
    };
    flow.finish(result);
}
