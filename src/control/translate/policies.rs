//! AuthorizationPolicies as the L4 policies that proxies enforce.
//!
//! What only an L7 proxy could check never opens anything: an ALLOW rule that needs it is left out, a DENY rule keeps
//! the rest of its conditions.

use std::net::IpAddr;

use ipnet::IpNet;

use super::services::octets;
use crate::control::kubernetes::{AuthorizationPolicy, AuthorizationRule, Operation, Source, When};
use crate::proto::security as proto;

// Values of the wire's enumerations.
const GLOBAL: i32 = 0;
const NAMESPACE: i32 = 1;
const SELECTOR: i32 = 2;
const ALLOW: i32 = 0;
const DENY: i32 = 1;

/// Whether a policy concerns proxies at all.
pub fn is_sent(policy: &AuthorizationPolicy) -> bool {
    let spec = &policy.spec;
    spec.target_ref.is_none()
        && spec.target_refs.is_empty()
        && action(policy).is_ok_and(|action| action.is_some())
}

/// Checks that every value can be understood.
///
/// # Errors
/// The path of the first that cannot, and why.
pub fn check(policy: &AuthorizationPolicy) -> Result<(), String> {
    action(policy)?;
    rules(policy).map(drop)
}

/// What a policy says that proxies will not do, if anything.
pub fn reservations(policy: &AuthorizationPolicy) -> Vec<String> {
    let spec = &policy.spec;
    if spec.target_ref.is_some() || !spec.target_refs.is_empty() {
        return vec!["spec.targetRefs: is for waypoints only, proxies do not enforce it".into()];
    }
    match action(policy) {
        Ok(None) => vec![format!(
            "spec.action: {} is for waypoints only, proxies do not take it",
            spec.action
        )],
        _ => {
            let mut said = rules(policy).map(|(_, said)| said).unwrap_or_default();
            said.extend(schemes(policy));
            said
        }
    }
}

/// Principals that were written as URIs, which no principal ever is.
fn schemes(policy: &AuthorizationPolicy) -> Vec<String> {
    let rules = policy.spec.rules.iter();
    let sources = rules.flat_map(|rule| rule.from.iter().flatten());
    let principals = sources.flat_map(|from| {
        from.source
            .principals
            .iter()
            .chain(&from.source.not_principals)
    });
    let uris = principals.filter(|principal| principal.starts_with("spiffe://"));
    uris.map(|uri| format!("{uri:?} is nobody: principals are written without spiffe://"))
        .collect()
}

/// The policy's record; none if it does not concern proxies.
pub fn authorization(
    policy: &AuthorizationPolicy,
    root_namespace: &str,
) -> Option<proto::Authorization> {
    if !is_sent(policy) {
        return None;
    }
    let metadata = &policy.metadata;
    let scope = match &policy.spec.selector {
        Some(_) => SELECTOR,
        None if metadata.namespace == root_namespace => GLOBAL,
        None => NAMESPACE,
    };
    let dry_run = metadata.annotations.get("istio.io/dry-run");
    Some(proto::Authorization {
        name: metadata.name.clone(),
        namespace: metadata.namespace.clone(),
        scope,
        action: action(policy).ok()??,
        rules: rules(policy).ok()?.0,
        dry_run: dry_run.is_some_and(|value| value == "true"),
    })
}

/// The action; none for those that only an L7 proxy takes.
fn action(policy: &AuthorizationPolicy) -> Result<Option<i32>, String> {
    match &*policy.spec.action {
        "" | "ALLOW" => Ok(Some(ALLOW)),
        "DENY" => Ok(Some(DENY)),
        "AUDIT" | "CUSTOM" => Ok(None),
        other => Err(format!(
            "spec.action: {other:?} is not ALLOW, DENY, AUDIT or CUSTOM"
        )),
    }
}

/// The rules, and what had to be left out of them.
fn rules(policy: &AuthorizationPolicy) -> Result<(Vec<proto::Rule>, Vec<String>), String> {
    let allow = action(policy)? == Some(ALLOW);
    let (mut rules, mut said) = (Vec::new(), Vec::new());
    for (number, rule) in policy.spec.rules.iter().enumerate() {
        let path = format!("spec.rules[{number}]");
        let translated = translate(rule, &policy.metadata.namespace, &path)?;
        if !translated.needs_seven {
            rules.push(translated.rule);
        } else if allow {
            said.push(format!(
                "{path}: needs an L7 proxy, so it allows nothing here"
            ));
        } else {
            let rule = without_seven(translated.rule);
            said.push(if can_hold(&rule) {
                format!("{path}: denies without regard to what only an L7 proxy can see")
            } else {
                format!("{path}: only an L7 proxy could enforce it, so it denies nothing here")
            });
            rules.push(rule);
        }
    }
    Ok((rules, said))
}

