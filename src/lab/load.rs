//! A plain load generator over TCP and its target, to see what a flow through the mesh costs.
//!
//! The first byte of a connection says what it is for: `b` bulk, which is read to its end and answered with the
//! number of bytes; `r` requests, which are sent back as they come. Threads and blocking calls: it is meant for
//! tens of connections.

use std::io::{Read, Result, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::{Subcommand, ValueEnum};
use serde::{Deserialize, Serialize};

use super::listen;
use super::say::say;

const CHUNK: usize = 256 << 10;
const REQUEST: usize = 1 << 10;

/// One end of a measurement.
#[derive(Subcommand, Clone, Debug)]
pub enum LoadCommand {
    /// Be the target
    Serve {
        #[arg(long, default_value_t = 9000)]
        port: u16,
    },
    /// Load a target and print what came of it, as JSON
    Run {
        #[arg(value_enum)]
        kind: Kind,
        target: SocketAddr,
        #[arg(long, default_value_t = 1)]
        connections: usize,
        #[arg(long, default_value_t = 3)]
        seconds: u64,
    },
}

/// What to measure.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// As many bytes as go through, in one direction
    Bulk,
    /// Requests of 1 KiB and answers of the same size, one after the other on every connection
    Requests,
    /// A new connection for every request
    Connections,
}

/// What was measured.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    pub seconds: f64,
    /// Bytes that the target has confirmed.
    pub bytes: u64,
    pub requests: u64,
    /// Of the time a request took, in microseconds.
    pub median: u64,
    pub p99: u64,
    pub errors: u64,
}

/// Runs one end.
///
/// # Errors
/// When the port cannot be listened on.
pub fn run(command: &LoadCommand) -> anyhow::Result<()> {
    match command {
        LoadCommand::Serve { port } => {
            let listener = listen::everywhere(*port)?;
            for socket in listener.incoming().flatten() {
                std::thread::spawn(move || answer(socket));
            }
        }
        LoadCommand::Run {
            kind,
            target,
            connections,
            seconds,
        } => {
            let figures = load(*kind, *target, *connections, Duration::from_secs(*seconds));
            say!("{}", serde_json::to_string(&figures)?);
        }
    }
    Ok(())
}

fn answer(mut socket: TcpStream) -> Result<()> {
    socket.set_nodelay(true)?;
    let mut kind = [0];
    socket.read_exact(&mut kind)?;
    let mut buffer = vec![0; CHUNK];
    let mut total = 0_u64;
    loop {
        let read = socket.read(&mut buffer)?;
        total += read as u64;
        match (read, kind) {
            (0, [b'b']) => return socket.write_all(&total.to_be_bytes()),
            (0, _) => return Ok(()),
            (_, [b'b']) => {}
            _ => socket.write_all(&buffer[..read])?,
        }
    }
}

fn load(kind: Kind, target: SocketAddr, connections: usize, time: Duration) -> Figures {
    let stop = Arc::new(AtomicBool::new(false));
    let started = Instant::now();
    let threads: Vec<_> = (0..connections)
        .map(|_| {
            let stop = Arc::clone(&stop);
            std::thread::spawn(move || {
                let mut one = One::default();
                let result = match kind {
                    Kind::Bulk => one.bulk(target, &stop),
                    Kind::Requests => one.requests(target, &stop),
                    Kind::Connections => one.connections(target, &stop),
                };
                one.errors += u64::from(result.is_err());
                one
            })
        })
        .collect();
    std::thread::sleep(time);
    stop.store(true, Ordering::Relaxed);
    let mut all = One::default();
    for thread in threads {
        match thread.join() {
            Ok(one) => all.add(one),
            Err(_) => all.errors += 1,
        }
    }
    all.figures(started.elapsed())
}

/// What one connection, or all of them, achieved.
#[derive(Default)]
struct One {
    bytes: u64,
    errors: u64,
    /// Microseconds of every request.
    times: Vec<u64>,
}

impl One {
    fn bulk(&mut self, target: SocketAddr, stop: &AtomicBool) -> Result<()> {
        let mut socket = connect(target, b'b')?;
        let chunk = vec![b'x'; CHUNK];
        while !stop.load(Ordering::Relaxed) {
            socket.write_all(&chunk)?;
        }
        socket.shutdown(std::net::Shutdown::Write)?;
        let mut total = [0; 8];
        socket.read_exact(&mut total)?;
        self.bytes = u64::from_be_bytes(total);
        Ok(())
    }

    fn requests(&mut self, target: SocketAddr, stop: &AtomicBool) -> Result<()> {
        let mut socket = connect(target, b'r')?;
        while !stop.load(Ordering::Relaxed) {
            let started = Instant::now();
            request(&mut socket)?;
            self.times.push(started.elapsed().as_micros() as u64);
        }
        Ok(())
    }

    fn connections(&mut self, target: SocketAddr, stop: &AtomicBool) -> Result<()> {
        while !stop.load(Ordering::Relaxed) {
            let started = Instant::now();
            request(&mut connect(target, b'r')?)?;
            self.times.push(started.elapsed().as_micros() as u64);
        }
        Ok(())
    }

    fn add(&mut self, other: Self) {
        self.bytes += other.bytes;
        self.errors += other.errors;
        self.times.extend(other.times);
    }

    fn figures(mut self, time: Duration) -> Figures {
        self.times.sort_unstable();
        let at = |share: f64| {
            let index = (self.times.len() as f64 * share) as usize;
            self.times.get(index).copied().unwrap_or_default()
        };
        Figures {
            seconds: time.as_secs_f64(),
            bytes: self.bytes,
            requests: self.times.len() as u64,
            median: at(0.5),
            p99: at(0.99),
            errors: self.errors,
        }
    }
}

fn connect(target: SocketAddr, kind: u8) -> Result<TcpStream> {
    let mut socket = TcpStream::connect(target)?;
    socket.set_nodelay(true)?;
    socket.set_read_timeout(Some(Duration::from_secs(10)))?;
    socket.write_all(&[kind])?;
    Ok(socket)
}

fn request(socket: &mut TcpStream) -> Result<()> {
    let mut buffer = [b'x'; REQUEST];
    socket.write_all(&buffer)?;
    socket.read_exact(&mut buffer)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn every_kind_of_load_is_answered_and_counted() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let target = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            for socket in listener.incoming().flatten() {
                std::thread::spawn(move || answer(socket));
            }
        });
        let time = Duration::from_millis(50);
        let bulk = load(Kind::Bulk, target, 2, time);
        assert!(
            bulk.bytes >= 2 * CHUNK as u64 && bulk.errors == 0,
            "{bulk:?}"
        );
        for kind in [Kind::Requests, Kind::Connections] {
            let figures = load(kind, target, 2, time);
            assert!(figures.requests > 0 && figures.errors == 0, "{figures:?}");
            assert!(figures.median <= figures.p99);
        }
    }

    #[test]
    fn a_target_that_is_not_there_is_an_error() {
        let nobody = "127.0.0.1:1".parse().unwrap();
        assert_eq!(load(Kind::Bulk, nobody, 3, Duration::ZERO).errors, 3);
    }
}
