//! Whatever comes from outside, in every damaged form: it is refused or understood, and nothing else happens.
//!
//! Each target replays its folder of `corpus` and mutations of what is there, always the same ones. With
//! `WARREN_FUZZ_SECONDS` each target goes on for so long with others; a failure prints the input.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use hbone::{Authority, Baggage, Identity};
use prost::Message;
use tokio::io;
use warren::dns::answer::Resolution;
use warren::dns::forward;
use warren::dns::server::{Question, Resolver, Transport, answer};
use warren::local::State;
use warren::mesh::{Store, dump};
use warren::policy::Context;
use warren::policy::evaluate::evaluate;
use warren::proto::{security, workload};
use warren::proxy::proxy_protocol;
use warren::xds::names::Names;
use warren::xds::{policies, resources};

/// Mutations of each seed.
const MUTATIONS: usize = 2000;

/// The same numbers for the same start.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % bound.max(1) as u64) as usize
    }

    /// Changes, removes and repeats parts.
    fn mutate(&mut self, bytes: &mut Vec<u8>) {
        for _ in 0..=self.below(4) {
            let at = self.below(bytes.len());
            match self.below(5) {
                0 if !bytes.is_empty() => bytes[at] = self.below(256) as u8,
                1 if !bytes.is_empty() => bytes[at] ^= 1 << self.below(8),
                2 => drop(bytes.drain(at..(at + self.below(20)).min(bytes.len()))),
                3 => {
                    let part = bytes[at..(at + self.below(40)).min(bytes.len())].to_vec();
                    let to = self.below(bytes.len());
                    bytes.splice(to..to, part);
                }
                _ => bytes.insert(at, self.below(256) as u8),
            }
        }
    }
}

/// Replays a folder of the corpus and what can be made of it.
fn replay(target: &str, check: impl Fn(&[u8]) + std::panic::RefUnwindSafe) {
    let folder = format!("{}/tests/fuzz/corpus/{target}", env!("CARGO_MANIFEST_DIR"));
    let files = std::fs::read_dir(&folder).unwrap();
    let mut seeds: Vec<_> = files
        .map(|file| std::fs::read(file.unwrap().path()).unwrap())
        .collect();
    seeds.sort();
    assert!(!seeds.is_empty());
    let tried = |bytes: &[u8]| {
        if let Err(failure) = std::panic::catch_unwind(|| check(bytes)) {
            eprintln!(
                "{target} failed with {bytes:?} ({:?})",
                bytes.escape_ascii().to_string()
            );
            std::panic::resume_unwind(failure);
        }
    };
    let mut random = Random(0x2545_f491_4f6c_dd1d);
    for seed in &seeds {
        tried(seed);
        for _ in 0..MUTATIONS {
            let mut bytes = seed.clone();
            random.mutate(&mut bytes);
            tried(&bytes);
        }
    }
    let longer = std::env::var("WARREN_FUZZ_SECONDS").ok();
    let Some(seconds) = longer.and_then(|text| text.parse().ok()) else {
        return;
    };
    let (start, now) = (Instant::now(), std::time::SystemTime::UNIX_EPOCH.elapsed());
    random = Random(now.unwrap().as_nanos() as u64 | 1);
    while start.elapsed() < Duration::from_secs(seconds) {
        let mut bytes = seeds[random.below(seeds.len())].clone();
        for _ in 0..=random.below(3) {
            random.mutate(&mut bytes);
        }
        tried(&bytes);
    }
}

/// The same for text.
fn replay_text(target: &str, check: impl Fn(&str) + std::panic::RefUnwindSafe) {
    replay(target, |bytes| check(&String::from_utf8_lossy(bytes)));
}

#[test]
fn authorities() {
    replay_text("authority", |text| match text.parse::<Authority>() {
        Ok(Authority::Host(host, _)) => {
            let named = |c: char| c.is_ascii_alphanumeric() || ".-_*".contains(c);
            assert!(!host.is_empty() && host.chars().all(named));
            assert!(text.starts_with(&host));
        }
        Ok(Authority::Addr(address)) => {
            assert_eq!(address.to_string().parse(), Ok(Authority::Addr(address)));
        }
        Err(error) => assert!(error.to_string().ends_with(text)),
    });
}

#[test]
fn baggage() {
    replay_text("baggage", |text| {
        let once = Baggage::parse(text).to_string();
        assert_eq!(Baggage::parse(&once).to_string(), once);
    });
}

#[test]
fn forwarded_headers() {
    replay_text("forwarded", |text| {
        if let Some(host) = hbone::forwarded_host(text) {
            assert!(!host.is_empty() && text.contains(host) && !host.contains(';'));
        }
    });
}

/// An address of a family and a port, off the front of the input.
fn address(bytes: &mut &[u8], v4: bool) -> Option<SocketAddr> {
    let length = if v4 { 4 } else { 16 };
    let (ip, rest) = bytes.split_at_checked(length)?;
    let (port, rest) = rest.split_first_chunk()?;
    *bytes = rest;
    Some(SocketAddr::new(
        resources::ip(ip).ok()?,
        u16::from_be_bytes(*port),
    ))
}

