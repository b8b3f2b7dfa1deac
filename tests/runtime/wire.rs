//! What crosses a node's bridge.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use cni::netns::within;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

/// The largest frame, offloads included.
const FRAME: usize = 70 << 10;

/// Takes down every frame on every interface of a network namespace.
pub struct Wire {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Vec<Vec<u8>>>,
}

impl Wire {
    /// Starts to listen.
    pub fn tap(netns: &File) -> Self {
        let open = || {
            let (family, kind) = (AddressFamily::Packet, SockType::Raw);
            let socket = socket(family, kind, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll)?;
            setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::milliseconds(20))?;
            Ok(socket)
        };
        let socket = within(netns.as_fd(), open).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let asked = stop.clone();
        let thread = std::thread::spawn(move || take_down(&socket, &asked));
        Self { stop, thread }
    }

    /// Stops; gives the frames.
    pub fn frames(self) -> Vec<Vec<u8>> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

fn take_down(socket: &OwnedFd, stop: &AtomicBool) -> Vec<Vec<u8>> {
    let (mut frames, mut frame) = (Vec::new(), vec![0; FRAME]);
    loop {
        match recv(socket.as_raw_fd(), &mut frame, MsgFlags::empty()) {
            Ok(length) => frames.push(frame[..length].to_vec()),
            // What is queued is read to the end.
            Err(Errno::EAGAIN) if stop.load(Ordering::Relaxed) => return frames,
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            Err(error) => panic!("frames are lost: {error}"),
        }
    }
}

/// How many frames hold some bytes.
pub fn count(frames: &[Vec<u8>], bytes: &[u8]) -> usize {
    let holds = |frame: &&Vec<u8>| frame.windows(bytes.len()).any(|window| window == bytes);
    frames.iter().filter(holds).count()
}
