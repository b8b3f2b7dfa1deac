//! What a namespace's nftables hold of ours, as nft prints it.

use std::collections::BTreeMap;

/// What prints every table of the family inet, without what changes by itself and without names that have to be looked
/// up.
pub const ARGUMENTS: [&str; 4] = ["-sn", "list", "ruleset", "inet"];

/// The lines of each table that is ours, by the table's name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listing(BTreeMap<String, Vec<String>>);

impl Listing {
    /// Reads what nft prints; tables of other names are passed over.
    pub fn parse(text: &str, ours: &[&str]) -> Self {
        let mut tables = BTreeMap::new();
        let mut lines = text.lines();
        while let Some(line) = lines.next() {
            let name = line.strip_prefix("table inet ");
            let Some(name) = name.and_then(|rest| rest.split(' ').next()) else {
                continue;
            };
            let inside = lines.by_ref().take_while(|line| *line != "}");
            let inside = inside.filter(|line| !line.trim().is_empty());
            let inside: Vec<_> = inside.map(|line| line.trim().to_string()).collect();
            if ours.contains(&name) {
                tables.insert(name.to_string(), inside);
            }
        }
        Self(tables)
    }

    /// Whether there is nothing of ours.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The first thing in which this differs from what it should be.
    pub fn difference(&self, wanted: &Self) -> Option<String> {
        for (name, wanted) in &wanted.0 {
            let Some(held) = self.0.get(name) else {
                return Some(format!("table {name} is missing"));
            };
            if held != wanted {
                return Some(format!("table {name}: {}", first(held, wanted)));
            }
        }
        let unexpected = self.0.keys().find(|name| !wanted.0.contains_key(*name));
        unexpected.map(|name| format!("unexpected table {name}"))
    }
}

/// The first line that differs, and the chain it is in.
fn first(held: &[String], wanted: &[String]) -> String {
    let same = held.iter().zip(wanted).take_while(|(a, b)| a == b).count();
    let [held, wanted] = [held, wanted].map(|lines| match lines.get(same) {
        None => "nothing",
        Some(line) if line == "}" => "the chain's end",
        Some(line) => line,
    });
    format!("{held} instead of {wanted}")
}

#[cfg(test)]
mod tests {
    use super::*;

    const HELD: &str = "\
table inet other {
\tchain output {
\t\ttype filter hook output priority 0; policy accept;
\t}
}
table inet ours {
\tset s {
\t\ttype ipv4_addr
\t}

\tchain a {
\t\tcounter accept
\t\tjump b
\t}
}
";

    fn found(held: &str) -> Option<String> {
        let wanted = Listing::parse(HELD, &["ours"]);
        Listing::parse(held, &["ours", "ours-too"]).difference(&wanted)
    }

    #[test]
    fn only_our_tables_are_compared() {
        assert_eq!(found(HELD), None);
        assert_eq!(found(&HELD.replace("hook output", "hook input")), None);
        assert!(Listing::parse(HELD, &["mine"]).is_empty());
        assert!(!Listing::parse(HELD, &["ours"]).is_empty());
    }

    #[test]
    fn each_kind_of_difference_is_told() {
        let cases = [
            (String::new(), "table ours is missing"),
            (
                HELD.replace("\t\tcounter accept\n", ""),
                "table ours: jump b instead of counter accept",
            ),
            (
                HELD.replace("\t\tjump b\n", ""),
                "table ours: the chain's end instead of jump b",
            ),
            (
                HELD.replace("\t}\n}\n", "\t}\n\tchain c {\n\t}\n}\n"),
                "table ours: chain c { instead of nothing",
            ),
            (
                format!("{HELD}table inet ours-too {{\n}}\n"),
                "unexpected table ours-too",
            ),
        ];
        for (held, expected) in cases {
            assert_eq!(found(&held).as_deref(), Some(expected));
        }
    }
}
