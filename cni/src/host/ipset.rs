//! Sets of addresses in the kernel (ipset), over netlink, for the namespace of the calling thread.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::netlink::{
    Attributes, NESTED, NETFILTER_HEADER, NETWORK_ORDER, Netlink, attribute_bytes, netfilter_header,
};
use crate::rules::Family;

// linux/netfilter/nfnetlink.h and ipset/ip_set.h.
const SUBSYSTEM: u16 = 6 << 8;
const CREATE: u16 = SUBSYSTEM | 2;
const DESTROY: u16 = SUBSYSTEM | 3;
const LIST: u16 = SUBSYSTEM | 7;
const ADD: u16 = SUBSYSTEM | 9;
const DELETE: u16 = SUBSYSTEM | 10;

const PROTOCOL: u16 = 1;
const SET_NAME: u16 = 2;
const TYPE_NAME: u16 = 3;
const REVISION: u16 = 4;
const FAMILY: u16 = 5;
const DATA: u16 = 7;
const ENTRIES: u16 = 8;
// Within the data of a set or an entry.
const IP: u16 = 1;
const TIMEOUT: u16 = 6;
const FLAGS: u16 = 8;
const COMMENT: u16 = 26;
// Within an address.
const IP_V4: u16 = 1;
const IP_V6: u16 = 2;

/// The version of the protocol; kernels since 2.6.39 speak it.
const VERSION: u8 = 6;
/// The kind of set, and its first revision that has comments.
const HASH_IP: &str = "hash:ip";
const WITH_COMMENTS: u8 = 2;
const FLAG_COMMENTS: u32 = 1 << 4;

// Codes of ipset's own among the errors.
const BUSY: i32 = 4100;
const ABSENT: i32 = 4103;
const EXTENSIONS: [(i32, &str); 4] = [
    (4097, "the kernel speaks another version of ipset"),
    (4098, "the kernel's ipset has no type hash:ip with comments"),
    (BUSY, "rules of others use the set"),
    (4101, "there is another set of this name"),
];

/// A set as the kernel holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Set {
    /// Whether it is of the kind that [`create`] makes.
    pub fits: bool,
    /// Each address and its comment.
    pub entries: Vec<(IpAddr, String)>,
}

/// Makes a set; one like it may be there.
///
/// # Errors
/// The kernel's error.
pub fn create(name: &str, family: Family) -> io::Result<()> {
    let mut body = named(name);
    text(&mut body, TYPE_NAME, HASH_IP);
    attribute_bytes(&mut body, REVISION, &[WITH_COMMENTS]);
    attribute_bytes(&mut body, FAMILY, &[address_family(family)]);
    let mut data = Vec::new();
    attribute_bytes(
        &mut data,
        NETWORK_ORDER | FLAGS,
        &FLAG_COMMENTS.to_be_bytes(),
    );
    attribute_bytes(&mut body, NESTED | DATA, &data);
    request(CREATE, libc::NLM_F_CREATE as u16, &body)
}

