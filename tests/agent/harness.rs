//! A node in network namespaces of its own: its agent as a real process, its pods, a proxy that answers the agent as
//! the test wants, and the API server that the agent talks to.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use cni::netns::{id, within};
use cni::zds::{Connection, Payload, messages};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use warren::lab::api::{ApiServer, Options};

pub const NODE: &str = "node-a";
const PATIENCE: Duration = Duration::from_secs(20);
const LOOK: Duration = Duration::from_millis(20);

/// Waits for something, and says what did not happen.
pub fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < end, "never came true: {what}");
        std::thread::sleep(LOOK);
    }
}

/// A network namespace that lives as long as this.
pub struct Netns(pub File);

impl Netns {
    fn new() -> Self {
        let made = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            File::open("/proc/thread-self/ns/net").unwrap()
        });
        let netns = Self(made.join().unwrap());
        netns.shell("ip link set lo up");
        netns
    }

    /// Runs a command line inside; gives its output.
    pub fn shell(&self, line: &str) -> String {
        let output = within(self.0.as_fd(), || {
            Command::new("sh").args(["-ec", line]).output()
        });
        let output = output.unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{line}: {errors}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }
}

/// A pod's network, connected to its node.
pub struct Pod {
    pub netns: Netns,
    pub name: String,
    pub uid: String,
    pub ip: IpAddr,
}

impl Pod {
    /// The rules and routes of ours that it holds.
    pub fn rules(&self) -> String {
        self.netns.shell(
            "iptables-save | grep ISTIO || true; ip6tables-save | grep ISTIO || true; \
             ip rule | grep 0x111 || true; ip route show table 100 2>/dev/null || true",
        )
    }

    pub fn is_captured(&self) -> bool {
        let config = cni::CaptureConfig::default();
        cni::verify(self.netns.0.as_fd(), &config)
            .unwrap()
            .is_none()
    }
}

/// What the proxy was told of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Told {
    Add {
        uid: String,
        name: String,
        account: String,
        netns: (u64, u64),
    },
    Keep(String),
    Del(String),
    Snapshot,
}

/// How the proxy answers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Manner {
    #[default]
    Serves,
    Refuses(String),
    /// Never.
    Silent,
}

/// A proxy at the agent's socket.
pub struct Proxy {
    pub told: Arc<Mutex<Vec<Told>>>,
    pub manner: Arc<Mutex<Manner>>,
    task: tokio::task::JoinHandle<()>,
}

impl Proxy {
    /// What it was told since it was last asked.
    pub fn take(&self) -> Vec<Told> {
        std::mem::take(&mut *self.told.lock().unwrap())
    }

    /// Waits until it was told something.
    pub fn wait(&self, what: &str, wanted: impl Fn(&Told) -> bool) -> Told {
        eventually(what, || {
            self.told
                .lock()
                .unwrap()
                .iter()
                .find(|told| wanted(told))
                .cloned()
        })
    }

    pub fn wait_added(&self, pod: &Pod) {
        self.wait(
            "an addition",
            |told| matches!(told, Told::Add { uid, .. } if *uid == pod.uid),
        );
    }

