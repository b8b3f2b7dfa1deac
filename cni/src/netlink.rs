//! Requests to the kernel's routing tables and to netfilter over netlink (RFC 3549).

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// The length of struct nlmsghdr.
const HEADER: usize = 16;
/// Room for what the kernel sends at once.
const BUFFER: usize = 64 * 1024;

const REQUEST: u16 = libc::NLM_F_REQUEST as u16;
const ACK: u16 = libc::NLM_F_ACK as u16;
const DUMP: u16 = libc::NLM_F_DUMP as u16;
const ERROR: u16 = libc::NLMSG_ERROR as u16;
const DONE: u16 = libc::NLMSG_DONE as u16;

/// How often a list that changed while it was read is read anew.
const ATTEMPTS: usize = 5;

/// A socket to the namespace it was opened in.
pub struct Netlink(OwnedFd);

impl Netlink {
    /// To the routing tables.
    ///
    /// # Errors
    /// The kernel's error.
    pub fn routing() -> io::Result<Self> {
        Self::open(libc::NETLINK_ROUTE)
    }

    /// To netfilter, whose kinds of requests are a subsystem and a command.
    ///
    /// # Errors
    /// The kernel's error.
    pub fn netfilter() -> io::Result<Self> {
        Self::open(libc::NETLINK_NETFILTER)
    }

    fn open(protocol: libc::c_int) -> io::Result<Self> {
        // SAFETY: plain system call; the descriptor it gives is owned by nobody else.
        let socket = unsafe {
            let raw = libc::socket(
                libc::AF_NETLINK,
                libc::SOCK_RAW | libc::SOCK_CLOEXEC,
                protocol,
            );
            if raw < 0 {
                return Err(io::Error::last_os_error());
            }
            OwnedFd::from_raw_fd(raw)
        };
        Ok(Self(socket))
    }

    /// Sends a request and waits for its acknowledgement.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn request(&self, kind: u16, flags: u16, body: &[u8]) -> io::Result<()> {
        self.send(kind, REQUEST | ACK | flags, body)?;
        loop {
            for message in Messages(&self.receive()?) {
                let message = message?;
                if message.kind == ERROR {
                    return message.result();
                }
            }
        }
    }

    /// Asks for a list, by the header of its kind; gives the body of each of its messages.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn list(&self, kind: u16, header: &[u8]) -> io::Result<Vec<Vec<u8>>> {
        for _ in 0..ATTEMPTS {
            self.send(kind, REQUEST | DUMP, header)?;
            if let Some(list) = self.collect()? {
                return Ok(list);
            }
        }
        Err(io::Error::other("the list keeps changing"))
    }

    /// The answer to a request for a list; nothing if it changed meanwhile.
    fn collect(&self) -> io::Result<Option<Vec<Vec<u8>>>> {
        let mut list = Vec::new();
        let mut whole = true;
        loop {
            for message in Messages(&self.receive()?) {
                let message = message?;
                whole &= message.flags & libc::NLM_F_DUMP_INTR as u16 == 0;
                match message.kind {
                    ERROR => message.result()?,
                    DONE => return Ok(whole.then_some(list)),
                    _ => list.push(message.body.to_vec()),
                }
            }
        }
    }

    fn send(&self, kind: u16, flags: u16, body: &[u8]) -> io::Result<()> {
        let length = (HEADER + body.len()) as u32;
        let mut message = Vec::with_capacity(length as usize);
        message.extend(length.to_ne_bytes());
        message.extend(kind.to_ne_bytes());
        message.extend(flags.to_ne_bytes());
        // Sequence number and port: one request at a time needs neither.
        message.extend([0; 8]);
        message.extend(body);
        let (pointer, length) = (message.as_ptr().cast(), message.len());
        // SAFETY: the pointer and length are of a live buffer.
        let sent = unsafe { libc::send(self.0.as_raw_fd(), pointer, length, 0) };
        if sent < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    fn receive(&self) -> io::Result<Vec<u8>> {
        let mut buffer = vec![0; BUFFER];
        let pointer = buffer.as_mut_ptr().cast();
        // SAFETY: the pointer and length are of a live buffer.
        let received = unsafe { libc::recv(self.0.as_raw_fd(), pointer, BUFFER, 0) };
        let length = usize::try_from(received).map_err(|_| io::Error::last_os_error())?;
        buffer.truncate(length);
        if buffer.is_empty() {
            return Err(malformed());
        }
        Ok(buffer)
    }
}

/// The header of a request to netfilter, struct nfgenmsg.
pub fn netfilter_header(family: u8) -> Vec<u8> {
    vec![family, 0, 0, 0]
}

/// The length of that header.
pub const NETFILTER_HEADER: usize = 4;
/// On the kind of an attribute that holds attributes.
pub const NESTED: u16 = 0x8000;
/// On the kind of an attribute in network byte order.
pub const NETWORK_ORDER: u16 = 0x4000;
/// What remains of a kind without the two.
const KIND: u16 = 0x3fff;
/// The length of struct nlattr.
const ATTRIBUTE_HEADER: usize = 4;

/// Appends a numeric attribute to a request.
pub fn attribute(body: &mut Vec<u8>, kind: u16, value: u32) {
    attribute_bytes(body, kind, &value.to_ne_bytes());
}