/// Removes a set and says whether there was one.
///
/// # Errors
/// The kernel's error, such as that rules use it.
pub fn destroy(name: &str) -> io::Result<bool> {
    match request(DESTROY, 0, &named(name)) {
        Ok(()) => Ok(true),
        Err(error) if is_absent(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Adds an address, or gives it another comment.
///
/// # Errors
/// The kernel's error.
pub fn add(name: &str, ip: IpAddr, comment: &str) -> io::Result<()> {
    request(ADD, 0, &entry(name, ip, Some(comment)))
}

/// Removes an address; it need not be there.
///
/// # Errors
/// The kernel's error.
pub fn delete(name: &str, ip: IpAddr) -> io::Result<()> {
    request(DELETE, 0, &entry(name, ip, None))
}

/// A set and what it holds; none if there is none.
///
/// # Errors
/// The kernel's error.
pub fn read(name: &str, family: Family) -> io::Result<Option<Set>> {
    let list = match Netlink::netfilter()?.list(LIST, &named(name)) {
        Err(error) if is_absent(&error) => return Ok(None),
        list => list.map_err(explained)?,
    };
    let mut set = Set {
        fits: false,
        entries: Vec::new(),
    };
    for body in &list {
        let attributes = Attributes(body.get(NETFILTER_HEADER..).unwrap_or_default());
        set.fits |= fits(attributes, family);
        let entries = Attributes(attributes.get(ENTRIES).unwrap_or_default());
        let found = entries.iter().filter(|(kind, _)| *kind == DATA);
        set.entries
            .extend(found.filter_map(|(_, data)| address(Attributes(data))));
    }
    Ok(Some(set))
}

/// The header of a set comes with the first message only.
fn fits(attributes: Attributes<'_>, family: Family) -> bool {
    let Some(data) = attributes.get(DATA).map(Attributes) else {
        return false;
    };
    let flags = data.get(FLAGS).and_then(|value| value.try_into().ok());
    attributes.text(TYPE_NAME) == Some(HASH_IP)
        && attributes.get(FAMILY) == Some(&[address_family(family)])
        && flags.map_or(0, u32::from_be_bytes) & FLAG_COMMENTS != 0
        // Addresses would go by themselves.
        && data.get(TIMEOUT).is_none()
}

fn address(data: Attributes<'_>) -> Option<(IpAddr, String)> {
    let ip = Attributes(data.get(IP)?);
    let ip = match (ip.get(IP_V4), ip.get(IP_V6)) {
        (Some(v4), _) => Ipv4Addr::from(<[u8; 4]>::try_from(v4).ok()?).into(),
        (_, Some(v6)) => Ipv6Addr::from(<[u8; 16]>::try_from(v6).ok()?).into(),
        _ => return None,
    };
    let comment = data.text(COMMENT).unwrap_or_default();
    Some((ip, comment.to_string()))
}

fn address_family(family: Family) -> u8 {
    match family {
        Family::V4 => libc::AF_INET as u8,
        Family::V6 => libc::AF_INET6 as u8,
    }
}

fn named(name: &str) -> Vec<u8> {
    let mut body = netfilter_header(libc::AF_INET as u8);
    attribute_bytes(&mut body, PROTOCOL, &[VERSION]);
    text(&mut body, SET_NAME, name);
    body
}

fn entry(name: &str, ip: IpAddr, comment: Option<&str>) -> Vec<u8> {
    let mut address = Vec::new();
    match ip {
        IpAddr::V4(v4) => attribute_bytes(&mut address, NETWORK_ORDER | IP_V4, &v4.octets()),
        IpAddr::V6(v6) => attribute_bytes(&mut address, NETWORK_ORDER | IP_V6, &v6.octets()),
    }
    let mut data = Vec::new();
    attribute_bytes(&mut data, NESTED | IP, &address);
    if let Some(comment) = comment {
        text(&mut data, COMMENT, comment);
    }
    let mut body = named(name);
    attribute_bytes(&mut body, NESTED | DATA, &data);
    body
}

fn text(body: &mut Vec<u8>, kind: u16, value: &str) {
    attribute_bytes(body, kind, &[value.as_bytes(), &[0]].concat());
}

fn request(kind: u16, flags: u16, body: &[u8]) -> io::Result<()> {
    let done = Netlink::netfilter()?.request(kind, flags, body);
    done.map_err(explained)
}

/// The absence of a set, or of the kernel's whole ipset.
fn is_absent(error: &io::Error) -> bool {
    let absent = [libc::ENOENT, libc::EINVAL, ABSENT];
    error
        .raw_os_error()
        .is_some_and(|code| absent.contains(&code))
}

/// The codes of ipset's own say nothing to the system's library.
fn explained(error: io::Error) -> io::Error {
    let code = error.raw_os_error();
    match EXTENSIONS.iter().find(|(known, _)| Some(*known) == code) {
        Some((_, text)) => io::Error::other(*text),
        None => error,
    }
}
