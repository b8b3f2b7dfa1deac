//! A listener on every address of a pod, of whichever family.

use std::io::Result;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};

use socket2::{Domain, Socket, Type};

const BACKLOG: i32 = 1024;

/// Listens on a port of every address.
///
/// # Errors
/// When the port is taken.
pub fn everywhere(port: u16) -> Result<TcpListener> {
    // A kernel without IPv6 has no such sockets.
    let (socket, address) = match Socket::new(Domain::IPV6, Type::STREAM, None) {
        Ok(socket) => {
            socket.set_only_v6(false)?;
            (socket, SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)))
        }
        Err(_) => (
            Socket::new(Domain::IPV4, Type::STREAM, None)?,
            SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)),
        ),
    };
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use std::net::{TcpStream, UdpSocket};

    use super::*;

    #[test]
    fn clients_of_both_families_are_let_in() {
        let listener = everywhere(0).unwrap();
        let port = listener.local_addr().unwrap().port();
        assert!(TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok());
        let has_ipv6 = UdpSocket::bind((Ipv6Addr::LOCALHOST, 0)).is_ok();
        let v6 = TcpStream::connect((Ipv6Addr::LOCALHOST, port));
        assert_eq!(v6.is_ok(), has_ipv6);
    }
}
