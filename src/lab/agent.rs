//! The node agent of a lab's node: captures pods and hands them to the node's proxy.

use std::time::Duration;

use cni::zds::{WorkloadInfo, ZdsServer};
use tokio::runtime::Handle;
use tokio::time::timeout;

use super::pod::Pod;
use super::wire::Capture;

/// How long a pod waits for its node's proxy to connect.
const PROXY_CONNECTS: Duration = Duration::from_secs(5);

/// Captures the pods of one node.
#[derive(Clone)]
pub struct Agent {
    zds: ZdsServer,
    /// Whether the pods have IPv6 to capture.
    ipv6: bool,
    runtime: Handle,
}

impl Agent {
    /// Listens for the node's proxy.
    ///
    /// # Errors
    /// When the socket cannot be made.
    pub fn start(socket: &std::path::Path, ipv6: bool, runtime: &Handle) -> std::io::Result<Self> {
        let _inside = runtime.enter();
        Ok(Self {
            zds: ZdsServer::bind(socket)?,
            ipv6,
            runtime: runtime.clone(),
        })
    }

    /// Waits until a proxy has connected; says whether one has.
    pub fn wait_for_proxy(&self) -> bool {
        let mut connected = self.zds.connected();
        self.runtime.block_on(async {
            let waiting = timeout(PROXY_CONNECTS, connected.wait_for(|count| *count > 0));
            matches!(waiting.await, Ok(Ok(_)))
        })
    }

    /// Captures a pod's traffic and waits until the proxy serves it.
    pub fn enroll(&self, pod: &Pod) -> Capture {
        match self.try_enroll(pod) {
            Ok(()) => Capture::Captured,
            Err(reason) => Capture::Failed(reason),
        }
    }

    fn try_enroll(&self, pod: &Pod) -> Result<(), String> {
        let netns = pod.namespaces.network();
        super::capture::install(netns, &pod.plan.object, self.ipv6)?;
        let netns = netns.try_clone_to_owned().map_err(|e| e.to_string())?;
        let info = WorkloadInfo {
            name: pod.plan.name.clone(),
            namespace: pod.plan.namespace.clone(),
            service_account: pod.plan.service_account.clone(),
        };
        self.wait_for_proxy();
        self.runtime
            .block_on(self.zds.add(&pod.plan.uid, info, netns))
            .map_err(|e| e.to_string())
    }

    /// Takes a pod out of the mesh. `running` pods also lose their rules.
    pub fn release(&self, pod: &Pod, running: bool) -> Result<(), String> {
        let told = self.runtime.block_on(self.zds.remove(&pod.plan.uid));
        if running {
            super::capture::remove(pod.namespaces.network())?;
        }
        told.map_err(|e| e.to_string())
    }
}
