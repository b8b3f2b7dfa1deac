//! PeerAuthentications as policies that deny what has no identity.

use crate::control::kubernetes::{Metadata, Mode, PeerAuthentication, Pod, selects};
use crate::control::manifests::Objects;
use crate::proto::security as proto;

/// The policy that denies all plaintext.
const STATIC: &str = "istio_converted_static_strict";

// Values of the wire's enumerations.
const SELECTOR: i32 = 2;
const DENY: i32 = 1;

/// Every policy that follows from the PeerAuthentications.
pub fn authorizations(objects: &Objects, root_namespace: &str) -> Vec<proto::Authorization> {
    if objects.peers.is_empty() {
        return Vec::new();
    }
    let strict = record(root_namespace, STATIC, vec![rule(vec![no_identity()])]);
    let derived = objects
        .peers
        .values()
        .filter(|peer| is_workload_level(peer, root_namespace));
    let derived = derived.filter_map(|peer| {
        let rules = port_rules(peer, base_mode(peer, objects, root_namespace))?;
        Some(record(
            &peer.metadata.namespace,
            &derived_name(&peer.metadata),
            rules,
        ))
    });
    std::iter::once(strict).chain(derived).collect()
}

/// The resource name of the policy that a pod is under because of PeerAuthentications.
pub fn policy_for(pod: &Pod, objects: &Objects, root_namespace: &str) -> Option<String> {
    let namespace = &pod.metadata.namespace;
    let mine = |peer: &&PeerAuthentication| {
        let selector = peer.spec.selector.as_ref();
        peer.metadata.namespace == *namespace
            && is_workload_level(peer, root_namespace)
            && selector
                .is_some_and(|selector| selects(&selector.match_labels, &pod.metadata.labels))
    };
    let peer = oldest(objects.peers.values().filter(mine));
    let mode = match peer {
        Some(peer) => base_mode(peer, objects, root_namespace),
        None => inherited(namespace, objects, root_namespace),
    };
    if let Some(peer) = peer.filter(|peer| port_rules(peer, mode).is_some()) {
        return Some(format!("{namespace}/{}", derived_name(&peer.metadata)));
    }
    (mode == Mode::Strict).then(|| format!("{root_namespace}/{STATIC}"))
}

fn derived_name(metadata: &Metadata) -> String {
    format!("converted_peer_authentication_{}", metadata.name)
}

fn is_workload_level(peer: &PeerAuthentication, root_namespace: &str) -> bool {
    peer.metadata.namespace != root_namespace
        && peer
            .spec
            .selector
            .as_ref()
            .is_some_and(|selector| !selector.match_labels.is_empty())
}

/// What a PeerAuthentication of workload level says of the ports that it does not name.
fn base_mode(peer: &PeerAuthentication, objects: &Objects, root_namespace: &str) -> Mode {
    match peer.spec.mtls.as_ref().map(|mtls| mtls.mode) {
        None | Some(Mode::Unset) => inherited(&peer.metadata.namespace, objects, root_namespace),
        Some(mode) => mode,
    }
}

/// What the namespace says, else the mesh, else plaintext is welcome.
fn inherited(namespace: &str, objects: &Objects, root_namespace: &str) -> Mode {
    let level = |namespace: &str| {
        let whole = |peer: &&PeerAuthentication| {
            let selector = peer.spec.selector.as_ref();
            peer.metadata.namespace == namespace
                && selector.is_none_or(|selector| selector.match_labels.is_empty())
        };
        let mode = oldest(objects.peers.values().filter(whole))?
            .spec
            .mtls
            .as_ref()?
            .mode;
        (mode != Mode::Unset).then_some(mode)
    };
    level(namespace)
        .or_else(|| level(root_namespace))
        .unwrap_or(Mode::Permissive)
}

fn oldest<'a>(
    peers: impl Iterator<Item = &'a PeerAuthentication>,
) -> Option<&'a PeerAuthentication> {
    peers.min_by_key(|peer| {
        (
            peer.metadata.creation_timestamp.clone(),
            peer.metadata.name.clone(),
        )
    })
}

