//! What a namespace's iptables hold, as `iptables-save` prints it.

use crate::render::CHAIN_PREFIX;

/// The tables of a namespace that capture may have to do with.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Saved {
    pub tables: Vec<SavedTable>,
}

/// One table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SavedTable {
    pub name: String,
    /// Our own chains, and those that look like ours.
    pub chains: Vec<String>,
    /// Every rule, beginning with its chain.
    pub rules: Vec<String>,
}

impl Saved {
    /// Reads the output of `iptables-save`; lines that are nothing of this kind are passed over.
    pub fn parse(text: &str) -> Self {
        let mut saved = Self::default();
        for line in text.lines() {
            if let Some(name) = line.strip_prefix('*') {
                saved.tables.push(SavedTable {
                    name: name.trim().to_string(),
                    ..Default::default()
                });
            } else if let Some(table) = saved.tables.last_mut() {
                if let Some(chain) = line.strip_prefix(':') {
                    let name = chain.split(' ').next().unwrap_or_default();
                    if name.starts_with(CHAIN_PREFIX) {
                        table.chains.push(name.to_string());
                    }
                } else if let Some(rule) = line.strip_prefix("-A ") {
                    table.rules.push(rule.to_string());
                }
            }
        }
        saved
            .tables
            .retain(|table| matches!(&*table.name, "filter" | "nat" | "mangle" | "raw"));
        saved
    }

    /// A table by name.
    pub fn table(&self, name: &str) -> Option<&SavedTable> {
        self.tables.iter().find(|table| table.name == name)
    }

    /// Whether there is a chain that is ours or looks like it.
    pub fn has_chains(&self) -> bool {
        self.tables.iter().any(|table| !table.chains.is_empty())
    }
}

impl SavedTable {
    /// The rules of a chain, in order.
    pub fn chain<'a>(&'a self, chain: &'a str) -> impl Iterator<Item = &'a str> {
        let of_chain = move |rule: &&String| chain_of(rule) == chain;
        self.rules.iter().filter(of_chain).map(String::as_str)
    }

    /// The rules that lead from chains of others into chains of ours.
    pub fn jumps(&self) -> impl Iterator<Item = &str> {
        let jumps = |rule: &&String| {
            let mut last = rule.rsplit(' ');
            let (target, option) = (last.next(), last.next());
            matches!(option, Some("-j" | "-g"))
                && target.is_some_and(|target| self.chains.iter().any(|chain| chain == target))
                && !self.chains.iter().any(|chain| chain == chain_of(rule))
        };
        self.rules.iter().filter(jumps).map(String::as_str)
    }
}

fn chain_of(rule: &str) -> &str {
    rule.split(' ').next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_chains_and_rules_are_read_and_the_rest_is_passed_over() {
        let text = "\
# Generated
*filter
:INPUT ACCEPT [0:0]
-A INPUT -p tcp -j DROP
COMMIT
*nat
:PREROUTING ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:OTHER - [0:0]
:ISTIO_OUTPUT - [0:0]
-A OUTPUT -j OTHER
-A OUTPUT -j ISTIO_OUTPUT
COMMIT
*security
:INPUT ACCEPT [0:0]
:ISTIO_X - [0:0]
-A INPUT -j ACCEPT
COMMIT
";
        let saved = Saved::parse(text);
        let names = saved.tables.iter().map(|table| &*table.name);
        assert_eq!(names.collect::<Vec<_>>(), ["filter", "nat"]);
        let nat = saved.table("nat").unwrap();
        assert_eq!(nat.chains, ["ISTIO_OUTPUT"]);
        let output: Vec<_> = nat.chain("OUTPUT").collect();
        assert_eq!(output, ["OUTPUT -j OTHER", "OUTPUT -j ISTIO_OUTPUT"]);
        assert!(saved.has_chains());
        assert!(!Saved::parse("*nat\n:OUTPUT ACCEPT [0:0]\n:OTHER - [0:0]\nCOMMIT\n").has_chains());
        assert_eq!(Saved::parse("garbage\n-A x\n"), Saved::default());
    }

    #[test]
    fn only_rules_of_others_that_end_in_our_chains_are_jumps() {
        let jumps = |rule: &str| {
            let text = format!("*nat\n:ISTIO_A - [0:0]\n:ISTIO_B - [0:0]\n-A {rule}\n");
            let saved = Saved::parse(&text);
            saved.tables[0].jumps().count() == 1
        };
        assert!(jumps("OUTPUT -j ISTIO_A"));
        assert!(jumps(
            "OUTPUT -p tcp -m comment --comment \"a -j b\" -g ISTIO_B"
        ));
        assert!(jumps("OTHER -j ISTIO_A"));
        assert!(!jumps("ISTIO_A -j ISTIO_B"));
        assert!(!jumps("OUTPUT -j ISTIO_C"));
        assert!(!jumps(
            "OUTPUT -m comment --comment \"-j ISTIO_A\" -j ACCEPT"
        ));
        assert!(!jumps("OUTPUT -j"));
    }
}
