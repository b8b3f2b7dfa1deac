//! The tunnels that a pod's flows share on one worker.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use crate::client::{ConnectHeaders, Dialer, Tunnel, Tunnelled};
use crate::engine::Engine;
use crate::error::OpenError;
use crate::http2::Http2Config;
use crate::stream::Stream;
use crate::{Identity, TlsIdentity};

/// How often a stream is tried on another tunnel when its tunnel turns out to be on its way out.
const ATTEMPTS: usize = 4;

/// The longest time between two looks at the tunnels.
const LOOK: Duration = Duration::from_secs(15);

/// How many dials a stream waits for; each gives room to many, unless the peer allows no streams at all.
const DIALS: usize = 256;

/// Flows with the same key may share a tunnel.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PoolKey {
    pub src: Identity,
    /// Any one of these must be proven by the peer.
    pub expected: Vec<Identity>,
    pub dst: SocketAddr,
    pub src_ip: IpAddr,
}

/// Whom a tunnel inside a tunnel is for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Beyond {
    /// The way to the gateway.
    pub gateway: PoolKey,
    /// What is asked for on both tunnels.
    pub authority: String,
    /// Any one of these must be proven by whoever is behind the gateway.
    pub expected: Vec<Identity>,
    /// Whether flows may share an inner tunnel: only if whoever is behind balances each of them by itself. Behind one
    /// gateway may be many, and flows that share would all meet the same.
    pub shared: bool,
}

/// The tunnels of one pod on one worker; cheap to clone, not shared between threads.
#[derive(Clone)]
pub struct Pool(Rc<Inner>);

struct Inner {
    engine: Engine,
    config: Rc<Http2Config>,
    dialer: Rc<dyn Dialer>,
    entries: RefCell<HashMap<PoolKey, Entry>>,
    /// Tunnels inside of others that flows may share.
    inner: RefCell<HashMap<Beyond, Vec<Rc<Tunnel>>>>,
    closed: Cell<bool>,
    sweeping: Cell<bool>,
}

#[derive(Default)]
struct Entry {
    tunnels: Vec<Rc<Tunnel>>,
    dial: Option<Rc<Dial>>,
}

/// A dial under way and, once over, how it went; every flow that waits for it sees the same.
#[derive(Default)]
struct Dial {
    result: RefCell<Option<Result<(), OpenError>>>,
    over: Notify,
}

impl Dial {
    async fn wait(&self) -> Result<(), OpenError> {
        loop {
            let over = self.over.notified();
            tokio::pin!(over);
            // Enabled before the look, so that an end in between is not missed.
            over.as_mut().enable();
            if let Some(result) = self.result.borrow().clone() {
                return result;
            }
            over.await;
        }
    }
}

impl Pool {
    /// An empty pool.
    pub fn new(engine: Engine, config: Rc<Http2Config>, dialer: Rc<dyn Dialer>) -> Self {
        Self(Rc::new(Inner {
            engine,
            config,
            dialer,
            entries: RefCell::default(),
            inner: RefCell::default(),
            closed: Cell::new(false),
            sweeping: Cell::new(false),
        }))
    }

    /// The HTTP/2 parameters.
    pub fn config(&self) -> &Rc<Http2Config> {
        &self.0.config
    }

    /// The engine that serves the tunnels.
    pub fn engine(&self) -> &Engine {
        &self.0.engine
    }

    /// Opens a stream on a tunnel that fits the key, dialling one if there is none with room.
    ///
    /// `tls` gives the certificate of `key.src`; it is only asked when a tunnel is dialled. Several flows may wait
    /// for one dial; if it fails, they all see why.
    ///
    /// # Errors
    /// When no tunnel could be made, or the peer refused or did not answer.
    pub async fn open<F>(
        &self,
        key: &PoolKey,
        tls: impl Fn() -> F,
        headers: &ConnectHeaders,
    ) -> Result<Tunnelled, OpenError>
    where
        F: Future<Output = Result<Arc<TlsIdentity>, Box<dyn std::error::Error + Send + Sync>>>
            + 'static,
    {
        let mut attempts = 0;
        let mut dials = 0;
        loop {
            if self.0.closed.get() {
                return Err(OpenError::Draining);
            }
            let Some(tunnel) = self.0.pick(key) else {
                if dials == DIALS {
                    return Err(OpenError::Http2("the peer allows no streams".to_string()));
                }
                dials += 1;
                self.0.dial(key, &tls).wait().await?;
                continue;
            };
            match tunnel.open(headers, &self.0.config).await {
                Ok(tunnelled) => return Ok(tunnelled),
                Err(Some(error)) => return Err(error),
                Err(None) => {
                    attempts += 1;
                    if attempts == ATTEMPTS {
                        return Err(OpenError::Http2(
                            "every tunnel to the peer ended before it was used".to_string(),
                        ));
                    }
                }
            }
        }
    }