/// Appends an attribute of any kind; padding follows as the next one needs.
pub fn attribute_bytes(body: &mut Vec<u8>, kind: u16, value: &[u8]) {
    body.extend(((ATTRIBUTE_HEADER + value.len()) as u16).to_ne_bytes());
    body.extend(kind.to_ne_bytes());
    body.extend(value);
    body.resize(body.len().next_multiple_of(4), 0);
}

/// The attributes behind the header of a body, or within another attribute.
#[derive(Clone, Copy)]
pub struct Attributes<'a>(pub &'a [u8]);

impl<'a> Attributes<'a> {
    /// Each with its kind; they end where one is cut off.
    pub fn iter(self) -> impl Iterator<Item = (u16, &'a [u8])> {
        let mut rest = self.0;
        std::iter::from_fn(move || {
            let length = usize::from(u16::from_ne_bytes(*rest.first_chunk()?));
            let kind = u16::from_ne_bytes(*rest.get(2..)?.first_chunk()?);
            let value = rest.get(ATTRIBUTE_HEADER..length)?;
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
            Some((kind & KIND, value))
        })
    }

    /// The value of the first attribute of a kind.
    pub fn get(self, wanted: u16) -> Option<&'a [u8]> {
        let mut found = self.iter().filter(|(kind, _)| *kind == wanted);
        found.next().map(|(_, value)| value)
    }

    /// The value of a numeric attribute.
    pub fn number(self, wanted: u16) -> Option<u32> {
        let value = self.get(wanted)?;
        value.try_into().ok().map(u32::from_ne_bytes)
    }

    /// The value of an attribute that is text.
    pub fn text(self, wanted: u16) -> Option<&'a str> {
        let value = self.get(wanted)?;
        std::str::from_utf8(value.split(|byte| *byte == 0).next()?).ok()
    }
}

/// The messages of one packet.
struct Messages<'a>(&'a [u8]);

struct Message<'a> {
    kind: u16,
    flags: u16,
    body: &'a [u8],
}

impl<'a> Iterator for Messages<'a> {
    type Item = io::Result<Message<'a>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let message = self.split();
        if message.is_none() {
            self.0 = &[];
        }
        Some(message.ok_or_else(malformed))
    }
}

impl<'a> Messages<'a> {
    fn split(&mut self) -> Option<Message<'a>> {
        let length = u32::from_ne_bytes(*self.0.first_chunk()?) as usize;
        let kind = u16::from_ne_bytes(*self.0.get(4..)?.first_chunk()?);
        let flags = u16::from_ne_bytes(*self.0.get(6..)?.first_chunk()?);
        let body = self.0.get(HEADER..length)?;
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Message { kind, flags, body })
    }
}

impl Message<'_> {
    /// What struct nlmsgerr says: a negative errno, or zero.
    fn result(&self) -> io::Result<()> {
        let code = self.body.first_chunk().ok_or_else(malformed)?;
        match i32::from_ne_bytes(*code) {
            0 => Ok(()),
            code => Err(io::Error::from_raw_os_error(code.saturating_neg())),
        }
    }
}

fn malformed() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "malformed netlink answer")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, body: &[u8]) -> Vec<u8> {
        let mut message = ((HEADER + body.len()) as u32).to_ne_bytes().to_vec();
        message.extend(kind.to_ne_bytes());
        message.extend([0; 10]);
        message.extend(body);
        message.resize(message.len().next_multiple_of(4), 0);
        message
    }

    #[test]
    fn packets_are_split_into_messages() {
        let packet = [
            message(24, b"abcde"),
            message(ERROR, &(-2i32).to_ne_bytes()),
        ]
        .concat();
        let messages: Vec<_> = Messages(&packet).map(Result::unwrap).collect();
        assert_eq!(messages.len(), 2);
        assert_eq!((messages[0].kind, messages[0].body), (24, &b"abcde"[..]));
        let error = messages[1].result().unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOENT));
    }

    #[test]
    fn a_packet_cut_off_anywhere_is_malformed() {
        let packet = message(24, b"abcd");
        for length in 1..packet.len() {
            let mut messages = Messages(&packet[..length]);
            assert!(messages.next().unwrap().is_err(), "{length}");
            assert!(messages.next().is_none());
        }
    }

    #[test]
    fn attributes_are_found_by_kind_whatever_stands_before_them() {
        let mut body = vec![5, 0, 3, 0, b'x', 0, 0, 0];
        attribute(&mut body, 4, 77);
        attribute_bytes(&mut body, NESTED | 5, b"name\0");
        let attributes = Attributes(&body);
        assert_eq!(attributes.number(4), Some(77));
        assert_eq!(attributes.text(5), Some("name"));
        assert_eq!(attributes.number(3), None);
        assert_eq!(attributes.number(9), None);
        // Lengths that lie lead nowhere.
        assert_eq!(Attributes(&[0, 0, 3, 0, 0, 0]).number(9), None);
        assert_eq!(Attributes(&[200, 0, 3, 0]).number(9), None);
        assert_eq!(Attributes(&[200, 0, 9, 0]).number(9), None);
    }
}
