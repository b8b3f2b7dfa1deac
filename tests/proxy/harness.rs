//! A node of one pod in a network namespace: a real control plane, a real proxy, and the certificates of anybody.

use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use cni::netns::within;
use cni::zds::{WorkloadInfo, ZdsServer};
use nix::sched::{CloneFlags, setns, unshare};
use tokio::net::{TcpSocket, TcpStream};

use crate::certificate::Certificate;

/// The pod's address.
pub const POD: &str = "10.0.0.9";
/// The address of another pod, from which the tests call.
pub const CLIENT: &str = "10.0.0.1";
const WARREN: &str = env!("CARGO_BIN_EXE_warren");
/// For `RESOLV_CONF`: there is none.
pub const MISSING: &str = "missing";
/// Not a variable of the proxy: the text of its `/etc/resolv.conf`.
pub const RESOLV_CONF: &str = "RESOLV_CONF";
/// How long anything may take that ought to happen soon.
const SOON: Duration = Duration::from_secs(20);

/// The node; everything of it ends with it.
pub struct Node {
    proxy: Proxy,
    control: Child,
    /// Further arguments of the control plane.
    arguments: Vec<&'static str>,
    agent: ZdsServer,
}

impl std::ops::Deref for Node {
    type Target = Proxy;

    fn deref(&self) -> &Proxy {
        &self.proxy
    }
}

impl std::ops::DerefMut for Node {
    fn deref_mut(&mut self) -> &mut Proxy {
        &mut self.proxy
    }
}

/// A proxy in a namespace of its own; both end with it.
pub struct Proxy {
    netns: File,
    folder: PathBuf,
    process: Child,
}

impl Node {
    /// Starts a node whose pod `web` runs nothing yet; none, with a line that says so, without root.
    pub async fn start(name: &str, variables: &[(&str, &str)]) -> Option<Self> {
        Self::start_with(name, variables, &[]).await
    }

    /// The same with further arguments for the control plane.
    pub async fn start_with(
        name: &str,
        variables: &[(&str, &str)],
        control: &[&'static str],
    ) -> Option<Self> {
        let arguments = control.to_vec();
        let (netns, folder) = place(name)?;
        std::fs::create_dir_all(folder.join("manifests")).unwrap();
        let control = Self::control(&netns, &folder, &arguments);
        let (root, token) = (
            folder.join("state/root-cert.pem"),
            folder.join("state/tokens/n1"),
        );
        wait_for("the control plane's token", || {
            token.exists() && root.exists()
        })
        .await;
        let agent = ZdsServer::bind(&folder.join("zds.sock")).unwrap();
        let mut command = proxy_command(&[WARREN]);
        command
            .env("XDS_ADDRESS", "https://127.0.0.1:15012")
            .env("CA_ADDRESS", "https://127.0.0.1:15012")
            .env("XDS_ROOT_CA", &root)
            .env("CA_ROOT_CA", &root)
            .env("AUTH_TOKEN", &token);
        command
            .env("INPOD_UDS", folder.join("zds.sock"))
            .envs(variables.iter().copied());
        let process = spawn(&mut command, &netns, &folder.join("proxy.log"));
        agent
            .connected()
            .wait_for(|count| *count > 0)
            .await
            .unwrap();
        let info = WorkloadInfo {
            name: "web".into(),
            namespace: "b".into(),
            service_account: "web".into(),
        };
        agent
            .add("uid-web", info, netns.try_clone().unwrap().into())
            .await
            .unwrap();
        let proxy = Proxy {
            netns,
            folder,
            process,
        };
        Some(Self {
            proxy,
            control,
            arguments,
            agent,
        })
    }

    fn control(netns: &File, folder: &Path, arguments: &[&str]) -> Child {
        std::fs::write(folder.join("manifests/all.yaml"), MANIFESTS).unwrap();
        let mut command = Command::new(WARREN);
        command.args(["control", "--listen", "127.0.0.1:15012", "--node", "n1"]);
        command.args(arguments);
        command
            .arg("--manifests")
            .arg(folder.join("manifests"))
            .arg("--state-dir")
            .arg(folder.join("state"));
        spawn(&mut command, netns, &folder.join("control.log"))
    }

    /// Ends the control plane without a word.
    pub fn kill_control(&mut self) {
        self.control.kill().unwrap();
        self.control.wait().unwrap();
    }

    /// Starts the control plane again.
    pub fn restart_control(&mut self) {
        self.control = Self::control(&self.netns, &self.folder, &self.arguments);
    }

    /// The node agent.
    pub fn agent(&self) -> &ZdsServer {
        &self.agent
    }

    /// Writes another manifest.
    pub fn apply(&self, name: &str, text: &str) {
        let scratch = self.folder.join("scratch");
        std::fs::write(&scratch, text).unwrap();
        std::fs::rename(scratch, self.folder.join("manifests").join(name)).unwrap();
    }
}

impl Proxy {
    /// Starts a proxy that needs no control plane and no CA, with that state; none without root.
    pub async fn alone(name: &str, variables: &[(&str, &str)], state: &str) -> Option<Self> {
        let (netns, folder) = place(name)?;
        std::fs::write(folder.join("state.yaml"), state).unwrap();
        let mut command = alone(&folder, variables);
        let process = spawn(&mut command, &netns, &folder.join("proxy.log"));
        let proxy = Self {
            netns,
            folder,
            process,
        };
        proxy.logged(&["local config initialized"]).await;
        Some(proxy)
    }

