//! A data-plane worker: one OS thread with its own runtime, its own listeners and its own tunnels.

use std::cell::Cell;
use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::net::{SocketAddr, TcpListener as StdListener};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use hbone::Engine;
use socket2::SockRef;
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::runtime::LocalRuntime;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::JoinSet;

use super::drain::{Drain, DrainHandle, Stage, drain};
use super::pod::{Pod, PodSpec, Shared};
use super::{Accepted, inbound, outbound, passthrough, socks5};
use crate::node::sockets::{self, Listeners};
use crate::telemetry::{Direction, Flow, FlowError};

/// How long a listener rests after an accept error such as a shortage of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

enum Command {
    Add(Arc<PodSpec>, Listeners, oneshot::Sender<io::Result<()>>),
    /// Ends a pod's proxy, its flows after that time at the latest; answered when nothing of it is left.
    Remove(String, Duration, oneshot::Sender<()>),
    /// Ends every pod's proxy gracefully within the deadline.
    Stop(Duration, oneshot::Sender<()>),
    Ask(Box<dyn FnOnce(&Running) + Send>),
}

/// The pods that a worker serves, by uid.
#[derive(Default)]
pub struct Running(HashMap<String, RunningPod>);

/// The control thread's end of a worker.
#[derive(Clone)]
pub struct Worker(mpsc::UnboundedSender<Command>);

impl Worker {
    /// Starts the worker's thread.
    ///
    /// # Errors
    /// When the thread or its runtime cannot be made.
    pub fn start(index: usize, shared: Shared) -> io::Result<Self> {
        let (sender, receiver) = mpsc::unbounded_channel();
        let telemetry = shared.telemetry.clone();
        let (started, outcome) = std::sync::mpsc::channel();
        std::thread::Builder::new()
            .name(format!("worker-{index}"))
            // The runtime is made where it is used, because it counts its tasks only if they are tied to its thread.
            .spawn(move || match LocalRuntime::new() {
                Ok(runtime) => {
                    let _ = started.send(Ok(runtime.handle().metrics()));
                    runtime.block_on(run(Rc::new(shared), receiver));
                }
                Err(error) => drop(started.send(Err(error))),
            })?;
        let metrics = outcome.recv().map_err(io::Error::other)??;
        telemetry.watch(metrics);
        Ok(Self(sender))
    }

    pub async fn add(&self, spec: Arc<PodSpec>, listeners: Listeners) -> io::Result<()> {
        let (reply, answer) = oneshot::channel();
        let gone = || io::Error::other("the data-plane worker has stopped");
        self.0
            .send(Command::Add(spec, listeners, reply))
            .map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    /// Ends the pod's proxy; what it still carries is cut after `deadline`.
    pub async fn remove(&self, uid: &str, deadline: Duration) {
        let (reply, answer) = oneshot::channel();
        let remove = Command::Remove(uid.to_string(), deadline, reply);
        if self.0.send(remove).is_ok() {
            let _ = answer.await;
        }
    }

    /// Stops every pod's proxy, letting flows end within `deadline`.
    pub async fn stop(&self, deadline: Duration) {
        let (reply, answer) = oneshot::channel();
        if self.0.send(Command::Stop(deadline, reply)).is_ok() {
            let _ = answer.await;
        }
    }

    /// Asks something of the worker on its own thread; none when it has stopped.
    pub async fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&Running) -> T + Send + 'static,
    ) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        let ask = Command::Ask(Box::new(move |pods| drop(reply.send(question(pods)))));
        self.0.send(ask).ok()?;
        answer.await.ok()
    }
}

impl Running {
    /// Every open flow: pod uid, `inbound` or `outbound`, and the flow as in the configuration dump.
    pub fn connections(&self) -> Vec<(String, &'static str, serde_json::Value)> {
        let mut all = Vec::new();
        for (uid, running) in &self.0 {
            for (direction, connections) in [
                ("inbound", &running.pod.inbound),
                ("outbound", &running.pod.outbound),
            ] {
                all.extend(
                    connections
                        .dump()
                        .into_iter()
                        .map(|flow| (uid.clone(), direction, flow)),
                );
            }
        }
        all
    }
}

