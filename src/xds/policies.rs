//! Authorization resources of the control plane, turned into policies.
//!
//! What cannot be read never opens anything: in an ALLOW the match that holds it is void, in a DENY the match holds
//! whatever the unreadable part would have said.

use ipnet::IpNet;

use super::resources::ip;
use crate::policy::Policy;
use crate::policy::model::{Action, Match, Scope, ServiceAccount, StringMatch};
use crate::proto::security as proto;

/// A policy, and what of it could not be read.
#[derive(Debug)]
pub struct Read {
    pub policy: Policy,
    pub warnings: Vec<String>,
}

/// Turns a resource into its model; `key` is its name in xDS.
///
/// # Errors
/// Which field makes the whole policy unusable.
pub fn policy(key: &str, record: proto::Authorization) -> Result<Read, String> {
    let scope = match record.scope {
        0 => Scope::Global,
        1 => Scope::Namespace,
        2 => Scope::WorkloadSelector,
        other => return Err(format!("scope: unknown value {other}")),
    };
    let action = match record.action {
        0 => Action::Allow,
        1 => Action::Deny,
        other => return Err(format!("action: unknown value {other}")),
    };
    let mut reader = Reader {
        action,
        warnings: Vec::new(),
        place: String::new(),
        unreadable: false,
    };
    let mut rules = Vec::new();
    for (rule_number, rule) in record.rules.into_iter().enumerate() {
        let mut clauses = Vec::new();
        for (clause_number, clause) in rule.clauses.into_iter().enumerate() {
            let place = format!("rules[{rule_number}].clauses[{clause_number}]");
            let matches = clause.matches.into_iter().enumerate();
            clauses.push(
                matches
                    .map(|(number, part)| reader.part(format!("{place}.matches[{number}]"), part))
                    .collect(),
            );
        }
        rules.push(clauses);
    }
    let policy = Policy {
        key: key.into(),
        name: record.name.into(),
        namespace: record.namespace.into(),
        scope,
        action,
        rules,
        dry_run: record.dry_run,
    };
    Ok(Read {
        policy,
        warnings: reader.warnings,
    })
}

struct Reader {
    action: Action,
    warnings: Vec<String>,
    place: String,
    unreadable: bool,
}

impl Reader {
    fn part(&mut self, place: String, part: proto::Match) -> Match {
        (self.place, self.unreadable) = (place, false);
        let account = |list: Vec<proto::ServiceAccountMatch>| {
            let one = |account: proto::ServiceAccountMatch| ServiceAccount {
                namespace: account.namespace.into(),
                service_account: account.service_account.into(),
            };
            list.into_iter().map(one).collect()
        };
        let read = Match {
            namespaces: self.list("namespaces", part.namespaces, text),
            not_namespaces: self.negated("not_namespaces", part.not_namespaces, text),
            service_accounts: account(part.service_accounts),
            not_service_accounts: account(part.not_service_accounts),
            principals: self.list("principals", part.principals, text),
            not_principals: self.negated("not_principals", part.not_principals, text),
            source_ips: self.list("source_ips", part.source_ips, net),
            not_source_ips: self.negated("not_source_ips", part.not_source_ips, net),
            destination_ips: self.list("destination_ips", part.destination_ips, net),
            not_destination_ips: self.negated("not_destination_ips", part.not_destination_ips, net),
            destination_ports: self.list("destination_ports", part.destination_ports, port),
            not_destination_ports: self.negated(
                "not_destination_ports",
                part.not_destination_ports,
                port,
            ),
            unreadable: false,
        };
        Match {
            unreadable: self.unreadable,
            ..read
        }
    }

    /// A list of which one entry must hold: with an unreadable entry, a DENY takes it as holding.
    fn list<P, T>(&mut self, field: &str, entries: Vec<P>, read: fn(P) -> Option<T>) -> Vec<T> {
        let count = entries.len();
        let read = self.negated(field, entries, read);
        if read.len() < count && self.action == Action::Deny {
            Vec::new()
        } else {
            read
        }
    }

    /// A list of which no entry may hold: an unreadable entry forbids nothing, which only widens a DENY.
    fn negated<P, T>(&mut self, field: &str, entries: Vec<P>, read: fn(P) -> Option<T>) -> Vec<T> {
        let mut list = Vec::with_capacity(entries.len());
        for (number, entry) in entries.into_iter().enumerate() {
            match read(entry) {
                Some(entry) => list.push(entry),
                None => {
                    self.unreadable = true;
                    self.warnings
                        .push(format!("{}.{field}[{number}] cannot be read", self.place));
                }
            }
        }
        list
    }
}

