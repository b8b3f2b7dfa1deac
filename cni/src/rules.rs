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

/// What is captured of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CaptureConfig {
    /// Whether DNS queries go to the proxy.
    pub dns: bool,
    /// Whether IPv6 is captured; without, IPv6 traffic passes by.
    pub ipv6: bool,
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

impl Default for CaptureConfig {
    fn default() -> Self {
        Self {
            dns: true,
            ipv6: true,
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
    Mangle,
    Nat,
    Raw,
}

/// Where packets are looked at: as they arrive, or as the pod sends them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Hook {
    Prerouting,
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
}

impl Rule {
    /// The table of the rule.
    pub fn table(&self) -> Table {
        match self {
            Self::Jump(table, _) => *table,
            Self::RememberSpoofed | Self::RestoreSpoofed => Table::Mangle,
            Self::ZoneProxyQueries | Self::ZoneAnswers => Table::Raw,
            _ => Table::Nat,
        }
    }

    /// The hook whose chain holds the rule.
    pub fn hook(&self) -> Hook {
        match self {
            Self::Jump(_, hook) => *hook,
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

/// The tables that hold rules.
pub fn tables(config: &CaptureConfig) -> &'static [Table] {
    if config.dns {
        &[Table::Mangle, Table::Nat, Table::Raw]
    } else {
        &[Table::Mangle, Table::Nat]
    }
}

/// All rules, in the order in which they are looked at within their chains; the same for both families.
pub fn plan(config: &CaptureConfig) -> Vec<Rule> {
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
