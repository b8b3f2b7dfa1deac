use super::*;
use crate::policy::model::Scope;

fn exact(text: &str) -> StringMatch {
    StringMatch::Exact(text.into())
}

fn prefix(text: &str) -> StringMatch {
    StringMatch::Prefix(text.into())
}

fn suffix(text: &str) -> StringMatch {
    StringMatch::Suffix(text.into())
}

fn policy(action: Action, rules: Vec<Vec<Vec<Match>>>) -> Arc<Policy> {
    Arc::new(Policy {
        key: "ns/p".into(),
        name: "p".into(),
        namespace: "ns".into(),
        scope: Scope::Namespace,
        action,
        rules,
        dry_run: false,
    })
}

fn judge(policies: &[Arc<Policy>], identity: Option<&Identity>) -> Verdict {
    let context = Context {
        identity,
        src: "10.0.0.7:5555".parse().unwrap(),
        dst: "[::ffff:10.0.0.9]:8080".parse().unwrap(),
    };
    evaluate(&policies.iter().collect::<Vec<_>>(), &context)
}

fn nets(text: &str) -> Vec<IpNet> {
    vec![text.parse().unwrap()]
}

#[test]
fn every_kind_of_match_holds_as_its_list_says() {
    let curl = Identity::new("td", "default", "curl");
    let account = |ns: &str, sa: &str| {
        vec![ServiceAccount {
            namespace: ns.into(),
            service_account: sa.into(),
        }]
    };
    let blank = Match::default;
    // match, holds with an identity, holds for plaintext
    let cases = [
        (
            Match {
                namespaces: vec![exact("default")],
                ..blank()
            },
            true,
            false,
        ),
        (
            Match {
                namespaces: vec![exact("other"), prefix("def")],
                ..blank()
            },
            true,
            false,
        ),
        (
            Match {
                namespaces: vec![prefix("")],
                ..blank()
            },
            true,
            true,
        ),
        (
            Match {
                namespaces: vec![StringMatch::Presence],
                ..blank()
            },
            true,
            false,
        ),
        (
            Match {
                not_namespaces: vec![exact("default")],
                ..blank()
            },
            false,
            true,
        ),
        (
            Match {
                principals: vec![exact("td/ns/default/sa/curl")],
                ..blank()
            },
            true,
            false,
        ),
        (
            Match {
                principals: vec![exact("spiffe://td/ns/default/sa/curl")],
                ..blank()
            },
            false,
            false,
        ),
        (
            Match {
                principals: vec![suffix("/sa/curl")],
                ..blank()
            },
            true,
            false,
        ),
        (
            Match {
                principals: vec![StringMatch::Presence],
                ..blank()
            },
            true,
            false,
        ),
        (
            Match {
                principals: vec![prefix("")],
                ..blank()
            },
            true,
            false,
        ),
        (
            Match {
                not_principals: vec![StringMatch::Presence],
                ..blank()
            },
            false,
            true,
        ),
        (
            Match {
                service_accounts: account("default", "curl"),
                ..blank()
            },
            true,
            false,
        ),
        (
            Match {
                service_accounts: account("other", "curl"),
                ..blank()
            },
            false,
            false,
        ),
        (
            Match {
                not_service_accounts: account("default", "curl"),
                ..blank()
            },
            false,
            true,
        ),
        (
            Match {
                source_ips: nets("10.0.0.0/24"),
                ..blank()
            },
            true,
            true,
        ),
        (
            Match {
                source_ips: nets("10.0.1.0/24"),
                ..blank()
            },
            false,
            false,
        ),
        (
            Match {
                not_source_ips: nets("10.0.0.7/32"),
                ..blank()
            },
            false,
            false,
        ),
        (
            Match {
                destination_ips: nets("10.0.0.9/32"),
                ..blank()
            },
            true,
            true,
        ),
        (
            Match {
                not_destination_ips: nets("fd00::/8"),
                ..blank()
            },
            true,
            true,
        ),
        (
            Match {
                destination_ports: vec![80, 8080],
                ..blank()
            },
            true,
            true,
        ),
        (
            Match {
                not_destination_ports: vec![8080],
                ..blank()
            },
            false,
            false,
        ),
        (
            Match {
                namespaces: vec![exact("default")],
                destination_ports: vec![81],
                ..blank()
            },
            false,
            false,
        ),
        (blank(), false, false),
    ];
    for (part, with_identity, plaintext) in cases {
        let policies = [policy(Action::Allow, vec![vec![vec![part.clone()]]])];
        assert_eq!(
            judge(&policies, Some(&curl)).is_allowed(),
            with_identity,
            "{part:?}"
        );
        assert_eq!(
            judge(&policies, None).is_allowed(),
            plaintext,
            "plaintext: {part:?}"
        );
    }
}

