//! Whether the rules of a namespace are those of the plan.

use crate::render;
use crate::rules::{CaptureConfig, Family, Hook, Rule, Table, plan, tables};
use crate::saved::{Saved, SavedTable};

/// The first thing in which a namespace differs from the plan.
///
/// Rules are compared as they are printed. `has` is asked, with a table and a rule, only about what an iptables may
/// print in a way not known here.
///
/// # Errors
/// Those of `has`.
pub fn difference<E>(
    saved: &Saved,
    family: Family,
    config: &CaptureConfig,
    mut has: impl FnMut(&str, &str) -> Result<bool, E>,
) -> Result<Option<String>, E> {
    if let Some(text) = unexpected(saved, family, config) {
        return Ok(Some(text));
    }
    let rules = plan(family, config);
    for table in tables(family, config) {
        let name = render::table(*table);
        let Some(known) = saved.table(name) else {
            return Ok(Some(format!("table {name} is missing")));
        };
        for &hook in table.hooks() {
            let chain = render::chain(hook);
            if !known.chains.iter().any(|known| known == chain) {
                return Ok(Some(format!("chain {chain} of table {name} is missing")));
            }
            let jump = render::rule(&Rule::Jump(*table, hook), family, config);
            if !known.rules.contains(&jump) && !has(name, &jump)? {
                return Ok(Some(format!("rule {jump} of table {name} is missing")));
            }
            let planned: Vec<_> = rules
                .iter()
                .filter(|rule| is_in_chain(rule, *table, hook))
                .map(|rule| render::rule(rule, family, config))
                .collect();
            if let Some(text) = in_chain(known, chain, &planned, &mut has)? {
                return Ok(Some(text));
            }
        }
    }
    Ok(None)
}

fn is_in_chain(rule: &Rule, table: Table, hook: Hook) -> bool {
    rule.table() == table && rule.hook() == hook && !matches!(rule, Rule::Jump(..))
}

/// A chain that looks like ours where none should be.
fn unexpected(saved: &Saved, family: Family, config: &CaptureConfig) -> Option<String> {
    for known in &saved.tables {
        let ours = |table: &&Table| render::table(**table) == known.name;
        let planned = tables(family, config).iter().find(ours);
        let hooks = planned.map_or(&[][..], |table| table.hooks());
        let expected = |chain: &String| hooks.iter().any(|hook| render::chain(*hook) == chain);
        if let Some(chain) = known.chains.iter().find(|chain| !expected(chain)) {
            return Some(format!("unexpected chain {chain} in table {}", known.name));
        }
    }
    None
}

/// The first difference within a chain.
fn in_chain<E>(
    known: &SavedTable,
    chain: &str,
    planned: &[String],
    has: &mut impl FnMut(&str, &str) -> Result<bool, E>,
) -> Result<Option<String>, E> {
    let name = &known.name;
    let mut found: Vec<_> = known.chain(chain).map(plain).collect();
    let mut wanted: Vec<_> = planned.iter().map(|rule| plain(rule)).collect();
    if found == wanted {
        return Ok(None);
    }
    if found.len() != wanted.len() {
        return Ok(Some(format!(
            "chain {chain} of table {name} has {} rules instead of {}",
            found.len(),
            wanted.len()
        )));
    }
    for (rule, plain) in planned.iter().zip(&wanted) {
        if !found.contains(plain) && !has(name, rule)? {
            return Ok(Some(format!("rule {rule} of table {name} is missing")));
        }
    }
    found.sort();
    wanted.sort();
    Ok((found == wanted)
        .then(|| format!("the rules of chain {chain} of table {name} are in another order")))
}

