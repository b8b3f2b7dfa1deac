//! The rules that bring a pod's traffic to the proxy: what they are, whatever they are written down in.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};

/// The mark on everything the proxy sends.
pub const PROXY_MARK: u32 = 0x539;
/// The mark on connections that the proxy makes in a client's name.
pub const SPOOFED_MARK: u32 = 0x111;
/// The bits that both marks are compared in.
pub const MARK_MASK: u32 = 0xfff;
/// Captured egress goes here.
pub const OUTBOUND_PORT: u16 = 15001;
/// Captured plaintext ingress goes here.
pub const PLAINTEXT_PORT: u16 = 15006;
/// Tunnels arrive here by themselves.
pub const HBONE_PORT: u16 = 15008;
/// Captured DNS goes here.
pub const DNS_PORT: u16 = 15053;
/// The conntrack zone of the proxy's own DNS queries.
pub const DNS_ZONE: u16 = 1;

/// An address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    V4,
    V6,
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// What the rules are written in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Backend {
    #[default]
    Iptables,
    Nftables,
}

impl Backend {
    /// The one that this is not.
    pub fn other(self) -> Self {
        match self {
            Self::Iptables => Self::Nftables,
            Self::Nftables => Self::Iptables,
        }
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Iptables => "iptables",
            Self::Nftables => "nftables",
        })
    }
}

/// What becomes of a pod's IPv6.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Ipv6Mode {
    /// It goes to the proxy, as IPv4 does.
    #[default]
    Capture,
    /// It is refused but for what stays within the pod, so that nothing goes past the proxy in clear.
    Refuse,
    /// It goes past the proxy.
    Pass,
}

/// What is captured of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CaptureConfig {
    pub backend: Backend,
    /// Whether DNS queries go to the proxy.
    pub dns: bool,
    pub ipv6: Ipv6Mode,
    /// Whether plaintext arrivals go straight to the application.
    pub bypass_inbound: bool,
    /// Interfaces whose arrivals are the egress of something inside the pod, such as a virtual machine.
    pub virtual_interfaces: Vec<String>,
    /// Where the node's health probes seem to come from.
    pub probe_v4: Ipv4Addr,
    pub probe_v6: Ipv6Addr,
    /// Whether rules that differ from these are replaced rather than left alone.
    pub reconcile: bool,
}

impl CaptureConfig {
    /// Whether IPv6 is brought to the proxy.
    pub fn captures_ipv6(&self) -> bool {
        self.ipv6 == Ipv6Mode::Capture
    }
}

impl Default for CaptureConfig {
    fn default() -> Self {
        Self {
            backend: Backend::default(),
            dns: true,
            ipv6: Ipv6Mode::default(),
            bypass_inbound: false,
            virtual_interfaces: Vec::new(),
            probe_v4: Ipv4Addr::new(169, 254, 7, 127),
            probe_v6: Ipv6Addr::new(
                0xfd16, 0x9254, 0x7127, 0x1337, 0xffff, 0xffff, 0xffff, 0xffff,
            ),
            reconcile: true,
        }
    }
}

/// A netfilter table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Table {
    Filter,
    Mangle,
    Nat,
    Raw,
}

impl Table {
    /// All that may hold rules of ours.
    pub const ALL: [Self; 4] = [Self::Filter, Self::Mangle, Self::Nat, Self::Raw];

    /// The hooks at which we have a chain in this table.
    pub fn hooks(self) -> &'static [Hook] {
        match self {
            Self::Filter => &[Hook::Forward, Hook::Input, Hook::Output],
            Self::Mangle | Self::Nat | Self::Raw => &[Hook::Output, Hook::Prerouting],
        }
    }
}

/// Where packets are looked at: as they arrive, when they are for the pod or for something behind it, or as the pod
/// sends them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Hook {
    Prerouting,
    Input,
    Forward,
    Output,
}

/// One rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rule {
    /// Whatever passes the hook is put to our chain.
    Jump(Table, Hook),
    /// Connections that the proxy's packets begin are remembered as spoofed.
    RememberSpoofed,
    /// Answers to spoofed connections get their mark back, which routes them to the proxy.
    RestoreSpoofed,
    /// What an inner interface sends is egress.
    RedirectInterface(String),
    /// The rest of an inner interface's TCP is left alone.
    ReturnInterface(String),
    /// Probes of the node reach the application directly.
    AcceptFromProbe,
    /// So do the answers to them.
    AcceptToProbe,
    /// Plaintext arrivals go to the proxy.
    RedirectInbound,
    RedirectDnsUdp,
    RedirectDnsTcp,
    /// Answers to spoofed connections are not egress.
    AcceptSpoofed,
    /// What stays within the pod is not egress.
    AcceptLocal,
    /// Egress goes to the proxy.
    RedirectOutbound,
    /// The proxy's own queries are tracked apart from the application's.
    ZoneProxyQueries,
    /// The answers to them too.
    ZoneAnswers,
    /// What stays within the pod is not refused.
    PassLoopback(Hook),
    /// Nor is a type of ICMPv6 that neighbours need.
    PassIcmp(Hook, u8),
    /// Nor is the reset by which we refuse others.
    PassReset,
    /// A refused connection fails at once, so that clients go on to IPv4.
    RefuseTcp(Hook),
    /// The rest is refused in so many words.
    Refuse(Hook),
}

