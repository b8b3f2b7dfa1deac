//! The API server as a process in a node's network namespace, and requests to it as the administrator.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

use cni::netns::within;
use kube::config::{AuthInfo, KubeConfigOptions, Kubeconfig};
use serde::Deserialize;
use serde_json::Value;

use crate::harness::{Node, eventually};

pub const ADDRESS: Ipv4Addr = Ipv4Addr::LOCALHOST;
/// Free in every namespace, and the same after another start.
pub const PORT: u16 = 6443;

/// The API server and its etcd.
pub struct ApiServer {
    process: Child,
    answers: BufReader<ChildStdout>,
    netns: File,
    config: kube::Config,
    dir: PathBuf,
    killed: bool,
}

impl ApiServer {
    /// Starts one on a node, over the data of the one before; waits until it is ready.
    pub fn start(node: &Node, flags: &[&str]) -> Self {
        let program = std::env::var_os("WARREN_CLUSTER").expect(
            "WARREN_CLUSTER must name the built program of tests/cluster: run `make test-cluster`",
        );
        let dir = node.root.join("apiserver");
        std::fs::create_dir_all(&dir).unwrap();
        let log = File::options()
            .create(true)
            .append(true)
            .open(dir.join("log"))
            .unwrap();
        let netns = node.netns.0.try_clone().unwrap();
        let mut command = Command::new(program);
        command
            .arg("--dir")
            .arg(&dir)
            .args(["--keep", "--port", &PORT.to_string(), "--"])
            .args(flags)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log);
        let mut process = within(netns.as_fd(), || command.spawn()).unwrap();
        let mut answers = BufReader::new(process.stdout.take().unwrap());
        let ready = line(&mut answers);
        let kubeconfig = ready
            .strip_prefix("ready ")
            .unwrap_or_else(|| panic!("the API server did not start: {}", tail(&dir)));
        let config = config(Path::new(kubeconfig));
        Self {
            process,
            answers,
            netns,
            config,
            dir,
            killed: false,
        }
    }

    /// Ends it at once, as a crash does; the data stays.
    pub fn kill(mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
        self.killed = true;
    }

    /// Has etcd forget every revision but the last.
    pub fn compact(&mut self) {
        writeln!(self.process.stdin.as_mut().unwrap(), "compact").unwrap();
        let answer = line(&mut self.answers);
        assert!(answer.starts_with("compacted "), "{answer}");
    }

    pub fn get(&self, path: &str) -> Option<Value> {
        match self.ask("GET", path, &Value::Null) {
            Ok(object) => Some(object),
            Err(kube::Error::Api(status)) if status.code == 404 => None,
            Err(error) => panic!("GET {path}: {error}"),
        }
    }

    pub fn create(&self, path: &str, object: &Value) -> Value {
        let created = self.ask("POST", path, object);
        created.unwrap_or_else(|error| panic!("POST {path}: {error}"))
    }

    /// Changes an object; what is null in the patch goes.
    pub fn patch(&self, path: &str, patch: &Value) -> Value {
        let patched = self.ask("PATCH", path, patch);
        patched.unwrap_or_else(|error| panic!("PATCH {path}: {error}"))
    }

    /// Deletes an object; gives what it was or is.
    pub fn delete(&self, path: &str, options: &Value) -> Value {
        let deleted = self.ask("DELETE", path, options);
        deleted.unwrap_or_else(|error| panic!("DELETE {path}: {error}"))
    }

    /// Creates everything in a text of manifests.
    pub fn create_all(&self, manifests: &str) {
        for document in serde_yaml_ng::Deserializer::from_str(manifests) {
            let object = Value::deserialize(document).unwrap();
            self.create(&collection(&object), &object);
        }
    }

    fn ask(&self, method: &str, path: &str, body: &Value) -> Result<Value, kube::Error> {
        self.ask_as(self.config.clone(), method, path, body)
    }

    /// Asks as somebody who has nothing but a token.
    pub fn ask_with(
        &self,
        token: &str,
        method: &str,
        path: &str,
        body: &Value,
    ) -> Result<Value, kube::Error> {
        let mut config = self.config.clone();
        config.auth_info = AuthInfo {
            token: Some(token.to_string().into()),
            ..AuthInfo::default()
        };
        self.ask_as(config, method, path, body)
    }

    /// What the owner of a kubeconfig may see.
    pub fn get_by(&self, kubeconfig: &Path, path: &str) -> Result<Value, kube::Error> {
        self.ask_as(config(kubeconfig), "GET", path, &Value::Null)
    }

    fn ask_as(
        &self,
        config: kube::Config,
        method: &str,
        path: &str,
        body: &Value,
    ) -> Result<Value, kube::Error> {
        let kind = match method {
            "PATCH" => "application/merge-patch+json",
            _ => "application/json",
        };
        let body = match body {
            Value::Null => Vec::new(),
            body => body.to_string().into_bytes(),
        };
        let request = http::Request::builder()
            .method(method)
            .uri(path)
            .header("content-type", kind)
            .body(body)
            .unwrap();
        // Connections are made where their thread is, so each request has a runtime that is in the namespace.
        let asked = within(self.netns.as_fd(), || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            Ok(runtime.block_on(async { kube::Client::try_from(config)?.request(request).await }))
        });
        asked.unwrap()
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        if self.killed {
            return;
        }
        // It ends when its input does.
        drop(self.process.stdin.take());
        if std::thread::panicking() {
            let _ = self.process.kill();
            let _ = self.process.wait();
            eprintln!("the API server's log ends with:\n{}", tail(&self.dir));
            return;
        }
        let status = eventually("the API server's end", || self.process.try_wait().unwrap());
        assert!(status.success(), "{status}: {}", tail(&self.dir));
    }
}

fn line(answers: &mut impl BufRead) -> String {
    let mut line = String::new();
    answers.read_line(&mut line).unwrap();
    line.trim_end().to_string()
}

fn tail(dir: &Path) -> String {
    let log = std::fs::read_to_string(dir.join("log")).unwrap_or_default();
    let lines: Vec<_> = log.lines().collect();
    lines[lines.len().saturating_sub(30)..].join("\n")
}

fn config(kubeconfig: &Path) -> kube::Config {
    // Another test may have been first.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let kubeconfig = Kubeconfig::read_from(kubeconfig).unwrap();
    let options = KubeConfigOptions::default();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    let config = kube::Config::from_custom_kubeconfig(kubeconfig, &options);
    runtime.block_on(config).unwrap()
}

/// Where objects of a kind are created.
fn collection(object: &Value) -> String {
    let text = |pointer: &str| object.pointer(pointer).and_then(Value::as_str);
    let api = match text("/apiVersion").unwrap() {
        "v1" => "/api/v1".to_string(),
        version => format!("/apis/{version}"),
    };
    let namespace = text("/metadata/namespace").map(|name| format!("/namespaces/{name}"));
    let kind = text("/kind").unwrap().to_lowercase();
    format!("{api}{}/{kind}s", namespace.unwrap_or_default())
}