/// What is left of a DENY rule without its L7 conditions, which may deny more but not less.
///
/// A clause that an L7 condition was all of no longer restricts the others; where no other is left it stays, as one
/// that never holds, because a rule without clauses would deny everything.
fn without_seven(mut rule: proto::Rule) -> proto::Rule {
    let nothing = proto::Match::default();
    let restricts = |clause: &proto::Clause| !clause.matches.contains(&nothing);
    if rule.clauses.iter().any(restricts) {
        rule.clauses.retain(restricts);
    }
    rule
}

/// Whether a rule can hold for any flow at all.
fn can_hold(rule: &proto::Rule) -> bool {
    let nothing = proto::Match::default();
    let clause = |clause: &proto::Clause| clause.matches.iter().any(|part| *part != nothing);
    rule.clauses.iter().all(clause)
}

struct Translated {
    rule: proto::Rule,
    /// Whether it has conditions that only an L7 proxy can check; what they leave nothing of is an empty match.
    needs_seven: bool,
}

fn translate(rule: &AuthorizationRule, namespace: &str, path: &str) -> Result<Translated, String> {
    let mut clauses = Vec::new();
    let mut needs_seven = false;
    if let Some(parts) = &rule.to {
        let path = format!("{path}.to");
        let mut matches = Vec::new();
        for (number, to) in some(parts, &path)?.iter().enumerate() {
            let path = format!("{path}[{number}].operation");
            let part = operation(&to.operation, &path)?;
            let seven = sees_requests(&to.operation);
            says_something(&part, seven, &path)?;
            needs_seven |= seven;
            matches.push(part);
        }
        clauses.push(proto::Clause { matches });
    }
    if let Some(parts) = &rule.from {
        let path = format!("{path}.from");
        let mut matches = Vec::new();
        for (number, from) in some(parts, &path)?.iter().enumerate() {
            let path = format!("{path}[{number}].source");
            let part = source(&from.source, namespace, &path)?;
            let seven = sees_requesters(&from.source);
            says_something(&part, seven, &path)?;
            needs_seven |= seven;
            matches.push(part);
        }
        clauses.push(proto::Clause { matches });
    }
    if let Some(parts) = &rule.when {
        let path = format!("{path}.when");
        for (number, when) in some(parts, &path)?.iter().enumerate() {
            let path = format!("{path}[{number}]");
            let (part, known) = condition(when, &path)?;
            says_something(&part, !known, &path)?;
            needs_seven |= !known;
            clauses.push(proto::Clause {
                matches: vec![part],
            });
        }
    }
    Ok(Translated {
        rule: proto::Rule { clauses },
        needs_seven,
    })
}

/// A list that is there must not be empty: nobody could tell whether it means all or nothing.
fn some<'a, T>(list: &'a [T], path: &str) -> Result<&'a [T], String> {
    if list.is_empty() {
        return Err(format!("{path}: is empty"));
    }
    Ok(list)
}

fn says_something(part: &proto::Match, needs_seven: bool, path: &str) -> Result<(), String> {
    if *part == proto::Match::default() && !needs_seven {
        return Err(format!("{path}: names nothing"));
    }
    Ok(())
}

fn sees_requesters(source: &Source) -> bool {
    let lists = [
        &source.remote_ip_blocks,
        &source.not_remote_ip_blocks,
        &source.request_principals,
        &source.not_request_principals,
    ];
    lists.iter().any(|list| !list.is_empty())
}

fn sees_requests(operation: &Operation) -> bool {
    let lists = [
        &operation.hosts,
        &operation.not_hosts,
        &operation.methods,
        &operation.not_methods,
        &operation.paths,
        &operation.not_paths,
    ];
    lists.iter().any(|list| !list.is_empty())
}

fn operation(operation: &Operation, path: &str) -> Result<proto::Match, String> {
    Ok(proto::Match {
        destination_ports: ports(&operation.ports, &format!("{path}.ports"))?,
        not_destination_ports: ports(&operation.not_ports, &format!("{path}.notPorts"))?,
        ..Default::default()
    })
}