    /// Starts a proxy that is alone once more; the former one must have ended.
    pub fn start_again(&mut self, variables: &[(&str, &str)]) {
        let mut command = alone(&self.folder, variables);
        self.process = spawn(&mut command, &self.netns, &self.folder.join("proxy.log"));
    }

    /// Waits for the proxy's end; gives its exit code.
    pub async fn ended(&mut self) -> Option<i32> {
        let mut code = None;
        wait_for("the proxy's end", || {
            code = self.process.try_wait().unwrap();
            code.is_some()
        })
        .await;
        code.and_then(|status| status.code())
    }

    /// Writes other state for a proxy that is alone.
    pub fn state(&self, text: &str) {
        let scratch = self.folder.join("scratch");
        std::fs::write(&scratch, text).unwrap();
        std::fs::rename(scratch, self.folder.join("state.yaml")).unwrap();
    }

    /// Tells the proxy to stop.
    pub fn ask_to_stop(&self) {
        let pid = nix::unistd::Pid::from_raw(self.process.id() as i32);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    }

    /// Ends the proxy without a word.
    pub fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    /// Runs a shell command in the pod's namespace.
    pub fn shell(&self, text: &str) {
        let mut command = Command::new("sh");
        command.args(["-ec", text]);
        let log = self.folder.join("shell.log");
        let mut child = spawn(&mut command, &self.netns, &log);
        let done = child.wait().unwrap().success();
        assert!(done, "{text}: {}", std::fs::read_to_string(&log).unwrap());
    }

    /// The proxy's namespace.
    pub fn netns(&self) -> &File {
        &self.netns
    }

    /// The test's own folder; it goes with the proxy.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Captures what the pod sends to those ranges, and gives the pod's namespace further addresses for peers.
    pub fn capture(&self, ranges: &[&str], peers: &[&str]) {
        self.shell("ip route add default dev eth0");
        for peer in peers {
            self.shell(&format!("ip addr add {peer}/32 dev eth0"));
        }
        for range in ranges {
            let mark = "-m mark ! --mark 0x539/0xfff";
            self.shell(&format!(
                "iptables -w 10 -t nat -A OUTPUT -p tcp -d {range} {mark} -j REDIRECT --to-ports 15001"
            ));
        }
    }

