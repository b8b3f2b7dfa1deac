//! A node of several pods: each in a namespace of its own, captured as in a cluster, and all on one bridge with peers
//! outside the mesh.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::process::{Child, Command};

use cni::CaptureConfig;
use cni::zds::{WorkloadInfo, ZdsServer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::harness::{self, Proxy};

/// The node's proxy and its agent. The addresses of the proxy's own namespace are on the bridge, outside the mesh.
pub struct Pods {
    proxy: Proxy,
    agent: ZdsServer,
}

impl std::ops::Deref for Pods {
    type Target = Proxy;

    fn deref(&self) -> &Proxy {
        &self.proxy
    }
}

impl Drop for Pods {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = std::fs::read_to_string(self.proxy.folder().join("proxy.log"));
            eprintln!("{}", log.unwrap_or_default());
        }
    }
}

/// A place on the bridge.
pub struct Host {
    netns: File,
    ip: &'static str,
}

impl Pods {
    /// Starts a node without pods that knows that state; none, with a line that says so, without root.
    pub async fn start(name: &str, variables: &[(&str, &str)], state: &str) -> Option<Self> {
        let proxy = Proxy::alone(name, variables, state).await?;
        proxy
            .shell("ip link add br0 type bridge; ip link set br0 up; ip link set peer0 master br0");
        let agent = ZdsServer::bind(&proxy.folder().join("zds.sock")).unwrap();
        let mut connected = agent.connected();
        connected.wait_for(|count| *count > 0).await.unwrap();
        Some(Self { proxy, agent })
    }

    /// A place at an address of 10.0.0.0/24 that nothing is captured of.
    pub fn host(&self, ip: &'static str) -> Host {
        let link = format!("v{}", ip.replace('.', "-"));
        let bridge = self.proxy.netns().as_raw_fd();
        let netns = harness::namespace_with(&format!(
            "ip link add eth0 type veth peer name {link}; ip link set {link} netns /proc/{}/fd/{bridge}; \
             ip addr add {ip}/24 dev eth0; ip link set eth0 up; ip route add default dev eth0",
            std::process::id(),
        ));
        self.proxy
            .shell(&format!("ip link set {link} master br0 up"));
        Host { netns, ip }
    }

    /// The captured pod of that name, which is also that of its service account.
    pub async fn pod(&self, name: &str, ip: &'static str) -> Host {
        let host = self.host(ip);
        let info = WorkloadInfo {
            name: name.into(),
            namespace: "default".into(),
            service_account: name.into(),
        };
        let netns = host.netns.try_clone().unwrap().into();
        let uid = format!("uid-{name}");
        self.agent.add(&uid, info, netns).await.unwrap();
        let config = CaptureConfig {
            ipv6: cni::Ipv6Mode::Pass,
            ..CaptureConfig::default()
        };
        cni::capture(host.netns.as_fd(), &config).unwrap();
        host
    }
}

impl Host {
    pub fn ip(&self) -> &'static str {
        self.ip
    }

    /// A listener at its address.
    pub fn listen(&self, port: u16) -> TcpListener {
        harness::listen(&self.netns, self.ip, port)
    }

    /// A connection from its address, or within its loopback.
    pub async fn connect(&self, target: &str) -> io::Result<TcpStream> {
        harness::connect(&self.netns, self.ip, target).await
    }

    /// Starts a process here.
    pub fn spawn(&self, command: &mut Command, log: &std::path::Path) -> Child {
        harness::spawn(command, &self.netns, log)
    }

    /// What an HTTP server answers to a GET from here, head included; nothing when it gives none.
    pub async fn get(&self, target: &str) -> String {
        self.get_path(target, "/").await
    }

    /// The same for a path.
    pub async fn get_path(&self, target: &str, path: &str) -> String {
        let mut text = Vec::new();
        if let Ok(mut socket) = self.connect(target).await {
            let request =
                format!("GET {path} HTTP/1.1\r\nhost: {target}\r\nconnection: close\r\n\r\n");
            socket.write_all(request.as_bytes()).await.unwrap();
            // An Envoy that closes a connection inside a tunnel resets the stream after the last byte.
            let _ = socket.read_to_end(&mut text).await;
        }
        String::from_utf8(text).unwrap()
    }
}

/// How long the answer for `/large` is; less than the window of a stream.
pub const LARGE: usize = 3 << 20;

/// Answers HTTP requests with whom they seem to come from, and those for `/large` at length.
pub fn serve(listener: TcpListener) {
    tokio::spawn(async move {
        while let Ok((mut socket, peer)) = listener.accept().await {
            tokio::spawn(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    if socket.read_buf(&mut head).await.unwrap_or(0) == 0 {
                        return;
                    }
                }
                let body = match head.starts_with(b"GET /large") {
                    true => "x".repeat(LARGE),
                    false => format!("hello {}", peer.ip()),
                };
                let answer = format!(
                    "HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
                    body.len()
                );
                let _ = socket.write_all(answer.as_bytes()).await;
            });
        }
    });
}
