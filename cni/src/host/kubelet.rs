//! Which user the node's kubelet runs as; by that nftables knows its probes.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::HostError;

/// What kubelets are called, and whether their command line must say so too.
const NAMES: [(&str, bool); 5] = [
    ("kubelet", true),
    ("kubelite", true),
    ("k3s", false),
    ("k3s-server", false),
    ("k3s-agent", false),
];

/// The real user of the first process that is a kubelet.
///
/// # Errors
/// When there is none.
pub fn uid(proc: &Path) -> Result<u32, HostError> {
    let unreadable = |error| HostError::Processes {
        path: proc.to_path_buf(),
        error,
    };
    let entries = fs::read_dir(proc).map_err(unreadable)?;
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut processes: Vec<u32> = names.filter_map(|name| name.parse().ok()).collect();
    processes.sort_unstable();
    let mut found = processes
        .iter()
        .filter_map(|process| of_kubelet(proc, &proc.join(process.to_string())));
    found
        .next()
        .ok_or_else(|| HostError::NoKubelet(proc.to_path_buf()))
}

/// The real user of a process, if it is a kubelet; processes may go at any moment.
fn of_kubelet(proc: &Path, process: &Path) -> Option<u32> {
    let read = |name: &str| fs::read(process.join(name)).ok();
    let name = String::from_utf8(read("comm")?).ok()?;
    let (name, in_command) = NAMES.iter().find(|(known, _)| *known == name.trim_end())?;
    let command = String::from_utf8_lossy(&read("cmdline")?).into_owned();
    if (*in_command && !command.contains(name)) || is_in_a_pod(proc, process) {
        return None;
    }
    let status = String::from_utf8(read("status")?).ok()?;
    let uids = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    uids.split_whitespace().next()?.parse().ok()
}

/// A pod can call its processes what it likes, but a kubelet is in the node's network namespace.
fn is_in_a_pod(proc: &Path, process: &Path) -> bool {
    let namespace = |process: &Path| {
        let status = fs::metadata(process.join("ns/net")).ok()?;
        Some((status.dev(), status.ino()))
    };
    let (node, its) = (namespace(&proc.join("1")), namespace(process));
    node.is_some() && its.is_some() && node != its
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    /// A folder that looks like `/proc`.
    struct Processes(PathBuf);

    impl Processes {
        fn new(name: &str) -> Self {
            let folder =
                std::env::temp_dir().join(format!("wrn-kubelet-{}-{name}", std::process::id()));
            fs::create_dir_all(folder.join("self")).unwrap();
            fs::write(folder.join("uptime"), "1 1").unwrap();
            Self(folder).with(1, "systemd", "/sbin/init", 0)
        }

        fn with(self, pid: u32, name: &str, command: &str, uid: u32) -> Self {
            let folder = self.0.join(pid.to_string());
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join("comm"), format!("{name}\n")).unwrap();
            fs::write(folder.join("cmdline"), command.replace(' ', "\0")).unwrap();
            let status = format!("Name:\t{name}\nUid:\t{uid}\t7\t7\t7\nGid:\t9\t9\t9\t9\n");
            fs::write(folder.join("status"), status).unwrap();
            self
        }

        /// Puts a process into a namespace, here a file.
        fn in_namespace(self, pid: u32, namespace: &str) -> Self {
            let folder = self.0.join(pid.to_string()).join("ns");
            fs::create_dir_all(&folder).unwrap();
            fs::write(self.0.join(namespace), "").unwrap();
            std::os::unix::fs::symlink(self.0.join(namespace), folder.join("net")).unwrap();
            self
        }

        fn uid(&self) -> Option<u32> {
            uid(&self.0).ok()
        }
    }

    impl Drop for Processes {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn each_kind_of_kubelet_is_found_among_others() {
        let cases = [
            ("kubelet", "/usr/bin/kubelet --v=2", Some(1001)),
            ("kubelite", "/snap/bin/kubelite --x", Some(1001)),
            ("k3s", "anything", Some(1001)),
            ("k3s-server", "/usr/bin/k3s server", Some(1001)),
            ("kubelet", "/bin/sleep 5", None),
            ("kubelets", "/usr/bin/kubelet", None),
            ("bash", "vi kubelet", None),
        ];
        for (index, (name, command, expected)) in cases.into_iter().enumerate() {
            let processes = Processes::new(&format!("kind{index}")).with(700, name, command, 1001);
            assert_eq!(processes.uid(), expected, "{name} {command}");
        }
        let two = Processes::new("two").with(1000, "kubelet", "kubelet", 1);
        assert_eq!(two.with(99, "kubelet", "kubelet", 2).uid(), Some(2));
    }

    #[test]
    fn a_pods_process_is_not_taken_for_the_kubelet() {
        let processes = Processes::new("pod")
            .in_namespace(1, "node")
            .with(50, "kubelet", "kubelet", 1001)
            .in_namespace(50, "pod");
        assert_eq!(processes.uid(), None);
        let processes = processes
            .with(60, "kubelet", "kubelet", 0)
            .in_namespace(60, "node");
        assert_eq!(processes.uid(), Some(0));
    }

    #[test]
    fn without_a_kubelet_the_error_says_where_it_was_looked_for() {
        let none = Processes::new("none");
        let error = uid(&none.0).unwrap_err().to_string();
        let start = format!(
            "no kubelet was found among the processes in {}",
            none.0.display()
        );
        assert!(error.starts_with(&start), "{error}");
        assert!(error.contains("use the iptables backend"), "{error}");
        let error = uid(Path::new("/nonexistent")).unwrap_err().to_string();
        assert!(error.starts_with("the processes in /nonexistent cannot be listed"));
    }
}