struct RunningPod {
    pod: Rc<Pod>,
    handle: DrainHandle,
    ended: Rc<Ended>,
}

/// Counts a pod's tasks down.
#[derive(Default)]
struct Ended {
    left: Cell<usize>,
    notify: Notify,
}

impl Ended {
    async fn wait(&self) {
        while self.left.get() > 0 {
            self.notify.notified().await;
        }
    }
}

async fn run(shared: Rc<Shared>, mut commands: mpsc::UnboundedReceiver<Command>) {
    let engine = Engine::start();
    let mut pods = Running::default();
    while let Some(command) = commands.recv().await {
        match command {
            Command::Add(spec, listeners, reply) => {
                let uid = spec.uid.clone();
                let started = start(&shared, &engine, spec, listeners);
                let _ = reply.send(started.map(|running| {
                    pods.0.insert(uid, running);
                }));
            }
            Command::Remove(uid, deadline, reply) => {
                if let Some(running) = pods.0.remove(&uid) {
                    tokio::task::spawn_local(async move {
                        if !deadline.is_zero() {
                            running.handle.advance(Stage::Draining);
                            let _ = tokio::time::timeout(deadline, running.ended.wait()).await;
                        }
                        running.handle.advance(Stage::Cut);
                        running.ended.wait().await;
                        let _ = reply.send(());
                    });
                }
            }
            Command::Stop(deadline, reply) => {
                let pods = std::mem::take(&mut pods.0);
                tokio::task::spawn_local(async move {
                    stop_all(pods, deadline).await;
                    let _ = reply.send(());
                });
            }
            Command::Ask(question) => question(&pods),
        }
    }
}

async fn stop_all(pods: HashMap<String, RunningPod>, deadline: Duration) {
    for running in pods.values() {
        running.handle.advance(Stage::Draining);
    }
    let ended = async {
        for running in pods.values() {
            running.ended.wait().await;
        }
    };
    if tokio::time::timeout(deadline, ended).await.is_err() {
        tracing::warn!("drain duration expired with pending connections, forcefully shutting down");
    }
    for running in pods.values() {
        running.handle.advance(Stage::Cut);
    }
    for running in pods.values() {
        running.ended.wait().await;
    }
}

fn start(
    shared: &Rc<Shared>,
    engine: &Engine,
    spec: Arc<PodSpec>,
    listeners: Listeners,
) -> io::Result<RunningPod> {
    let (handle, drain) = drain();
    let shared = match Arc::ptr_eq(&spec.config, &shared.config) {
        true => shared.clone(),
        false => Rc::new(Shared {
            config: spec.config.clone(),
            ..Shared::clone(shared)
        }),
    };
    let pod = Rc::new(Pod::new(spec, shared, engine.clone(), drain.clone()));
    let ended = Rc::new(Ended::default());
    let task = |work: std::pin::Pin<Box<dyn Future<Output = ()>>>| {
        ended.left.set(ended.left.get() + 1);
        let ended = ended.clone();
        tokio::task::spawn_local(async move {
            work.await;
            ended.left.set(ended.left.get() - 1);
            ended.notify.notify_waiters();
            ended.notify.notify_one();
        });
    };
    let take = |listener: StdListener| TcpListener::from_std(listener);
    if let Some(listener) = listeners.outbound.map(take).transpose()? {
        let serve = outbound::serve;
        let direction = Direction::Outbound;
        task(Box::pin(accept(pod.clone(), listener, direction, serve)));
    }
    if let Some(listener) = listeners.plaintext.map(take).transpose()? {
        let serve = passthrough::serve;
        let direction = Direction::Inbound;
        task(Box::pin(accept(pod.clone(), listener, direction, serve)));
    }
    if let Some(listener) = listeners.hbone.map(take).transpose()? {
        let serve = inbound::serve;
        let direction = Direction::Inbound;
        task(Box::pin(accept(pod.clone(), listener, direction, serve)));
    }
    if let Some(listener) = listeners.socks5.map(take).transpose()? {
        let serve = socks5::serve;
        let direction = Direction::Outbound;
        task(Box::pin(accept(pod.clone(), listener, direction, serve)));
    }
    tokio::task::spawn_local(follow_policy(pod.clone()));
    tokio::task::spawn_local(drain_pool(pod.clone()));
    let udp = listeners
        .dns_udp
        .into_iter()
        .map(UdpSocket::from_std)
        .collect::<io::Result<Vec<_>>>()?;
    let tcp = listeners
        .dns_tcp
        .into_iter()
        .map(TcpListener::from_std)
        .collect::<io::Result<Vec<_>>>()?;
    if !udp.is_empty() || !tcp.is_empty() {
        task(Box::pin(until(
            drain,
            super::pod_dns::serve(pod.clone(), udp, tcp),
        )));
    }
    Ok(RunningPod { pod, handle, ended })
}

