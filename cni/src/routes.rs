//! The route that brings answers to spoofed connections back to the proxy, over netlink (RFC 3549).

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::rules::{Family, MARK_MASK, SPOOFED_MARK};

/// The routing table of marked packets.
const TABLE: u8 = 100;
/// The place of our rule among the routing rules.
const PRIORITY: u32 = 32_764;
/// The index of the loopback interface, the first of every namespace.
const LOOPBACK: u32 = 1;

const ACK: u16 = (libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16;
const REPLACE: u16 = (libc::NLM_F_CREATE | libc::NLM_F_REPLACE) as u16;
const EXCLUSIVE: u16 = (libc::NLM_F_CREATE | libc::NLM_F_EXCL) as u16;

// The attributes of linux/rtnetlink.h and linux/fib_rules.h.
const RTA_OIF: u16 = 4;
const FRA_PRIORITY: u16 = 6;
const FRA_FWMARK: u16 = 10;
const FRA_TABLE: u16 = 15;
const FRA_FWMASK: u16 = 16;
const FR_ACT_TO_TBL: u8 = 1;

/// Adds the route and the rule of a family to the calling thread's namespace; what is there already stays.
///
/// # Errors
/// The kernel's error.
pub fn add(family: Family) -> io::Result<()> {
    let netlink = Netlink::open()?;
    netlink.request(libc::RTM_NEWROUTE, REPLACE, &route(family))?;
    match netlink.request(libc::RTM_NEWRULE, EXCLUSIVE, &rule(family)) {
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        result => result,
    }
}

/// Removes them again; what is not there is no error.
///
/// # Errors
/// The kernel's error.
pub fn remove(family: Family) -> io::Result<()> {
    let netlink = Netlink::open()?;
    let absent = |result: io::Result<()>| match result {
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::ENOENT | libc::ESRCH | libc::EAFNOSUPPORT)
            ) =>
        {
            Ok(())
        }
        result => result,
    };
    absent(netlink.request(libc::RTM_DELRULE, 0, &rule(family)))?;
    absent(netlink.request(libc::RTM_DELROUTE, 0, &route(family)))
}

fn address_family(family: Family) -> u8 {
    match family {
        Family::V4 => libc::AF_INET as u8,
        Family::V6 => libc::AF_INET6 as u8,
    }
}

/// `local default dev lo table 100`: struct rtmsg and one attribute.
fn route(family: Family) -> Vec<u8> {
    let header = [
        address_family(family),
        0, // destination prefix length: everything
        0,
        0,
        TABLE,
        libc::RTPROT_BOOT,
        libc::RT_SCOPE_HOST,
        libc::RTN_LOCAL,
    ];
    let mut body = header.to_vec();
    body.extend(0u32.to_ne_bytes());
    attribute(&mut body, RTA_OIF, LOOPBACK);
    body
}

/// `fwmark 0x111/0xfff pref 32764 lookup 100`: struct fib_rule_hdr and its attributes.
fn rule(family: Family) -> Vec<u8> {
    let mut body = vec![address_family(family), 0, 0, 0, TABLE, 0, 0, FR_ACT_TO_TBL];
    body.extend(0u32.to_ne_bytes());
    attribute(&mut body, FRA_PRIORITY, PRIORITY);
    attribute(&mut body, FRA_FWMARK, SPOOFED_MARK);
    attribute(&mut body, FRA_FWMASK, MARK_MASK);
    attribute(&mut body, FRA_TABLE, u32::from(TABLE));
    body
}

fn attribute(body: &mut Vec<u8>, kind: u16, value: u32) {
    body.extend(8u16.to_ne_bytes());
    body.extend(kind.to_ne_bytes());
    body.extend(value.to_ne_bytes());
}

struct Netlink(OwnedFd);

impl Netlink {
    fn open() -> io::Result<Self> {
        // SAFETY: plain system call; the descriptor it gives is owned by nobody else.
        let socket = unsafe {
            let raw = libc::socket(
                libc::AF_NETLINK,
                libc::SOCK_RAW | libc::SOCK_CLOEXEC,
                libc::NETLINK_ROUTE,
            );
            if raw < 0 {
                return Err(io::Error::last_os_error());
            }
            OwnedFd::from_raw_fd(raw)
        };
        Ok(Self(socket))
    }

    /// Sends a request and waits for its acknowledgement.
    fn request(&self, kind: u16, flags: u16, body: &[u8]) -> io::Result<()> {
        let length = 16 + body.len() as u32;
        let mut message = Vec::with_capacity(length as usize);
        message.extend(length.to_ne_bytes());
        message.extend(kind.to_ne_bytes());
        message.extend((ACK | flags).to_ne_bytes());
        message.extend(1u32.to_ne_bytes());
        message.extend(0u32.to_ne_bytes());
        message.extend(body);
        // SAFETY: the pointer and length are of a live buffer.
        let sent = unsafe {
            libc::send(
                self.0.as_raw_fd(),
                message.as_ptr().cast(),
                message.len(),
                0,
            )
        };
        if sent < 0 {
            return Err(io::Error::last_os_error());
        }
        let mut answer = [0u8; 1024];
        // SAFETY: the pointer and length are of a live buffer.
        let received = unsafe {
            libc::recv(
                self.0.as_raw_fd(),
                answer.as_mut_ptr().cast(),
                answer.len(),
                0,
            )
        };
        if received < 20 {
            return Err(io::Error::last_os_error());
        }
        // struct nlmsgerr behind the header: a negative errno, or zero.
        let code = i32::from_ne_bytes([answer[16], answer[17], answer[18], answer[19]]);
        if code == 0 {
            Ok(())
        } else {
            Err(io::Error::from_raw_os_error(-code))
        }
    }
}
