//! State from a file or a variable instead of a control plane, or beside one; a file is read again when it changes.
//!
//! What a control plane sends under the same name wins.

mod records;

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow, ensure};
use serde_json::{Value, json};

use crate::config::LocalXds;
use crate::mesh::store::AddressResource;
use crate::mesh::{Store, dump};
use crate::mesh_feed::MeshWriter;
use crate::policy::Policy;
use crate::xds::names::Names;
use crate::xds::{policies, resources};
use records::File;

/// How often the file is looked at.
const LOOK: Duration = Duration::from_secs(1);

/// Everything a source says, by resource name.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct State {
    pub addresses: BTreeMap<String, AddressResource>,
    pub policies: BTreeMap<String, Policy>,
}

impl State {
    /// Reads a YAML document; the meaning of each field is that of the control plane's resources.
    ///
    /// # Errors
    /// Which entry and which field cannot be used; nothing of the document counts then.
    pub fn parse(text: &str) -> anyhow::Result<Self> {
        let text = if text.trim().is_empty() { "{}" } else { text };
        let mut file: File = serde_yaml_ng::from_str(text)?;
        file.attach_endpoints()?;
        let mut names = Names::default();
        let mut state = Self::default();
        for workload in file.workloads {
            let uid = workload.uid();
            let resource = workload
                .record()
                .and_then(|record| resources::workload(record, &mut names))
                .map_err(|error| anyhow!("workload {uid}: {error}"))?;
            let known = state
                .addresses
                .insert(uid.clone(), AddressResource::Workload(resource));
            ensure!(known.is_none(), "workload {uid} is there twice");
        }
        for service in file.services {
            let key = service.key();
            let resource = service
                .record()
                .and_then(|record| resources::service(record, &mut names))
                .map_err(|error| anyhow!("service {key}: {error}"))?;
            let known = state
                .addresses
                .insert(key.clone(), AddressResource::Service(resource));
            ensure!(known.is_none(), "service {key} is there twice");
        }
        for policy in file.policies {
            let key = policy.key();
            let read = policies::policy(&key, policy.record())
                .map_err(|error| anyhow!("policy {key}: {error}"))?;
            if let Some(warning) = read.warnings.first() {
                return Err(anyhow!("policy {key}: {warning}"));
            }
            let known = state.policies.insert(key.clone(), read.policy);
            ensure!(known.is_none(), "policy {key} is there twice");
        }
        Ok(state)
    }

    /// As the configuration dump shows it.
    pub fn dump(&self) -> Value {
        let mut store = Store::new("");
        store.apply_addresses(self.addresses.values().cloned().collect(), &[]);
        store.apply_policies(self.policies.values().cloned().collect(), &[]);
        let mesh = store.snapshot();
        json!({
            "workloads": dump::workloads(&mesh),
            "policies": dump::policies(&mesh),
            "services": dump::services(&mesh),
        })
    }
}

impl File {
    /// Gives the workloads the endpoints that services name.
    fn attach_endpoints(&mut self) -> anyhow::Result<()> {
        for service in &mut self.services {
            let key = service.key();
            for endpoint in std::mem::take(&mut service.endpoints).into_values() {
                let uid = endpoint.workload_uid;
                let mut workloads = self.workloads.iter_mut();
                let workload = workloads
                    .find(|workload| workload.uid() == uid)
                    .ok_or_else(|| anyhow!("service {key}: endpoint {uid} is no workload here"))?;
                workload.services.insert(key.clone(), endpoint.port);
            }
        }
        Ok(())
    }
}

/// A source and what it said last.
pub struct Local {
    source: LocalXds,
    text: String,
    state: Arc<State>,
}

impl Local {
    /// Reads the source for the first time.
    ///
    /// # Errors
    /// When it cannot be read or understood: a proxy told to start from it must not start from nothing.
    pub fn load(source: LocalXds) -> anyhow::Result<Self> {
        let (text, name) = match &source {
            LocalXds::File(path) => {
                let name = format!("LOCAL_XDS_PATH={}", path.display());
                let text = std::fs::read_to_string(path).with_context(|| name.clone())?;
                (text, name)
            }
            LocalXds::Inline(text) => (text.clone(), "LOCAL_XDS".to_string()),
        };
        let state = Arc::new(State::parse(&text).context(name)?);
        Ok(Self {
            source,
            text,
            state,
        })
    }

    /// What the source said last.
    pub fn state(&self) -> Arc<State> {
        self.state.clone()
    }

    /// Puts all of it into the mesh, then every change of the file, for ever; `told` hears of each new state.
    pub async fn follow(mut self, mesh: Rc<MeshWriter>, told: impl Fn(Arc<State>)) {
        mesh.apply_local(&State::default(), &self.state);
        tracing::info!(
            num_workloads = self.state.workloads(),
            num_policies = self.state.policies.len(),
            "local config initialized"
        );
        let LocalXds::File(path) = self.source else {
            return;
        };
        let mut complained = false;
        loop {
            tokio::time::sleep(LOOK).await;
            let text = match std::fs::read_to_string(&path) {
                Ok(text) => text,
                Err(error) => {
                    if !std::mem::replace(&mut complained, true) {
                        let path = path.display();
                        tracing::error!("{path}: {error}; what it said before stays in force");
                    }
                    continue;
                }
            };
            complained = false;
            if text == self.text {
                continue;
            }
            match State::parse(&text) {
                Ok(state) => {
                    let state = Arc::new(state);
                    mesh.apply_local(&self.state, &state);
                    self.state = state;
                    told(self.state.clone());
                    tracing::info!(
                        num_workloads = self.state.workloads(),
                        num_policies = self.state.policies.len(),
                        "local config read again"
                    );
                }
                Err(error) => {
                    let path = path.display();
                    tracing::error!("{path}: {error:#}; what it said before stays in force");
                }
            }
            self.text = text;
        }
    }
}

impl State {
    fn workloads(&self) -> usize {
        let workload = |known: &&AddressResource| matches!(known, AddressResource::Workload(_));
        self.addresses.values().filter(workload).count()
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