#[test]
fn empty_rules_clauses_and_matches_mean_what_they_should() {
    let never: [Vec<Vec<Vec<Match>>>; 2] = [vec![], vec![vec![vec![Match::default()]]]];
    let always: [Vec<Vec<Vec<Match>>>; 2] = [vec![vec![]], vec![vec![vec![]]]];
    for rules in never {
        assert_eq!(
            judge(&[policy(Action::Deny, rules)], None),
            Verdict::Unrestricted
        );
    }
    for rules in always {
        let denied = judge(&[policy(Action::Deny, rules)], None);
        assert_eq!(
            denied.refusal().as_deref(),
            Some("explicitly denied by: ns/p")
        );
    }
}

#[test]
fn all_clauses_and_one_match_of_each_must_hold() {
    let port = |port| Match {
        destination_ports: vec![port],
        ..Match::default()
    };
    let from = |net| Match {
        source_ips: nets(net),
        ..Match::default()
    };
    let allowed = |rules| judge(&[policy(Action::Allow, rules)], None).is_allowed();
    assert!(allowed(vec![vec![
        vec![port(1), port(8080)],
        vec![from("10.0.0.0/8")]
    ]]));
    assert!(!allowed(vec![vec![
        vec![port(8080)],
        vec![from("11.0.0.0/8")]
    ]]));
    assert!(allowed(vec![vec![vec![port(1)]], vec![vec![port(8080)]]]));
}

#[test]
fn denials_win_and_allow_policies_restrict() {
    let everyone = || vec![vec![]];
    let nobody = Vec::new;
    let (allow, deny) = (
        policy(Action::Allow, everyone()),
        policy(Action::Deny, everyone()),
    );
    assert_eq!(judge(&[], None), Verdict::Unrestricted);
    assert!(!judge(&[allow.clone(), deny], None).is_allowed());
    assert!(judge(&[allow.clone(), policy(Action::Deny, nobody())], None).is_allowed());
    let refused = judge(&[policy(Action::Allow, nobody())], None);
    assert_eq!(
        refused.refusal().as_deref(),
        Some("allow policies exist, but none allowed")
    );
    assert!(judge(&[policy(Action::Allow, nobody()), allow], None).is_allowed());
}

#[test]
fn a_dry_run_decides_nothing() {
    let dry = |action, rules| {
        Arc::new(Policy {
            dry_run: true,
            ..(*policy(action, rules)).clone()
        })
    };
    assert_eq!(
        judge(&[dry(Action::Deny, vec![vec![]])], None),
        Verdict::Unrestricted
    );
    assert_eq!(
        judge(&[dry(Action::Allow, vec![])], None),
        Verdict::Unrestricted
    );
}

#[test]
fn what_cannot_be_read_narrows_an_allow_and_widens_a_deny() {
    let part = |ports: &[u16]| Match {
        destination_ports: ports.to_vec(),
        unreadable: true,
        ..Match::default()
    };
    let judged = |action, ports: &[u16]| {
        judge(&[policy(action, vec![vec![vec![part(ports)]]])], None).is_allowed()
    };
    assert!(!judged(Action::Allow, &[]));
    assert!(!judged(Action::Allow, &[8080]));
    assert!(!judged(Action::Deny, &[]));
    assert!(!judged(Action::Deny, &[8080]));
    assert!(judged(Action::Deny, &[1]));
}

#[test]
fn a_range_of_mapped_addresses_means_the_ipv4_addresses_in_it() {
    // range, holds for 10.0.0.7
    let cases = [
        ("::ffff:10.0.0.0/104", true),
        ("::ffff:10.0.0.7/128", true),
        ("::ffff:0.0.0.0/96", true),
        ("::ffff:11.0.0.0/104", false),
        ("::ffff:10.0.0.8/128", false),
        ("::/0", false),
        ("::ffff:10.0.0.0/90", false),
        ("0.0.0.0/0", true),
    ];
    for (range, holds) in cases {
        let part = Match {
            source_ips: nets(range),
            ..Match::default()
        };
        let denied = !judge(&[policy(Action::Deny, vec![vec![vec![part]]])], None).is_allowed();
        assert_eq!(denied, holds, "{range}");
    }
}

