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
        && policy
            .metadata
            .annotations
            .get("istio.io/dry-run")
            .is_none_or(|value| value != "true")
}

/// Checks that every value can be understood.
///
/// # Errors
/// The path of the first that cannot, and why.
pub fn check(policy: &AuthorizationPolicy) -> Result<(), String> {
    action(policy)?;
    rules(policy).map(drop)
}

/// The policy's record; none if it does not concern proxies.
pub fn authorization(
    policy: &AuthorizationPolicy,
    root_namespace: &str,
) -> Option<proto::Authorization> {
    if !is_sent(policy) {
        return None;
    }
    let namespace = &policy.metadata.namespace;
    let scope = match &policy.spec.selector {
        Some(_) => SELECTOR,
        None if namespace == root_namespace => GLOBAL,
        None => NAMESPACE,
    };
    Some(proto::Authorization {
        name: policy.metadata.name.clone(),
        namespace: namespace.clone(),
        scope,
        action: action(policy).ok()??,
        rules: rules(policy).ok()?,
        dry_run: false,
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

fn rules(policy: &AuthorizationPolicy) -> Result<Vec<proto::Rule>, String> {
    let allow = action(policy)? == Some(ALLOW);
    let mut rules = Vec::new();
    for (number, rule) in policy.spec.rules.iter().enumerate() {
        let (translated, seven) = translate(
            rule,
            &policy.metadata.namespace,
            &format!("spec.rules[{number}]"),
        )?;
        if !(allow && seven) {
            rules.push(translated);
        }
    }
    Ok(rules)
}

/// A rule, and whether it needs an L7 proxy.
fn translate(
    rule: &AuthorizationRule,
    namespace: &str,
    path: &str,
) -> Result<(proto::Rule, bool), String> {
    let mut clauses = Vec::new();
    let mut seven = false;
    if !rule.to.is_empty() {
        let mut matches = Vec::new();
        for (number, to) in rule.to.iter().enumerate() {
            matches.push(operation(
                &to.operation,
                &format!("{path}.to[{number}].operation"),
            )?);
            seven |= needs_seven(&to.operation);
        }
        clauses.push(proto::Clause { matches });
    }
    if !rule.from.is_empty() {
        let mut matches = Vec::new();
        for (number, from) in rule.from.iter().enumerate() {
            matches.push(source(
                &from.source,
                namespace,
                &format!("{path}.from[{number}].source"),
            )?);
            let source = &from.source;
            let lists = [
                &source.remote_ip_blocks,
                &source.not_remote_ip_blocks,
                &source.request_principals,
                &source.not_request_principals,
            ];
            seven |= lists.iter().any(|list| !list.is_empty());
        }
        clauses.push(proto::Clause { matches });
    }
    for (number, when) in rule.when.iter().enumerate() {
        let (part, known) = condition(when, &format!("{path}.when[{number}]"))?;
        seven |= !known;
        clauses.push(proto::Clause {
            matches: vec![part],
        });
    }
    Ok((proto::Rule { clauses }, seven))
}

fn needs_seven(operation: &Operation) -> bool {
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
    Ok(proto::Match {
        principals: texts(&source.principals),
        not_principals: texts(&source.not_principals),
        namespaces: texts(&source.namespaces),
        not_namespaces: texts(&source.not_namespaces),
        service_accounts: accounts(&source.service_accounts, namespace),
        not_service_accounts: accounts(&source.not_service_accounts, namespace),
        source_ips: ranges(&source.ip_blocks, &format!("{path}.ipBlocks"))?,
        not_source_ips: ranges(&source.not_ip_blocks, &format!("{path}.notIpBlocks"))?,
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
            (part.namespaces, part.not_namespaces) = (texts(values), texts(not_values))
        }
        "source.principal" => {
            (part.principals, part.not_principals) = (texts(values), texts(not_values))
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

fn texts(values: &[String]) -> Vec<proto::StringMatch> {
    use proto::string_match::MatchType;
    let one = |value: &String| {
        let kind = if value == "*" {
            MatchType::Presence(())
        } else if let Some(suffix) = value.strip_prefix('*') {
            MatchType::Suffix(suffix.to_string())
        } else if let Some(prefix) = value.strip_suffix('*') {
            MatchType::Prefix(prefix.to_string())
        } else {
            MatchType::Exact(value.clone())
        };
        proto::StringMatch {
            match_type: Some(kind),
        }
    };
    values.iter().map(one).collect()
}

fn accounts(values: &[String], namespace: &str) -> Vec<proto::ServiceAccountMatch> {
    let one = |value: &String| {
        let (namespace, account) = value.split_once('/').unwrap_or((namespace, value));
        proto::ServiceAccountMatch {
            namespace: namespace.to_string(),
            service_account: account.to_string(),
        }
    };
    values.iter().map(one).collect()
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
mod tests {
    use super::super::tests_support::read;
    use super::*;

    fn policy(namespace: &str, spec: &str) -> AuthorizationPolicy {
        let objects = read(&format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: p, namespace: {namespace}}}\nspec: {spec}\n"
        ));
        objects.policies.into_values().next().unwrap()
    }

    fn translated(spec: &str) -> Option<proto::Authorization> {
        authorization(&policy("a", spec), "istio-system")
    }

    /// Each rule as its clauses of matches, in short.
    fn told(spec: &str) -> Vec<Vec<Vec<String>>> {
        let one = |part: &proto::Match| {
            let principals: Vec<_> = part
                .principals
                .iter()
                .map(|text| format!("{:?}", text.match_type.as_ref().unwrap()))
                .collect();
            let accounts: Vec<_> = part
                .service_accounts
                .iter()
                .map(|known| format!("{}/{}", known.namespace, known.service_account))
                .collect();
            let ips: Vec<_> = part
                .source_ips
                .iter()
                .map(|known| format!("{:?}/{}", known.address, known.length))
                .collect();
            format!(
                "{}{}{}{}",
                principals.join(","),
                accounts.join(","),
                ips.join(","),
                if part.destination_ports.is_empty() {
                    String::new()
                } else {
                    format!("{:?}", part.destination_ports)
                }
            )
        };
        let record = translated(spec).unwrap();
        record
            .rules
            .iter()
            .map(|rule| {
                rule.clauses
                    .iter()
                    .map(|clause| clause.matches.iter().map(one).collect())
                    .collect()
            })
            .collect()
    }

    #[test]
    fn the_scope_follows_from_selector_and_namespace() {
        let scope = |namespace, spec| {
            authorization(&policy(namespace, spec), "istio-system")
                .unwrap()
                .scope
        };
        assert_eq!(scope("istio-system", "{}"), GLOBAL);
        assert_eq!(scope("a", "{}"), NAMESPACE);
        assert_eq!(scope("a", "{selector: {matchLabels: {app: x}}}"), SELECTOR);
    }

    #[test]
    fn what_is_for_others_is_not_sent() {
        assert!(translated("{action: AUDIT}").is_none());
        assert!(translated("{action: CUSTOM}").is_none());
        assert!(translated("{targetRef: {kind: Service, name: x}}").is_none());
        assert!(translated("{targetRefs: [{kind: Service, name: x}]}").is_none());
        let mut dry = policy("a", "{}");
        dry.metadata
            .annotations
            .insert("istio.io/dry-run".to_string(), "true".to_string());
        assert!(authorization(&dry, "istio-system").is_none());
    }

    #[test]
    fn rules_clauses_and_matches_keep_their_structure() {
        assert!(told("{}").is_empty());
        assert_eq!(told("{rules: [{}]}"), [Vec::<Vec<String>>::new()]);
        assert_eq!(
            told("{rules: [{from: [{source: {principals: [td/ns/x/sa/y, 'a*', '*b', '*']}}]}]}"),
            [[["Exact(\"td/ns/x/sa/y\"),Prefix(\"a\"),Suffix(\"b\"),Presence(())"]]]
        );
        assert_eq!(
            told(
                "{rules: [{from: [{source: {serviceAccounts: [x, b/y]}}, {source: {ipBlocks: [10.0.0.0/8, 1.2.3.4]}}], to: [{operation: {ports: ['80']}}]}]}"
            ),
            [vec![
                vec!["[80]".to_string()],
                vec![
                    "a/x,b/y".to_string(),
                    "[10, 0, 0, 0]/8,[1, 2, 3, 4]/32".to_string()
                ]
            ]]
        );
        assert_eq!(
            told(
                "{rules: [{when: [{key: destination.port, values: ['81']}, {key: source.principal, values: ['*']}]}]}"
            ),
            [[["[81]"], ["Presence(())"]]]
        );
    }

    #[test]
    fn what_needs_an_l7_proxy_opens_nothing() {
        let seven = "{from: [{source: {principals: ['*']}}], to: [{operation: {ports: ['80'], methods: [GET]}}]}";
        let only_seven = "{to: [{operation: {methods: [GET]}}]}";
        let key = "{when: [{key: 'request.headers[x]', values: [y]}]}";
        for rule in [seven, only_seven, key] {
            assert!(told(&format!("{{rules: [{rule}]}}")).is_empty(), "{rule}");
        }
        assert_eq!(
            told(&format!("{{action: DENY, rules: [{seven}]}}")),
            [[["[80]"], ["Presence(())"]]]
        );
        // An empty match never holds.
        assert_eq!(
            told(&format!("{{action: DENY, rules: [{only_seven}]}}")),
            [[[""]]]
        );
        assert_eq!(told(&format!("{{action: DENY, rules: [{key}]}}")), [[[""]]]);
    }

    #[test]
    fn values_that_cannot_be_understood_are_named() {
        let wrong = |spec| check(&parse(spec)).unwrap_err();
        fn parse(spec: &str) -> AuthorizationPolicy {
            let text = format!("{{metadata: {{name: p, namespace: a}}, spec: {spec}}}");
            serde_yaml_ng::from_str(&text).unwrap()
        }
        assert_eq!(
            wrong("{action: PERMIT}"),
            "spec.action: \"PERMIT\" is not ALLOW, DENY, AUDIT or CUSTOM"
        );
        assert_eq!(
            wrong("{rules: [{}, {from: [{source: {ipBlocks: [10.0.0.0/8, x]}}]}]}"),
            "spec.rules[1].from[0].source.ipBlocks[1]: \"x\" is not an address or a range"
        );
        assert_eq!(
            wrong("{rules: [{when: [{key: destination.port, notValues: ['70000']}]}]}"),
            "spec.rules[0].when[0].notValues[0]: \"70000\" is not a port number"
        );
    }
}