    /// Opens a stream to whom `beyond` names, through a stream to a gateway that sees nothing of it.
    ///
    /// `gateway` opens the stream to the gateway; it is only asked when an inner tunnel has to be made.
    ///
    /// # Errors
    /// As for [`Self::open`], of either tunnel.
    pub async fn open_through(
        &self,
        beyond: &Beyond,
        tls: Arc<TlsIdentity>,
        headers: &ConnectHeaders,
        gateway: impl Future<Output = Result<Stream, OpenError>>,
    ) -> Result<Tunnelled, OpenError> {
        let (engine, config) = (&self.0.engine, &self.0.config);
        if beyond.shared
            && let Some(tunnel) = self.0.pick_inner(beyond, &tls)
        {
            match tunnel.open(headers, config).await {
                Ok(tunnelled) => return Ok(tunnelled),
                Err(Some(error)) => return Err(error),
                // It was on its way out: another is made.
                Err(None) => {}
            }
        }
        let socket = gateway.await?.into_socket().map_err(OpenError::from_io)?;
        let tunnel = Tunnel::over(engine, socket, tls, &beyond.expected, config).await?;
        let opened = tunnel.open(headers, config).await;
        if beyond.shared && opened.is_ok() && !self.0.closed.get() {
            let mut inner = self.0.inner.borrow_mut();
            inner.entry(beyond.clone()).or_default().push(tunnel);
            drop(inner);
            self.0.sweep_later();
        } else {
            tunnel.retire();
        }
        opened.map_err(|error| {
            error.unwrap_or_else(|| {
                OpenError::Http2("the tunnel ended before it was used".to_string())
            })
        })
    }

    /// How many tunnels there are.
    pub fn tunnels(&self) -> usize {
        self.0
            .entries
            .borrow()
            .values()
            .map(|entry| entry.tunnels.len())
            .sum()
    }

    /// Opens nothing any more; open streams go on until `close`.
    pub fn drain(&self) {
        self.0.closed.set(true);
        let entries = std::mem::take(&mut *self.0.entries.borrow_mut());
        let inner = std::mem::take(&mut *self.0.inner.borrow_mut());
        let tunnels = entries.into_values().flat_map(|entry| entry.tunnels);
        for tunnel in tunnels.chain(inner.into_values().flatten()) {
            tunnel.retire();
        }
    }
}

impl Inner {
    fn pick(&self, key: &PoolKey) -> Option<Rc<Tunnel>> {
        let mut entries = self.entries.borrow_mut();
        let entry = entries.get_mut(key)?;
        entry.tunnels.retain(|tunnel| !tunnel.is_dead());
        entry
            .tunnels
            .iter()
            .find(|tunnel| tunnel.has_room())
            .cloned()
    }

    /// An inner tunnel with room that was made with that certificate.
    fn pick_inner(&self, beyond: &Beyond, tls: &Arc<TlsIdentity>) -> Option<Rc<Tunnel>> {
        let mut inner = self.inner.borrow_mut();
        let tunnels = inner.get_mut(beyond)?;
        tunnels.retain(|tunnel| !tunnel.is_dead());
        let fits =
            |tunnel: &&Rc<Tunnel>| tunnel.has_room() && Arc::ptr_eq(tunnel.certificate(), tls);
        tunnels.iter().find(fits).cloned()
    }

