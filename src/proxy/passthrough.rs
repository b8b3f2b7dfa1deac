//! Plaintext that arrives at a pod: judged without an identity, then handed on as it came.

use std::net::SocketAddr;
use std::rc::Rc;

use tokio::net::TcpStream;

use super::connections::{Admission, Asked, Registration};
use super::inbound::{policy_change, rejection};
use super::outbound::copied;
use super::pod::Pod;
use super::relay::relay;
use super::{Accepted, Refusal};
use crate::mesh::Workload;
use crate::node::sockets;
use crate::policy::Context;
use crate::telemetry::{Direction, Flow, FlowError, Reason};

/// Serves one connection accepted on 15006.
pub async fn serve(pod: Rc<Pod>, accepted: Accepted) {
    let Accepted {
        socket,
        client,
        held: _held,
    } = accepted;
    let target = match sockets::original_destination(&socket, client) {
        Ok(target) => target,
        Err(error) => {
            tracing::warn!("failed to read SO_ORIGINAL_DST: {error}");
            return;
        }
    };
    let telemetry = pod.shared.telemetry.clone();
    let mut flow = Flow::new(Direction::Inbound, client, target, telemetry);
    // What is only needed until the flow is open lies in a box that is gone by then.
    let opened = Box::pin(open(&pod, client, target, &mut flow)).await;
    let (far, registration) = match opened {
        Ok(opened) => opened,
        Err(refusal) => return flow.refuse(refusal),
    };
    let counters = flow.counters();
    // The near side is the client: what it sends is what the workload receives.
    let result = tokio::select! {
        result = relay(socket, far, &counters.received, &counters.sent) => copied(result),
        () = registration.revoked() => Err(policy_change()),
    };
    flow.finish(result);
}

/// Judges the flow and connects to the application.
async fn open(
    pod: &Pod,
    client: SocketAddr,
    target: SocketAddr,
    flow: &mut Flow,
) -> Result<(TcpStream, Registration), Refusal> {
    if pod.shared.config.illegal_ports().contains(&target.port()) {
        let error = "attempted recursive call to ourselves";
        return Err(Refusal::Early(FlowError::new(Reason::Loop, error)));
    }
    let workload = pod.workload().await.map_err(Refusal::Early)?;
    let registration = admit(pod, &workload, client, target, flow).map_err(Refusal::Failed)?;
    match pod.connect_application(target, client.ip()).await {
        Ok(far) => Ok((far, registration)),
        Err(error) => Err(Refusal::Failed(FlowError::new(
            Reason::Unreachable,
            format!("connection failed: {error}"),
        ))),
    }
}

/// Counts the flow as opened and lets it in, or says why not.
fn admit(
    pod: &Pod,
    workload: &std::sync::Arc<Workload>,
    client: SocketAddr,
    target: SocketAddr,
    flow: &mut Flow,
) -> Result<Registration, FlowError> {
    let registration = pod.inbound.register(Admission {
        src: client,
        dst: target,
        original: Asked::Address(target),
        protocol: "TCP",
        identity: None,
    });
    let mesh = pod.shared.mesh.load();
    if let Some(source) = mesh.workload_by_ip(&pod.shared.config.network, &client.ip()) {
        flow.source(source.clone());
    }
    flow.destination(workload.clone());
    if let Some(service) = mesh.inbound_service(workload, target.port(), None) {
        flow.service(service);
    }
    let context = Context {
        identity: None,
        src: client,
        dst: target,
    };
    let verdict = mesh.verdict(workload, &context);
    flow.open();
    match rejection(&verdict) {
        None => Ok(registration),
        Some(error) => Err(error),
    }
}
