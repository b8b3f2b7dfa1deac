//! Pods as a kubelet starts them: a sandbox, then containers in it.

use std::fs::File;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::Value;

use crate::containerd::Containerd;
use crate::cri::proto::*;
use crate::image::IMAGE;
use crate::leftovers::{control_groups, remove_group};

/// The port on which every pod's application answers with the pod's name.
pub const PORT: u16 = 8080;

/// A pod that does not run yet.
pub struct PodSpec<'n> {
    node: &'n Containerd,
    config: PodSandboxConfig,
}

/// A pod with a sandbox; it stays until it is removed or the node ends.
pub struct Pod<'n> {
    node: &'n Containerd,
    config: PodSandboxConfig,
    id: String,
    ips: Vec<IpAddr>,
    /// The first process of the sandbox, as the node numbers it.
    pid: u64,
    /// The application's container.
    application: Option<String>,
}

/// What a command did.
#[derive(Debug)]
pub struct Done {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl<'n> PodSpec<'n> {
    /// An ordinary pod with a UID of its own.
    pub fn new(node: &'n Containerd, namespace: &str, name: &str) -> Self {
        let uid = uid();
        let namespaces = NamespaceOption {
            network: NamespaceMode::Pod.into(),
            pid: NamespaceMode::Container.into(),
            ipc: NamespaceMode::Pod.into(),
        };
        let linux = LinuxPodSandboxConfig {
            // Node agents know pods by it.
            cgroup_parent: format!("/{}/pod{uid}", node.name()),
            security_context: Some(LinuxSandboxSecurityContext {
                namespace_options: Some(namespaces),
            }),
        };
        let config = PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: name.to_string(),
                uid,
                namespace: namespace.to_string(),
                attempt: 0,
            }),
            hostname: name.to_string(),
            linux: Some(linux),
            ..PodSandboxConfig::default()
        };
        Self { node, config }
    }

    /// The pod is to have the node's network instead of one of its own.
    pub fn host_network(mut self) -> Self {
        let linux = self.config.linux.as_mut();
        let security = linux.and_then(|linux| linux.security_context.as_mut());
        let namespaces = security.and_then(|security| security.namespace_options.as_mut());
        namespaces.unwrap().network = NamespaceMode::Node.into();
        // The node's name goes with the node's network.
        self.config.hostname.clear();
        self
    }

    /// Makes the sandbox, with the network and without any container.
    ///
    /// # Errors
    /// What the runtime said, the network plugins' words with it. Only if they cleaned up may it be tried again.
    pub fn sandbox(&self) -> Result<Pod<'n>, String> {
        let config = self.config.clone();
        let id = self.node.cri().run_sandbox(config.clone())?;
        let (status, info) = self.node.cri().sandbox_status(&id)?;
        let info: Value = serde_json::from_str(&info).unwrap();
        let network = status.network.unwrap_or_default();
        let more = network.additional_ips.into_iter().map(|more| more.ip);
        let ips = std::iter::once(network.ip).chain(more);
        Ok(Pod {
            node: self.node,
            config,
            id,
            ips: ips.filter_map(|ip| ip.parse().ok()).collect(),
            pid: info["pid"].as_u64().unwrap(),
            application: None,
        })
    }

    /// Starts the pod with an application that answers with the pod's name.
    pub fn run(&self) -> Pod<'n> {
        let mut pod = self.sandbox().unwrap();
        pod.start_application();
        pod
    }
}

impl Pod<'_> {
    /// Starts the application, and waits until it answers.
    pub fn start_application(&mut self) {
        let name = self.name();
        let script = format!(
            "mkdir /www; echo hello from {name} >/www/index.html; exec httpd -f -p {PORT} -h /www"
        );
        self.application = Some(self.start("application", &["sh", "-c", &script]));
        let local = format!("http://127.0.0.1:{PORT}/");
        let words = ["wget", "-qO-", &local];
        self.node
            .eventually("the application answers", || self.exec(&words).code == 0);
    }

    /// Starts a further container; gives its ID.
    pub fn start(&self, name: &str, command: &[&str]) -> String {
        let linux = self.config.linux.as_ref();
        let security = linux.and_then(|linux| linux.security_context.as_ref());
        let namespace_options = security.and_then(|security| security.namespace_options);
        let config = ContainerConfig {
            metadata: Some(ContainerMetadata {
                name: name.to_string(),
                attempt: 0,
            }),
            image: Some(ImageSpec {
                image: IMAGE.to_string(),
            }),
            command: command.iter().map(|word| word.to_string()).collect(),
            args: Vec::new(),
            linux: Some(LinuxContainerConfig {
                security_context: Some(LinuxContainerSecurityContext { namespace_options }),
            }),
        };
        let cri = self.node.cri();
        cri.run_container(&self.id, config, self.config.clone())
            .unwrap()
    }

    /// Runs a command in the application's container to its end.
    pub fn exec(&self, words: &[&str]) -> Done {
        let application = self.application.as_ref().unwrap();
        let done = self.node.cri().exec(application, words).unwrap();
        Done {
            code: done.exit_code,
            stdout: String::from_utf8_lossy(&done.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&done.stderr).into_owned(),
        }
    }

    /// Asks another pod's application for its name.
    pub fn ask(&self, ip: IpAddr) -> Done {
        let address = std::net::SocketAddr::new(ip, PORT);
        self.exec(&["wget", "-qO-", &format!("http://{address}/")])
    }

    fn metadata(&self) -> &PodSandboxMetadata {
        self.config.metadata.as_ref().unwrap()
    }

    pub fn name(&self) -> &str {
        &self.metadata().name
    }

    pub fn namespace(&self) -> &str {
        &self.metadata().namespace
    }

    pub fn uid(&self) -> &str {
        &self.metadata().uid
    }

    /// The sandbox's ID.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The first address.
    pub fn ip(&self) -> IpAddr {
        self.ips[0]
    }

    /// All addresses; none of a pod in the node's network.
    pub fn ips(&self) -> &[IpAddr] {
        &self.ips
    }

    /// The network namespace.
    pub fn netns(&self) -> File {
        let path = format!("/proc/{}/ns/net", self.pid);
        File::open(self.node.space().path(path)).unwrap()
    }

    /// Ends the containers and takes the network away.
    ///
    /// # Errors
    /// What the runtime said.
    pub fn stop(&self) -> Result<(), String> {
        self.node.cri().stop_sandbox(&self.id)
    }

    /// Ends the pod and forgets it.
    ///
    /// # Errors
    /// What the runtime said; the pod may then still be there.
    pub fn remove(&self) -> Result<(), String> {
        self.stop()?;
        self.node.cri().remove_sandbox(&self.id)?;
        for group in control_groups(self.node.name()) {
            remove_group(&group.join(format!("pod{}", self.uid()))).unwrap();
        }
        Ok(())
    }
}

/// A UID in the usual shape that no other pod of this process has.
fn uid() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(1);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    format!("{:08x}-0000-4000-8000-{count:012x}", std::process::id())
}