    /// The proxy's resident memory, in KiB.
    pub fn memory(&self) -> usize {
        let status =
            std::fs::read_to_string(format!("/proc/{}/status", self.process.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let number = line.and_then(|line| line.split_whitespace().next());
        number.unwrap().parse().unwrap()
    }

    /// Lets the proxy have no more than so many descriptors.
    pub fn limit_descriptors(&self, most: usize) {
        let pid = self.process.id();
        self.shell(&format!("prlimit --pid {pid} --nofile={most}:"));
    }

    /// How many descriptors the proxy has open.
    pub fn descriptors(&self) -> usize {
        let folder = format!("/proc/{}/fd", self.process.id());
        std::fs::read_dir(folder).unwrap().count()
    }

    /// Tells the proxy to stop; gives its exit code.
    pub async fn terminate(&mut self) -> Option<i32> {
        self.ask_to_stop();
        self.ended().await
    }

    /// A connection from the client's address into the pod's namespace.
    pub async fn connect(&self, target: &str) -> io::Result<TcpStream> {
        connect(&self.netns, CLIENT, target).await
    }

    /// A listener of the pod's application.
    pub fn listen(&self, port: u16) -> tokio::net::TcpListener {
        self.listen_at(POD, port)
    }

    /// A listener at an address of the pod's namespace.
    pub fn listen_at(&self, ip: &str, port: u16) -> tokio::net::TcpListener {
        listen(&self.netns, ip, port)
    }

    /// An HTTP endpoint of the proxy: status and body.
    pub async fn http(&self, method: &str, port: u16, path: &str) -> (u16, String) {
        let (status, body) = self.fetch(method, port, path).await;
        (status, String::from_utf8(body).unwrap())
    }

    /// The same for a body that is no text.
    pub async fn fetch(&self, method: &str, port: u16, path: &str) -> (u16, Vec<u8>) {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let mut stream = self.connect(&format!("127.0.0.1:{port}")).await.unwrap();
        let request = format!("{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        tokio::time::timeout(SOON, stream.read_to_end(&mut answer))
            .await
            .unwrap()
            .unwrap();
        let end = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n");
        let body = end.map_or(Vec::new(), |end| answer[end + 4..].to_vec());
        let head = String::from_utf8_lossy(&answer[..end.unwrap_or(0)]);
        let status = head.split(' ').nth(1).and_then(|code| code.parse().ok());
        (status.unwrap_or(0), body)
    }

    /// Waits until the proxy has logged a line that holds all of the texts; gives it.
    pub async fn logged(&self, texts: &[&str]) -> String {
        let mut found = None;
        let what = format!("a log line with {texts:?}");
        let log = self.folder.join("proxy.log");
        let look = || {
            let text = std::fs::read_to_string(&log).unwrap_or_default();
            // The last line may be half written.
            let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
            found = whole
                .lines()
                .find(|line| texts.iter().all(|text| line.contains(text)))
                .map(str::to_string);
            found.is_some()
        };
        if !waited(look).await {
            panic!(
                "no {what} in\n{}",
                std::fs::read_to_string(&log).unwrap_or_default()
            );
        }
        found.unwrap()
    }

    /// How many lines the proxy has logged that hold a text.
    pub fn count(&self, text: &str) -> usize {
        let log = std::fs::read_to_string(self.folder.join("proxy.log")).unwrap_or_default();
        log.lines().filter(|line| line.contains(text)).count()
    }

    /// A certificate of the mesh's own root.
    pub fn certificate(&self, uri: &str) -> Certificate {
        let state = match self.folder.join("state") {
            state if state.exists() => state,
            _ => self.folder.join("warren-fake-ca-0"),
        };
        Certificate::of(&state, uri)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.control.kill();
        let _ = self.control.wait();
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

/// A namespace and a folder for a test; none, with a line that says so, without root.
fn place(name: &str) -> Option<(File, PathBuf)> {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: tests of the whole proxy need root");
        return None;
    }
    let folder = std::env::temp_dir().join(format!("wrn-proxy-{}-{name}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    Some((namespace(), folder))
}

fn alone(folder: &Path, variables: &[(&str, &str)]) -> Command {
    let resolv_conf = variables.iter().find(|(name, _)| *name == RESOLV_CONF);
    let mut command = match resolv_conf {
        None => proxy_command(&[WARREN]),
        Some((_, text)) => {
            let file = folder.join("resolv.conf");
            std::fs::write(&file, text).unwrap();
            let mount = match *text {
                MISSING => "mount -t tmpfs none /etc && exec $@",
                _ => "mount --bind $0 /etc/resolv.conf && exec $@",
            };
            let file = file.to_str().unwrap();
            proxy_command(&["unshare", "--mount", "sh", "-ec", mount, file, WARREN])
        }
    };
    command
        .env("TMPDIR", folder)
        .env("LOCAL_XDS_PATH", folder.join("state.yaml"))
        .env("INPOD_UDS", folder.join("zds.sock"));
    for (key, value) in [("XDS_ADDRESS", ""), ("FAKE_CA", "true")] {
        command.env(key, value);
    }
    command.envs(variables.iter().copied());
    command
}

fn proxy_command(program: &[&str]) -> Command {
    let mut command = Command::new(program[0]);
    command
        .args(&program[1..])
        .args(["proxy", "ztunnel"])
        .env_clear()
        .env("PATH", std::env::var("PATH").unwrap());
    for (key, value) in [
        ("NODE_NAME", "n1"),
        ("IPV6_ENABLED", "false"),
        ("RUST_LOG", "info,access=debug"),
        ("ZTUNNEL_WORKER_THREADS", "2"),
    ] {
        command.env(key, value);
    }
    command
}

/// A namespace with the pod's and the client's addresses.
pub fn namespace() -> File {
    namespace_with(&format!(
        "ip link add eth0 type veth peer name peer0; ip link set eth0 up; ip link set peer0 up; \
         ip addr add {POD}/24 dev eth0; ip addr add {CLIENT}/24 dev eth0"
    ))
}

/// A namespace in which a shell command was run.
pub fn namespace_with(setup: &str) -> File {
    let setup = format!("ip link set lo up; {setup}");
    let made = std::thread::spawn(move || -> io::Result<File> {
        unshare(CloneFlags::CLONE_NEWNET)?;
        let done = Command::new("sh").args(["-ec", &setup]).status()?;
        assert!(done.success(), "{setup}");
        File::open("/proc/thread-self/ns/net")
    });
    made.join().unwrap().unwrap()
}

/// A connection from an address of a namespace, or within its loopback.
pub async fn connect(netns: &File, source: &str, target: &str) -> io::Result<TcpStream> {
    let target: SocketAddr = target.parse().unwrap();
    let socket = within(netns.as_fd(), || {
        let socket = TcpSocket::new_v4()?;
        socket.set_reuseaddr(true)?;
        if !target.ip().is_loopback() {
            socket.bind(SocketAddr::new(source.parse().unwrap(), 0))?;
        }
        Ok(std::os::fd::IntoRawFd::into_raw_fd(socket))
    })?;
    // SAFETY: the descriptor was just given up by its socket.
    let socket = unsafe { <TcpSocket as std::os::fd::FromRawFd>::from_raw_fd(socket) };
    tokio::time::timeout(SOON, socket.connect(target))
        .await
        .map_err(io::Error::from)?
}

/// A listener at an address of a namespace.
pub fn listen(netns: &File, ip: &str, port: u16) -> tokio::net::TcpListener {
    let bind = || std::net::TcpListener::bind((ip, port));
    let listener = within(netns.as_fd(), bind).unwrap();
    listener.set_nonblocking(true).unwrap();
    tokio::net::TcpListener::from_std(listener).unwrap()
}

/// Starts a process in a namespace; it ends with the test's thread at the latest.
pub fn spawn(command: &mut Command, netns: &File, log: &Path) -> Child {
    let log = File::options().create(true).append(true).open(log).unwrap();
    command
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log);
    let netns: OwnedFd = netns.try_clone().unwrap().into();
    // SAFETY: between fork and exec only system calls are made, on a descriptor that the closure owns.
    unsafe {
        command.pre_exec(move || {
            setns(netns.as_fd(), CloneFlags::CLONE_NEWNET)?;
            // The process ends with the test, however that ends.
            nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
            Ok(())
        });
    }
    command.spawn().unwrap()
}

/// Waits for something that ought to happen soon.
pub async fn wait_for(what: &str, check: impl FnMut() -> bool) {
    assert!(waited(check).await, "{what} did not come");
}

async fn waited(mut check: impl FnMut() -> bool) -> bool {
    let deadline = tokio::time::Instant::now() + SOON;
    while tokio::time::Instant::now() < deadline {
        if check() {
            return true;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    check()
}

const MANIFESTS: &str = "apiVersion: v1
kind: Node
metadata: {name: n1}
---
apiVersion: v1
kind: Pod
metadata:
  name: web
  namespace: b
  labels: {app: web}
  annotations: {ambient.istio.io/redirection: enabled}
spec: {nodeName: n1, serviceAccountName: web}
status: {podIP: 10.0.0.9, conditions: [{type: Ready, status: 'True'}]}
---
apiVersion: v1
kind: Pod
metadata:
  name: curl
  namespace: a
  labels: {app: curl}
  annotations: {ambient.istio.io/redirection: enabled}
spec: {nodeName: n2, serviceAccountName: curl}
status: {podIP: 10.0.0.1, conditions: [{type: Ready, status: 'True'}]}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: b}
spec: {clusterIP: 10.96.0.1, selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}
";
