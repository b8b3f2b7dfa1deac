//! A node with a container runtime: containerd and runc, a bridge, addresses by host-local, one image.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::cri::Cri;
use crate::image::{BUSYBOX, IMAGE, archive};
use crate::leftovers;
use crate::pod::PodSpec;
use crate::space::Space;

/// The bridge to which the node's pods are joined; the node has the first address of each range there.
pub const BRIDGE: &str = "wrnbr0";
/// The pods' addresses.
pub const PODS: [&str; 2] = ["10.88.0.0/24", "fd00:10:88::/64"];
/// How long anything may take that ought to happen soon.
const SOON: Duration = Duration::from_secs(20);
/// Where distributions put the network plugins.
const PLUGINS: [&str; 2] = ["/usr/lib/cni", "/opt/cni/bin"];

/// What a node is to be like.
#[derive(Default)]
pub struct Options {
    /// Whether pods get IPv6 addresses, too.
    pub dual_stack: bool,
    /// The network plugins that follow the bridge.
    pub chained: Vec<Value>,
    /// Further programs for the folder of network plugins, by their names there.
    pub programs: Vec<(&'static str, PathBuf)>,
}

/// The node; its pods and everything else of it end with it.
pub struct Containerd {
    name: String,
    folder: PathBuf,
    options: Options,
    /// How often the network configuration was changed.
    generation: u32,
    cri: Cri,
    daemon: Child,
    space: Space,
}

impl Containerd {
    /// Starts a node with a plain bridge; none, with a line that says so, where that is impossible.
    pub fn start(name: &str) -> Option<Self> {
        Self::start_with(name, Options::default())
    }

    /// Starts a node; none, with a line that says so, where that is impossible.
    pub fn start_with(name: &str, options: Options) -> Option<Self> {
        let plugins = match prerequisites() {
            Ok(plugins) => plugins,
            Err(reason) => {
                eprintln!("SKIPPED {name}: {reason}");
                return None;
            }
        };
        leftovers::sweep();
        let name = leftovers::unique(name);
        let folder = leftovers::folder(&name);
        for part in ["root", "state", "net.d", "bin"] {
            fs::create_dir_all(folder.join(part)).unwrap();
        }
        for plugin in ["bridge", "host-local", "loopback", "tuning"] {
            symlink(plugins.join(plugin), folder.join("bin").join(plugin)).unwrap();
        }
        for (name, program) in &options.programs {
            symlink(program, folder.join("bin").join(name)).unwrap();
        }
        fs::write(folder.join("containerd.toml"), configuration(&folder)).unwrap();
        let space = Space::new(&[&folder.join("root"), &folder.join("state")]);
        write_network(&folder, &options, 0);
        let node = Self {
            cri: Cri::new(&folder.join("containerd.sock")),
            daemon: daemon(&space, &folder),
            name,
            folder,
            options,
            generation: 0,
            space,
        };
        node.wait_ready();
        let mut import = Command::new("ctr");
        import.arg("--address").arg(node.folder("containerd.sock"));
        import.args(["--namespace", "k8s.io", "images", "import"]);
        let output = node.space.output(import.arg(archive(&node.folder)));
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "the image: {errors}");
        // The runtime learns of it by an event.
        node.eventually("the image is there", || {
            let images = node.cri.images().unwrap_or_default();
            images.iter().any(|image| image == IMAGE)
        });
        Some(node)
    }