#[test]
fn a_verdict_tells_the_place_that_decided() {
    let port = |port| Match {
        destination_ports: vec![port],
        ..Match::default()
    };
    let rules = vec![
        vec![vec![port(1)]],
        vec![vec![port(1), port(8080)], vec![], vec![port(8080)]],
    ];
    // action, rules, what is told, what the access log says
    let cases = [
        (
            Action::Allow,
            rules.clone(),
            "allowed by: ns/p rules[1] clauses[0].matches[1] clauses[2].matches[0]",
            None,
        ),
        (
            Action::Deny,
            rules,
            "explicitly denied by: ns/p rules[1] clauses[0].matches[1] clauses[2].matches[0]",
            Some("explicitly denied by: ns/p"),
        ),
        (
            Action::Deny,
            vec![vec![]],
            "explicitly denied by: ns/p rules[0]",
            Some("explicitly denied by: ns/p"),
        ),
        (
            Action::Allow,
            vec![],
            "allow policies exist, but none allowed",
            Some("allow policies exist, but none allowed"),
        ),
        (Action::Deny, vec![], "allowed: no allow policies", None),
    ];
    for (action, rules, told, refusal) in cases {
        let verdict = judge(&[policy(action, rules)], None);
        assert_eq!(verdict.to_string(), told);
        assert_eq!(verdict.refusal().as_deref(), refusal);
    }
}

/// What is logged while `act` runs, as `LEVEL policy message`.
fn logged(act: impl FnOnce()) -> Vec<String> {
    use std::sync::Mutex;
    use tracing::field::{Field, Visit};
    use tracing_subscriber::layer::{Context, Layer, SubscriberExt};

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<String>>>);
    struct Line {
        policy: String,
        message: String,
    }
    impl Visit for Line {
        fn record_str(&mut self, field: &Field, value: &str) {
            assert_eq!(field.name(), "policy");
            self.policy = format!("{value:?} ");
        }
        fn record_debug(&mut self, _: &Field, value: &dyn fmt::Debug) {
            self.message = format!("{value:?}");
        }
    }
    impl<S: tracing::Subscriber> Layer<S> for Lines {
        fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
            let mut line = Line {
                policy: String::new(),
                message: String::new(),
            };
            event.record(&mut line);
            self.0.lock().unwrap().push(format!(
                "{} {}{}",
                event.metadata().level(),
                line.policy,
                line.message
            ));
        }
    }
    let lines = Lines::default();
    tracing::subscriber::with_default(tracing_subscriber::registry().with(lines.clone()), act);
    let lines = lines.0.lock().unwrap();
    lines.clone()
}

#[test]
fn what_was_decided_is_logged_dry_runs_too() {
    let (everyone, nobody) = (|| vec![vec![]], Vec::new);
    let dry = |action, rules| {
        Arc::new(Policy {
            dry_run: true,
            ..(*policy(action, rules)).clone()
        })
    };
    // policies, what is logged
    let cases: [(Vec<Arc<Policy>>, &[&str]); 7] = [
        (vec![], &["no allow policies, allow"]),
        (
            vec![dry(Action::Deny, everyone())],
            &[
                "\"ns/p\" dry-run: deny policy match",
                "no allow policies, allow",
            ],
        ),
        (
            vec![dry(Action::Allow, everyone())],
            &[
                "\"ns/p\" dry-run: allow policy match",
                "no allow policies, allow",
            ],
        ),
        (
            vec![dry(Action::Allow, nobody())],
            &[
                "dry-run: no allow policies match",
                "no allow policies, allow",
            ],
        ),
        (
            vec![
                dry(Action::Allow, nobody()),
                policy(Action::Allow, nobody()),
            ],
            &["no allow policies matched"],
        ),
        (
            vec![policy(Action::Allow, everyone())],
            &["\"ns/p\" allow policy match"],
        ),
        (
            vec![policy(Action::Deny, everyone())],
            &["\"ns/p\" deny policy match"],
        ),
    ];
    for (at_info, level) in [(false, "DEBUG"), (true, "INFO")] {
        log_at_info(at_info);
        for (policies, expected) in &cases {
            let expected: Vec<_> = expected
                .iter()
                .map(|line| format!("{level} {line}"))
                .collect();
            assert_eq!(
                logged(|| {
                    judge(policies, None);
                }),
                expected
            );
        }
    }
    log_at_info(false);
}