/// The rules for ports that differ from the rest; none when they do not.
fn port_rules(peer: &PeerAuthentication, base: Mode) -> Option<Vec<proto::Rule>> {
    let ports = |wanted: fn(Mode) -> bool| {
        let matching = peer
            .spec
            .port_level_mtls
            .iter()
            .filter(move |(_, mtls)| wanted(mtls.mode));
        matching
            .map(|(port, _)| u32::from(*port))
            .collect::<Vec<_>>()
    };
    if base == Mode::Strict {
        let exempt = ports(|mode| matches!(mode, Mode::Permissive | Mode::Disable));
        let one = |port| proto::Match {
            not_destination_ports: vec![port],
            ..Default::default()
        };
        let clauses = std::iter::once(no_identity()).chain(exempt.iter().map(|port| one(*port)));
        return (!exempt.is_empty()).then(|| vec![rule(clauses.collect())]);
    }
    let strict = ports(|mode| mode == Mode::Strict);
    let one = |port: &u32| {
        rule(vec![proto::Match {
            destination_ports: vec![*port],
            ..no_identity()
        }])
    };
    (!strict.is_empty()).then(|| strict.iter().map(one).collect())
}

fn record(namespace: &str, name: &str, rules: Vec<proto::Rule>) -> proto::Authorization {
    proto::Authorization {
        name: name.to_string(),
        namespace: namespace.to_string(),
        scope: SELECTOR,
        action: DENY,
        rules,
        dry_run: false,
    }
}

/// A rule of clauses of one match each, all of which must hold.
fn rule(matches: Vec<proto::Match>) -> proto::Rule {
    proto::Rule {
        clauses: matches
            .into_iter()
            .map(|part| proto::Clause {
                matches: vec![part],
            })
            .collect(),
    }
}

