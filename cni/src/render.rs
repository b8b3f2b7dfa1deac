//! The rules written down for iptables.

use std::fmt::Write;

use crate::rules::{
    CaptureConfig, DNS_PORT, DNS_ZONE, Family, HBONE_PORT, Hook, MARK_MASK, OUTBOUND_PORT,
    PLAINTEXT_PORT, PROXY_MARK, Rule, SPOOFED_MARK, Table, plan, tables,
};
use crate::saved::{Saved, SavedTable};

/// What the names of our chains begin with.
pub const CHAIN_PREFIX: &str = "ISTIO_";

/// A table's name.
pub fn table(table: Table) -> &'static str {
    match table {
        Table::Filter => "filter",
        Table::Mangle => "mangle",
        Table::Nat => "nat",
        Table::Raw => "raw",
    }
}

/// Our chain of a hook.
pub fn chain(hook: Hook) -> &'static str {
    match hook {
        Hook::Prerouting => "ISTIO_PRERT",
        Hook::Input => "ISTIO_INPUT",
        Hook::Forward => "ISTIO_FORWARD",
        Hook::Output => "ISTIO_OUTPUT",
    }
}

fn builtin(hook: Hook) -> &'static str {
    match hook {
        Hook::Prerouting => "PREROUTING",
        Hook::Input => "INPUT",
        Hook::Forward => "FORWARD",
        Hook::Output => "OUTPUT",
    }
}

/// A rule as chain and conditions, as they stand behind `-A`, `-C` or `-D`.
pub fn rule(rule: &Rule, family: Family, config: &CaptureConfig) -> String {
    let (loopback, probe) = match family {
        Family::V4 => ("127.0.0.1/32", format!("{}/32", config.probe_v4)),
        Family::V6 => ("::1/128", format!("{}/128", config.probe_v6)),
    };
    let proxy = format!("{PROXY_MARK:#x}/{MARK_MASK:#x}");
    let spoofed = format!("{SPOOFED_MARK:#x}/{MARK_MASK:#x}");
    let text = match rule {
        Rule::Jump(_, hook) => return format!("{} -j {}", builtin(*hook), chain(*hook)),
        Rule::RememberSpoofed => {
            format!("-m mark --mark {proxy} -j CONNMARK --set-xmark {spoofed}")
        }
        Rule::RestoreSpoofed => format!(
            "-m connmark --mark {spoofed} -j CONNMARK --restore-mark --nfmask 0xffffffff --ctmask 0xffffffff"
        ),
        Rule::RedirectInterface(name) => {
            format!("-i {name} -p tcp -j REDIRECT --to-ports {OUTBOUND_PORT}")
        }
        Rule::ReturnInterface(name) => format!("-i {name} -p tcp -j RETURN"),
        Rule::AcceptFromProbe => format!("-s {probe} -p tcp -m tcp -j ACCEPT"),
        Rule::AcceptToProbe => format!("-d {probe} -p tcp -m tcp -j ACCEPT"),
        Rule::RedirectInbound => format!(
            "! -d {loopback} -p tcp ! --dport {HBONE_PORT} -m mark ! --mark {proxy} -j REDIRECT --to-ports {PLAINTEXT_PORT}"
        ),
        Rule::RedirectDnsUdp => format!(
            "! -o lo -p udp -m mark ! --mark {proxy} -m udp --dport 53 -j REDIRECT --to-port {DNS_PORT}"
        ),
        Rule::RedirectDnsTcp => format!(
            "! -d {loopback} -p tcp --dport 53 -m mark ! --mark {proxy} -j REDIRECT --to-ports {DNS_PORT}"
        ),
        Rule::AcceptSpoofed => format!("-p tcp -m mark --mark {spoofed} -j ACCEPT"),
        Rule::AcceptLocal => format!("! -d {loopback} -o lo -j ACCEPT"),
        Rule::RedirectOutbound => {
            format!(
                "! -d {loopback} -p tcp -m mark ! --mark {proxy} -j REDIRECT --to-ports {OUTBOUND_PORT}"
            )
        }
        Rule::ZoneProxyQueries => {
            format!("-p udp -m mark --mark {proxy} -m udp --dport 53 -j CT --zone {DNS_ZONE}")
        }
        Rule::ZoneAnswers => {
            format!("-p udp -m mark ! --mark {proxy} -m udp --sport 53 -j CT --zone {DNS_ZONE}")
        }
        Rule::PassLoopback(Hook::Output) => "-o lo -j RETURN".to_string(),
        Rule::PassLoopback(_) => "-i lo -j RETURN".to_string(),
        Rule::PassIcmp(_, kind) => format!("-p ipv6-icmp --icmpv6-type {kind} -j RETURN"),
        Rule::PassReset => "-p tcp --tcp-flags RST RST -j RETURN".to_string(),
        Rule::RefuseTcp(_) => "-p tcp -j REJECT --reject-with tcp-reset".to_string(),
        Rule::Refuse(_) => "-j REJECT --reject-with icmp6-adm-prohibited".to_string(),
    };
    format!("{} {text}", chain(rule.hook()))
}