/// A rule without what iptables adds or drops when it prints one.
fn plain(rule: &str) -> Vec<&str> {
    let mut plain: Vec<&str> = Vec::new();
    for word in rule.split(' ') {
        match (plain.last(), word) {
            (Some(&"-m"), "tcp" | "udp" | "icmp6") => {
                plain.pop();
            }
            (_, "--to-port") => plain.push("--to-ports"),
            _ => plain.push(word),
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    /// The whole plan as a current iptables prints it.
    fn printed(config: &CaptureConfig, family: Family) -> String {
        let text = render::restore(family, config)
            .replace("-N ISTIO_OUTPUT", ":ISTIO_OUTPUT - [0:0]")
            .replace("-N ISTIO_PRERT", ":ISTIO_PRERT - [0:0]")
            .replace("* ", "*")
            .replace("--to-port 15053", "--to-ports 15053");
        ["--dport 53 -m mark", "! --dport 15008"]
            .iter()
            .fold(text, |text, part| {
                text.replace(&format!("-p tcp {part}"), &format!("-p tcp -m tcp {part}"))
            })
    }

    /// The difference of a printed text, with an iptables that knows no other form of any rule.
    fn found(text: &str) -> Option<String> {
        let no = |_: &str, _: &str| Ok::<_, Infallible>(false);
        let saved = Saved::parse(text);
        difference(&saved, Family::V4, &CaptureConfig::default(), no).unwrap()
    }

    #[test]
    fn what_iptables_prints_of_the_plan_is_the_plan() {
        let never = |_: &str, rule: &str| -> Result<bool, String> { Err(rule.to_string()) };
        for family in [Family::V4, Family::V6] {
            for dns in [true, false] {
                let config = CaptureConfig {
                    dns,
                    ..CaptureConfig::default()
                };
                let saved = Saved::parse(&printed(&config, family));
                assert_eq!(difference(&saved, family, &config, never), Ok(None));
            }
        }
    }

    #[test]
    fn each_kind_of_damage_is_named() {
        let whole = printed(&CaptureConfig::default(), Family::V4);
        assert_eq!(found(&whole), None);
        let accept = "-A ISTIO_OUTPUT -p tcp -m mark --mark 0x111/0xfff -j ACCEPT\n";
        let local = "-A ISTIO_OUTPUT ! -d 127.0.0.1/32 -o lo -j ACCEPT\n";
        assert!(whole.contains(&format!("{accept}{local}")));
        let swapped = whole.replace(&format!("{accept}{local}"), &format!("{local}{accept}"));
        let table = |text: &str| [&whole, "*filter\n", text].concat();
        let cases = [
            (String::new(), "table mangle is missing"),
            (
                whole.replacen(":ISTIO_PRERT - [0:0]\n", "", 1),
                "chain ISTIO_PRERT of table mangle is missing",
            ),
            (
                whole.replacen("-A OUTPUT -j ISTIO_OUTPUT\n", "", 2),
                "rule OUTPUT -j ISTIO_OUTPUT of table mangle is missing",
            ),
            (
                whole.replace(accept, ""),
                "chain ISTIO_OUTPUT of table nat has 5 rules instead of 6",
            ),
            (
                whole.replace(accept, &[accept, accept].concat()),
                "chain ISTIO_OUTPUT of table nat has 7 rules instead of 6",
            ),
            (
                whole.replace(
                    "-j REDIRECT --to-ports 15001",
                    "-j REDIRECT --to-ports 15002",
                ),
                "rule ISTIO_OUTPUT ! -d 127.0.0.1/32 -p tcp -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15001 of table nat is missing",
            ),
            (
                swapped,
                "the rules of chain ISTIO_OUTPUT of table nat are in another order",
            ),
            (
                table(":ISTIO_X - [0:0]\n"),
                "unexpected chain ISTIO_X in table filter",
            ),
            (
                table(":ISTIO_OUTPUT - [0:0]\n"),
                "unexpected chain ISTIO_OUTPUT in table filter",
            ),
        ];
        for (text, expected) in cases {
            assert_eq!(found(&text).as_deref(), Some(expected));
        }
        // Rules of others are none of our business.
        let others = "-A OUTPUT -p udp -j ACCEPT\n:MINE - [0:0]\n-A MINE -j DROP\n";
        assert_eq!(found(&table(others)), None);
    }

    #[test]
    fn a_rule_printed_in_an_unknown_form_is_asked_for() {
        let whole = printed(&CaptureConfig::default(), Family::V4);
        let text = whole.replace("--mark 0x539/0xfff", "--mark 1337/4095");
        let saved = Saved::parse(&text);
        let mut asked = 0;
        let knows = |_: &str, rule: &str| {
            assert!(rule.contains("0x539/0xfff"), "{rule}");
            asked += 1;
            Ok::<_, Infallible>(true)
        };
        let config = CaptureConfig::default();
        assert_eq!(
            difference(&saved, Family::V4, &config, knows).unwrap(),
            None
        );
        assert_eq!(asked, 7);
    }
}
