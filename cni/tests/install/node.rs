//! The folders of a node, of a test's own; they go when the test does.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use cni::eligibility::Selectors;
use cni::install::{InstallConfig, Installer, KubeconfigConfig, PluginEntry, Trust};
use serde_json::Value;

pub const TOKEN: &str = "first-token";
pub const CA: &str = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
const PREFIX: &str = "wrn-install";

/// The list of a cluster's network, in nobody's formatting.
pub const CALICO: &str = r#"{"name":"k8s","cniVersion":"0.4.0","unknown":{"b":[1,2.5],"a":null},
    "plugins":[{"type":"calico","mtu":1440,"ipam":{"type":"calico-ipam"}},{"type":"portmap","snat":true}]}"#;

pub struct Node {
    pub root: PathBuf,
    pub config: InstallConfig,
}

impl Node {
    /// A node with every folder, the image's program and the service account, and no network yet.
    pub fn new(test: &str) -> Self {
        forget_the_dead();
        let name = format!("{PREFIX}-{}-{test}", std::process::id());
        let root = std::env::temp_dir().join(name);
        for folder in ["image", "bin", "bin2", "net.d", "run", "account"] {
            fs::create_dir_all(root.join(folder)).unwrap();
        }
        let program = root.join("image/warren-cni");
        fs::write(&program, "#!/bin/sh\nexit 0\n").unwrap();
        fs::set_permissions(&program, Permissions::from_mode(0o755)).unwrap();
        fs::write(root.join("account/ca.crt"), CA).unwrap();
        let config = config(&root);
        Self { root, config }
    }

    /// A node whose network is [`CALICO`].
    pub fn with_network(test: &str) -> Self {
        let node = Self::new(test);
        node.conf("10-calico.conflist", CALICO);
        node
    }

    pub fn installer(&self) -> Installer {
        Installer::new(self.config.clone())
    }

    /// An installer that has installed.
    pub fn installed(&self) -> Installer {
        let mut installer = self.installer();
        installer.install(TOKEN).unwrap();
        installer.check().unwrap();
        installer
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// Writes a configuration the way careful programs do.
    pub fn conf(&self, name: &str, text: &str) -> PathBuf {
        let path = self.config.conf_dir.join(name);
        let temporary = self.config.conf_dir.join(format!(".{name}.part"));
        fs::write(&temporary, text).unwrap();
        fs::set_permissions(&temporary, Permissions::from_mode(0o644)).unwrap();
        fs::rename(&temporary, &path).unwrap();
        path
    }

    pub fn text(&self, name: &str) -> String {
        fs::read_to_string(self.root.join(name)).unwrap()
    }

    pub fn json(&self, name: &str) -> Value {
        serde_json::from_str(&self.text(name)).unwrap()
    }

    /// The types of a list's plugins.
    pub fn types(&self, name: &str) -> Vec<String> {
        let plugins = self.json(name)["plugins"].as_array().unwrap().clone();
        let kind = |plugin: &Value| plugin["type"].as_str().unwrap().to_string();
        plugins.iter().map(kind).collect()
    }

    /// Changes the plugins of a list.
    pub fn edit(&self, name: &str, change: impl FnOnce(&mut Vec<Value>)) {
        let mut list = self.json(name);
        change(list["plugins"].as_array_mut().unwrap());
        let name = name.strip_prefix("net.d/").unwrap();
        self.conf(name, &list.to_string());
    }

    pub fn exists(&self, name: &str) -> bool {
        self.root.join(name).exists()
    }

    pub fn mode(&self, name: &str) -> u32 {
        let metadata = fs::metadata(self.root.join(name)).unwrap();
        metadata.permissions().mode() & 0o7777
    }

    pub fn inode(&self, name: &str) -> u64 {
        fs::metadata(self.root.join(name)).unwrap().ino()
    }

    /// The names in a folder.
    pub fn names(&self, folder: &str) -> Vec<String> {
        let entries = fs::read_dir(self.root.join(folder)).unwrap();
        let name = |entry: fs::DirEntry| entry.file_name().into_string().unwrap();
        let mut names: Vec<_> = entries.map(|entry| name(entry.unwrap())).collect();
        names.sort();
        names
    }

    /// Unfinished files, wherever they lie.
    pub fn unfinished(&self) -> Vec<String> {
        let folders = ["bin", "bin2", "net.d", "run"];
        let all = folders.iter().flat_map(|folder| self.names(folder));
        all.filter(|name| name.contains("tmp")).collect()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.root);
    }
}

/// What is installed on the node of this folder.
pub fn config(root: &Path) -> InstallConfig {
    InstallConfig {
        bin_source: root.join("image"),
        bin_targets: vec![root.join("bin"), root.join("bin2")],
        conf_dir: root.join("net.d"),
        conf_name: None,
        chained: true,
        owned: None,
        group_read: false,
        run_dir: root.join("run"),
        service_account: root.join("account"),
        kubeconfig: KubeconfigConfig {
            server: "https://[fd00::1]:443".into(),
            trust: Trust::ServiceAccount,
            mode: 0o600,
        },
        entry: PluginEntry {
            log_level: "info".into(),
            ambient_enabled: true,
            enablement_selectors: Selectors::default(),
            exclude_namespaces: vec!["kube-system".into()],
            pod_namespace: "istio-system".into(),
            agent_pod_prefix: "warren-node-agent-".into(),
            native_nftables: false,
            enable_ambient_detection_retry: false,
        },
    }
}

/// Removes the folders of tests that were killed.
fn forget_the_dead() {
    for entry in fs::read_dir(std::env::temp_dir()).unwrap().flatten() {
        let name = entry.file_name().into_string().unwrap_or_default();
        let pid = name
            .strip_prefix(PREFIX)
            .and_then(|rest| rest.split('-').nth(1));
        if let Some(pid) = pid
            && pid.parse::<u32>().is_ok()
            && !Path::new("/proc").join(pid).exists()
        {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}
