//! The rules written down for nft: tables of the family inet, for IPv4 and IPv6 at once.

use std::fmt::Write;

use crate::rules::{
    CaptureConfig, DNS_PORT, DNS_ZONE, Family, HBONE_PORT, Hook, Ipv6Mode, MARK_MASK,
    OUTBOUND_PORT, PLAINTEXT_PORT, PROXY_MARK, Rule, SPOOFED_MARK, Table, plan, tables,
};

/// A table's name.
pub fn table(table: Table) -> &'static str {
    match table {
        Table::Filter => "istio-ambient-filter",
        Table::Mangle => "istio-ambient-mangle",
        Table::Nat => "istio-ambient-nat",
        Table::Raw => "istio-ambient-raw",
    }
}

/// The chain at a hook; all that it does is to jump to ours.
fn base(hook: Hook) -> &'static str {
    match hook {
        Hook::Prerouting => "prerouting",
        Hook::Input => "input",
        Hook::Forward => "forward",
        Hook::Output => "output",
    }
}

/// When the chain at a hook is looked at, and what it may do there.
fn kind(table: Table, hook: Hook) -> (&'static str, i32) {
    match (table, hook) {
        (Table::Filter, _) => ("filter", 0),
        // Answers get their mark here, which routes them anew.
        (Table::Mangle, Hook::Output) => ("route", -150),
        (Table::Mangle, _) => ("filter", -150),
        (Table::Nat, _) => ("nat", -100),
        (Table::Raw, _) => ("filter", -300),
    }
}

/// The script that puts the rules in, whatever was there of ours before; one transaction.
pub fn script(config: &CaptureConfig) -> String {
    let mut text = removal();
    let mut rules = plan(Family::V4, config);
    let mut planned = tables(Family::V4, config).to_vec();
    if config.ipv6 == Ipv6Mode::Refuse {
        rules.extend(plan(Family::V6, config));
        planned.extend(tables(Family::V6, config));
    }
    planned.sort_unstable();
    for known in planned {
        let name = table(known);
        let _ = writeln!(text, "add table inet {name}");
        for &hook in known.hooks() {
            let (base, (kind, priority)) = (base(hook), kind(known, hook));
            let _ = writeln!(
                text,
                "add chain inet {name} {base} {{ type {kind} hook {base} priority {priority} ; policy accept ; }}\n\
                 add chain inet {name} istio-{base}"
            );
        }
        for planned in rules.iter().filter(|planned| planned.table() == known) {
            for statement in statements(planned, config) {
                let _ = writeln!(text, "add rule inet {name} {statement}");
            }
        }
    }
    text
}

/// The script that takes everything out, however much of it is there; one transaction.
pub fn removal() -> String {
    let mut text = String::new();
    for known in Table::ALL {
        let name = table(known);
        // What is not there cannot be deleted, and what is there can be added.
        let _ = writeln!(text, "add table inet {name}\ndelete table inet {name}");
    }
    text
}

