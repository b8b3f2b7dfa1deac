//! Watches everything that crosses the lab's bridge for byte strings that should not be there.

use std::io::Result;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

use super::wire::Sighting;

const TUNNEL_PORT: u16 = 15008;
/// The largest frame, offloads included.
const FRAME: usize = 70 << 10;
const BUFFER: usize = 32 << 20;
const IPV4: [u8; 2] = [0x08, 0x00];
const IPV6: [u8; 2] = [0x86, 0xdd];
const IPV6_HEADER: usize = 40;
const TCP: u8 = 6;

/// A watch that is going on.
#[derive(Debug)]
pub struct Watcher {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Sighting>,
}

impl Watcher {
    /// Watches all interfaces of the calling thread's network namespace.
    ///
    /// # Errors
    /// When the kernel gives no packet socket.
    pub fn start(needles: &[String]) -> Result<Self> {
        let socket = socket(
            AddressFamily::Packet,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::EthAll,
        )?;
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::milliseconds(20))?;
        // Only with privilege over the whole machine; a small buffer serves as well.
        let _ = setsockopt(&socket, sockopt::RcvBufForce, &BUFFER);
        let stop = Arc::new(AtomicBool::new(false));
        let asked = Arc::clone(&stop);
        let needles: Vec<Vec<u8>> = needles.iter().map(|n| n.clone().into_bytes()).collect();
        let thread = std::thread::Builder::new()
            .name("watch".into())
            .spawn(move || watch(&socket, &needles, &asked))?;
        Ok(Self { stop, thread })
    }

    /// Ends the watch and says what it saw.
    pub fn stop(self) -> Sighting {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap_or_default()
    }
}

fn watch(socket: &OwnedFd, needles: &[Vec<u8>], stop: &AtomicBool) -> Sighting {
    let mut sighting = Sighting {
        found: vec![0; needles.len()],
        ..Sighting::default()
    };
    let mut frame = vec![0; FRAME];
    loop {
        match recv(socket.as_raw_fd(), &mut frame, MsgFlags::empty()) {
            Ok(length) => note(&mut sighting, &frame[..length], needles),
            // What is queued is read to the end before the watch ends.
            Err(nix::Error::EAGAIN) if stop.load(Ordering::Relaxed) => return sighting,
            Err(nix::Error::EAGAIN | nix::Error::EINTR) => {}
            Err(nix::Error::ENOBUFS) => sighting.lost += 1,
            Err(_) => return sighting,
        }
    }
}

fn note(sighting: &mut Sighting, frame: &[u8], needles: &[Vec<u8>]) {
    sighting.frames += 1;
    sighting.bytes += frame.len() as u64;
    if tcp_ports(frame).is_some_and(|ports| ports.contains(&TUNNEL_PORT)) {
        sighting.tunnel_frames += 1;
    }
    for (needle, count) in needles.iter().zip(&mut sighting.found) {
        if frame
            .windows(needle.len().max(1))
            .any(|window| window == needle)
        {
            *count += 1;
        }
    }
}

/// Source and destination port of an Ethernet frame with TCP. Nobody in a lab sends IPv6 extension headers before it.
fn tcp_ports(frame: &[u8]) -> Option<[u16; 2]> {
    let packet = frame.get(14..)?;
    let (protocol, header) = match [frame[12], frame[13]] {
        IPV4 => (packet.get(9)?, usize::from(packet.first()? & 0x0f) * 4),
        IPV6 => (packet.get(6)?, IPV6_HEADER),
        _ => return None,
    };
    if *protocol != TCP {
        return None;
    }
    let ports = packet.get(header..header + 4)?;
    Some([
        u16::from_be_bytes([ports[0], ports[1]]),
        u16::from_be_bytes([ports[2], ports[3]]),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_of_the_tunnel_and_needles_are_counted() {
        let mut frame = vec![0; 14 + 20 + 20];
        frame[12..14].copy_from_slice(&IPV4);
        frame[14] = 0x45;
        frame[14 + 9] = TCP;
        frame[14 + 22..14 + 24].copy_from_slice(&TUNNEL_PORT.to_be_bytes());
        frame.extend_from_slice(b"GET /productpage HTTP/1.1");
        let mut other = vec![0; 14 + 40 + 20];
        other[12..14].copy_from_slice(&IPV6);
        other[14 + 6] = TCP;
        other[14 + 40..14 + 42].copy_from_slice(&TUNNEL_PORT.to_be_bytes());
        let needles = [b"GET /productpage".to_vec(), b"curl".to_vec()];
        let mut sighting = Sighting {
            found: vec![0, 0],
            ..Sighting::default()
        };
        note(&mut sighting, &frame, &needles);
        note(&mut sighting, &other, &needles);
        note(&mut sighting, b"short", &needles);
        assert_eq!(sighting.found, [1, 0]);
        assert_eq!((sighting.frames, sighting.tunnel_frames), (3, 2));
    }
}
