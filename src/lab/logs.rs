//! `warren lab logs`: what a process of the lab wrote, and goes on writing.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};

use super::client::Lab;
use super::wire::{PodStatus, Status};

const LOOK: Duration = Duration::from_millis(100);

/// The log of `control`, `proxy/NODE`, `POD` or `deploy/NAME`.
///
/// # Errors
/// When there is nothing of that name.
pub fn path(
    lab: &Lab,
    namespace: &str,
    name: &str,
    container: Option<&str>,
) -> anyhow::Result<PathBuf> {
    let dir = lab.dir();
    let status = lab.status()?;
    if name == "control" {
        return Ok(dir.join("control.log"));
    }
    if name == "lab" {
        return Ok(dir.join("lab.log"));
    }
    if let Some(node) = name.strip_prefix("proxy/") {
        if status.nodes.iter().any(|n| n.name == node) {
            return Ok(dir.join(format!("nodes/{node}/proxy.log")));
        }
        let nodes: Vec<&str> = status.nodes.iter().map(|n| n.name.as_str()).collect();
        bail!("there is no node {node}; there are: {}", nodes.join(", "));
    }
    let pod = pod(&status, namespace, name)
        .with_context(|| format!("there is no {name} in namespace {namespace}"))?;
    let container = match container {
        Some(container) if pod.containers.iter().any(|c| c == container) => container,
        Some(container) => bail!("pod {} has no container {container}", pod.name),
        None => pod.containers.first().map_or("", String::as_str),
    };
    Ok(dir.join(format!(
        "pods/{}/{}/{container}.log",
        pod.namespace, pod.name
    )))
}

/// The pod that `POD` or `deploy/NAME` means.
pub fn pod<'a>(status: &'a Status, namespace: &str, name: &str) -> Option<&'a PodStatus> {
    let deployment = ["deploy/", "deployment/"]
        .iter()
        .find_map(|prefix| name.strip_prefix(prefix));
    let name = name.strip_prefix("pod/").unwrap_or(name);
    status.pods.iter().find(|pod| {
        pod.namespace == namespace
            && match deployment {
                Some(deployment) => pod.deployment.as_deref() == Some(deployment),
                None => pod.name == name,
            }
    })
}

/// Copies a log to standard output; with `follow`, until the lab goes or the reader does.
///
/// # Errors
/// When the log cannot be read.
pub fn show(path: &Path, follow: bool) -> anyhow::Result<()> {
    let mut log = File::open(path).with_context(|| path.display().to_string())?;
    let mut out = std::io::stdout();
    let mut chunk = vec![0; 64 << 10];
    loop {
        let read = log.read(&mut chunk)?;
        if out
            .write_all(&chunk[..read])
            .and_then(|()| out.flush())
            .is_err()
        {
            return Ok(());
        }
        if read > 0 {
            continue;
        }
        if !follow || !path.exists() {
            return Ok(());
        }
        std::thread::sleep(LOOK);
    }
}

/// The lines that were added to a log after `from`.
///
/// # Errors
/// When the log cannot be read.
pub fn lines_from(path: &Path, from: u64) -> std::io::Result<Vec<String>> {
    let mut log = File::open(path)?;
    log.seek(SeekFrom::Start(from))?;
    let mut text = String::new();
    log.read_to_string(&mut text)?;
    Ok(text.lines().map(str::to_owned).collect())
}
