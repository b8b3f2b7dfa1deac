//! Connections out of a pod. Their sockets are made inside its namespace; for a busy pod some are made ahead of need,
//! so that entering the namespace is paid once for many.

use std::cell::{Cell, RefCell};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::IpBindAddressNoPort;
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::net::TcpStream;

use super::netns::PodNetns;
use super::sockets::{keep_alive, mark};
use crate::config::Config;

/// How long a connection may take.
const CONNECT: Duration = Duration::from_secs(10);
/// Sockets that are made at a time for a busy pod.
const BATCH: usize = 16;
/// A pod is busy that needs new sockets again within this time.
const BUSY: Duration = Duration::from_secs(1);
/// Sockets that nobody wanted for this long are closed.
const IDLE: Duration = Duration::from_secs(3);

/// Where a connection goes, as far as its socket's options care.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Toward {
    /// An application of the pod itself, from a client's address if possible. Such a connection needs no keep-alive:
    /// one kernel has both ends and knows when either goes.
    Application(Option<IpAddr>),
    /// Anywhere, from the pod's own address.
    Elsewhere,
}

impl Toward {
    /// Whether a socket made for one serves the other, if they are of the same address family.
    fn shelf(self, v4: bool) -> usize {
        let kind = match self {
            Self::Application(None) => 0,
            Self::Application(Some(_)) => 1,
            Self::Elsewhere => 2,
        };
        2 * kind + usize::from(v4)
    }
}

/// Makes the connections of one pod on one worker; clones share the sockets made ahead.
#[derive(Clone)]
pub struct Connector(Rc<Inner>);

struct Inner {
    netns: Arc<PodNetns>,
    config: Arc<Config>,
    idle: Duration,
    shelves: RefCell<[Shelf; 6]>,
    sweeping: Cell<bool>,
}

/// Sockets of one kind, made but not used.
#[derive(Default)]
struct Shelf {
    spare: Vec<Socket>,
    /// How many were made the last time, and when.
    batch: usize,
    made: Option<Instant>,
}

impl Connector {
    /// Makes no socket yet.
    pub fn new(netns: Arc<PodNetns>, config: Arc<Config>) -> Self {
        Self::resting_after(IDLE, netns, config)
    }

    fn resting_after(idle: Duration, netns: Arc<PodNetns>, config: Arc<Config>) -> Self {
        Self(Rc::new(Inner {
            netns,
            config,
            idle,
            shelves: RefCell::default(),
            sweeping: Cell::new(false),
        }))
    }

    /// Connects.
    ///
    /// # Errors
    /// When nobody answers within the limit, or the kernel's error.
    pub async fn connect(&self, destination: SocketAddr, toward: Toward) -> io::Result<TcpStream> {
        let v4 = destination.is_ipv4();
        let toward = match toward {
            // Where the client is the application itself there is nothing to take over.
            Toward::Application(Some(client))
                if client == destination.ip() || client.is_ipv4() != v4 =>
            {
                Toward::Application(None)
            }
            other => other,
        };
        let socket = self.0.take(toward, v4)?;
        if let Toward::Application(Some(client)) = toward
            && let Err(error) = socket.bind(&SocketAddr::new(client, 0).into())
        {
            tracing::warn!("failed to bind local addr: {error}");
        }
        let established = begin(&socket, destination, toward)?;
        let stream = TcpStream::from_std(socket.into())?;
        if !established {
            match tokio::time::timeout(CONNECT, stream.writable()).await {
                Ok(ready) => ready?,
                Err(elapsed) => return Err(io::Error::new(io::ErrorKind::TimedOut, elapsed)),
            }
            if let Some(error) = stream.take_error()? {
                return Err(error);
            }
        }
        Ok(stream)
    }

    /// How many sockets are made but not used.
    #[cfg(test)]
    fn spare(&self) -> usize {
        let shelves = self.0.shelves.borrow();
        shelves.iter().map(|shelf| shelf.spare.len()).sum()
    }
}

