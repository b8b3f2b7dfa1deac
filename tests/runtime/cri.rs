//! The calls of a kubelet to its container runtime, one after the other.

use std::path::Path;
use std::time::Duration;

use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint};
use tonic::{Response, Status};

/// The schema's messages.
#[allow(missing_docs, clippy::all, reason = "generated code")]
pub mod proto {
    tonic::include_proto!("runtime.v1");
}

use proto::image_service_client::ImageServiceClient;
use proto::runtime_service_client::RuntimeServiceClient;
use proto::*;

/// Longest call, the network plugins' work with it.
const CALL: Duration = Duration::from_secs(30);

/// A client; what the runtime refuses is told in its own words.
pub struct Cri {
    runtime: Runtime,
    channel: Channel,
}

impl Cri {
    /// A client that connects when it must, and again after the runtime was restarted.
    pub fn new(socket: &Path) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let _inside = runtime.enter();
        let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display())).unwrap();
        let channel = endpoint.timeout(CALL).connect_lazy();
        Self { runtime, channel }
    }

    fn call<T>(
        &self,
        call: impl AsyncFnOnce(RuntimeServiceClient<Channel>) -> Result<Response<T>, Status>,
    ) -> Result<T, String> {
        let client = RuntimeServiceClient::new(self.channel.clone());
        let answer = self.runtime.block_on(call(client));
        answer
            .map(Response::into_inner)
            .map_err(|status| status.message().to_string())
    }

    /// Whether the runtime and its network are ready, and the network configuration that is in use.
    pub fn status(&self) -> Result<(bool, String), String> {
        let request = StatusRequest { verbose: true };
        let answer = self.call(async |mut client| client.status(request).await)?;
        let conditions = answer.status.unwrap_or_default().conditions;
        let ready = conditions.len() >= 2 && conditions.iter().all(|condition| condition.status);
        let network = answer.info.get("cniconfig").cloned();
        Ok((ready, network.unwrap_or_default()))
    }

    /// The names of all images.
    pub fn images(&self) -> Result<Vec<String>, String> {
        let mut client = ImageServiceClient::new(self.channel.clone());
        let answer = self
            .runtime
            .block_on(client.list_images(ListImagesRequest {}));
        let images = answer.map_err(|status| status.message().to_string())?;
        let images = images.into_inner().images.into_iter();
        Ok(images.flat_map(|image| image.repo_tags).collect())
    }

    /// Makes a sandbox; gives its ID.
    pub fn run_sandbox(&self, config: PodSandboxConfig) -> Result<String, String> {
        let config = Some(config);
        let request = RunPodSandboxRequest { config };
        let answer = self.call(async |mut client| client.run_pod_sandbox(request).await)?;
        Ok(answer.pod_sandbox_id)
    }

    /// Ends a sandbox's containers and takes its network away.
    pub fn stop_sandbox(&self, id: &str) -> Result<(), String> {
        let pod_sandbox_id = id.to_string();
        let request = StopPodSandboxRequest { pod_sandbox_id };
        self.call(async |mut client| client.stop_pod_sandbox(request).await)
            .map(drop)
    }

    /// Forgets a stopped sandbox.
    pub fn remove_sandbox(&self, id: &str) -> Result<(), String> {
        let pod_sandbox_id = id.to_string();
        let request = RemovePodSandboxRequest { pod_sandbox_id };
        self.call(async |mut client| client.remove_pod_sandbox(request).await)
            .map(drop)
    }

    /// A sandbox's state and, as JSON, what the runtime knows of it.
    pub fn sandbox_status(&self, id: &str) -> Result<(PodSandboxStatus, String), String> {
        let request = PodSandboxStatusRequest {
            pod_sandbox_id: id.to_string(),
            verbose: true,
        };
        let answer = self.call(async |mut client| client.pod_sandbox_status(request).await)?;
        let info = answer.info.get("info").cloned();
        Ok((answer.status.unwrap_or_default(), info.unwrap_or_default()))
    }

    /// All sandboxes.
    pub fn sandboxes(&self) -> Result<Vec<PodSandbox>, String> {
        let request = ListPodSandboxRequest {};
        let answer = self.call(async |mut client| client.list_pod_sandbox(request).await)?;
        Ok(answer.items)
    }

    /// Makes a container in a sandbox and starts it; gives its ID.
    pub fn run_container(
        &self,
        sandbox: &str,
        config: ContainerConfig,
        sandbox_config: PodSandboxConfig,
    ) -> Result<String, String> {
        let request = CreateContainerRequest {
            pod_sandbox_id: sandbox.to_string(),
            config: Some(config),
            sandbox_config: Some(sandbox_config),
        };
        let made = self.call(async |mut client| client.create_container(request).await)?;
        let container_id = made.container_id.clone();
        let request = StartContainerRequest { container_id };
        self.call(async |mut client| client.start_container(request).await)?;
        Ok(made.container_id)
    }

    /// Runs a command in a container to its end.
    pub fn exec(&self, container: &str, words: &[&str]) -> Result<ExecSyncResponse, String> {
        let request = ExecSyncRequest {
            container_id: container.to_string(),
            cmd: words.iter().map(|word| word.to_string()).collect(),
            timeout: CALL.as_secs() as i64,
        };
        self.call(async |mut client| client.exec_sync(request).await)
    }
}