/// All rules of a family as input for `iptables-restore --noflush`, for a namespace that has none of our chains.
pub fn restore(family: Family, config: &CaptureConfig) -> String {
    let rules = plan(family, config);
    let mut text = String::new();
    for known in tables(family, config) {
        let _ = writeln!(text, "* {}", table(*known));
        for hook in known.hooks() {
            let _ = writeln!(text, "-N {}", chain(*hook));
        }
        append(&mut text, *known, &rules, family, config);
    }
    text
}

/// The same for a namespace that has some: whatever of ours is there is replaced, one table at a time without a gap.
/// What takes its place is there before anything goes for good.
pub fn replacement(saved: &Saved, family: Family, config: &CaptureConfig) -> String {
    let rules = plan(family, config);
    let planned = tables(family, config);
    let mut text = String::new();
    for known in planned {
        let name = table(*known);
        let empty = SavedTable::default();
        let held = saved.table(name).unwrap_or(&empty);
        let chains: Vec<_> = known.hooks().iter().map(|hook| chain(*hook)).collect();
        let _ = writeln!(text, "*{name}");
        for chain in &chains {
            // Empties the chain if there is one.
            let _ = writeln!(text, ":{chain} - [0:0]");
        }
        clear(&mut text, held, &chains);
        append(&mut text, *known, &rules, family, config);
    }
    let is_planned = |held: &SavedTable| planned.iter().any(|known| table(*known) == held.name);
    for held in saved.tables.iter().filter(|held| !is_planned(held)) {
        text.push_str(&removal_of(held));
    }
    text
}

/// The rules of a table and its end.
fn append(text: &mut String, known: Table, rules: &[Rule], family: Family, config: &CaptureConfig) {
    for planned in rules.iter().filter(|planned| planned.table() == known) {
        let _ = writeln!(text, "-A {}", rule(planned, family, config));
    }
    text.push_str("COMMIT\n");
}

/// What removes every chain of ours and every jump to one; nothing if there is none.
pub fn removal(saved: &Saved) -> Option<String> {
    let text: String = saved.tables.iter().map(removal_of).collect();
    (!text.is_empty()).then_some(text)
}

fn removal_of(held: &SavedTable) -> String {
    let mut text = String::new();
    if !held.chains.is_empty() {
        let _ = writeln!(text, "*{}", held.name);
        clear(&mut text, held, &[]);
        text.push_str("COMMIT\n");
    }
    text
}

