//! The kinds of objects that are served, and how they are called in paths.

use serde_json::{Value, json};

/// One kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resource {
    /// Empty for the core group.
    pub group: &'static str,
    pub version: &'static str,
    pub plural: &'static str,
    pub kind: &'static str,
    pub namespaced: bool,
}

const fn resource(
    group: &'static str,
    version: &'static str,
    plural: &'static str,
    kind: &'static str,
    namespaced: bool,
) -> Resource {
    Resource {
        group,
        version,
        plural,
        kind,
        namespaced,
    }
}

const GATEWAY: &str = "gateway.networking.k8s.io";
const NETWORKING: &str = "networking.istio.io";
const SECURITY: &str = "security.istio.io";

/// Everything that is served.
pub const RESOURCES: [Resource; 28] = [
    resource("", "v1", "configmaps", "ConfigMap", true),
    resource("", "v1", "endpoints", "Endpoints", true),
    resource("", "v1", "events", "Event", true),
    resource("", "v1", "namespaces", "Namespace", false),
    resource("", "v1", "nodes", "Node", false),
    resource("", "v1", "pods", "Pod", true),
    resource("", "v1", "secrets", "Secret", true),
    resource("", "v1", "serviceaccounts", "ServiceAccount", true),
    resource("", "v1", "services", "Service", true),
    resource("apps", "v1", "daemonsets", "DaemonSet", true),
    resource("apps", "v1", "deployments", "Deployment", true),
    resource("apps", "v1", "replicasets", "ReplicaSet", true),
    resource("apps", "v1", "statefulsets", "StatefulSet", true),
    resource("batch", "v1", "jobs", "Job", true),
    resource("coordination.k8s.io", "v1", "leases", "Lease", true),
    resource(
        "discovery.k8s.io",
        "v1",
        "endpointslices",
        "EndpointSlice",
        true,
    ),
    resource(GATEWAY, "v1", "gatewayclasses", "GatewayClass", false),
    resource(GATEWAY, "v1", "gateways", "Gateway", true),
    resource(GATEWAY, "v1", "httproutes", "HTTPRoute", true),
    resource(
        GATEWAY,
        "v1beta1",
        "referencegrants",
        "ReferenceGrant",
        true,
    ),
    resource(
        NETWORKING,
        "v1",
        "destinationrules",
        "DestinationRule",
        true,
    ),
    resource(NETWORKING, "v1", "serviceentries", "ServiceEntry", true),
    resource(NETWORKING, "v1", "workloadentries", "WorkloadEntry", true),
    resource(
        SECURITY,
        "v1",
        "authorizationpolicies",
        "AuthorizationPolicy",
        true,
    ),
    resource(
        SECURITY,
        "v1",
        "peerauthentications",
        "PeerAuthentication",
        true,
    ),
    resource(
        SECURITY,
        "v1",
        "requestauthentications",
        "RequestAuthentication",
        true,
    ),
    resource("telemetry.istio.io", "v1", "telemetries", "Telemetry", true),
    resource(
        "rbac.authorization.k8s.io",
        "v1",
        "clusterroles",
        "ClusterRole",
        false,
    ),
];

impl Resource {
    /// The `apiVersion` of its objects.
    pub fn api_version(&self) -> String {
        match self.group {
            "" => self.version.to_string(),
            group => format!("{group}/{}", self.version),
        }
    }

    /// The kind of an object, whatever version of its group it is written in.
    pub fn of(object: &Value) -> Option<&'static Self> {
        let api_version = object["apiVersion"].as_str()?;
        let group = api_version.split_once('/').map_or("", |(group, _)| group);
        let kind = object["kind"].as_str()?;
        RESOURCES
            .iter()
            .find(|known| known.group == group && known.kind == kind)
    }

    /// The kind that a path calls by its plural.
    pub fn named(group: &str, plural: &str) -> Option<&'static Self> {
        RESOURCES
            .iter()
            .find(|known| known.group == group && known.plural == plural)
    }
}

/// The answer to a client that asks what is served, at a path without a resource.
pub fn discovery(path: &str) -> Option<Value> {
    let mut groups: Vec<_> = RESOURCES
        .iter()
        .map(|known| (known.group, known.version))
        .filter(|(group, _)| !group.is_empty())
        .collect();
    groups.sort_unstable();
    groups.dedup();
    let version = |(group, version): &(&str, &str)| json!({"groupVersion": format!("{group}/{version}"), "version": version});
    match path.trim_matches('/') {
        "api" => Some(json!({"kind": "APIVersions", "versions": ["v1"]})),
        "apis" => {
            let group = |known: &(&str, &str)| json!({"name": known.0, "versions": [version(known)], "preferredVersion": version(known)});
            let groups: Vec<_> = groups.iter().map(group).collect();
            Some(json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}))
        }
        "version" => Some(json!({"major": "1", "minor": "37", "gitVersion": "v1.37.0-warren-lab"})),
        path => {
            let api_version = path.strip_prefix("apis/").or(path.strip_prefix("api/"))?;
            let served = RESOURCES
                .iter()
                .filter(|known| known.api_version() == api_version);
            let resources: Vec<_> = served
                .map(|known| {
                    json!({"name": known.plural, "singularName": known.kind.to_lowercase(), "kind": known.kind,
                        "namespaced": known.namespaced,
                        "verbs": ["create", "delete", "get", "list", "patch", "update", "watch"]})
                })
                .collect();
            (!resources.is_empty()).then(|| {
                json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": api_version, "resources": resources})
            })
        }
    }
}
