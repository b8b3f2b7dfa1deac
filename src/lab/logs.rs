//! `warren lab logs`: what a process of the lab wrote, and goes on writing.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};

use super::client::Lab;
use super::status::is_meant;
use super::wire::{PodStatus, Status};

/// Characters of `2025-06-30T06:41:34.685667Z`.
const STAMP: usize = 27;
const LOOK: Duration = Duration::from_millis(100);

/// The log of `control`, `proxy/NODE`, `agent/NODE`, `POD` or `deploy/NAME`.
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
    if let Some((part @ ("proxy" | "agent"), node)) = name.split_once('/') {
        if status.nodes.iter().any(|n| n.name == node) {
            return Ok(dir.join(format!("nodes/{node}/{part}.log")));
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

/// The pod that `POD`, `deploy/NAME` or `NAME` means.
pub fn pod<'a>(status: &'a Status, namespace: &str, name: &str) -> Option<&'a PodStatus> {
    status.pods.iter().find(|pod| {
        pod.namespace == namespace && is_meant(name, &pod.name, pod.deployment.as_deref())
    })
}

/// The logs of all proxies, each with its node's name.
///
/// # Errors
/// When the lab does not run.
pub fn proxies(lab: &Lab) -> anyhow::Result<Vec<(String, PathBuf)>> {
    let nodes = lab.status()?.nodes;
    let log = |name: &str| lab.dir().join(format!("nodes/{name}/proxy.log"));
    Ok(nodes
        .into_iter()
        .map(|n| (format!("{} ", n.name), log(&n.name)))
        .collect())
}

/// Copies logs to standard output, each line behind its log's prefix and several logs in the order of their
/// time stamps; with `follow`, until the lab goes or the reader does.
///
/// # Errors
/// When a log cannot be read.
pub fn show(logs: &[(String, PathBuf)], follow: bool) -> anyhow::Result<()> {
    let mut out = std::io::stdout();
    let mut read = vec![0; logs.len()];
    loop {
        let mut lines = Vec::new();
        for ((prefix, path), read) in logs.iter().zip(&mut read) {
            let text = match text_from(path, *read) {
                Ok(text) => text,
                Err(_) if *read > 0 => return Ok(()),
                Err(e) => return Err(e).with_context(|| path.display().to_string()),
            };
            // While more may come, half a line is left for the next time.
            let whole = if follow {
                text.rfind('\n').map_or(0, |end| end + 1)
            } else {
                text.len()
            };
            *read += whole as u64;
            lines.extend(stamped(prefix, &text[..whole]));
        }
        // A stable sort: lines of one log stay in their order.
        lines.sort_by(|one, other| one.0.cmp(&other.0));
        let text: String = lines.into_iter().map(|(_, line)| line).collect();
        if out
            .write_all(text.as_bytes())
            .and_then(|()| out.flush())
            .is_err()
            || !follow
        {
            return Ok(());
        }
        std::thread::sleep(LOOK);
    }
}

/// Lines with their time stamps; one without belongs to the line before it.
fn stamped(prefix: &str, text: &str) -> Vec<(String, String)> {
    let mut stamp = String::new();
    text.lines()
        .map(|line| {
            if line.starts_with(|c: char| c.is_ascii_digit()) {
                stamp = line.chars().take(STAMP).collect();
            }
            (stamp.clone(), format!("{prefix}{line}\n"))
        })
        .collect()
}

fn text_from(path: &Path, from: u64) -> std::io::Result<String> {
    let mut log = File::open(path)?;
    log.seek(SeekFrom::Start(from))?;
    let mut bytes = Vec::new();
    log.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The lines that were added to a log after `from`.
///
/// # Errors
/// When the log cannot be read.
pub fn lines_from(path: &Path, from: u64) -> std::io::Result<Vec<String>> {
    Ok(text_from(path, from)?.lines().map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_without_a_time_stamp_follows_the_one_before_it() {
        let first = "2025-06-30T06:41:34.685667Z\tinfo\tone";
        let lines = stamped("a ", &format!("{first}\nmore\n"));
        assert_eq!(lines[0].0, "2025-06-30T06:41:34.685667Z");
        assert_eq!(lines[1], (lines[0].0.clone(), "a more\n".into()));
    }
}
