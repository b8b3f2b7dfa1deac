//! Kubernetes objects turned into the resources that proxies understand.

pub mod peers;
pub mod pods;
pub mod policies;
pub mod services;

use std::collections::BTreeMap;

use super::manifests::Objects;
use crate::proto::{security, workload};

/// What the translation depends on besides the objects.
#[derive(Clone, Debug)]
pub struct Settings {
    pub cluster_id: String,
    pub cluster_domain: String,
    pub trust_domain: String,
    pub network: String,
    /// The namespace whose policies are for the whole mesh.
    pub root_namespace: String,
}

/// Everything that proxies are told, by resource name.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Resources {
    pub addresses: BTreeMap<String, workload::Address>,
    pub authorizations: BTreeMap<String, security::Authorization>,
}

impl Resources {
    /// How many of the addresses are workloads.
    pub fn workloads(&self) -> usize {
        let of_workloads = |address: &&workload::Address| {
            matches!(address.r#type, Some(workload::address::Type::Workload(_)))
        };
        self.addresses.values().filter(of_workloads).count()
    }
}

/// Translates all objects.
pub fn all(objects: &Objects, settings: &Settings) -> Resources {
    let mut resources = Resources::default();
    for service in objects.services.values() {
        if let Some(record) = services::service(service, objects, settings) {
            let name = format!("{}/{}", record.namespace, record.hostname);
            let address = workload::Address {
                r#type: Some(workload::address::Type::Service(record)),
            };
            resources.addresses.insert(name, address);
        }
    }
    for pod in objects.pods.values() {
        if let Some(record) = pods::workload(pod, objects, settings) {
            let name = record.uid.clone();
            let address = workload::Address {
                r#type: Some(workload::address::Type::Workload(record)),
            };
            resources.addresses.insert(name, address);
        }
    }
    for policy in objects.policies.values() {
        if let Some(record) = policies::authorization(policy, &settings.root_namespace) {
            resources
                .authorizations
                .insert(format!("{}/{}", record.namespace, record.name), record);
        }
    }
    for record in peers::authorizations(objects, &settings.root_namespace) {
        resources
            .authorizations
            .insert(format!("{}/{}", record.namespace, record.name), record);
    }
    resources
}

#[cfg(test)]
mod tests_support {
    use super::Settings;
    use crate::control::manifests::{Manifests, Objects};

    pub fn settings() -> Settings {
        Settings {
            cluster_id: "Kubernetes".into(),
            cluster_domain: "cluster.local".into(),
            trust_domain: "cluster.local".into(),
            network: String::new(),
            root_namespace: "istio-system".into(),
        }
    }

    /// The objects of a text, all of which must be good.
    pub fn read(text: &str) -> Objects {
        use std::sync::atomic::{AtomicUsize, Ordering};
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let folder =
            std::env::temp_dir().join(format!("wrn-translate-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("all.yaml"), text).unwrap();
        let loaded = Manifests::new(folder.clone()).load();
        std::fs::remove_dir_all(folder).unwrap();
        assert_eq!(loaded.errors, Vec::<String>::new());
        loaded.objects
    }
}