fn text(entry: proto::StringMatch) -> Option<StringMatch> {
    use proto::string_match::MatchType;
    Some(match entry.match_type? {
        MatchType::Exact(text) => StringMatch::Exact(text.into()),
        MatchType::Prefix(text) => StringMatch::Prefix(text.into()),
        MatchType::Suffix(text) => StringMatch::Suffix(text.into()),
        MatchType::Presence(_) => StringMatch::Presence,
    })
}

fn net(entry: proto::Address) -> Option<IpNet> {
    IpNet::new(ip(&entry.address).ok()?, u8::try_from(entry.length).ok()?).ok()
}

fn port(entry: u32) -> Option<u16> {
    u16::try_from(entry).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Context;
    use crate::policy::evaluate::evaluate;
    use std::sync::Arc;

    fn record(action: i32, part: proto::Match) -> proto::Authorization {
        let rule = proto::Rule {
            clauses: vec![proto::Clause {
                matches: vec![part],
            }],
        };
        proto::Authorization {
            name: "p".into(),
            namespace: "ns".into(),
            scope: 1,
            action,
            rules: vec![rule],
            dry_run: false,
        }
    }

    fn allows(action: i32, part: proto::Match) -> (bool, Vec<String>) {
        let read = policy("ns/p", record(action, part)).unwrap();
        let address = "10.0.0.1:80".parse().unwrap();
        let context = Context {
            identity: None,
            src: address,
            dst: address,
        };
        (
            evaluate(&[&Arc::new(read.policy)], &context).is_allowed(),
            read.warnings,
        )
    }

    #[test]
    fn unknown_scopes_and_actions_are_refused_by_name() {
        let with = |scope, action| {
            let record = proto::Authorization {
                scope,
                action,
                ..Default::default()
            };
            policy("ns/p", record).unwrap_err()
        };
        assert_eq!(with(3, 0), "scope: unknown value 3");
        assert_eq!(with(0, 2), "action: unknown value 2");
    }

    #[test]
    fn what_cannot_be_read_opens_nothing() {
        let nets = |ranges: &[Range]| {
            let one = |(address, length): &Range| proto::Address {
                address: address.to_vec(),
                length: *length,
            };
            ranges.iter().map(one).collect::<Vec<_>>()
        };
        type Range = (&'static [u8], u32);
        let (good, bad): (Range, Range) = ((&[10, 0, 0, 0], 8), (&[1, 2, 3], 8));
        let elsewhere: Range = (&[11, 0, 0, 0], 8);
        let too_long: Range = (&[10, 0, 0, 0], 33);
        let from = |ranges: &[Range]| proto::Match {
            source_ips: nets(ranges),
            ..Default::default()
        };
        let not_from = |ranges: &[Range]| proto::Match {
            not_source_ips: nets(ranges),
            ..Default::default()
        };
        const ALLOW: i32 = 0;
        const DENY: i32 = 1;
        let cases = [
            (ALLOW, from(&[good]), true, 0),
            (ALLOW, from(&[good, bad]), false, 1),
            (ALLOW, from(&[too_long]), false, 1),
            (ALLOW, not_from(&[elsewhere]), true, 0),
            (ALLOW, not_from(&[elsewhere, bad]), false, 1),
            (DENY, from(&[elsewhere]), true, 0),
            (DENY, from(&[elsewhere, bad]), false, 1),
            (DENY, from(&[bad]), false, 1),
            (DENY, not_from(&[bad]), false, 1),
            (DENY, not_from(&[good, bad]), true, 1),
        ];
        for (action, part, allowed, warnings) in cases {
            let told = format!("{action} {part:?}");
            let (got, warned) = allows(action, part);
            assert_eq!(
                (got, warned.len()),
                (allowed, warnings),
                "{told}: {warned:?}"
            );
        }
        let odd = proto::Match {
            principals: vec![proto::StringMatch { match_type: None }],
            destination_ports: vec![70_000],
            ..Default::default()
        };
        let (_, warnings) = allows(ALLOW, odd);
        assert_eq!(
            warnings,
            [
                "rules[0].clauses[0].matches[0].principals[0] cannot be read",
                "rules[0].clauses[0].matches[0].destination_ports[0] cannot be read"
            ]
        );
    }
}