/// A rule as chain and statements, once or for each family.
fn statements(rule: &Rule, config: &CaptureConfig) -> Vec<String> {
    let ipv6 = config.ipv6 == Ipv6Mode::Capture;
    let proxy = |sign| format!("meta mark & {MARK_MASK:#x} {sign} {PROXY_MARK:#x}");
    // What would hold for both families is not to catch an IPv6 that is none of the proxy's business.
    let family = if ipv6 { "" } else { "meta nfproto ipv4 " };
    let both = |text: String| vec![text];
    let twins = |v4: &str, v6: &str, text: &dyn Fn(&str) -> String| {
        let mut twins = vec![text(v4)];
        if ipv6 {
            twins.push(text(v6));
        }
        twins
    };
    let (loop_v4, loop_v6) = ("ip daddr != 127.0.0.1/32", "ip6 daddr != ::1/128");
    let (probe_v4, probe_v6) = (config.probe_v4, config.probe_v6);
    let texts = match rule {
        Rule::Jump(_, hook) => {
            return both(format!("{} jump istio-{}", base(*hook), base(*hook)));
        }
        Rule::RememberSpoofed => both(format!(
            "{} counter ct mark set ct mark & {:#x} | {SPOOFED_MARK:#x}",
            proxy("=="),
            !MARK_MASK
        )),
        Rule::RestoreSpoofed => both(format!(
            "ct mark & {MARK_MASK:#x} == {SPOOFED_MARK:#x} counter meta mark set ct mark"
        )),
        Rule::RedirectInterface(name) => both(format!(
            "{family}iifname \"{}\" meta l4proto tcp counter redirect to :{OUTBOUND_PORT}",
            interface(name)
        )),
        Rule::ReturnInterface(name) => both(format!(
            "{family}iifname \"{}\" meta l4proto tcp counter return",
            interface(name)
        )),
        Rule::AcceptFromProbe => twins(
            &format!("ip saddr {probe_v4}"),
            &format!("ip6 saddr {probe_v6}"),
            &|probe| format!("meta l4proto tcp {probe} counter accept"),
        ),
        Rule::AcceptToProbe => twins(
            &format!("ip daddr {probe_v4}"),
            &format!("ip6 daddr {probe_v6}"),
            &|probe| format!("meta l4proto tcp {probe} counter accept"),
        ),
        Rule::RedirectInbound => twins(loop_v4, loop_v6, &|loopback| {
            format!(
                "{loopback} tcp dport != {HBONE_PORT} {} counter redirect to :{PLAINTEXT_PORT}",
                proxy("!=")
            )
        }),
        Rule::RedirectDnsUdp => both(format!(
            "{family}oifname != \"lo\" {} udp dport 53 counter redirect to :{DNS_PORT}",
            proxy("!=")
        )),
        Rule::RedirectDnsTcp => twins(loop_v4, loop_v6, &|loopback| {
            format!(
                "{loopback} tcp dport 53 {} counter redirect to :{DNS_PORT}",
                proxy("!=")
            )
        }),
        Rule::AcceptSpoofed => both(format!(
            "meta l4proto tcp meta mark & {MARK_MASK:#x} == {SPOOFED_MARK:#x} counter accept"
        )),
        Rule::AcceptLocal => twins(loop_v4, loop_v6, &|loopback| {
            format!("oifname \"lo\" {loopback} counter accept")
        }),
        Rule::RedirectOutbound => twins(loop_v4, loop_v6, &|loopback| {
            format!(
                "meta l4proto tcp {loopback} {} counter redirect to :{OUTBOUND_PORT}",
                proxy("!=")
            )
        }),
        Rule::ZoneProxyQueries => both(format!(
            "udp dport 53 {} counter ct zone set {DNS_ZONE}",
            proxy("==")
        )),
        Rule::ZoneAnswers => both(format!(
            "udp sport 53 {} counter ct zone set {DNS_ZONE}",
            proxy("!=")
        )),
        Rule::PassLoopback(Hook::Output) => both("oifname \"lo\" counter return".to_string()),
        Rule::PassLoopback(_) => both("iifname \"lo\" counter return".to_string()),
        Rule::PassIcmp(_, kind) => both(format!("icmpv6 type {kind} counter return")),
        Rule::PassReset => {
            both("meta nfproto ipv6 tcp flags & rst == rst counter return".to_string())
        }
        Rule::RefuseTcp(_) => {
            both("meta nfproto ipv6 meta l4proto tcp counter reject with tcp reset".to_string())
        }
        Rule::Refuse(_) => {
            both("meta nfproto ipv6 counter reject with icmpv6 type admin-prohibited".to_string())
        }
    };
    let chain = base(rule.hook());
    let texts = texts.into_iter();
    texts.map(|text| format!("istio-{chain} {text}")).collect()
}

/// A name in which a `+` at the end stands for whatever follows, as it does for iptables; a `*` stands for itself.
fn interface(name: &str) -> String {
    let literal = name.replace('*', "\\*");
    match literal.strip_suffix('+') {
        Some(stem) => format!("{stem}*"),
        None => literal,
    }
}
