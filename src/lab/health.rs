//! Whether the control plane and the proxies are ready.

use std::io::{Read, Result, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

use super::addresses::{CONTROL, CONTROL_PORT};
use super::topology::Node;

const TIMEOUT: Duration = Duration::from_millis(500);
const READINESS_PORT: u16 = 15021;

/// Whether the control plane accepts connections.
pub fn control_is_ready() -> bool {
    let address = SocketAddr::from((CONTROL, CONTROL_PORT));
    TcpStream::connect_timeout(&address, TIMEOUT).is_ok()
}

/// What a node's proxy says of itself.
pub fn proxy_is_ready(node: &Node) -> bool {
    node.namespaces.run(ask).is_ok_and(|code| code == 200)
}

fn ask() -> Result<u16> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, READINESS_PORT));
    let mut socket = TcpStream::connect_timeout(&address, TIMEOUT)?;
    socket.set_read_timeout(Some(TIMEOUT))?;
    socket.write_all(
        b"GET /healthz/ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    )?;
    let mut answer = [0; 64];
    let read = socket.read(&mut answer)?;
    let line = String::from_utf8_lossy(&answer[..read]);
    let code = line.split(' ').nth(1).and_then(|code| code.parse().ok());
    Ok(code.unwrap_or_default())
}
