//! A node of one pod in a network namespace: a real control plane, a real proxy, and the certificates of anybody.

use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use cni::netns::within;
use cni::zds::{WorkloadInfo, ZdsServer};
use hbone::{TlsIdentity, TlsOptions};
use nix::sched::{CloneFlags, setns, unshare};
use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::net::{TcpSocket, TcpStream};

/// The pod's address.
pub const POD: &str = "10.0.0.9";
/// The address of another pod, from which the tests call.
pub const CLIENT: &str = "10.0.0.1";
const WARREN: &str = env!("CARGO_BIN_EXE_warren");
/// How long anything may take that ought to happen soon.
const SOON: Duration = Duration::from_secs(20);

/// The node; everything of it ends with it.
pub struct Node {
    netns: File,
    folder: PathBuf,
    control: Child,
    /// Further arguments of the control plane.
    arguments: Vec<&'static str>,
    proxy: Child,
    agent: ZdsServer,
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
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: tests of the whole proxy need root");
            return None;
        }
        let folder = std::env::temp_dir().join(format!("wrn-proxy-{}-{name}", std::process::id()));
        std::fs::create_dir_all(folder.join("manifests")).unwrap();
        let netns = namespace();
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
        let mut command = Command::new(WARREN);
        command
            .args(["proxy", "ztunnel"])
            .env_clear()
            .env("PATH", std::env::var("PATH").unwrap());
        for (key, value) in [
            ("NODE_NAME", "n1"),
            ("IPV6_ENABLED", "false"),
            ("XDS_ADDRESS", "https://127.0.0.1:15012"),
            ("CA_ADDRESS", "https://127.0.0.1:15012"),
            ("RUST_LOG", "info,access=debug"),
            ("ZTUNNEL_WORKER_THREADS", "2"),
        ] {
            command.env(key, value);
        }
        command
            .env("XDS_ROOT_CA", &root)
            .env("CA_ROOT_CA", &root)
            .env("AUTH_TOKEN", &token);
        command
            .env("INPOD_UDS", folder.join("zds.sock"))
            .envs(variables.iter().copied());
        let proxy = spawn(&mut command, &netns, &folder.join("proxy.log"));
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
        Some(Self {
            netns,
            folder,
            control,
            arguments,
            proxy,
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

    /// Runs a shell command in the pod's namespace.
    pub fn shell(&self, text: &str) {
        let mut command = Command::new("sh");
        command.args(["-ec", text]);
        let log = self.folder.join("shell.log");
        let mut child = spawn(&mut command, &self.netns, &log);
        let done = child.wait().unwrap().success();
        assert!(done, "{text}: {}", std::fs::read_to_string(&log).unwrap());
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

    /// The node agent.
    pub fn agent(&self) -> &ZdsServer {
        &self.agent
    }

    /// The proxy's resident memory, in KiB.
    pub fn memory(&self) -> usize {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.proxy.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let number = line.and_then(|line| line.split_whitespace().next());
        number.unwrap().parse().unwrap()
    }

    /// How many descriptors the proxy has open.
    pub fn descriptors(&self) -> usize {
        let folder = format!("/proc/{}/fd", self.proxy.id());
        std::fs::read_dir(folder).unwrap().count()
    }

    /// Writes another manifest.
    pub fn apply(&self, name: &str, text: &str) {
        let scratch = self.folder.join("scratch");
        std::fs::write(&scratch, text).unwrap();
        std::fs::rename(scratch, self.folder.join("manifests").join(name)).unwrap();
    }

    /// Tells the proxy to stop; gives its exit code.
    pub async fn terminate(&mut self) -> Option<i32> {
        let pid = nix::unistd::Pid::from_raw(self.proxy.id() as i32);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        let mut code = None;
        wait_for("the proxy's end", || {
            code = self.proxy.try_wait().unwrap();
            code.is_some()
        })
        .await;
        code.and_then(|status| status.code())
    }

    /// A connection from the client's address into the pod's namespace.
    pub async fn connect(&self, target: &str) -> io::Result<TcpStream> {
        let target: SocketAddr = target.parse().unwrap();
        let socket = within(self.netns.as_fd(), || {
            let socket = TcpSocket::new_v4()?;
            socket.set_reuseaddr(true)?;
            if !target.ip().is_loopback() {
                socket.bind(SocketAddr::new(CLIENT.parse().unwrap(), 0))?;
            }
            Ok(std::os::fd::IntoRawFd::into_raw_fd(socket))
        })?;
        // SAFETY: the descriptor was just given up by its socket.
        let socket = unsafe { <TcpSocket as std::os::fd::FromRawFd>::from_raw_fd(socket) };
        tokio::time::timeout(SOON, socket.connect(target))
            .await
            .map_err(io::Error::from)?
    }

    /// A listener of the pod's application.
    pub fn listen(&self, port: u16) -> tokio::net::TcpListener {
        self.listen_at(POD, port)
    }

    /// A listener at an address of the pod's namespace.
    pub fn listen_at(&self, ip: &str, port: u16) -> tokio::net::TcpListener {
        let bind = || std::net::TcpListener::bind((ip, port));
        let listener = within(self.netns.as_fd(), bind).unwrap();
        listener.set_nonblocking(true).unwrap();
        tokio::net::TcpListener::from_std(listener).unwrap()
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
            found = text
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
        let state = self.folder.join("state");
        let root = std::fs::read_to_string(state.join("root-cert.pem")).unwrap();
        let key = KeyPair::from_pem(&std::fs::read_to_string(state.join("root-key.pem")).unwrap())
            .unwrap();
        Certificate {
            issuer: Issuer::from_ca_cert_pem(&root, key).unwrap(),
            root,
            uri: uri.to_string(),
            expired: false,
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        for child in [&mut self.proxy, &mut self.control] {
            let _ = child.kill();
            let _ = child.wait();
        }
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

/// A client's certificate to be.
pub struct Certificate {
    issuer: Issuer<'static, KeyPair>,
    root: String,
    uri: String,
    expired: bool,
}

impl Certificate {
    /// Signed by somebody else who looks the same, while the mesh's root is trusted.
    pub fn of_another_root(mut self) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        self.issuer = Issuer::new(params, key);
        self
    }

    /// Valid until yesterday.
    pub fn expired(mut self) -> Self {
        self.expired = true;
        self
    }

    /// A revocation list with the certificate of an identity on it.
    pub fn revoke(&self, identity: &TlsIdentity) -> String {
        use x509_parser::prelude::FromDer;
        let leaf = &identity.chain()[0];
        let (_, parsed) = x509_parser::prelude::X509Certificate::from_der(leaf).unwrap();
        let now = rcgen::date_time_ymd(2026, 1, 1);
        let entry = rcgen::RevokedCertParams {
            serial_number: rcgen::SerialNumber::from_slice(parsed.raw_serial()),
            revocation_time: now,
            reason_code: None,
            invalidity_date: None,
        };
        let list = rcgen::CertificateRevocationListParams {
            this_update: now,
            next_update: rcgen::date_time_ymd(2036, 1, 1),
            crl_number: rcgen::SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: vec![entry],
            key_identifier_method: rcgen::KeyIdMethod::Sha256,
        };
        list.signed_by(&self.issuer).unwrap().pem().unwrap()
    }

    /// The certificate with a new key, and the configurations made of it.
    pub fn identity(&self) -> Arc<TlsIdentity> {
        const DAY: Duration = Duration::from_secs(24 * 3600);
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(self.uri.as_str().try_into().unwrap())];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ClientAuth,
            ExtendedKeyUsagePurpose::ServerAuth,
        ];
        let now = SystemTime::now();
        params.not_before = (now - 2 * DAY).into();
        params.not_after = if self.expired {
            (now - DAY).into()
        } else {
            (now + DAY).into()
        };
        let leaf = params.signed_by(&key, &self.issuer).unwrap();
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let root = CertificateDer::from_pem_slice(self.root.as_bytes()).unwrap();
        let chain = vec![leaf.der().clone()];
        Arc::new(
            TlsIdentity::new(
                chain,
                key,
                vec![root],
                &TlsOptions {
                    tls12: true,
                    pqc: false,
                },
            )
            .unwrap(),
        )
    }
}

/// A namespace with the pod's and the client's addresses.
pub fn namespace() -> File {
    let made = std::thread::spawn(|| -> io::Result<File> {
        unshare(CloneFlags::CLONE_NEWNET)?;
        let setup = format!(
            "ip link set lo up; ip link add eth0 type veth peer name peer0; ip link set eth0 up; ip link set peer0 up; \
             ip addr add {POD}/24 dev eth0; ip addr add {CLIENT}/24 dev eth0"
        );
        let done = Command::new("sh").args(["-ec", &setup]).status()?;
        assert!(done.success(), "{setup}");
        File::open("/proc/thread-self/ns/net")
    });
    made.join().unwrap().unwrap()
}

fn spawn(command: &mut Command, netns: &File, log: &Path) -> Child {
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