async fn until(drain: Drain, work: impl Future<Output = ()>) {
    tokio::select! {
        () = work => {}
        () = drain.reached(Stage::Draining) => {}
    }
}

/// Accepts until the drain begins, then lets the flows end until they are cut.
async fn accept<F, S>(pod: Rc<Pod>, listener: TcpListener, direction: Direction, serve: S)
where
    F: Future<Output = ()> + 'static,
    S: Fn(Rc<Pod>, Accepted) -> F,
{
    let mut flows = JoinSet::new();
    {
        let draining = pod.drain.reached(Stage::Draining);
        tokio::pin!(draining);
        loop {
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((socket, client)) => match pod.spec.budget.admit() {
                        Ok(place) => {
                            let accepted = Accepted {
                                socket,
                                client: hbone::canonical(client),
                                held: (pod.shared.telemetry.socket(direction), place),
                            };
                            flows.spawn_local(serve(pod.clone(), accepted));
                        }
                        Err(error) => turn_away(&pod, socket, client, direction, &error),
                    },
                    Err(error) => {
                        tracing::error!("Failed TCP handshake {error}");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                },
                Some(_) = flows.join_next(), if !flows.is_empty() => {}
                () = &mut draining => break,
            }
        }
    }
    // Whoever waits in the queue of a closing listener would be reset.
    for (socket, client) in waiting(listener) {
        if let Ok(place) = pod.spec.budget.admit() {
            let accepted = Accepted {
                socket,
                client: hbone::canonical(client),
                held: (pod.shared.telemetry.socket(direction), place),
            };
            flows.spawn_local(serve(pod.clone(), accepted));
        }
    }
    let ended = async { while flows.join_next().await.is_some() {} };
    tokio::select! {
        () = ended => {}
        () = pod.drain.reached(Stage::Cut) => {}
    }
    flows.shutdown().await;
}

/// Closes a listener; gives the connections that wait in its queue.
fn waiting(listener: TcpListener) -> Vec<(TcpStream, SocketAddr)> {
    let Ok(listener) = listener.into_std() else {
        return Vec::new();
    };
    let queue = std::iter::from_fn(|| listener.accept().ok());
    let ready = queue.filter_map(|(socket, client)| {
        socket.set_nonblocking(true).ok()?;
        Some((TcpStream::from_std(socket).ok()?, client))
    });
    ready.collect()
}

/// Resets a connection for which there is no room.
fn turn_away(
    pod: &Pod,
    socket: TcpStream,
    client: SocketAddr,
    direction: Direction,
    error: &FlowError,
) {
    let client = hbone::canonical(client);
    if let Ok(target) = sockets::original_destination(&socket, client) {
        let telemetry = pod.shared.telemetry.clone();
        Flow::new(direction, client, target, telemetry).early_deny(error);
    }
    // If that fails the connection is closed in order, which is the next best thing.
    let _ = SockRef::from(&socket).set_linger(Some(Duration::ZERO));
}

/// Lets go of tunnels once the pod opens no more flows; each ends with its last one.
async fn drain_pool(pod: Rc<Pod>) {
    pod.drain.reached(Stage::Draining).await;
    pod.pool.drain();
}

/// Judges the pod's live flows anew whenever the mesh changes.
async fn follow_policy(pod: Rc<Pod>) {
    let mut changes = pod.shared.mesh.subscribe();
    let follow = async {
        while changes.changed().await.is_ok() {
            pod.recheck().await;
        }
    };
    tokio::select! {
        () = follow => {}
        () = pod.drain.reached(Stage::Cut) => {}
    }
}
