//! Authorization policies as data.

use std::sync::Arc;

use ipnet::IpNet;

/// Which workloads a policy is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Every workload.
    Global,
    /// Every workload of the policy's namespace.
    Namespace,
    /// The workloads that name the policy.
    WorkloadSelector,
}

/// What a match means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Allow,
    Deny,
}

/// How a text is compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StringMatch {
    Exact(Arc<str>),
    Prefix(Arc<str>),
    Suffix(Arc<str>),
    /// Any text that is not empty.
    Presence,
}

/// A service account within a namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceAccount {
    pub namespace: Arc<str>,
    pub service_account: Arc<str>,
}

/// Attributes that must all hold; an empty list holds always. A list holds when one of its entries does, a `not_` list when none does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Match {
    pub namespaces: Vec<StringMatch>,
    pub not_namespaces: Vec<StringMatch>,
    pub service_accounts: Vec<ServiceAccount>,
    pub not_service_accounts: Vec<ServiceAccount>,
    pub principals: Vec<StringMatch>,
    pub not_principals: Vec<StringMatch>,
    pub source_ips: Vec<IpNet>,
    pub not_source_ips: Vec<IpNet>,
    pub destination_ips: Vec<IpNet>,
    pub not_destination_ips: Vec<IpNet>,
    pub destination_ports: Vec<u16>,
    pub not_destination_ports: Vec<u16>,
    /// A part that could not be read: the match never holds in an ALLOW and is as wide as the rest of it in a DENY.
    pub unreadable: bool,
}

/// Matches of which one must hold; without any it holds.
pub type Clause = Vec<Match>;

/// Clauses that must all hold.
pub type Rule = Vec<Clause>;

/// One policy record of the control plane.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// The name it came under in xDS; workloads refer to it by this, `namespace/name`.
    pub key: Arc<str>,
    pub name: Arc<str>,
    pub namespace: Arc<str>,
    pub scope: Scope,
    pub action: Action,
    pub rules: Vec<Rule>,
    pub dry_run: bool,
}