    /// Joins the dial that is under way for the key, or starts one.
    fn dial<F>(self: &Rc<Self>, key: &PoolKey, tls: impl Fn() -> F) -> Rc<Dial>
    where
        F: Future<Output = Result<Arc<TlsIdentity>, Box<dyn std::error::Error + Send + Sync>>>
            + 'static,
    {
        let mut entries = self.entries.borrow_mut();
        let entry = entries.entry(key.clone()).or_default();
        if let Some(dial) = &entry.dial {
            return dial.clone();
        }
        let dial = Rc::new(Dial::default());
        entry.dial = Some(dial.clone());
        // A task of its own: the flow that began the dial may end before the others that wait for it.
        let (inner, key, under_way) = (self.clone(), key.clone(), dial.clone());
        let tls = tls();
        tokio::task::spawn_local(async move {
            let result = inner.connect(&key, tls).await;
            inner.settle(&key, result, &under_way);
        });
        dial
    }

    async fn connect(
        &self,
        key: &PoolKey,
        tls: impl Future<Output = Result<Arc<TlsIdentity>, Box<dyn std::error::Error + Send + Sync>>>,
    ) -> Result<Rc<Tunnel>, OpenError> {
        let tls = tls
            .await
            .map_err(|error| OpenError::Identity(error.into()))?;
        let socket = self.dialer.dial(key.dst).await;
        let socket = socket.map_err(OpenError::from_dial)?;
        Tunnel::over(&self.engine, socket, tls, &key.expected, &self.config).await
    }

    fn settle(self: &Rc<Self>, key: &PoolKey, result: Result<Rc<Tunnel>, OpenError>, dial: &Dial) {
        let result = match result {
            Ok(tunnel) if self.closed.get() => {
                tunnel.retire();
                Err(OpenError::Draining)
            }
            Ok(tunnel) => {
                let mut entries = self.entries.borrow_mut();
                let entry = entries.entry(key.clone()).or_default();
                entry.tunnels.push(tunnel);
                entry.dial = None;
                self.sweep_later();
                Ok(())
            }
            Err(error) => {
                let mut entries = self.entries.borrow_mut();
                if let Some(entry) = entries.get_mut(key) {
                    entry.dial = None;
                    if entry.tunnels.is_empty() {
                        entries.remove(key);
                    }
                }
                Err(error)
            }
        };
        *dial.result.borrow_mut() = Some(result);
        dial.over.notify_waiters();
    }

    /// Starts the task that lets go of unused tunnels, unless it runs.
    fn sweep_later(self: &Rc<Self>) {
        if !self.sweeping.replace(true) {
            tokio::task::spawn_local(sweep(Rc::downgrade(self), self.config.unused_release));
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let entries = self.entries.get_mut().values();
        let tunnels = entries.flat_map(|entry| &entry.tunnels);
        for tunnel in tunnels.chain(self.inner.get_mut().values().flatten()) {
            tunnel.stop();
        }
    }
}

/// Lets go of tunnels that took no stream for `unused`, or whose certificate is no longer in use; ends with the last.
async fn sweep(inner: Weak<Inner>, unused: Duration) {
    loop {
        let rest = (unused / 4).min(LOOK) + Duration::from_millis(1);
        tokio::time::sleep(rest).await;
        let Some(inner) = inner.upgrade() else { return };
        let now = Instant::now();
        let keep = |source: &Identity, tunnel: &Rc<Tunnel>| {
            let outdated = !inner.dialer.is_current(source, tunnel.certificate());
            let rested = now.duration_since(tunnel.last_used()) >= unused;
            let keep = !tunnel.is_dead() && !outdated && !rested;
            if !keep {
                tunnel.retire();
            }
            keep
        };
        let mut nested = inner.inner.borrow_mut();
        nested.retain(|beyond, tunnels| {
            tunnels.retain(|tunnel| keep(&beyond.gateway.src, tunnel));
            !tunnels.is_empty()
        });
        let mut entries = inner.entries.borrow_mut();
        entries.retain(|key, entry| {
            entry.tunnels.retain(|tunnel| keep(&key.src, tunnel));
            entry.dial.is_some() || !entry.tunnels.is_empty()
        });
        if entries.is_empty() && nested.is_empty() {
            inner.sweeping.set(false);
            return;
        }
    }
}
