//! The PROXY protocol, version 2: tells an application behind the last hop whom it really serves.

use std::net::{IpAddr, SocketAddr};

use hbone::Identity;

const SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";
/// Version 2, command PROXY.
const PROXY: u8 = 0x21;
/// Streams over IPv4, over IPv6, and over something that cannot be said.
const STREAM_V4: u8 = 0x11;
const STREAM_V6: u8 = 0x21;
const UNSPECIFIED: u8 = 0x00;
/// The TLV that names the client's identity.
const IDENTITY: u8 = 0xd0;

/// The header for a flow from `source` to `destination` of a client that proved to be `identity`.
pub fn header(source: SocketAddr, destination: SocketAddr, identity: Option<&Identity>) -> Vec<u8> {
    let mut rest = Vec::new();
    let family = match (source.ip(), destination.ip()) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            rest.extend(source.octets());
            rest.extend(destination.octets());
            STREAM_V4
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            rest.extend(source.octets());
            rest.extend(destination.octets());
            STREAM_V6
        }
        _ => UNSPECIFIED,
    };
    if family != UNSPECIFIED {
        rest.extend(source.port().to_be_bytes());
        rest.extend(destination.port().to_be_bytes());
    }
    if let Some(identity) = identity {
        let text = identity.as_str().as_bytes();
        rest.push(IDENTITY);
        rest.extend((text.len() as u16).to_be_bytes());
        rest.extend(text);
    }
    let mut header = SIGNATURE.to_vec();
    header.extend([PROXY, family]);
    header.extend((rest.len() as u16).to_be_bytes());
    header.extend(rest);
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_and_identity_are_where_they_should_be() {
        let identity = Identity::new("td", "a", "b");
        let (source, destination) = (
            "10.0.0.1:258".parse().unwrap(),
            "10.0.0.2:80".parse().unwrap(),
        );
        let bytes = header(source, destination, Some(&identity));
        assert_eq!(&bytes[..16], b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x24");
        assert_eq!(&bytes[16..28], [10, 0, 0, 1, 10, 0, 0, 2, 1, 2, 0, 80]);
        assert_eq!(&bytes[28..31], [0xd0, 0, 21]);
        assert_eq!(&bytes[31..], b"spiffe://td/ns/a/sa/b");
    }

    #[test]
    fn mixed_families_say_no_addresses() {
        let bytes = header(
            "10.0.0.1:1".parse().unwrap(),
            "[fd00::1]:2".parse().unwrap(),
            None,
        );
        assert_eq!(&bytes[12..], [0x21, 0x00, 0, 0]);
    }
}
