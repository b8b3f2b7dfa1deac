//! Bridges, veth pairs, addresses and routes in the namespace of the calling thread, over rtnetlink.

use std::io::{Error, ErrorKind, Result};
use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use ipnet::IpNet;
use nix::net::if_::if_nametoindex;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket,
};

const VETH_INFO_PEER: u16 = 1;
const HEADER: usize = 16;

/// A connection to the kernel's routing tables.
pub struct Links {
    socket: OwnedFd,
    sequence: u32,
}

impl Links {
    /// Opens a connection to the network namespace that the calling thread is in.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn open() -> Result<Self> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkRoute,
        )?;
        Ok(Self {
            socket,
            sequence: 0,
        })
    }

    /// Makes a bridge and brings it up.
    pub fn bridge(&mut self, name: &str) -> Result<()> {
        let mut message = Message::link(0, 0);
        message.text(libc::IFLA_IFNAME, name);
        message.nest(libc::IFLA_LINKINFO, |info| {
            info.text(libc::IFLA_INFO_KIND, "bridge");
        });
        self.create(libc::RTM_NEWLINK, message, name)?;
        self.up(name)
    }

    /// Makes a veth pair: `name` here and brought up, `peer` in another namespace.
    pub fn veth(&mut self, name: &str, peer: &str, peer_namespace: BorrowedFd) -> Result<()> {
        let mut message = Message::link(0, 0);
        message.text(libc::IFLA_IFNAME, name);
        message.nest(libc::IFLA_LINKINFO, |info| {
            info.text(libc::IFLA_INFO_KIND, "veth");
            info.nest(libc::IFLA_INFO_DATA, |data| {
                data.nest(VETH_INFO_PEER, |end| {
                    end.interface_header(0, 0);
                    end.text(libc::IFLA_IFNAME, peer);
                    let fd = peer_namespace.as_raw_fd();
                    end.attribute(libc::IFLA_NET_NS_FD, &fd.to_ne_bytes());
                });
            });
        });
        self.create(libc::RTM_NEWLINK, message, name)?;
        self.up(name)
    }

    /// Puts an interface on a bridge.
    pub fn join_bridge(&mut self, name: &str, bridge: &str) -> Result<()> {
        let mut message = Message::link(index(name)?, 0);
        message.attribute(libc::IFLA_MASTER, &index(bridge)?.to_ne_bytes());
        self.request(libc::RTM_NEWLINK, 0, message, name)
    }

    /// Brings an interface up.
    pub fn up(&mut self, name: &str) -> Result<()> {
        let message = Message::link(index(name)?, libc::IFF_UP as u32);
        self.request(libc::RTM_NEWLINK, 0, message, name)
    }

    /// Removes an interface.
    pub fn remove(&mut self, name: &str) -> Result<()> {
        let message = Message::link(index(name)?, 0);
        self.request(libc::RTM_DELLINK, 0, message, name)
    }

    /// Gives an interface an address, to be used at once.
    pub fn address(&mut self, name: &str, address: IpNet) -> Result<()> {
        let mut message = Message::default();
        // Nobody else can have it, so that nobody needs to be asked (RFC 4862 §5.4).
        let flags = match address {
            IpNet::V4(_) => 0,
            IpNet::V6(_) => libc::IFA_F_NODAD as u8,
        };
        message.bytes(&[family(address.addr()), address.prefix_len(), flags, 0]);
        message.bytes(&index(name)?.to_ne_bytes());
        message.attribute(libc::IFA_LOCAL, &octets(address.addr()));
        message.attribute(libc::IFA_ADDRESS, &octets(address.addr()));
        self.create(libc::RTM_NEWADDR, message, &address.to_string())
    }

    /// Sends `destination` to the neighbour `via`.
    pub fn route_via(&mut self, destination: IpNet, via: IpAddr) -> Result<()> {
        let mut message = Message::route(destination, libc::RT_SCOPE_UNIVERSE);
        message.attribute(libc::RTA_GATEWAY, &octets(via));
        self.create(libc::RTM_NEWROUTE, message, &destination.to_string())
    }

    /// Sends `destination` out of an interface.
    pub fn route_on(&mut self, destination: IpNet, interface: &str) -> Result<()> {
        let mut message = Message::route(destination, libc::RT_SCOPE_LINK);
        message.attribute(libc::RTA_OIF, &index(interface)?.to_ne_bytes());
        self.create(libc::RTM_NEWROUTE, message, &destination.to_string())
    }

    fn create(&mut self, kind: u16, message: Message, what: &str) -> Result<()> {
        let flags = (libc::NLM_F_CREATE | libc::NLM_F_EXCL) as u16;
        self.request(kind, flags, message, what)
    }

    /// Sends one request and waits for its acknowledgement.
    fn request(&mut self, kind: u16, flags: u16, message: Message, what: &str) -> Result<()> {
        self.sequence += 1;
        let length = HEADER + message.0.len();
        let mut packet = Vec::with_capacity(length);
        packet.extend_from_slice(&(length as u32).to_ne_bytes());
        packet.extend_from_slice(&kind.to_ne_bytes());
        let flags = flags | (libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16;
        packet.extend_from_slice(&flags.to_ne_bytes());
        packet.extend_from_slice(&self.sequence.to_ne_bytes());
        packet.extend_from_slice(&0_u32.to_ne_bytes());
        packet.extend_from_slice(&message.0);
        let fd = self.socket.as_raw_fd();
        sendto(fd, &packet, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
        let mut answer = [0_u8; 4096];
        let received = recv(fd, &mut answer, MsgFlags::empty())?;
        let code = answer
            .get(HEADER..HEADER + 4)
            .filter(|_| received >= HEADER + 4)
            .and_then(|code| code.try_into().ok())
            .map(i32::from_ne_bytes)
            .ok_or_else(|| Error::new(ErrorKind::InvalidData, "short netlink answer"))?;
        if code == 0 {
            return Ok(());
        }
        let reason = Error::from_raw_os_error(-code);
        Err(Error::new(reason.kind(), format!("{what}: {reason}")))
    }
}

fn index(name: &str) -> Result<u32> {
    if_nametoindex(name).map_err(|e| Error::new(Error::from(e).kind(), format!("{name}: {e}")))
}

fn family(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => libc::AF_INET as u8,
        IpAddr::V6(_) => libc::AF_INET6 as u8,
    }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// The body of a netlink message, every part padded to four bytes.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn link(index: u32, flags: u32) -> Self {
        let mut message = Self::default();
        message.interface_header(index, flags);
        message
    }

    fn route(destination: IpNet, scope: u8) -> Self {
        let mut message = Self::default();
        let prefix = destination.prefix_len();
        message.bytes(&[family(destination.addr()), prefix, 0, 0]);
        message.bytes(&[
            libc::RT_TABLE_MAIN,
            libc::RTPROT_STATIC,
            scope,
            libc::RTN_UNICAST,
        ]);
        message.bytes(&0_u32.to_ne_bytes());
        if prefix > 0 {
            message.attribute(libc::RTA_DST, &octets(destination.network()));
        }
        message
    }

    fn interface_header(&mut self, index: u32, flags: u32) {
        self.bytes(&[libc::AF_UNSPEC as u8, 0, 0, 0]);
        self.bytes(&index.to_ne_bytes());
        self.bytes(&flags.to_ne_bytes());
        self.bytes(&flags.to_ne_bytes());
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    fn attribute(&mut self, kind: u16, value: &[u8]) {
        let length = (4 + value.len()) as u16;
        self.0.extend_from_slice(&length.to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.bytes(value);
    }

    fn text(&mut self, kind: u16, text: &str) {
        let mut bytes = text.as_bytes().to_vec();
        bytes.push(0);
        self.attribute(kind, &bytes);
    }

    fn nest(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) {
        let mut inner = Self::default();
        fill(&mut inner);
        self.attribute(kind, &inner.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_carry_their_length_and_are_padded() {
        let mut message = Message::default();
        message.nest(18, |inner| inner.text(1, "veth"));
        let expected = [
            16_u16.to_ne_bytes(),
            18_u16.to_ne_bytes(),
            9_u16.to_ne_bytes(),
            1_u16.to_ne_bytes(),
        ];
        assert_eq!(&message.0[..8], expected.concat());
        assert_eq!(&message.0[8..], b"veth\0\0\0\0");
    }
}
