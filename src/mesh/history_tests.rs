//! Whatever the updates, the mesh is that of a store which only ever heard how things ended.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use hbone::Identity;
use serde_json::Value;

use super::{AddressResource as Resource, Store, presents_certificate};
use crate::mesh::service::{
    BalanceMode, CidrAddress, HealthPolicy, LoadBalancer, Service, Visibility,
};
use crate::mesh::testing::{pod, service};
use crate::mesh::workload::{HealthStatus, NetworkAddress, NetworkMode, Protocol, Workload};
use crate::mesh::{Mesh, NamespacedHostname, dump};
use crate::policy::Policy;
use crate::policy::model::{Action, Scope};

const NAMESPACES: [&str; 3] = ["a", "b", "c"];
const NETWORKS: [&str; 2] = ["", "far"];
const ADDRESSES: [&str; 4] = ["10.0.0.1", "10.0.0.2", "10.0.1.1", "fd00::1"];
const RANGES: [&str; 3] = ["10.0.0.0/16", "10.0.1.0/24", "fd00::/64"];
const HOSTNAMES: [&str; 2] = ["one.example", "two.example"];
const UIDS: [&str; 5] = [
    "k//Pod/a/x",
    "k//Pod/b/y",
    "k//Pod/c/z",
    "k/WorkloadEntry/a/v",
    "k/WorkloadEntry/b/w",
];

