//! What the policies say of one flow.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use hbone::Identity;
use ipnet::IpNet;

use super::model::{Action, Match, Policy, ServiceAccount, StringMatch};

/// Who wants to reach what.
#[derive(Clone, Copy, Debug)]
pub struct Context<'a> {
    /// What the peer proved; none for plaintext.
    pub identity: Option<&'a Identity>,
    pub src: SocketAddr,
    pub dst: SocketAddr,
}

/// The place in a policy that decided; counted from zero.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decider {
    /// `namespace/name`.
    pub policy: String,
    /// The name it came under in xDS.
    pub key: Arc<str>,
    pub rule: usize,
    /// For each clause of the rule the match that held; none for a clause that demands nothing.
    pub clauses: Vec<Option<usize>>,
}

impl fmt::Display for Decider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} rules[{}]", self.policy, self.rule)?;
        let held = self.clauses.iter().enumerate();
        for (clause, part) in held.filter_map(|(clause, part)| Some((clause, part.as_ref()?))) {
            write!(f, " clauses[{clause}].matches[{part}]")?;
        }
        Ok(())
    }
}

/// Whether a flow may pass, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// No ALLOW policy is there to restrict it.
    Unrestricted,
    Allowed(Decider),
    Denied(Decider),
    /// There are ALLOW policies, but none matches.
    NotAllowed,
    /// A policy that the workload names has not arrived.
    Missing(String),
    /// The first set of policies has not arrived.
    NotSynced,
}

impl Verdict {
    /// Whether the flow may pass.
    pub fn is_allowed(&self) -> bool {
        matches!(self, Self::Unrestricted | Self::Allowed(_))
    }

    /// Whether it may pass, once policy is known; an open flow need not end because something has yet to arrive.
    pub fn is_certain(&self) -> bool {
        !matches!(self, Self::Missing(_) | Self::NotSynced)
    }

    /// Why it may not pass.
    pub fn refusal(&self) -> Option<String> {
        match self {
            Self::Unrestricted | Self::Allowed(_) => None,
            Self::Denied(decider) => Some(format!("explicitly denied by: {}", decider.policy)),
            Self::NotAllowed => Some("allow policies exist, but none allowed".to_string()),
            Self::Missing(key) => Some(format!(
                "policy {key} has not arrived from the control plane yet"
            )),
            Self::NotSynced => {
                Some("policies have not arrived from the control plane yet".to_string())
            }
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unrestricted => f.write_str("allowed: no allow policies"),
            Self::Allowed(decider) => write!(f, "allowed by: {decider}"),
            Self::Denied(decider) => write!(f, "explicitly denied by: {decider}"),
            _ => f.write_str(&self.refusal().unwrap_or_default()),
        }
    }
}

/// Whether evaluation is logged at info instead of debug; a setting of the process, like its log level.
static LOG_AT_INFO: AtomicBool = AtomicBool::new(false);

/// Logs evaluation at info instead of debug.
pub fn log_at_info(on: bool) {
    LOG_AT_INFO.store(on, Ordering::Relaxed);
}

macro_rules! note {
    ($($event:tt)*) => {
        if LOG_AT_INFO.load(Ordering::Relaxed) {
            tracing::info!($($event)*);
        } else {
            tracing::debug!($($event)*);
        }
    };
}

/// Judges a flow by the policies that apply to its destination, in any order.
pub fn evaluate(policies: &[&Arc<Policy>], context: &Context<'_>) -> Verdict {
    let facts = Facts::of(context);
    let of = |action: Action, dry_run: bool| {
        policies
            .iter()
            .filter(move |policy| policy.action == action && policy.dry_run == dry_run)
    };
    for policy in of(Action::Deny, true).filter(|policy| matches(policy, &facts)) {
        note!(policy = name(policy), "dry-run: deny policy match");
    }
    for policy in of(Action::Deny, false) {
        if let Some(decider) = decider(policy, &facts) {
            note!(policy = decider.policy, "deny policy match");
            return Verdict::Denied(decider);
        }
    }
    let mut dry_run_matched = None;
    for policy in of(Action::Allow, true) {
        let matched = matches(policy, &facts);
        if matched {
            note!(policy = name(policy), "dry-run: allow policy match");
        }
        dry_run_matched = Some(dry_run_matched.unwrap_or(false) || matched);
    }
    if of(Action::Allow, false).next().is_none() {
        if dry_run_matched == Some(false) {
            note!("dry-run: no allow policies match");
        }
        note!("no allow policies, allow");
        return Verdict::Unrestricted;
    }
    for policy in of(Action::Allow, false) {
        if let Some(decider) = decider(policy, &facts) {
            note!(policy = decider.policy, "allow policy match");
            return Verdict::Allowed(decider);
        }
    }
    note!("no allow policies matched");
    Verdict::NotAllowed
}

fn name(policy: &Policy) -> String {
    format!("{}/{}", policy.namespace, policy.name)
}