#[test]
fn proxy_protocol_headers() {
    replay("proxy-header", |bytes| {
        let Some((family, mut rest)) = bytes.split_first() else {
            return;
        };
        let families = (family % 2 == 0, family % 3 != 0);
        let (Some(source), Some(destination)) = (
            address(&mut rest, families.0),
            address(&mut rest, families.1),
        ) else {
            return;
        };
        let text = String::from_utf8_lossy(rest);
        let mut names = text.split('\0').map(|name| name.replace('/', ""));
        let mut name = || names.next().unwrap_or_default();
        let identity = Identity::new(&name(), &name(), &name());
        let header = proxy_protocol::header(source, destination, Some(&identity));
        // Read as the protocol's text has it (version 2, section 2.2).
        assert_eq!(&header[..12], b"\r\n\r\n\0\r\nQUIT\n");
        assert_eq!(header[12], 0x21);
        let length = usize::from(u16::from_be_bytes([header[14], header[15]]));
        assert_eq!(header.len(), 16 + length);
        let ips = match header[13] {
            0x11 => 12,
            0x21 => 36,
            other => {
                assert_eq!(other, 0);
                0
            }
        };
        let same = source.is_ipv4() == destination.is_ipv4();
        assert_eq!(ips > 0, same);
        let tlv = &header[16 + ips..];
        assert_eq!(tlv[0], 0xd0);
        assert_eq!(
            tlv.len(),
            3 + usize::from(u16::from_be_bytes([tlv[1], tlv[2]]))
        );
        assert_eq!(&tlv[3..], identity.as_str().as_bytes());
    });
}

/// Knows `web.b` and forwards the rest to nobody.
struct Zone;

impl Resolver for Zone {
    async fn resolve(&self, question: &Question) -> Result<Resolution, String> {
        assert_eq!(question.name, question.name.to_ascii_lowercase());
        Ok(match question.name.starts_with("web") {
            true => Resolution::Known {
                alias: None,
                addresses: vec![IpAddr::from([10, 96, 0, 1]); 100],
            },
            false => Resolution::Forward,
        })
    }

    async fn forward(&self, query: &[u8], _: &Question) -> io::Result<Vec<u8>> {
        let mut answer = query.to_vec();
        answer[2] |= 0x80;
        Ok(answer)
    }

    fn answered(&self, _: &Question, _: &str, _: usize) {}

    fn random(&self, _: u64) -> u64 {
        0
    }
}

#[test]
fn dns_messages() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    let runtime = std::panic::AssertUnwindSafe(runtime);
    replay("dns", |bytes| {
        for transport in [Transport::Udp, Transport::Tcp] {
            let answer = runtime.block_on(answer(&Zone, bytes, transport));
            if let Some(answer) = answer {
                assert_eq!(answer[..2], bytes[..2], "the client's number");
                assert!(answer[2] & 0x80 != 0, "an answer");
                let limit = if transport == Transport::Udp {
                    65_507
                } else {
                    65_535
                };
                assert!(answer.len() <= limit.max(bytes.len()));
            }
        }
        if let Ok((addresses, _)) = forward::addresses(bytes) {
            assert!(addresses.len() <= bytes.len());
        }
    });
}

#[test]
fn address_resources() {
    replay("address", |bytes| {
        let Ok(record) = workload::Address::decode(bytes) else {
            return;
        };
        let Ok(resource) = resources::address(record, &mut Names::default()) else {
            return;
        };
        let mut store = Store::new("n1");
        let name = resource.name();
        store.apply_addresses(vec![resource.clone(), resource], &[]);
        let mesh = store.snapshot();
        for ip in ["10.0.0.9", "10.96.0.1", "10.5.1.1", "fd00::1"] {
            let _ = mesh.lookup("", &ip.parse().unwrap(), Some("b"));
        }
        let (workloads, services) = (dump::workloads(&mesh), dump::services(&mesh));
        let count = workloads.as_array().unwrap().len() + services.as_array().unwrap().len();
        assert_eq!(count, 1);
        store.apply_addresses(vec![], &[name]);
        assert_eq!(store.snapshot().workloads().count(), 0);
    });
}

#[test]
fn authorization_resources() {
    replay("authorization", |bytes| {
        let Ok(record) = security::Authorization::decode(bytes) else {
            return;
        };
        let Ok(read) = policies::policy("b/p", record) else {
            return;
        };
        let identity = Identity::new("td", "a", "curl");
        let policy = std::sync::Arc::new(read.policy);
        for identity in [None, Some(&identity)] {
            let context = Context {
                identity,
                src: "10.1.0.1:5".parse().unwrap(),
                dst: "10.0.0.9:80".parse().unwrap(),
            };
            let _ = evaluate(&[&policy], &context);
        }
    });
}

#[test]
fn node_agent_packets() {
    replay("zds", |bytes| {
        if let Ok(request) = cni::zds::messages::WorkloadRequest::decode(bytes) {
            let again = request.encode_to_vec();
            let again = cni::zds::messages::WorkloadRequest::decode(&*again);
            assert_eq!(again.unwrap(), request);
        }
    });
}

#[test]
fn local_sources() {
    replay_text("local", |text| {
        if let Ok(state) = State::parse(text) {
            assert!(state.dump().is_object());
        }
    });
}
