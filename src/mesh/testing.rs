//! Small builders of workloads, services and policies for tests.

use std::sync::Arc;

use hbone::Identity;

use super::service::{Service, Visibility};
use super::store::{AddressResource, Store};
use super::workload::{
    HealthStatus, NamespacedHostname, NetworkAddress, NetworkMode, Protocol, Workload, WorkloadType,
};

/// An HBONE pod of `namespace` on node `n1` whose service account is its name.
pub fn pod(namespace: &str, name: &str, ip: &str) -> Workload {
    Workload {
        uid: format!("Kubernetes//Pod/{namespace}/{name}").into(),
        name: name.into(),
        namespace: namespace.into(),
        identity: Identity::new("cluster.local", namespace, name),
        addresses: vec![ip.parse().unwrap()].into(),
        network: "".into(),
        hostname: "".into(),
        node: "n1".into(),
        cluster_id: "Kubernetes".into(),
        protocol: Protocol::Hbone,
        network_mode: NetworkMode::Standard,
        status: HealthStatus::Healthy,
        workload_type: WorkloadType::Deployment,
        workload_name: name.into(),
        canonical_name: name.into(),
        canonical_revision: "v1".into(),
        locality: Arc::default(),
        waypoint: None,
        network_gateway: None,
        application_tunnel: None,
        native_tunnel: false,
        authorization_policies: vec![],
        services: Default::default(),
        capacity: 1,
    }
}

/// A service `name.namespace.svc.cluster.local` with port 80 to 8080.
pub fn service(namespace: &str, name: &str, vip: &str) -> Service {
    Service {
        name: name.into(),
        namespace: namespace.into(),
        hostname: format!("{name}.{namespace}.svc.cluster.local").into(),
        vips: vec![NetworkAddress {
            network: "".into(),
            address: vip.parse().unwrap(),
        }],
        cidr_vips: vec![],
        ports: [(80, 8080)].into(),
        subject_alt_names: vec![],
        waypoint: None,
        weighted_waypoints: vec![],
        load_balancer: None,
        ip_families: None,
        canonical: false,
        visibility: Visibility::Public,
    }
}

/// The key of a service made by `service`.
pub fn key(namespace: &str, name: &str) -> NamespacedHostname {
    NamespacedHostname {
        namespace: namespace.into(),
        hostname: format!("{name}.{namespace}.svc.cluster.local").into(),
    }
}

/// Makes a workload an endpoint of a service made by `service`.
pub fn serving(mut workload: Workload, service: &Service) -> Workload {
    workload.services.insert(service.key(), [(80, 8080)].into());
    workload
}

/// A mesh of those records, seen from node `n1`, with policies synced.
pub fn mesh(resources: Vec<AddressResource>) -> Arc<super::Mesh> {
    let mut store = Store::new("n1");
    store.apply_addresses(resources, &[]);
    store.set_policies_synced();
    store.snapshot()
}
