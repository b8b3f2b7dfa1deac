//! Tables of policies and what becomes of them.

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
    for rule in [only_seven, key] {
        assert_eq!(denied(rule), [[[""]]], "{rule}");
    }
}

#[test]
fn a_denial_without_its_l7_conditions_denies_more_not_less() {
    let from = "from: [{source: {principals: ['*']}}]";
    let get = "{operation: {methods: [GET]}}";
    let get_80 = "{operation: {ports: ['80'], methods: [GET]}}";
    assert_eq!(
        denied(&format!("{{{from}, to: [{get}]}}")),
        [[["Presence(())"]]]
    );
    assert_eq!(
        denied(&format!("{{{from}, to: [{get_80}, {get}]}}")),
        [[["Presence(())"]]]
    );
    assert_eq!(
        denied(&format!("{{{from}, when: [{{key: x, values: [y]}}]}}")),
        [[["Presence(())"]]]
    );
    // Where nothing else restricts the rule, what cannot be checked must not make it deny everything.
    assert_eq!(
        denied(&format!("{{to: [{get_80}, {get}]}}")),
        [[["[80]", ""]]]
    );
}

fn denied(rule: &str) -> Vec<Vec<Vec<String>>> {
    told(&format!("{{action: DENY, rules: [{rule}]}}"))
}

#[test]
fn what_proxies_will_not_do_is_said() {
    let said = |spec| reservations(&policy("a", spec));
    let cases = [
        ("{rules: [{to: [{operation: {ports: ['80']}}]}]}", ""),
        (
            "{action: AUDIT}",
            "spec.action: AUDIT is for waypoints only, proxies do not take it",
        ),
        (
            "{targetRefs: [{kind: Service, name: x}]}",
            "spec.targetRefs: is for waypoints only, proxies do not enforce it",
        ),
        (
            "{rules: [{}, {to: [{operation: {methods: [GET]}}]}]}",
            "spec.rules[1]: needs an L7 proxy, so it allows nothing here",
        ),
        (
            "{action: DENY, rules: [{to: [{operation: {ports: ['80'], methods: [GET]}}]}]}",
            "spec.rules[0]: denies without regard to what only an L7 proxy can see",
        ),
        (
            "{action: DENY, rules: [{to: [{operation: {methods: [GET]}}]}]}",
            "spec.rules[0]: only an L7 proxy could enforce it, so it denies nothing here",
        ),
        (
            "{rules: [{from: [{source: {notPrincipals: ['spiffe://x']}}]}]}",
            "\"spiffe://x\" is nobody: principals are written without spiffe://",
        ),
    ];
    for (spec, wanted) in cases {
        assert_eq!(said(spec).join("\n"), wanted, "{spec}");
    }
}

#[test]
fn a_dry_run_is_sent_as_one() {
    let mut dry = policy("a", "{}");
    assert!(!authorization(&dry, "istio-system").unwrap().dry_run);
    let annotations = &mut dry.metadata.annotations;
    annotations.insert("istio.io/dry-run".to_string(), "true".to_string());
    assert!(authorization(&dry, "istio-system").unwrap().dry_run);
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
    let path = "spec.rules[0].from[0].source";
    let cases = [
        (
            "{rules: [{when: [{key: destination.port, notValues: ['70000']}]}]}",
            "spec.rules[0].when[0].notValues[0]: \"70000\" is not a port number".to_string(),
        ),
        (
            "{rules: [{from: []}]}",
            "spec.rules[0].from: is empty".into(),
        ),
        ("{rules: [{from: [{}]}]}", format!("{path}: names nothing")),
        (
            "{rules: [{to: [{operation: {ports: []}}]}]}",
            "spec.rules[0].to[0].operation: names nothing".into(),
        ),
        (
            "{rules: [{when: [{key: source.ip}]}]}",
            "spec.rules[0].when[0]: names nothing".into(),
        ),
        (
            "{rules: [{from: [{source: {namespaces: ['']}}]}]}",
            format!("{path}.namespaces[0]: is empty"),
        ),
        (
            "{rules: [{from: [{source: {serviceAccounts: [x/]}}]}]}",
            format!(
                "{path}.serviceAccounts[0]: \"x/\" is not a service account, as NAME or NAMESPACE/NAME"
            ),
        ),
        (
            "{rules: [{from: [{source: {serviceAccounts: ['x/*']}}]}]}",
            format!(
                "{path}.serviceAccounts[0]: \"x/*\": service accounts have no wildcards, principals do"
            ),
        ),
    ];
    for (spec, reason) in cases {
        assert_eq!(wrong(spec), reason, "{spec}");
    }
}