/// Repeatable chance.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (self.0 >> 33) as usize % bound
    }

    fn coin(&mut self) -> bool {
        self.below(2) == 0
    }

    fn one<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }

    fn some<T: Copy>(&mut self, of: &[T]) -> Vec<T> {
        of.iter().copied().filter(|_| self.coin()).collect()
    }

    fn workload(&mut self) -> Workload {
        let namespace = self.one(&NAMESPACES);
        let mut workload = pod(namespace, self.one(&["x", "y"]), ADDRESSES[0]);
        let domain = self.one(&["cluster.local", "other.domain"]);
        workload.uid = self.one(&UIDS).into();
        workload.identity = Identity::new(domain, namespace, self.one(&["sa", "sb"]));
        workload.addresses = self.some(&ADDRESSES).into_iter().map(ip).collect();
        workload.network = self.one(&NETWORKS).into();
        workload.hostname = self.one(&["", HOSTNAMES[0], HOSTNAMES[1]]).into();
        workload.node = self.one(&["n1", "n2"]).into();
        workload.protocol = self.one(&[Protocol::Hbone, Protocol::Tcp]);
        workload.native_tunnel = self.below(4) == 0;
        workload.network_mode = self.one(&[
            NetworkMode::Standard,
            NetworkMode::Standard,
            NetworkMode::HostNetwork,
        ]);
        workload.status = self.one(&[HealthStatus::Healthy, HealthStatus::Unhealthy]);
        workload.capacity = self.below(4) as u32;
        for key in keys() {
            if self.coin() {
                let target = self.below(3) as u16;
                workload.services.insert(key, [(80, target)].into());
            }
        }
        workload
    }

    fn service(&mut self) -> Service {
        let mut service = service(self.one(&NAMESPACES), "service", ADDRESSES[0]);
        service.hostname = self.one(&HOSTNAMES).into();
        let address = |network: &str, address| NetworkAddress {
            network: network.into(),
            address: ip(address),
        };
        service.vips = NETWORKS
            .iter()
            .flat_map(|network| ADDRESSES.map(|text| address(network, text)))
            .filter(|_| self.coin())
            .collect();
        let ranges = self.some(&RANGES).into_iter();
        service.cidr_vips = ranges
            .map(|text| CidrAddress {
                network: self.one(&NETWORKS).into(),
                cidr: text.parse().unwrap(),
            })
            .collect();
        service.canonical = self.coin();
        service.visibility = self.one(&[Visibility::Public, Visibility::Namespace]);
        service.load_balancer = self.coin().then(|| LoadBalancer {
            routing_preferences: vec![],
            mode: BalanceMode::Standard,
            health_policy: self.one(&[HealthPolicy::OnlyHealthy, HealthPolicy::AllowAll]),
        });
        service
    }

    fn policy(&mut self) -> Policy {
        let (namespace, name) = (self.one(&NAMESPACES), self.one(&["p", "q"]));
        Policy {
            key: format!("{namespace}/{name}").into(),
            name: name.into(),
            namespace: namespace.into(),
            scope: self.one(&[Scope::Global, Scope::Namespace, Scope::WorkloadSelector]),
            action: self.one(&[Action::Allow, Action::Deny]),
            rules: vec![],
            dry_run: self.coin(),
        }
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn keys() -> impl Iterator<Item = NamespacedHostname> {
    NAMESPACES.into_iter().flat_map(|namespace| {
        HOSTNAMES.map(|hostname| NamespacedHostname {
            namespace: namespace.into(),
            hostname: hostname.into(),
        })
    })
}

fn name(resource: &Resource) -> String {
    match resource {
        Resource::Workload(workload) => workload.uid.to_string(),
        Resource::Service(service) => service.key().to_string(),
    }
}

/// Everything that can be asked of a mesh, with its answer.
fn answers(mesh: &Mesh) -> BTreeMap<String, Value> {
    let mut all: BTreeMap<String, Value> = [
        ("workloads", dump::workloads(mesh)),
        ("services", dump::services(mesh)),
        ("policies", dump::policies(mesh)),
        ("staged", dump::staged_services(mesh)),
    ]
    .map(|(question, answer)| (question.to_string(), answer))
    .into();
    let mut note = |question: String, answer: Option<String>| {
        all.insert(question, answer.into());
    };
    let uid = |workload: Option<&std::sync::Arc<Workload>>| workload.map(|w| w.uid.to_string());
    let key = |service: Option<&std::sync::Arc<Service>>| service.map(|s| s.key().to_string());
    let clients = [None, Some("a"), Some("b"), Some("c"), Some("d")];
    for network in NETWORKS {
        for address in ADDRESSES.map(ip) {
            let found = uid(mesh.workload_by_ip(network, &address));
            note(format!("owner of {network}/{address}"), found);
            for client in clients {
                let found = key(mesh.service_by_vip(network, &address, client));
                note(format!("vip {network}/{address} for {client:?}"), found);
            }
        }
    }
    for namespace in NAMESPACES {
        for (pod, account) in [("x", "sa"), ("x", "sb"), ("y", "sa"), ("y", "sb")] {
            let found = uid(mesh.local_workload(namespace, pod, account));
            note(format!("local {namespace}/{pod}/{account}"), found);
        }
    }
    for hostname in HOSTNAMES {
        for client in clients {
            for preferred in clients {
                let found = key(mesh.best_by_hostname(hostname, client, preferred));
                note(format!("{hostname} {client:?} {preferred:?}"), found);
            }
        }
    }
    for key in keys() {
        let found = uid(mesh.workload_by_hostname(&key));
        note(format!("workload of {key}"), found);
        let endpoints = mesh.service_entry(&key).map(|entry| {
            let set = &entry.endpoints;
            let sorted: BTreeSet<String> = set.iter().map(|known| format!("{known:?}")).collect();
            assert_eq!(sorted.len(), set.len());
            assert!(
                set.iter()
                    .all(|known| set.get(&known.workload_uid) == Some(known))
            );
            format!("{sorted:?}, heaviest {}", set.heaviest())
        });
        note(format!("endpoints of {key}"), endpoints);
    }
    for namespace in ["", "a", "b", "c"] {
        let keys = mesh.policies_for_namespace(namespace).map(|p| &p.key);
        note(
            format!("policies of {namespace:?}"),
            Some(format!("{:?}", keys.collect::<BTreeSet<_>>())),
        );
    }
    note("sizes".to_string(), Some(format!("{:?}", sizes(mesh))));
    all
}

/// How much each index holds, so that nothing stays behind unseen.
fn sizes(mesh: &Mesh) -> [usize; 11] {
    [
        mesh.workloads.len(),
        mesh.by_address.values().flatten().count(),
        mesh.by_workload_hostname.len(),
        mesh.local.len(),
        mesh.services.len(),
        mesh.by_vip.values().flatten().count(),
        mesh.by_hostname.len(),
        mesh.by_range.len(),
        mesh.staged.len(),
        mesh.policies.len(),
        mesh.policies_by_namespace.len(),
    ]
}

/// The records there are, the latest heard last.
#[derive(Default)]
struct Ending {
    addresses: Vec<Resource>,
    policies: Vec<Policy>,
}

impl Ending {
    fn hear(&mut self, upserts: &[Resource], removals: &[String]) {
        self.addresses
            .retain(|known| !removals.contains(&name(known)));
        for resource in upserts {
            self.addresses.retain(|known| name(known) != name(resource));
            self.addresses.push(resource.clone());
        }
    }

    fn hear_policies(&mut self, upserts: &[Policy], removals: &[String]) {
        self.policies
            .retain(|known| !removals.iter().any(|key| **key == *known.key));
        for policy in upserts {
            self.policies.retain(|known| known.key != policy.key);
            self.policies.push(policy.clone());
        }
    }

    /// What stores say that hear it at once, record by record, services first and workloads first.
    fn answers(&self) -> [BTreeMap<String, Value>; 4] {
        let is_service = |resource: &Resource| matches!(resource, Resource::Service(_));
        let (services, workloads): (Vec<_>, Vec<_>) =
            self.addresses.iter().cloned().partition(is_service);
        let singly = self.addresses.iter().map(|known| vec![known.clone()]);
        let tellings: [Vec<Vec<Resource>>; 4] = [
            vec![self.addresses.clone()],
            singly.collect(),
            vec![services.clone(), workloads.clone()],
            vec![workloads, services],
        ];
        tellings.map(|telling| {
            let mut store = Store::new("n1");
            for response in telling {
                store.apply_addresses(response, &[]);
            }
            store.apply_policies(self.policies.clone(), &[]);
            answers(&store.snapshot())
        })
    }
}

/// The identities of this node's workloads: those that need a certificate, and all.
fn identities(mesh: &Mesh) -> (BTreeSet<Identity>, BTreeSet<Identity>) {
    let of = |tunnelled: bool| {
        mesh.workloads()
            .filter(|workload| &*workload.node == "n1")
            .filter(|workload| !tunnelled || presents_certificate(workload))
            .map(|workload| workload.identity.clone())
            .collect()
    };
    (of(true), of(false))
}

#[test]
fn how_the_mesh_came_about_does_not_show() {
    for seed in 0..12 {
        let mut dice = Dice(seed);
        let (mut store, mut ending) = (Store::new("n1"), Ending::default());
        let mut held = BTreeSet::new();
        let mut names: Vec<String> = UIDS.map(str::to_string).to_vec();
        names.extend(keys().map(|key| key.to_string()));
        names.push("a/unknown".to_string());
        for step in 0..24 {
            let upserts: Vec<_> = (0..dice.below(4))
                .map(|_| match dice.coin() {
                    true => Resource::Workload(dice.workload()),
                    false => Resource::Service(dice.service()),
                })
                .collect();
            let removals: Vec<_> = (0..dice.below(3))
                .map(|_| names[dice.below(names.len())].clone())
                .collect();
            ending.hear(&upserts, &removals);
            let changes = store.apply_addresses(upserts, &removals);
            held.extend(changes.wanted);
            held.retain(|identity| !changes.unwanted.contains(identity));

            let policies: Vec<_> = (0..dice.below(2)).map(|_| dice.policy()).collect();
            let removals: Vec<_> = (0..dice.below(2))
                .map(|_| dice.policy().key.to_string())
                .collect();
            ending.hear_policies(&policies, &removals);
            store.apply_policies(policies, &removals);

            let mesh = store.snapshot();
            let (needed, local) = identities(&mesh);
            assert!(held.is_superset(&needed), "seed {seed} step {step}");
            assert!(held.is_subset(&local), "seed {seed} step {step}");
            let now = answers(&mesh);
            for fresh in ending.answers() {
                for (question, answer) in &now {
                    assert_eq!(
                        answer, &fresh[question],
                        "seed {seed} step {step}: {question}"
                    );
                }
            }
        }
        let all: Vec<_> = ending.addresses.iter().map(name).collect();
        let changes = store.apply_addresses(vec![], &all);
        held.retain(|identity| !changes.unwanted.contains(identity));
        assert!(held.is_empty(), "seed {seed} keeps {held:?}");
        let policies: Vec<_> = ending.policies.iter().map(|p| p.key.to_string()).collect();
        store.apply_policies(vec![], &policies);
        assert_eq!(sizes(&store.snapshot()), [0; 11], "seed {seed}");
    }
}