    /// A pod that is to run here.
    pub fn pod(&self, namespace: &str, name: &str) -> PodSpec<'_> {
        PodSpec::new(self, namespace, name)
    }

    /// The node's name; nothing else on this machine bears it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The calls of a kubelet.
    pub fn cri(&self) -> &Cri {
        &self.cri
    }

    /// The node's namespaces.
    pub fn space(&self) -> &Space {
        &self.space
    }

    /// A file of the node, seen from inside and outside alike. Of `root` and `state` the content is seen inside alone.
    pub fn folder(&self, part: &str) -> PathBuf {
        self.folder.join(part)
    }

    /// What containerd logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.folder("containerd.log")).unwrap_or_default()
    }

    /// Puts other network plugins behind the bridge and waits until the runtime knows them.
    pub fn chain(&mut self, plugins: Vec<Value>) {
        self.options.chained = plugins;
        self.generation += 1;
        let network = write_network(&self.folder, &self.options, self.generation);
        self.eventually("the network configuration is in use", || {
            let (_, used) = self.cri.status().unwrap_or_default();
            used.contains(&network)
        });
    }

    /// Ends containerd without a word; pods go on.
    pub fn kill(&mut self) {
        self.daemon.kill().unwrap();
        self.daemon.wait().unwrap();
    }

    /// Starts containerd again.
    pub fn restart(&mut self) {
        self.daemon = daemon(&self.space, &self.folder);
        self.wait_ready();
    }

    fn wait_ready(&self) {
        self.eventually("containerd is ready", || {
            matches!(self.cri.status(), Ok((true, _)))
        });
    }

    /// Waits for something that ought to happen soon.
    pub fn eventually(&self, what: &str, mut done: impl FnMut() -> bool) {
        let deadline = Instant::now() + SOON;
        while !done() {
            assert!(
                Instant::now() < deadline,
                "not in time: {what}; {}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        // First as a kubelet would, so that network plugins are asked to clean up; what they leave ends all the same.
        for sandbox in self.cri.sandboxes().unwrap_or_default() {
            let _ = self.cri.stop_sandbox(&sandbox.id);
            let _ = self.cri.remove_sandbox(&sandbox.id);
        }
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
        self.space.end();
        let removed = leftovers::remove(&self.name);
        if !std::thread::panicking() {
            removed.unwrap();
        }
    }
}

/// The folder of the network plugins, or what is missing on this machine.
fn prerequisites() -> Result<&'static Path, String> {
    if !nix::unistd::geteuid().is_root() {
        return Err("it needs root".to_string());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    for (program, package) in [
        ("containerd", "containerd"),
        ("ctr", "containerd"),
        ("runc", "runc"),
        (BUSYBOX, "busybox-static"),
    ] {
        let found = std::env::split_paths(&path).any(|folder| folder.join(program).exists());
        if !found {
            return Err(format!("no {program}: install {package}"));
        }
    }
    let mut folders = PLUGINS.iter().map(Path::new);
    let found = folders.find(|folder| folder.join("bridge").exists());
    found.ok_or_else(|| "no plugin bridge: install containernetworking-plugins".to_string())
}

fn daemon(space: &Space, folder: &Path) -> Child {
    let mut command = Command::new("containerd");
    command.arg("--config").arg(folder.join("containerd.toml"));
    space.spawn_logged(&mut command, &folder.join("containerd.log"))
}

/// The containerd configuration. Machines without CAP_SYS_RESOURCE need `restrict_oom_score_adj`.
fn configuration(folder: &Path) -> String {
    let folder = folder.display();
    format!(
        r#"version = 2
root = "{folder}/root"
state = "{folder}/state"

[debug]
level = "warn"

[grpc]
address = "{folder}/containerd.sock"

[plugins."io.containerd.internal.v1.opt"]
path = "{folder}/root/opt"

[plugins."io.containerd.grpc.v1.cri"]
restrict_oom_score_adj = true
sandbox_image = "{IMAGE}"

[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{folder}/bin"
conf_dir = "{folder}/net.d"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
"#
    )
}

/// Writes the network configuration; gives the text by which it is known from earlier ones.
fn write_network(folder: &Path, options: &Options, generation: u32) -> String {
    let generation = format!("generation {generation}");
    let families = if options.dual_stack { 2 } else { 1 };
    let ranges: Vec<Value> = PODS[..families]
        .iter()
        .map(|subnet| json!([{"subnet": subnet}]))
        .collect();
    let routes: Vec<Value> = ["0.0.0.0/0", "::/0"][..families]
        .iter()
        .map(|dst| json!({"dst": dst}))
        .collect();
    let mut plugins = vec![json!({
        "type": "bridge",
        "bridge": BRIDGE,
        "comment": generation,
        "isGateway": true,
        "ipMasq": false,
        "ipam": {
            "type": "host-local",
            "ranges": ranges,
            "routes": routes,
            "dataDir": folder.join("root/addresses"),
        },
    })];
    plugins.extend(options.chained.iter().cloned());
    let text = json!({"cniVersion": "1.0.0", "name": "pods", "plugins": plugins}).to_string();
    // containerd notices renames within the folder only.
    let scratch = folder.join("net.d/scratch");
    fs::write(&scratch, text).unwrap();
    fs::rename(scratch, folder.join("net.d/10-pods.conflist")).unwrap();
    generation
}