    pub fn wait_deleted(&self, pod: &Pod) {
        self.wait("a removal", |told| *told == Told::Del(pod.uid.clone()));
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve_pods(path: PathBuf, told: Arc<Mutex<Vec<Told>>>, manner: Arc<Mutex<Manner>>) {
    loop {
        let Ok(connection) = Connection::connect(&path) else {
            tokio::time::sleep(LOOK).await;
            continue;
        };
        let hello = messages::ZdsHello { version: 1 };
        if connection.send(&hello, None).await.is_err() {
            continue;
        }
        while let Ok(Some(packet)) = connection.receive().await {
            let netns = packet.descriptor.as_ref().map(|fd| id(fd).unwrap());
            let request: messages::WorkloadRequest = packet.decode().unwrap();
            let heard = match request.payload.unwrap() {
                Payload::Add(add) => {
                    let info = add.workload_info.unwrap();
                    Told::Add {
                        uid: add.uid,
                        name: format!("{}/{}", info.namespace, info.name),
                        account: info.service_account,
                        netns: netns.unwrap(),
                    }
                }
                Payload::Keep(keep) => Told::Keep(keep.uid),
                Payload::Del(del) => Told::Del(del.uid),
                Payload::SnapshotSent(_) => Told::Snapshot,
            };
            told.lock().unwrap().push(heard.clone());
            let manner = manner.lock().unwrap().clone();
            let error = match (manner, heard) {
                (Manner::Refuses(error), Told::Add { .. }) => error,
                (Manner::Silent, Told::Add { .. } | Told::Del(_)) => {
                    // Until the agent hangs up.
                    let _ = connection.receive().await;
                    break;
                }
                _ => String::new(),
            };
            let answer = messages::WorkloadResponse::ack(&error);
            if connection.send(&answer, None).await.is_err() {
                break;
            }
        }
    }
}

/// The node.
pub struct Node {
    pub api: ApiServer,
    pub netns: Netns,
    pub root: PathBuf,
    server: SocketAddr,
    agent: Option<Child>,
    runtime: tokio::runtime::Runtime,
    pods: AtomicU32,
    /// Further variables of the agent.
    pub env: Vec<(String, String)>,
}

impl Node {
    /// A node with a running agent; none, with a line that says so, without root.
    pub fn new(test: &str) -> Option<Self> {
        let mut node = Self::without_agent(test)?;
        node.start();
        Some(node)
    }

    pub fn without_agent(test: &str) -> Option<Self> {
        Self::with_api(test, Options::default())
    }

    /// A node whose API server has these options.
    pub fn with_api(test: &str, options: Options) -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            let _ = writeln!(std::io::stderr(), "SKIPPED {test}: it needs root");
            return None;
        }
        sweep();
        let root = std::env::temp_dir().join(format!("wrn-agent-{}-{test}", std::process::id()));
        let _ = fs::remove_dir_all(&root);
        for folder in ["run", "netns", "proc", "sa", "programs"] {
            fs::create_dir_all(root.join(folder)).unwrap();
        }
        fs::write(root.join("sa/token"), "agent-token").unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let netns = Netns::new();
        netns.shell("sysctl -qw net.ipv4.ip_forward=1");
        let listener = within(netns.0.as_fd(), || {
            TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
        });
        let listener = listener.unwrap();
        let server = listener.local_addr().unwrap();
        listener.set_nonblocking(true).unwrap();
        let api = ApiServer::new(options);
        let node = Self {
            api,
            netns,
            root,
            server,
            agent: None,
            runtime,
            pods: AtomicU32::new(1),
            env: Vec::new(),
        };
        node.serve(listener, None);
        node.namespace("default", None);
        Some(node)
    }

    fn serve(&self, listener: TcpListener, tls: Option<Arc<rustls::ServerConfig>>) {
        let serving = self.api.clone();
        self.runtime.spawn(async move {
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            let _ = serving
                .serve(listener, tls, std::future::pending::<()>())
                .await;
        });
    }

    /// Serves the API over TLS as well, and has the agent use that; gives the certificate to trust.
    pub fn secure(&mut self) -> String {
        let rcgen::CertifiedKey { cert, signing_key } =
            rcgen::generate_simple_self_signed([self.server.ip().to_string()]).unwrap();
        let key = rustls::pki_types::PrivateKeyDer::try_from(signing_key.serialize_der()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![cert.der().clone()], key)
            .unwrap();
        let listener = within(self.netns.0.as_fd(), || {
            TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
        });
        let listener = listener.unwrap();
        listener.set_nonblocking(true).unwrap();
        self.server = listener.local_addr().unwrap();
        self.serve(listener, Some(Arc::new(config)));
        self.set("KUBERNETES_SERVICE_PROTOCOL", "https");
        cert.pem()
    }

    /// Sets a variable of the agent.
    pub fn set(&mut self, name: &str, value: &str) {
        self.env.push((name.to_string(), value.to_string()));
    }

    /// Starts the agent and waits until it watches.
    pub fn start(&mut self) {
        self.spawn();
        eventually("the agent watches", || {
            self.readiness().contains("pods: watched").then_some(())
        });
    }