/// Begins to connect; gives whether the connection stands already.
fn begin(socket: &Socket, destination: SocketAddr, toward: Toward) -> io::Result<bool> {
    let address = destination.into();
    let try_once = || match socket.connect(&address) {
        Ok(()) => Ok(true),
        Err(error) if is_under_way(&error) => Ok(false),
        Err(error) => Err(error),
    };
    // Within a namespace the whole handshake takes place during the call; asking once more tells how it went.
    Ok(try_once()? || (toward != Toward::Elsewhere && try_once()?))
}

fn is_under_way(error: &io::Error) -> bool {
    let code = error.raw_os_error();
    code == Some(Errno::EINPROGRESS as i32) || code == Some(Errno::EALREADY as i32)
}

impl Inner {
    fn take(self: &Rc<Self>, toward: Toward, v4: bool) -> io::Result<Socket> {
        let mut shelves = self.shelves.borrow_mut();
        let shelf = &mut shelves[toward.shelf(v4)];
        if let Some(socket) = shelf.spare.pop() {
            return Ok(socket);
        }
        let now = Instant::now();
        let busy = shelf
            .made
            .is_some_and(|made| now.duration_since(made) < BUSY);
        shelf.batch = if busy { BATCH.min(2 * shelf.batch) } else { 1 };
        shelf.made = Some(now);
        let spare = &mut shelf.spare;
        let batch = shelf.batch;
        let socket = self.netns.run(|| {
            let socket = self.socket(toward, v4)?;
            // A shortage only matters to whoever meets it.
            spare.extend((1..batch).map_while(|_| self.socket(toward, v4).ok()));
            Ok(socket)
        })?;
        if !spare.is_empty() && !self.sweeping.replace(true) {
            tokio::task::spawn_local(sweep(Rc::downgrade(self), self.idle));
        }
        Ok(socket)
    }

    /// Makes a socket in the namespace that the thread is in.
    fn socket(&self, toward: Toward, v4: bool) -> io::Result<Socket> {
        let domain = if v4 { Domain::IPV4 } else { Domain::IPV6 };
        let kind = Type::STREAM.nonblocking();
        let socket = Socket::new(domain, kind, Some(Protocol::TCP))?;
        mark(&socket, &self.config)?;
        socket.set_tcp_nodelay(true)?;
        match toward {
            Toward::Application(None) => {}
            Toward::Application(Some(_)) => take_foreign(&socket, v4),
            Toward::Elsewhere => keep_alive(&SockRef::from(&socket), &self.config),
        }
        Ok(socket)
    }
}

/// Allows a socket to be bound to a foreign address; if that fails it keeps the pod's own.
fn take_foreign(socket: &Socket, v4: bool) {
    let transparent = match v4 {
        true => socket.set_ip_transparent_v4(true),
        false => socket.set_ip_transparent_v6(true),
    };
    if let Err(error) = transparent {
        tracing::warn!("failed to set freebind: {error}");
    }
    // The port is chosen when the destination is known, so that a client is not limited to one range of ports for all
    // of a pod's. Without the option it is chosen now.
    let _ = setsockopt(socket, IpBindAddressNoPort, &true);
}

/// Closes sockets that nobody wanted; ends when there are none.
async fn sweep(inner: Weak<Inner>, idle: Duration) {
    loop {
        tokio::time::sleep(idle).await;
        let Some(inner) = inner.upgrade() else { return };
        let mut shelves = inner.shelves.borrow_mut();
        let now = Instant::now();
        for shelf in shelves.iter_mut() {
            let made = shelf.made.map(|made| now.duration_since(made));
            if made.is_none_or(|age| age >= idle) {
                shelf.spare = Vec::new();
            }
        }
        if shelves.iter().all(|shelf| shelf.spare.is_empty()) {
            inner.sweeping.set(false);
            return;
        }
    }
}

#[cfg(test)]
#[path = "connector_tests.rs"]
mod tests;
