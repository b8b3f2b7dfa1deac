//! The socket of a running lab: answers the commands.

use std::io::{Read, Result};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use super::cluster::{Cluster, PodKey, lock};
use super::sniff::Watcher;
use super::wire::{self, Answer, PodName, Request};
use super::{status, wire::Sighting};

/// Answers at `socket` from threads of its own; `down` hears when the lab is to end.
///
/// # Errors
/// When the socket cannot be made.
pub fn serve(socket: &Path, cluster: Arc<Mutex<Cluster>>, down: Sender<()>) -> Result<()> {
    let listener = UnixListener::bind(socket)?;
    std::thread::Builder::new()
        .name("commands".into())
        .spawn(move || {
            for stream in listener.incoming().flatten() {
                let (cluster, down) = (Arc::clone(&cluster), down.clone());
                let started = std::thread::Builder::new()
                    .name("command".into())
                    .spawn(move || {
                        // The caller sees a hang-up; there is nobody else to tell.
                        let _ = answer(&stream, &cluster, &down);
                    });
                if let Err(e) = started {
                    eprintln!("cannot answer a command: {e}");
                }
            }
        })?;
    Ok(())
}

fn answer(stream: &UnixStream, cluster: &Mutex<Cluster>, down: &Sender<()>) -> Result<()> {
    let (request, fds) = wire::receive_with::<Request>(stream)?;
    let changed = |result| match result {
        Ok(report) => Answer::Changed(report),
        Err(reason) => Answer::Refused(reason),
    };
    let answer = match request {
        Request::Status => Answer::Status(status::collect(&lock(cluster))),
        Request::Apply(objects) => changed(lock(cluster).apply(objects)),
        Request::Delete(keys) => changed(lock(cluster).delete(&keys)),
        Request::Exec { pod, command } => exec(stream, cluster, &pod, command, fds),
        Request::Watch { needles } => match Watcher::start(&needles) {
            Ok(watcher) => {
                wire::send(stream, &Answer::Watching)?;
                Answer::Watched(watch(stream, watcher))
            }
            Err(e) => Answer::Refused(format!("cannot watch the bridge: {e}")),
        },
        Request::Down => {
            // The main thread ends the lab, and with it this connection.
            let _ = down.send(());
            let mut rest = [0];
            let mut stream = stream;
            let _ = stream.read(&mut rest);
            Answer::Down
        }
    };
    wire::send(stream, &answer)
}

/// Watches until the caller sends something or hangs up.
fn watch(mut stream: &UnixStream, watcher: Watcher) -> Sighting {
    let mut byte = [0];
    let _ = stream.read(&mut byte);
    watcher.stop()
}

fn exec(
    stream: &UnixStream,
    cluster: &Mutex<Cluster>,
    pod: &PodName,
    command: Vec<String>,
    fds: Vec<OwnedFd>,
) -> Answer {
    let Ok(fds) = <[OwnedFd; 3]>::try_from(fds) else {
        return Answer::Refused("three descriptors were expected".into());
    };
    let started = {
        let cluster = lock(cluster);
        let streams = fds.map(Stdio::from);
        match pod.name.strip_prefix("node/") {
            Some(node) => cluster.exec_on_node(node, command, streams),
            None => find(&cluster, pod).and_then(|key| cluster.exec(&key, command, streams)),
        }
    };
    let mut child = match started {
        Ok(child) => child,
        Err(reason) => return Answer::Refused(reason),
    };
    let group = i32::try_from(child.id()).map(Pid::from_raw);
    let caller = stream.try_clone();
    let running = Arc::new(AtomicBool::new(true));
    let still_running = Arc::clone(&running);
    std::thread::spawn(move || {
        // The caller sends nothing more: this ends when it hangs up, before the command or after.
        if let (Ok(mut caller), Ok(group)) = (caller, group)
            && matches!(caller.read(&mut [0]), Ok(0) | Err(_))
            && still_running.load(Ordering::SeqCst)
        {
            let _ = killpg(group, Signal::SIGTERM);
        }
    });
    let ended = child.wait();
    running.store(false, Ordering::SeqCst);
    match ended {
        Ok(status) => Answer::Ended(
            status
                .code()
                .or_else(|| status.signal().map(|s| 128 + s))
                .unwrap_or(1),
        ),
        Err(e) => Answer::Refused(e.to_string()),
    }
}

/// The pod that `POD`, `deploy/NAME` or only `NAME` means.
fn find(cluster: &Cluster, wanted: &PodName) -> std::result::Result<PodKey, String> {
    let pods: Vec<_> = cluster
        .pods
        .iter()
        .map(|(key, pod)| (key, status::deployment(pod)))
        .collect();
    let matching = |namespace: Option<&str>| {
        pods.iter().find(|((in_namespace, name), deployment)| {
            namespace.is_none_or(|wanted| wanted == in_namespace)
                && status::is_meant(&wanted.name, name, deployment.as_deref())
        })
    };
    match (matching(Some(&wanted.namespace)), matching(None)) {
        (Some((key, _)), _) => Ok((*key).clone()),
        (None, Some((key, _))) => Err(format!(
            "there is no {} in namespace {}, but one in {}: add -n {2}",
            wanted.name, wanted.namespace, key.0
        )),
        (None, None) => Err(format!(
            "there is no {} in namespace {}; warren lab status lists the pods",
            wanted.name, wanted.namespace
        )),
    }
}