    /// Starts the agent.
    pub fn spawn(&mut self) {
        let root = |name: &str| self.root.join(name).to_string_lossy().into_owned();
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.root.join("log"))
            .unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_warren"));
        let path = format!("{}:{}", root("programs"), std::env::var("PATH").unwrap());
        let socket = root("zds");
        command
            .arg("node-agent")
            .env_clear()
            .env("PATH", path)
            .env(
                "RUST_LOG",
                "debug,hyper=info,tower=info,kube=info,hyper_util=info",
            )
            .env("NODE_NAME", NODE)
            .env("POD_NAME", "agent-x")
            .env("POD_NAMESPACE", "istio-system")
            .env("HOST_ROOT", &self.root)
            .env("CNI_AGENT_RUN_DIR", root("run"))
            .env("ZTUNNEL_UDS_ADDRESS", socket)
            .env("SERVICE_ACCOUNT_DIR", root("sa"))
            .env("INSTALL_PLUGIN", "false")
            .env("EXCLUDE_NAMESPACES", "kube-system")
            .env("CAPTURE_CHECK_INTERVAL", "1")
            .env("KUBERNETES_SERVICE_PROTOCOL", "http")
            .env("KUBERNETES_SERVICE_HOST", self.server.ip().to_string())
            .env("KUBERNETES_SERVICE_PORT", self.server.port().to_string())
            .envs(self.env.iter().cloned())
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        let netns = self.netns.0.try_clone().unwrap();
        // SAFETY: between fork and exec there are only two system calls.
        unsafe {
            command.pre_exec(move || {
                nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
                setns(netns.as_fd(), CloneFlags::CLONE_NEWNET)?;
                Ok(())
            });
        }
        self.agent = Some(command.spawn().unwrap());
    }

    /// Ends the agent at once, as a crash does.
    pub fn kill(&mut self) {
        let mut agent = self.agent.take().unwrap();
        agent.kill().unwrap();
        agent.wait().unwrap();
    }

    /// Sends the agent a signal.
    pub fn signal(&self, signal: Signal) {
        let pid = self.agent.as_ref().unwrap().id();
        kill(Pid::from_raw(pid.try_into().unwrap()), signal).unwrap();
    }

    /// Asks the agent to end and waits for it.
    pub fn stop(&mut self) {
        self.signal(Signal::SIGTERM);
        let mut agent = self.agent.take().unwrap();
        let status = eventually("the agent's end", || agent.try_wait().unwrap());
        assert!(status.success(), "{status}: {}", self.log());
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.root.join("log")).unwrap_or_default()
    }

    /// A proxy that serves whatever it is told of.
    pub fn proxy(&self) -> Proxy {
        let (told, manner) = (Arc::default(), Arc::default());
        let serving = serve_pods(
            self.root.join("zds"),
            Arc::clone(&told),
            Arc::clone(&manner),
        );
        Proxy {
            told,
            manner,
            task: self.runtime.spawn(serving),
        }
    }

    /// A proxy that has heard of all pods.
    pub fn proxy_in_service(&self) -> Proxy {
        let proxy = self.proxy();
        proxy.wait("the snapshot", |told| *told == Told::Snapshot);
        eventually("the agent's count of proxies", || {
            self.readiness()
                .contains("proxies connected: 1")
                .then_some(())
        });
        proxy.take();
        proxy
    }

    /// Makes or changes a namespace.
    pub fn namespace(&self, name: &str, mode: Option<&str>) {
        let mut labels = json!({});
        if let Some(mode) = mode {
            labels["istio.io/dataplane-mode"] = mode.into();
        }
        self.api.put(json!({
            "apiVersion": "v1", "kind": "Namespace",
            "metadata": {"name": name, "labels": labels},
        }));
    }

    /// A pod's network; the API server knows nothing of it yet.
    pub fn network(&self, name: &str) -> Pod {
        let number = self.pods.fetch_add(1, Ordering::Relaxed);
        let pod = Pod {
            netns: Netns::new(),
            name: name.to_string(),
            uid: format!("00000000-0000-4000-8000-{number:012}"),
            ip: Ipv4Addr::new(10, 244, 0, u8::try_from(number).unwrap() + 1).into(),
        };
        let ip = pod.ip;
        pod.netns.shell(&format!(
            "ip link add eth0 type veth peer name pod{number}; ip link set pod{number} netns {}; ip link set eth0 up; \
             ip addr add {ip}/32 dev eth0; ip route add 10.244.0.1 dev eth0; ip route add default via 10.244.0.1",
            self.netns.path()
        ));
        self.netns.shell(&format!(
            "ip link set pod{number} up; ip addr add 10.244.0.1/32 dev pod{number}; ip route add {ip}/32 dev pod{number}"
        ));
        symlink(pod.netns.path(), self.root.join("netns").join(name)).unwrap();
        pod
    }

    /// What the API server shows of a pod.
    pub fn object(&self, pod: &Pod, running: bool) -> Value {
        let status = match running {
            true => json!({"phase": "Running", "podIP": pod.ip, "podIPs": [{"ip": pod.ip}]}),
            false => json!({"phase": "Pending"}),
        };
        json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": pod.name, "namespace": "default", "uid": pod.uid, "labels": {}, "annotations": {}},
            "spec": {"nodeName": NODE, "serviceAccountName": "sa-a", "containers": []},
            "status": status,
        })
    }

    /// A pod that runs, of which the plugin has told, outside the mesh.
    pub fn running(&self, name: &str) -> Pod {
        let pod = self.network(name);
        self.api.put(self.object(&pod, true));
        eventually("the agent knows the pod", || {
            (self.event("/note", &self.request(&pod)).0 == 200).then_some(())
        });
        pod
    }

    /// The body that the plugin sends.
    pub fn request(&self, pod: &Pod) -> Value {
        json!({
            "Netns": format!("/netns/{}", pod.name),
            "PodName": pod.name, "PodNamespace": "default",
            "IPs": [{"Interface": 0, "Address": {"IP": pod.ip, "Mask": "/////w=="}, "Gateway": ""}],
        })
    }

    /// What the plugin does for a pod that is being started.
    pub fn add(&self, pod: &Pod) -> (u16, String) {
        self.event("/cmdadd", &self.request(pod))
    }

    /// One request at the agent's socket: status and text.
    pub fn event(&self, path: &str, body: &Value) -> (u16, String) {
        self.raw_event(path, body.to_string().as_bytes())
    }

    pub fn raw_event(&self, path: &str, body: &[u8]) -> (u16, String) {
        let Ok(mut socket) = UnixStream::connect(self.root.join("run/pluginevent.sock")) else {
            return (0, "nobody listens".to_string());
        };
        let head = format!(
            "POST {path} HTTP/1.1\r\nHost: unix\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        let _ = socket
            .write_all(head.as_bytes())
            .and_then(|()| socket.write_all(body));
        answer(socket)
    }

    /// What the agent says of itself.
    pub fn readiness(&self) -> String {
        self.get(8000, "/readyz").1
    }

    pub fn get(&self, port: u16, path: &str) -> (u16, String) {
        let connected = within(self.netns.0.as_fd(), || {
            TcpStream::connect((Ipv4Addr::LOCALHOST, port))
        });
        let Ok(mut socket) = connected else {
            return (0, String::new());
        };
        let head = format!("GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
        let _ = socket.write_all(head.as_bytes());
        answer(socket)
    }

    /// A pod's status annotation.
    pub fn status(&self, pod: &Pod) -> Option<String> {
        let object = self.api.object("pods", "default", &pod.name)?;
        let value = &object["metadata"]["annotations"]["ambient.istio.io/redirection"];
        value.as_str().map(str::to_string)
    }

    pub fn wait_status(&self, pod: &Pod, wanted: Option<&str>) {
        eventually(
            &format!("status {wanted:?} of {}; {}", pod.name, self.log()),
            || (self.status(pod).as_deref() == wanted).then_some(()),
        );
    }

    /// The addresses whose probes are let through.
    pub fn probes(&self) -> String {
        self.netns
            .shell("ipset list 2>/dev/null | grep 'comment \"' || true")
    }

    /// Changes the labels of a pod.
    pub fn label(&self, pod: &Pod, mode: &str) {
        let mut object = self.api.object("pods", "default", &pod.name).unwrap();
        object["metadata"]["labels"]["istio.io/dataplane-mode"] = mode.into();
        self.api.put(object);
    }

    /// A program that the agent finds before the real one.
    pub fn program(&self, name: &str, script: &str) {
        use std::os::unix::fs::PermissionsExt;
        let file = self.root.join("programs").join(name);
        fs::write(&file, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(file, fs::Permissions::from_mode(0o755)).unwrap();
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(mut agent) = self.agent.take() {
            let _ = agent.kill();
            let _ = agent.wait();
        }
        if std::thread::panicking() {
            let log = self.log();
            let lines: Vec<_> = log.lines().collect();
            let last = lines[lines.len().saturating_sub(60)..].join("\n");
            eprintln!("the agent's log ends with:\n{last}");
        }
        let _ = fs::remove_dir_all(&self.root);
    }
}

fn answer(mut socket: impl Read) -> (u16, String) {
    let mut text = String::new();
    let _ = socket.read_to_string(&mut text);
    let status = text.split(' ').nth(1).and_then(|code| code.parse().ok());
    let body = text
        .split_once("\r\n\r\n")
        .map(|(_, body)| body.to_string());
    (status.unwrap_or(0), body.unwrap_or_default())
}

/// Removes what tests that were killed have left.
fn sweep() {
    for entry in fs::read_dir(std::env::temp_dir())
        .into_iter()
        .flatten()
        .flatten()
    {
        let name = entry.file_name().to_string_lossy().into_owned();
        let owner = name
            .strip_prefix("wrn-agent-")
            .and_then(|rest| rest.split('-').next());
        if owner.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}