/// Removes the jumps to our chains, and the chains but for those to keep.
fn clear(text: &mut String, held: &SavedTable, keep: &[&str]) {
    for jump in held.jumps() {
        let _ = writeln!(text, "-D {jump}");
    }
    for command in ["-F", "-X"] {
        for chain in &held.chains {
            if !keep.contains(&&**chain) {
                let _ = writeln!(text, "{command} {chain}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_whole_set_with_dns() {
        let expected = "\
* mangle
-N ISTIO_OUTPUT
-N ISTIO_PRERT
-A PREROUTING -j ISTIO_PRERT
-A OUTPUT -j ISTIO_OUTPUT
-A ISTIO_PRERT -m mark --mark 0x539/0xfff -j CONNMARK --set-xmark 0x111/0xfff
-A ISTIO_OUTPUT -m connmark --mark 0x111/0xfff -j CONNMARK --restore-mark --nfmask 0xffffffff --ctmask 0xffffffff
COMMIT
* nat
-N ISTIO_OUTPUT
-N ISTIO_PRERT
-A OUTPUT -j ISTIO_OUTPUT
-A PREROUTING -j ISTIO_PRERT
-A ISTIO_PRERT -s 169.254.7.127/32 -p tcp -m tcp -j ACCEPT
-A ISTIO_OUTPUT -d 169.254.7.127/32 -p tcp -m tcp -j ACCEPT
-A ISTIO_PRERT ! -d 127.0.0.1/32 -p tcp ! --dport 15008 -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15006
-A ISTIO_OUTPUT ! -o lo -p udp -m mark ! --mark 0x539/0xfff -m udp --dport 53 -j REDIRECT --to-port 15053
-A ISTIO_OUTPUT ! -d 127.0.0.1/32 -p tcp --dport 53 -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15053
-A ISTIO_OUTPUT -p tcp -m mark --mark 0x111/0xfff -j ACCEPT
-A ISTIO_OUTPUT ! -d 127.0.0.1/32 -o lo -j ACCEPT
-A ISTIO_OUTPUT ! -d 127.0.0.1/32 -p tcp -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15001
COMMIT
* raw
-N ISTIO_OUTPUT
-N ISTIO_PRERT
-A PREROUTING -j ISTIO_PRERT
-A OUTPUT -j ISTIO_OUTPUT
-A ISTIO_OUTPUT -p udp -m mark --mark 0x539/0xfff -m udp --dport 53 -j CT --zone 1
-A ISTIO_PRERT -p udp -m mark ! --mark 0x539/0xfff -m udp --sport 53 -j CT --zone 1
COMMIT
";
        assert_eq!(restore(Family::V4, &CaptureConfig::default()), expected);
        let v6 = expected.replace("127.0.0.1/32", "::1/128").replace(
            "169.254.7.127/32",
            "fd16:9254:7127:1337:ffff:ffff:ffff:ffff/128",
        );
        assert_eq!(restore(Family::V6, &CaptureConfig::default()), v6);
    }

    /// The rules of nat's two chains, in short.
    fn nat(config: &CaptureConfig) -> (Vec<&'static str>, Vec<&'static str>) {
        let name = |rule: &Rule| match rule {
            Rule::RedirectInterface(_) => "redirect-if",
            Rule::ReturnInterface(_) => "return-if",
            Rule::AcceptFromProbe => "from-probe",
            Rule::AcceptToProbe => "to-probe",
            Rule::RedirectInbound => "inbound",
            Rule::RedirectDnsUdp => "dns-udp",
            Rule::RedirectDnsTcp => "dns-tcp",
            Rule::AcceptSpoofed => "spoofed",
            Rule::AcceptLocal => "local",
            Rule::RedirectOutbound => "outbound",
            _ => "other",
        };
        let rules = plan(Family::V4, config);
        let of = |hook| {
            let in_chain = |rule: &&Rule| {
                rule.table() == Table::Nat && rule.hook() == hook && !matches!(rule, Rule::Jump(..))
            };
            rules.iter().filter(in_chain).map(name).collect()
        };
        (of(Hook::Prerouting), of(Hook::Output))
    }

    #[test]
    fn each_variant_has_its_rules_in_order() {
        let plain = CaptureConfig::default();
        let with_dns = vec![
            "to-probe", "dns-udp", "dns-tcp", "spoofed", "local", "outbound",
        ];
        let without_dns = vec!["to-probe", "spoofed", "local", "outbound"];
        let interfaces = vec!["a".to_string(), "b".to_string()];
        let both = ["redirect-if", "return-if", "redirect-if", "return-if"];
        let no_dns = CaptureConfig {
            dns: false,
            ..plain.clone()
        };
        let bypass = CaptureConfig {
            bypass_inbound: true,
            ..plain.clone()
        };
        let virtuals = CaptureConfig {
            virtual_interfaces: interfaces.clone(),
            ..plain.clone()
        };
        let bypass_virtuals = CaptureConfig {
            virtual_interfaces: interfaces,
            ..bypass.clone()
        };
        assert_eq!(
            nat(&plain),
            (vec!["from-probe", "inbound"], with_dns.clone())
        );
        assert_eq!(nat(&no_dns), (vec!["from-probe", "inbound"], without_dns));
        assert_eq!(nat(&bypass), (vec![], with_dns.clone()));
        assert_eq!(
            nat(&virtuals),
            (
                [&both[..], &["from-probe", "inbound"]].concat(),
                with_dns.clone()
            )
        );
        assert_eq!(nat(&bypass_virtuals), (both.to_vec(), with_dns));
        assert_eq!(tables(Family::V4, &no_dns), [Table::Mangle, Table::Nat]);
        let planned = plan(Family::V4, &no_dns);
        assert!(!planned.iter().any(|rule| rule.table() == Table::Raw));
        let text = restore(Family::V4, &virtuals);
        assert!(text.contains("-A ISTIO_PRERT -i a -p tcp -j REDIRECT --to-ports 15001\n-A ISTIO_PRERT -i a -p tcp -j RETURN\n"));
    }

    const HELD: &str = "\
*filter
:ISTIO_OLD - [0:0]
-A INPUT -p tcp -j DROP
-A INPUT -j ISTIO_OLD
*nat
:OTHER - [0:0]
:ISTIO_OUTPUT - [0:0]
:ISTIO_TEST - [0:0]
-A OUTPUT -j OTHER
-A OUTPUT -j ISTIO_OUTPUT
-A ISTIO_OUTPUT -p tcp -j ISTIO_TEST
*raw
:ISTIO_OUTPUT - [0:0]
-A OUTPUT -j ISTIO_OUTPUT
";

    #[test]
    fn removal_leaves_what_is_not_ours() {
        let expected = "\
*filter
-D INPUT -j ISTIO_OLD
-F ISTIO_OLD
-X ISTIO_OLD
COMMIT
*nat
-D OUTPUT -j ISTIO_OUTPUT
-F ISTIO_OUTPUT
-F ISTIO_TEST
-X ISTIO_OUTPUT
-X ISTIO_TEST
COMMIT
*raw
-D OUTPUT -j ISTIO_OUTPUT
-F ISTIO_OUTPUT
-X ISTIO_OUTPUT
COMMIT
";
        assert_eq!(removal(&Saved::parse(HELD)).as_deref(), Some(expected));
        assert_eq!(removal(&Saved::parse("*nat\n-A OUTPUT -j DROP\n")), None);
    }

    #[test]
    fn replacement_swaps_each_table_in_one_go() {
        let config = CaptureConfig {
            dns: false,
            bypass_inbound: true,
            ..CaptureConfig::default()
        };
        let expected = "\
*mangle
:ISTIO_OUTPUT - [0:0]
:ISTIO_PRERT - [0:0]
-A PREROUTING -j ISTIO_PRERT
-A OUTPUT -j ISTIO_OUTPUT
-A ISTIO_PRERT -m mark --mark 0x539/0xfff -j CONNMARK --set-xmark 0x111/0xfff
-A ISTIO_OUTPUT -m connmark --mark 0x111/0xfff -j CONNMARK --restore-mark --nfmask 0xffffffff --ctmask 0xffffffff
COMMIT
*nat
:ISTIO_OUTPUT - [0:0]
:ISTIO_PRERT - [0:0]
-D OUTPUT -j ISTIO_OUTPUT
-F ISTIO_TEST
-X ISTIO_TEST
-A OUTPUT -j ISTIO_OUTPUT
-A PREROUTING -j ISTIO_PRERT
-A ISTIO_OUTPUT -d 169.254.7.127/32 -p tcp -m tcp -j ACCEPT
-A ISTIO_OUTPUT -p tcp -m mark --mark 0x111/0xfff -j ACCEPT
-A ISTIO_OUTPUT ! -d 127.0.0.1/32 -o lo -j ACCEPT
-A ISTIO_OUTPUT ! -d 127.0.0.1/32 -p tcp -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15001
COMMIT
*filter
-D INPUT -j ISTIO_OLD
-F ISTIO_OLD
-X ISTIO_OLD
COMMIT
*raw
-D OUTPUT -j ISTIO_OUTPUT
-F ISTIO_OUTPUT
-X ISTIO_OUTPUT
COMMIT
";
        let text = replacement(&Saved::parse(HELD), Family::V4, &config);
        assert_eq!(text, expected);
    }
}