/// Multicast listener queries; router and neighbour advertisements and the neighbours' own questions (RFC 4861, RFC
/// 3810): without them an interface loses its addresses and neighbours.
const ICMP_IN: [u8; 4] = [130, 134, 135, 136];
/// Our side of the same; first the message by which we refuse (RFC 4443 §3.1).
const ICMP_OUT: [u8; 7] = [1, 131, 132, 133, 135, 136, 143];

impl Rule {
    /// The table of the rule.
    pub fn table(&self) -> Table {
        match self {
            Self::Jump(table, _) => *table,
            Self::RememberSpoofed | Self::RestoreSpoofed => Table::Mangle,
            Self::ZoneProxyQueries | Self::ZoneAnswers => Table::Raw,
            Self::PassLoopback(_)
            | Self::PassIcmp(..)
            | Self::PassReset
            | Self::RefuseTcp(_)
            | Self::Refuse(_) => Table::Filter,
            _ => Table::Nat,
        }
    }

    /// The hook whose chain holds the rule.
    pub fn hook(&self) -> Hook {
        match self {
            Self::Jump(_, hook)
            | Self::PassLoopback(hook)
            | Self::PassIcmp(hook, _)
            | Self::RefuseTcp(hook)
            | Self::Refuse(hook) => *hook,
            Self::RememberSpoofed
            | Self::RedirectInterface(_)
            | Self::ReturnInterface(_)
            | Self::AcceptFromProbe
            | Self::RedirectInbound
            | Self::ZoneAnswers => Hook::Prerouting,
            _ => Hook::Output,
        }
    }
}

/// The tables that hold rules of a family.
pub fn tables(family: Family, config: &CaptureConfig) -> &'static [Table] {
    match (family, config.ipv6) {
        (Family::V6, Ipv6Mode::Refuse) => &[Table::Filter],
        (Family::V6, Ipv6Mode::Pass) => &[],
        _ if config.dns => &[Table::Mangle, Table::Nat, Table::Raw],
        _ => &[Table::Mangle, Table::Nat],
    }
}

/// All rules of a family, in the order in which they are looked at within their chains.
pub fn plan(family: Family, config: &CaptureConfig) -> Vec<Rule> {
    match (family, config.ipv6) {
        (Family::V6, Ipv6Mode::Refuse) => refusal(),
        (Family::V6, Ipv6Mode::Pass) => Vec::new(),
        _ => redirection(config),
    }
}

/// What refuses a family.
fn refusal() -> Vec<Rule> {
    let mut rules = Vec::new();
    for &hook in Table::Filter.hooks() {
        rules.push(Rule::Jump(Table::Filter, hook));
        // What is forwarded is neither loopback's nor a neighbour's.
        if hook != Hook::Forward {
            rules.push(Rule::PassLoopback(hook));
        }
        let icmp: &[u8] = match hook {
            Hook::Input => &ICMP_IN,
            Hook::Output => &ICMP_OUT,
            Hook::Prerouting | Hook::Forward => &[],
        };
        rules.extend(icmp.iter().map(|kind| Rule::PassIcmp(hook, *kind)));
        if hook == Hook::Output {
            rules.push(Rule::PassReset);
        }
        rules.extend([Rule::RefuseTcp(hook), Rule::Refuse(hook)]);
    }
    rules
}

/// What brings a family to the proxy; the same for both.
fn redirection(config: &CaptureConfig) -> Vec<Rule> {
    let mut rules = vec![
        Rule::Jump(Table::Mangle, Hook::Prerouting),
        Rule::Jump(Table::Mangle, Hook::Output),
        Rule::RememberSpoofed,
        Rule::RestoreSpoofed,
        Rule::Jump(Table::Nat, Hook::Output),
        Rule::Jump(Table::Nat, Hook::Prerouting),
    ];
    for interface in &config.virtual_interfaces {
        rules.push(Rule::RedirectInterface(interface.clone()));
        rules.push(Rule::ReturnInterface(interface.clone()));
    }
    if !config.bypass_inbound {
        rules.push(Rule::AcceptFromProbe);
    }
    rules.push(Rule::AcceptToProbe);
    if !config.bypass_inbound {
        rules.push(Rule::RedirectInbound);
    }
    if config.dns {
        rules.extend([Rule::RedirectDnsUdp, Rule::RedirectDnsTcp]);
    }
    rules.extend([
        Rule::AcceptSpoofed,
        Rule::AcceptLocal,
        Rule::RedirectOutbound,
    ]);
    if config.dns {
        rules.extend([
            Rule::Jump(Table::Raw, Hook::Prerouting),
            Rule::Jump(Table::Raw, Hook::Output),
            Rule::ZoneProxyQueries,
            Rule::ZoneAnswers,
        ]);
    }
    rules
}