fn source(source: &Source, namespace: &str, path: &str) -> Result<proto::Match, String> {
    let at = |field: &str| format!("{path}.{field}");
    Ok(proto::Match {
        principals: texts(&source.principals, &at("principals"))?,
        not_principals: texts(&source.not_principals, &at("notPrincipals"))?,
        namespaces: texts(&source.namespaces, &at("namespaces"))?,
        not_namespaces: texts(&source.not_namespaces, &at("notNamespaces"))?,
        service_accounts: accounts(&source.service_accounts, namespace, &at("serviceAccounts"))?,
        not_service_accounts: accounts(
            &source.not_service_accounts,
            namespace,
            &at("notServiceAccounts"),
        )?,
        source_ips: ranges(&source.ip_blocks, &at("ipBlocks"))?,
        not_source_ips: ranges(&source.not_ip_blocks, &at("notIpBlocks"))?,
        ..Default::default()
    })
}

/// A condition, and whether its key is one that a proxy can check; else the match is empty and never holds.
fn condition(when: &When, path: &str) -> Result<(proto::Match, bool), String> {
    let (values, not_values) = (&when.values, &when.not_values);
    let (in_values, in_not_values) = (format!("{path}.values"), format!("{path}.notValues"));
    let mut part = proto::Match::default();
    match &*when.key {
        "source.ip" => {
            part.source_ips = ranges(values, &in_values)?;
            part.not_source_ips = ranges(not_values, &in_not_values)?;
        }
        "source.namespace" => {
            part.namespaces = texts(values, &in_values)?;
            part.not_namespaces = texts(not_values, &in_not_values)?;
        }
        "source.principal" => {
            part.principals = texts(values, &in_values)?;
            part.not_principals = texts(not_values, &in_not_values)?;
        }
        "destination.ip" => {
            part.destination_ips = ranges(values, &in_values)?;
            part.not_destination_ips = ranges(not_values, &in_not_values)?;
        }
        "destination.port" => {
            part.destination_ports = ports(values, &in_values)?;
            part.not_destination_ports = ports(not_values, &in_not_values)?;
        }
        "" => return Err(format!("{path}.key: is missing")),
        _ => return Ok((part, false)),
    }
    Ok((part, true))
}

fn texts(values: &[String], path: &str) -> Result<Vec<proto::StringMatch>, String> {
    use proto::string_match::MatchType;
    let one = |(number, value): (usize, &String)| {
        let kind = if value == "*" {
            MatchType::Presence(())
        } else if let Some(suffix) = value.strip_prefix('*') {
            MatchType::Suffix(suffix.to_string())
        } else if let Some(prefix) = value.strip_suffix('*') {
            MatchType::Prefix(prefix.to_string())
        } else if value.is_empty() {
            // It would be what a client without an identity has for a namespace.
            return Err(format!("{path}[{number}]: is empty"));
        } else {
            MatchType::Exact(value.clone())
        };
        Ok(proto::StringMatch {
            match_type: Some(kind),
        })
    };
    values.iter().enumerate().map(one).collect()
}

fn accounts(
    values: &[String],
    namespace: &str,
    path: &str,
) -> Result<Vec<proto::ServiceAccountMatch>, String> {
    let one = |(number, value): (usize, &String)| {
        let (namespace, account) = value.split_once('/').unwrap_or((namespace, value));
        if namespace.is_empty() || account.is_empty() || account.contains('/') {
            return Err(format!(
                "{path}[{number}]: {value:?} is not a service account, as NAME or NAMESPACE/NAME"
            ));
        }
        if value.contains('*') {
            return Err(format!(
                "{path}[{number}]: {value:?}: service accounts have no wildcards, principals do"
            ));
        }
        Ok(proto::ServiceAccountMatch {
            namespace: namespace.to_string(),
            service_account: account.to_string(),
        })
    };
    values.iter().enumerate().map(one).collect()
}

fn ranges(values: &[String], path: &str) -> Result<Vec<proto::Address>, String> {
    let one = |(number, value): (usize, &String)| {
        let range = value
            .parse::<IpNet>()
            .ok()
            .or_else(|| value.parse::<IpAddr>().ok().map(IpNet::from));
        let range = range
            .ok_or_else(|| format!("{path}[{number}]: {value:?} is not an address or a range"))?;
        Ok(proto::Address {
            address: octets(range.addr()),
            length: range.prefix_len().into(),
        })
    };
    values.iter().enumerate().map(one).collect()
}

fn ports(values: &[String], path: &str) -> Result<Vec<u32>, String> {
    let one = |(number, value): (usize, &String)| {
        let port: Result<u16, _> = value.parse();
        port.map(u32::from)
            .map_err(|_| format!("{path}[{number}]: {value:?} is not a port number"))
    };
    values.iter().enumerate().map(one).collect()
}

#[cfg(test)]
#[path = "policies_tests.rs"]
mod tests;