fn matches(policy: &Policy, facts: &Facts<'_>) -> bool {
    matching_rule(policy, facts).is_some()
}

fn decider(policy: &Policy, facts: &Facts<'_>) -> Option<Decider> {
    let rule = matching_rule(policy, facts)?;
    let clauses = policy.rules.get(rule)?.iter();
    Some(Decider {
        policy: name(policy),
        key: policy.key.clone(),
        rule,
        clauses: clauses
            .map(|clause| matching_part(clause, policy.action, facts))
            .collect(),
    })
}

/// The first rule that matches: every clause of it, and of each clause one match.
fn matching_rule(policy: &Policy, facts: &Facts<'_>) -> Option<usize> {
    policy.rules.iter().position(|rule| {
        rule.iter().all(|clause| {
            clause.is_empty() || matching_part(clause, policy.action, facts).is_some()
        })
    })
}

fn matching_part(clause: &[Match], action: Action, facts: &Facts<'_>) -> Option<usize> {
    clause.iter().position(|part| holds(part, action, facts))
}

fn holds(part: &Match, action: Action, facts: &Facts<'_>) -> bool {
    if part.unreadable && action == Action::Allow {
        return false;
    }
    // A match that demands nothing holds never, unless what it demanded could not be read and it denies.
    if is_empty(part) {
        return part.unreadable;
    }
    let text = |wanted: &StringMatch| text_matches(wanted, facts.namespace);
    let who = |wanted: &StringMatch| {
        let principal = facts.principal;
        principal.is_some_and(|principal| text_matches(wanted, principal))
    };
    let account = |wanted: &ServiceAccount| {
        facts.principal.is_some()
            && facts.namespace == &*wanted.namespace
            && facts.service_account == &*wanted.service_account
    };
    let from = |net: &IpNet| contains(net, facts.src);
    let to = |net: &IpNet| contains(net, facts.dst);
    let port = |port: &u16| *port == facts.port;
    pair(&part.namespaces, &part.not_namespaces, text)
        && pair(&part.service_accounts, &part.not_service_accounts, account)
        && pair(&part.principals, &part.not_principals, who)
        && pair(&part.source_ips, &part.not_source_ips, from)
        && pair(&part.destination_ips, &part.not_destination_ips, to)
        && pair(&part.destination_ports, &part.not_destination_ports, port)
}

/// What matches are held against, taken from the context once.
struct Facts<'a> {
    /// Empty without an identity, like the service account.
    namespace: &'a str,
    service_account: &'a str,
    principal: Option<&'a str>,
    src: IpAddr,
    dst: IpAddr,
    port: u16,
}

impl<'a> Facts<'a> {
    fn of(context: &Context<'a>) -> Self {
        Self {
            namespace: context.identity.map_or("", Identity::namespace),
            service_account: context.identity.map_or("", Identity::service_account),
            principal: context.identity.map(Identity::principal),
            src: context.src.ip().to_canonical(),
            dst: context.dst.ip().to_canonical(),
            port: context.dst.port(),
        }
    }
}

fn pair<T>(wanted: &[T], unwanted: &[T], holds: impl Fn(&T) -> bool) -> bool {
    (wanted.is_empty() || wanted.iter().any(&holds)) && !unwanted.iter().any(&holds)
}

fn is_empty(part: &Match) -> bool {
    let Match {
        namespaces,
        not_namespaces,
        service_accounts,
        not_service_accounts,
        principals,
        not_principals,
        source_ips,
        not_source_ips,
        destination_ips,
        not_destination_ips,
        destination_ports,
        not_destination_ports,
        unreadable: _,
    } = part;
    let texts = [namespaces, not_namespaces, principals, not_principals];
    let ranges = [
        source_ips,
        not_source_ips,
        destination_ips,
        not_destination_ips,
    ];
    texts.into_iter().all(Vec::is_empty)
        && ranges.into_iter().all(Vec::is_empty)
        && service_accounts.is_empty()
        && not_service_accounts.is_empty()
        && destination_ports.is_empty()
        && not_destination_ports.is_empty()
}

fn text_matches(wanted: &StringMatch, text: &str) -> bool {
    match wanted {
        StringMatch::Exact(exact) => text == &**exact,
        StringMatch::Prefix(prefix) => text.starts_with(&**prefix),
        StringMatch::Suffix(suffix) => text.ends_with(&**suffix),
        StringMatch::Presence => !text.is_empty(),
    }
}

/// Whether a range holds a canonical address; a range of mapped addresses means the IPv4 addresses in it.
fn contains(net: &IpNet, ip: IpAddr) -> bool {
    match (net, ip) {
        (IpNet::V6(mapped), IpAddr::V4(ip)) if mapped.addr().to_ipv4_mapped().is_some() => {
            mapped.prefix_len() >= 96 && mapped.contains(&ip.to_ipv6_mapped())
        }
        _ => net.contains(&ip),
    }
}

#[cfg(test)]
#[path = "evaluate_tests.rs"]
mod tests;