fn no_identity() -> proto::Match {
    let anyone = proto::StringMatch {
        match_type: Some(proto::string_match::MatchType::Presence(())),
    };
    proto::Match {
        not_principals: vec![anyone],
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests_support::read;
    use super::*;

    const POD: &str =
        "apiVersion: v1\nkind: Pod\nmetadata: {name: p, namespace: a, labels: {app: web}}\n";

    fn peer(namespace: &str, name: &str, spec: &str) -> String {
        format!(
            "---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec: {spec}\n"
        )
    }

    fn of_pod(peers: &[String]) -> Option<String> {
        let objects = read(&format!("{POD}{}", peers.concat()));
        policy_for(
            objects.pods.values().next().unwrap(),
            &objects,
            "istio-system",
        )
    }

    const MINE: &str = "selector: {matchLabels: {app: web}}";

    #[test]
    fn the_closest_level_that_says_anything_counts() {
        let strict = "{mtls: {mode: STRICT}}";
        let permissive = "{mtls: {mode: PERMISSIVE}}";
        let everywhere = Some("istio-system/istio_converted_static_strict".to_string());
        let mesh = || peer("istio-system", "default", strict);
        assert_eq!(of_pod(&[]), None);
        assert_eq!(of_pod(&[mesh()]), everywhere);
        assert_eq!(of_pod(&[peer("b", "default", strict)]), None);
        assert_eq!(of_pod(&[mesh(), peer("a", "default", permissive)]), None);
        assert_eq!(
            of_pod(&[mesh(), peer("a", "default", "{mtls: {mode: UNSET}}")]),
            everywhere
        );
        assert_eq!(
            of_pod(&[
                mesh(),
                peer("a", "x", &format!("{{{MINE}, mtls: {{mode: DISABLE}}}}"))
            ]),
            None
        );
        assert_eq!(
            of_pod(&[peer(
                "a",
                "x",
                &format!("{{{MINE}, mtls: {{mode: STRICT}}}}")
            )]),
            everywhere
        );
        assert_eq!(
            of_pod(&[peer(
                "a",
                "x",
                "{selector: {matchLabels: {app: db}}, mtls: {mode: STRICT}}"
            )]),
            None
        );
    }

    #[test]
    fn ports_that_differ_get_a_policy_of_their_own() {
        let derived = Some("a/converted_peer_authentication_x".to_string());
        let spec = |base: &str, port: &str| {
            format!("{{{MINE}, mtls: {{mode: {base}}}, portLevelMtls: {{80: {{mode: {port}}}}}}}")
        };
        let of = |base: &str, port: &str| of_pod(&[peer("a", "x", &spec(base, port))]);
        assert_eq!(of("STRICT", "PERMISSIVE"), derived);
        assert_eq!(of("STRICT", "DISABLE"), derived);
        assert_eq!(of("PERMISSIVE", "STRICT"), derived);
        assert_eq!(of("PERMISSIVE", "DISABLE"), None);
        assert_eq!(
            of("STRICT", "STRICT"),
            Some("istio-system/istio_converted_static_strict".to_string())
        );
        let objects = read(&peer("a", "x", &spec("STRICT", "DISABLE")));
        let all = authorizations(&objects, "istio-system");
        assert_eq!(all.len(), 2);
        let clauses = &all[1].rules[0].clauses;
        assert_eq!(clauses[1].matches[0].not_destination_ports, [80]);
        assert_eq!(clauses[0].matches[0].not_principals.len(), 1);
        assert!(authorizations(&read(POD), "istio-system").is_empty());
    }

    /// The rules of the policy that follows from a PeerAuthentication of its own, in short.
    fn derived(peers: &[String]) -> Option<Vec<Vec<String>>> {
        let objects = read(&peers.concat());
        let all = authorizations(&objects, "istio-system");
        let mine = all.into_iter().find(|record| record.name != STATIC)?;
        assert_eq!(
            (&*mine.namespace, &*mine.name, mine.scope, mine.action),
            ("a", "converted_peer_authentication_x", SELECTOR, DENY)
        );
        let told = |clause: &proto::Clause| {
            let [part] = &clause.matches[..] else {
                panic!("{clause:?}");
            };
            let nobody = if part.not_principals.is_empty() {
                ""
            } else {
                "nobody"
            };
            let (on, but) = (&part.destination_ports, &part.not_destination_ports);
            format!("{nobody} on {on:?} but {but:?}")
        };
        let rules = mine.rules.iter();
        Some(
            rules
                .map(|rule| rule.clauses.iter().map(told).collect())
                .collect(),
        )
    }

    #[test]
    fn one_policy_says_all_that_differs_by_port() {
        let own = |mtls: &str, ports: &str| {
            peer(
                "a",
                "x",
                &format!("{{{MINE}, {mtls} portLevelMtls: {{{ports}}}}}"),
            )
        };
        let of = |mode: &str| format!("mtls: {{mode: {mode}}},");
        let mesh = || peer("istio-system", "default", "{mtls: {mode: STRICT}}");
        let two = "80: {mode: PERMISSIVE}, 81: {mode: DISABLE}, 82: {mode: STRICT}";
        let strict_but = vec![vec![
            "nobody on [] but []".to_string(),
            " on [] but [80]".to_string(),
            " on [] but [81]".to_string(),
        ]];
        let only_82 = vec![vec!["nobody on [82] but []".to_string()]];
        assert_eq!(
            derived(&[own(&of("STRICT"), two)]),
            Some(strict_but.clone())
        );
        assert_eq!(
            derived(&[own(&of("PERMISSIVE"), two)]),
            Some(only_82.clone())
        );
        assert_eq!(derived(&[own("", two)]), Some(only_82));
        // What is unset comes from the mesh, and exemptions from that count whichever they are.
        assert_eq!(derived(&[mesh(), own("", two)]), Some(strict_but.clone()));
        assert_eq!(derived(&[mesh(), own(&of("UNSET"), two)]), Some(strict_but));
        let disabled = derived(&[mesh(), own("", "80: {mode: DISABLE}")]).unwrap();
        assert_eq!(disabled[0][1], " on [] but [80]");
        // Ports that are as the rest need nothing.
        assert_eq!(derived(&[mesh(), own("", "80: {mode: STRICT}")]), None);
        assert_eq!(derived(&[mesh(), own("", "80: {mode: UNSET}")]), None);
        assert_eq!(
            derived(&[own(&of("DISABLE"), "80: {mode: PERMISSIVE}")]),
            None
        );
    }

    #[test]
    fn the_oldest_of_a_level_counts_and_the_mesh_has_no_selectors() {
        let aged = |name: &str, year: &str, mode: &str| {
            peer("a", name, &format!("{{mtls: {{mode: {mode}}}}}")).replace(
                "namespace: a}",
                &format!("namespace: a, creationTimestamp: '{year}-01-01T00:00:00Z'}}"),
            )
        };
        let strict = Some("istio-system/istio_converted_static_strict".to_string());
        let (older, newer) = ("2024", "2025");
        assert_eq!(
            of_pod(&[aged("b", older, "STRICT"), aged("a", newer, "DISABLE")]),
            strict
        );
        assert_eq!(
            of_pod(&[aged("b", newer, "STRICT"), aged("a", older, "DISABLE")]),
            None
        );
        let of_root = peer(
            "istio-system",
            "x",
            &format!("{{{MINE}, mtls: {{mode: STRICT}}}}"),
        );
        assert_eq!(of_pod(&[of_root]), None);
    }
}
