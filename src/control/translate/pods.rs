//! Pods as workloads.

use std::collections::BTreeMap;
use std::net::IpAddr;

use super::services::{hostname, is_tcp, octets};
use super::{Settings, peers};
use crate::control::kubernetes::{Container, Metadata, Pod, PortReference, Service, selects};
use crate::control::manifests::Objects;
use crate::proto::workload as proto;

// Values of the wire's enumerations.
const HBONE: i32 = 1;
const POD: i32 = 2;
const HOST_NETWORK: i32 = 1;
const UNHEALTHY: i32 = 1;

/// A pod's record; none while it has no address or once it has ended.
pub fn workload(pod: &Pod, objects: &Objects, settings: &Settings) -> Option<proto::Workload> {
    if matches!(&*pod.status.phase, "Succeeded" | "Failed") {
        return None;
    }
    let texts = match &pod.status.pod_ips[..] {
        [] => vec![&pod.status.pod_ip],
        several => several.iter().map(|entry| &entry.ip).collect(),
    };
    let addresses: Vec<IpAddr> = texts
        .iter()
        .map(|ip| ip.parse().ok())
        .collect::<Option<_>>()?;
    let metadata = &pod.metadata;
    let label = |key: &str| metadata.labels.get(key).cloned();
    let (workload_name, namespace) = (workload_name(metadata), metadata.namespace.clone());
    let ready = pod
        .status
        .conditions
        .iter()
        .any(|known| known.r#type == "Ready" && known.status == "True");
    let native = label("networking.istio.io/tunnel")
        .is_some_and(|tunnels| tunnels.split(',').any(|one| one == "http"));
    let captured = metadata
        .annotations
        .get("ambient.istio.io/redirection")
        .is_some_and(|state| state == "enabled");
    let account = &pod.spec.service_account_name;
    Some(proto::Workload {
        uid: format!("{}//Pod/{namespace}/{}", settings.cluster_id, metadata.name),
        name: metadata.name.clone(),
        addresses: addresses.into_iter().map(octets).collect(),
        network: settings.network.clone(),
        tunnel_protocol: if native || captured { HBONE } else { 0 },
        native_tunnel: native,
        trust_domain: Some(&settings.trust_domain)
            .filter(|domain| *domain != "cluster.local")
            .cloned()
            .unwrap_or_default(),
        service_account: if account.is_empty() {
            "default".to_string()
        } else {
            account.clone()
        },
        node: pod.spec.node_name.clone(),
        canonical_name: label("service.istio.io/canonical-name")
            .or_else(|| label("app.kubernetes.io/name"))
            .or_else(|| label("app"))
            .unwrap_or_else(|| workload_name.clone()),
        canonical_revision: label("service.istio.io/canonical-revision")
            .or_else(|| label("app.kubernetes.io/version"))
            .or_else(|| label("version"))
            .unwrap_or_else(|| "latest".to_string()),
        workload_type: POD,
        workload_name,
        authorization_policies: policies(pod, objects, settings),
        status: if ready && metadata.deletion_timestamp.is_none() {
            0
        } else {
            UNHEALTHY
        },
        cluster_id: settings.cluster_id.clone(),
        services: services(pod, objects, settings),
        locality: locality(pod, objects),
        network_mode: if pod.spec.host_network {
            HOST_NETWORK
        } else {
            0
        },
        namespace,
        ..Default::default()
    })
}

/// What made the pod: the name of its deployment, cron job and so on, else its own.
fn workload_name(metadata: &Metadata) -> String {
    if let Some(name) = metadata.labels.get("service.istio.io/workload-name") {
        return name.clone();
    }
    let owner = metadata
        .owner_references
        .iter()
        .find(|owner| owner.controller);
    let Some(owner) = owner.filter(|_| !metadata.generate_name.is_empty()) else {
        return metadata.name.clone();
    };
    match &*owner.kind {
        "ReplicaSet" => {
            let hash = ["pod-template-hash", "rollouts-pod-template-hash"];
            let hash = hash.iter().find_map(|key| metadata.labels.get(*key));
            let trimmed = hash.and_then(|hash| owner.name.strip_suffix(&format!("-{hash}")));
            trimmed.unwrap_or(&owner.name).to_string()
        }
        "ReplicationController" => metadata
            .labels
            .get("deploymentconfig")
            .unwrap_or(&owner.name)
            .clone(),
        "Job" => match owner.name.rsplit_once('-') {
            Some((name, time))
                if (8..=10).contains(&time.len()) && time.bytes().all(|b| b.is_ascii_digit()) =>
            {
                name.to_string()
            }
            _ => owner.name.clone(),
        },
        _ => owner.name.clone(),
    }
}

fn services(
    pod: &Pod,
    objects: &Objects,
    settings: &Settings,
) -> BTreeMap<String, proto::PortList> {
    let mine = objects.services.values().filter(|service| {
        let selector = &service.spec.selector;
        service.metadata.namespace == pod.metadata.namespace
            && service.spec.r#type != "ExternalName"
            && !selector.is_empty()
            && selects(selector, &pod.metadata.labels)
    });
    let entry = |service: &Service| {
        let key = format!(
            "{}/{}",
            service.metadata.namespace,
            hostname(service, settings)
        );
        (
            key,
            proto::PortList {
                ports: ports(pod, service),
            },
        )
    };
    mine.map(entry).collect()
}

/// A service's ports as this pod serves them; a named port that it does not have is left out.
fn ports(pod: &Pod, service: &Service) -> Vec<proto::Port> {
    let lasting = |container: &&Container| container.restart_policy == "Always";
    let containers = || {
        pod.spec
            .containers
            .iter()
            .chain(pod.spec.init_containers.iter().filter(lasting))
    };
    let named = |name: &str| {
        let mut all = containers().flat_map(|container| &container.ports);
        let known = all
            .find(|port| port.name == name && (port.protocol.is_empty() || port.protocol == "TCP"));
        known.map(|port| port.container_port)
    };
    let tcp = service.spec.ports.iter().filter(|port| is_tcp(port));
    tcp.filter_map(|port| {
        let target = match &port.target_port {
            None => Some(port.port),
            Some(PortReference::Number(number)) => Some(*number),
            Some(PortReference::Name(name)) => named(name),
        };
        Some(proto::Port {
            service_port: port.port.into(),
            target_port: target?.into(),
            app_protocol: 0,
        })
    })
    .collect()
}

fn policies(pod: &Pod, objects: &Objects, settings: &Settings) -> Vec<String> {
    let selected = objects.policies.values().filter(|policy| {
        let namespace = &policy.metadata.namespace;
        let selector = policy.spec.selector.as_ref();
        (*namespace == pod.metadata.namespace || *namespace == settings.root_namespace)
            && selector
                .is_some_and(|selector| selects(&selector.match_labels, &pod.metadata.labels))
            && super::policies::is_sent(policy)
    });
    let mut keys: Vec<_> = selected
        .map(|policy| format!("{}/{}", policy.metadata.namespace, policy.metadata.name))
        .collect();
    keys.extend(peers::policy_for(pod, objects, &settings.root_namespace));
    keys.sort();
    keys
}

fn locality(pod: &Pod, objects: &Objects) -> Option<proto::Locality> {
    let labels = &objects.nodes.get(&pod.spec.node_name)?.metadata.labels;
    let label = |key: &str| labels.get(key).cloned().unwrap_or_default();
    let locality = proto::Locality {
        region: label("topology.kubernetes.io/region"),
        zone: label("topology.kubernetes.io/zone"),
        subzone: label("topology.istio.io/subzone"),
    };
    (locality != proto::Locality::default()).then_some(locality)
}

#[cfg(test)]
mod tests {
    use super::super::tests_support::{read, settings};
    use super::*;

    const POD: &str = "apiVersion: v1
kind: Pod
metadata:
  name: web-5b549b49b8-sf5qz
  generateName: web-5b549b49b8-
  namespace: a
  labels: {app: web, version: v2, pod-template-hash: 5b549b49b8}
  annotations: {ambient.istio.io/redirection: enabled}
  ownerReferences: [{kind: ReplicaSet, name: web-5b549b49b8, controller: true}]
spec:
  nodeName: n1
  serviceAccountName: web
  containers: [{ports: [{name: http, containerPort: 8080}]}]
status:
  podIP: 10.0.0.9
  conditions: [{type: Ready, status: 'True'}]
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: a}
spec: {selector: {app: web}, ports: [{port: 80, targetPort: http}, {port: 81, targetPort: missing}, {port: 82, targetPort: 9}]}
---
apiVersion: v1
kind: Service
metadata: {name: other, namespace: b}
spec: {selector: {app: web}, ports: [{port: 80}]}
---
apiVersion: v1
kind: Node
metadata: {name: n1, labels: {topology.kubernetes.io/zone: z1}}
";

    fn translated(text: &str) -> Option<proto::Workload> {
        let objects = read(text);
        workload(objects.pods.values().next().unwrap(), &objects, &settings())
    }

    #[test]
    fn a_pod_is_named_placed_and_part_of_its_services() {
        let web = translated(POD).unwrap();
        assert_eq!(web.uid, "Kubernetes//Pod/a/web-5b549b49b8-sf5qz");
        assert_eq!(
            (
                &*web.workload_name,
                &*web.canonical_name,
                &*web.canonical_revision
            ),
            ("web", "web", "v2")
        );
        assert_eq!(
            (web.tunnel_protocol, web.status, web.native_tunnel),
            (1, 0, false)
        );
        assert_eq!(web.addresses, [vec![10, 0, 0, 9]]);
        assert_eq!(web.locality.unwrap().zone, "z1");
        let services: Vec<_> = web.services.keys().cloned().collect();
        assert_eq!(services, ["a/web.a.svc.cluster.local"]);
        let ports: Vec<_> = web.services[&services[0]]
            .ports
            .iter()
            .map(|p| (p.service_port, p.target_port))
            .collect();
        assert_eq!(ports, [(80, 8080), (82, 9)]);
    }

    #[test]
    fn variations() {
        let with = |from: &str, to: &str| translated(&POD.replace(from, to));
        assert_eq!(
            with("redirection: enabled", "redirection: pending")
                .unwrap()
                .tunnel_protocol,
            0
        );
        assert_eq!(with("status: 'True'", "status: 'False'").unwrap().status, 1);
        let both = "podIP: 10.0.0.9\n  podIPs: [{ip: 10.0.0.9}, {ip: 'fd00::9'}]";
        let lengths = |pod: proto::Workload| pod.addresses.iter().map(Vec::len).collect::<Vec<_>>();
        assert_eq!(
            with("podIP: 10.0.0.9", both).map(lengths),
            Some(vec![4, 16])
        );
        assert_eq!(with("podIP: 10.0.0.9", "podIP: ''"), None);
        assert_eq!(
            with("podIP: 10.0.0.9", "phase: Failed\n  podIP: 10.0.0.9"),
            None
        );
        assert_eq!(
            with(
                "kind: ReplicaSet, name: web-5b549b49b8",
                "kind: Job, name: batch-28391234"
            )
            .unwrap()
            .workload_name,
            "batch"
        );
        assert_eq!(
            with("  generateName: web-5b549b49b8-\n", "")
                .unwrap()
                .workload_name,
            "web-5b549b49b8-sf5qz"
        );
        assert_eq!(
            with("serviceAccountName: web", "hostNetwork: true")
                .unwrap()
                .service_account,
            "default"
        );
        assert_eq!(
            with(
                "app: web, version: v2,",
                "networking.istio.io/tunnel: http,"
            )
            .unwrap()
            .canonical_revision,
            "latest"
        );
    }

    #[test]
    fn selector_policies_are_listed_by_those_they_select() {
        let policy = |namespace: &str, name: &str, label: &str| {
            format!(
                "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec: {{selector: {{matchLabels: {{app: {label}}}}}}}\n"
            )
        };
        let text = format!(
            "{POD}{}{}{}{}",
            policy("a", "mine", "web"),
            policy("a", "others", "db"),
            policy("b", "elsewhere", "web"),
            policy("istio-system", "mesh", "web")
        );
        assert_eq!(
            translated(&text).unwrap().authorization_policies,
            ["a/mine", "istio-system/mesh"]
        );
    }
}
