//! The delta discovery client: keeps the mesh as the control plane describes it.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use prost::Message;
use prost_types::value::Kind;
use prost_types::{Struct, Value};
use tonic::{Code, Status};

use super::demand::Interest;
use super::names::Names;
use super::{policies, resources, stream};
use crate::config::Config;
use crate::identity::channel::Peer;
use crate::identity::token::Credentials;
use crate::mesh::store::AddressResource;
use crate::mesh_feed::MeshWriter;
use crate::proto::discovery::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node, Status as Refusal,
};
use crate::proto::{security, workload};
use crate::telemetry::Telemetry;

/// The type URL of workloads and services.
pub const ADDRESS_TYPE: &str = "type.googleapis.com/istio.workload.Address";
/// The type URL of policies.
pub const AUTHORIZATION_TYPE: &str = "type.googleapis.com/istio.security.Authorization";

/// The name of all resources.
const EVERYTHING: &str = "*";

const FIRST_WAIT: Duration = Duration::from_millis(10);
const LONGEST_WAIT: Duration = Duration::from_secs(15);

/// Resources of a response that leave enough behind for the allocator to be tidied.
const MANY: usize = 1000;

/// Resource names and their versions.
type Held = BTreeMap<Arc<str>, Arc<str>>;

/// The client and everything it feeds.
pub struct Client {
    peer: Peer,
    credentials: Credentials,
    node: Node,
    mesh: Rc<MeshWriter>,
    telemetry: Arc<Telemetry>,
    /// Name to version of what is held, by type; what was rejected is not in it and so is sent again.
    held: [Held; 2],
    names: Names,
    /// Whether each type has arrived whole.
    complete: [bool; 2],
    synced: Option<Box<dyn FnOnce() + Send>>,
    /// What is asked for, unless everything is sent ahead.
    interest: Option<Interest>,
    /// Names that are not subscribed to any more, which the control plane has yet to be told.
    forgotten: Vec<String>,
    connections: u64,
}

/// How a stream ended.
enum End {
    /// It was never there.
    Connect(String),
    /// The control plane ended it with a status.
    Status(Status),
    /// The control plane closed it in peace.
    Complete,
}

impl Client {
    /// A client that has not connected yet; `synced` is called once everything has arrived for the first time.
    pub fn new(
        config: &Config,
        peer: Peer,
        credentials: Credentials,
        mesh: Rc<MeshWriter>,
        telemetry: Arc<Telemetry>,
        interest: Option<Interest>,
        synced: impl FnOnce() + Send + 'static,
    ) -> Self {
        Self {
            peer,
            credentials,
            node: node(config),
            mesh,
            telemetry,
            held: Default::default(),
            names: Names::default(),
            // What is asked for when it is needed is never whole.
            complete: [interest.is_some(), false],
            interest,
            forgotten: Vec::new(),
            synced: Some(Box::new(synced)),
            connections: 0,
        }
    }

    /// Follows the control plane for ever; what is known stays known while it cannot be reached.
    pub async fn run(mut self) {
        let mut wait = FIRST_WAIT;
        loop {
            self.connections += 1;
            let end = self.follow().await;
            let (reason, delay) = match &end {
                End::Connect(_) => {
                    wait = (wait * 2).min(LONGEST_WAIT);
                    ("ConnectionError", wait)
                }
                End::Status(status) if is_reconnect(status) => {
                    wait = FIRST_WAIT;
                    ("Reconnect", FIRST_WAIT)
                }
                End::Status(_) => {
                    wait = (wait * 2).min(LONGEST_WAIT);
                    ("Error", wait)
                }
                End::Complete => {
                    wait = FIRST_WAIT;
                    ("Complete", FIRST_WAIT)
                }
            };
            self.telemetry.add(
                "istio_xds_connection_terminations",
                "The total number of completed connections to xds server (unstable)",
                &[("reason", reason)],
                1,
            );
            self.report(&end, delay);
            tokio::time::sleep(delay).await;
        }
    }

    fn report(&self, end: &End, delay: Duration) {
        let address = &self.peer.address;
        match end {
            End::Connect(error) => tracing::warn!(
                "XDS client connection error: gRPC connection error connecting to {address}: {error}, retrying in {delay:?}{}",
                hint(error)
            ),
            End::Status(status) if is_reconnect(status) => {
                tracing::debug!("XDS stream to {address} ended: {status}");
            }
            End::Status(status) => tracing::warn!(
                "XDS client connection error: gRPC connection error connecting to {address}: status: {:?}, message: {:?}, retrying in {delay:?}{}",
                status.code(),
                status.message(),
                hint(status.message())
            ),
            End::Complete => tracing::debug!("XDS stream to {address} was closed"),
        }
    }

    async fn follow(&mut self) -> End {
        let metadata = match self.credentials.metadata().await {
            Ok(metadata) => metadata,
            Err(error) => return End::Connect(error.to_string()),
        };
        let mut channel = match self.peer.connect().await {
            Ok(channel) => channel,
            Err(error) => return End::Connect(error),
        };
        // Never blocks for long: only as many answers are outstanding as there are types.
        let (requests, outgoing) = tokio::sync::mpsc::channel(16);
        for (index, type_url) in [ADDRESS_TYPE, AUTHORIZATION_TYPE].into_iter().enumerate() {
            let (mut subscribe, mut unsubscribe) = (Vec::new(), Vec::new());
            if let Some(interest) = self.interest.as_ref().filter(|_| index == 0) {
                // Together: nothing but what is named.
                subscribe = vec![EVERYTHING.to_string()];
                unsubscribe = subscribe.clone();
                subscribe.extend(interest.subscribed());
            }
            let first = DeltaDiscoveryRequest {
                node: Some(self.node.clone()),
                type_url: type_url.to_string(),
                resource_names_subscribe: subscribe,
                resource_names_unsubscribe: unsubscribe,
                initial_resource_versions: self.held[index]
                    .iter()
                    .map(|(name, version)| (name.to_string(), version.to_string()))
                    .collect(),
                ..Default::default()
            };
            if requests.send(first).await.is_err() {
                return End::Complete;
            }
        }
        let mut responses = match stream::open(&mut channel, metadata, outgoing).await {
            Ok(responses) => responses,
            Err(status) => return End::Status(status),
        };
        tracing::info!(id = self.connections, "Stream established");
        loop {
            let next = async {
                match &mut self.interest {
                    Some(interest) => interest.next().await,
                    None => None,
                }
            };
            let request = tokio::select! {
                Some(key) = next => DeltaDiscoveryRequest {
                    type_url: ADDRESS_TYPE.to_string(),
                    resource_names_subscribe: vec![key],
                    ..Default::default()
                },
                response = responses.next() => match response {
                    Ok(Some(response)) => self.take(response),
                    Ok(None) => return End::Complete,
                    Err(status) => return End::Status(status),
                },
            };
            if requests.send(request).await.is_err() {
                return End::Complete;
            }
        }
    }

    /// Applies a response and gives the answer to it: good resources count, bad ones are refused by name.
    fn take(&mut self, response: DeltaDiscoveryResponse) -> DeltaDiscoveryRequest {
        let type_url = response.type_url.clone();
        let labels = [("url", &*type_url)];
        let bytes = response
            .resources
            .iter()
            .filter_map(|resource| resource.resource.as_ref());
        let bytes: usize = bytes.map(|any| any.value.len()).sum();
        self.telemetry.add(
            "istio_xds_message",
            "Total number of messages received (unstable)",
            &labels,
            1,
        );
        self.telemetry.add(
            "istio_xds_message_bytes",
            "Total number of bytes received (unstable)",
            &labels,
            bytes as u64,
        );
        let nonce = response.nonce.clone();
        let many = response.resources.len() >= MANY;
        let is_address = type_url == ADDRESS_TYPE;
        let rejected = match &*type_url {
            ADDRESS_TYPE => self.take_addresses(response),
            AUTHORIZATION_TYPE => self.take_policies(response),
            other => {
                tracing::error!("the control plane sent resources of unknown type {other}");
                Vec::new()
            }
        };
        if many {
            crate::memory::give_back();
        }
        let error_detail = (!rejected.is_empty()).then(|| {
            let message = rejected.join("; ");
            tracing::error!("rejected resources of the control plane: {message}");
            Refusal {
                code: 0,
                message,
                details: Vec::new(),
            }
        });
        DeltaDiscoveryRequest {
            type_url,
            response_nonce: nonce,
            error_detail,
            resource_names_unsubscribe: match is_address {
                true => std::mem::take(&mut self.forgotten),
                false => Vec::new(),
            },
            ..Default::default()
        }
    }

    fn take_addresses(&mut self, response: DeltaDiscoveryResponse) -> Vec<String> {
        let (mut upserts, mut rejected) = (Vec::new(), Vec::new());
        let mut removals = response.removed_resources;
        let mut there = Vec::new();
        let missing = match &self.interest {
            // What was asked for and is not there comes as removed, too.
            Some(_) => removals.clone(),
            None => Vec::new(),
        };
        if self.interest.is_some() {
            removals.retain(|name| self.held[0].contains_key(name.as_str()));
        }
        removals
            .iter()
            .for_each(|name| drop(self.held[0].remove(name.as_str())));
        for mut resource in response.resources {
            if self.interest.is_some() {
                there.push(resource.name.clone());
                there.append(&mut resource.aliases);
            }
            let names = &mut self.names;
            let read = decode::<workload::Address>(&resource)
                .and_then(|address| resources::address(address, names));
            let name = match &read {
                // The store keeps the same text.
                Ok(AddressResource::Workload(workload)) if *workload.uid == *resource.name => {
                    workload.uid.clone()
                }
                _ => resource.name.as_str().into(),
            };
            note(
                &mut self.held[0],
                &mut rejected,
                name,
                self.names.text(&resource.version),
                read.map(|read| upserts.push(read)),
            );
        }
        self.mesh.apply_addresses(upserts, &removals);
        self.arrived(0, rejected.is_empty());
        if let Some(interest) = &mut self.interest {
            let there = there.iter().map(String::as_str);
            self.forgotten.extend(interest.answered(there, &missing));
        }
        rejected
    }

    fn take_policies(&mut self, response: DeltaDiscoveryResponse) -> Vec<String> {
        let (mut upserts, mut rejected) = (Vec::new(), Vec::new());
        for name in &response.removed_resources {
            tracing::info!("handling RBAC delete {name}");
            self.held[1].remove(name.as_str());
        }
        for resource in response.resources {
            let read = decode::<security::Authorization>(&resource);
            let read = read
                .and_then(|record| policies::policy(&resource.name, record))
                .map(|read| {
                    tracing::info!("handling RBAC update {}", read.policy.name);
                    for warning in &read.warnings {
                        tracing::warn!("policy {}: {warning}; it opens nothing", resource.name);
                    }
                    upserts.push(read.policy);
                });
            note(
                &mut self.held[1],
                &mut rejected,
                resource.name.as_str().into(),
                self.names.text(&resource.version),
                read,
            );
        }
        let whole = rejected.is_empty();
        self.mesh
            .apply_policies(upserts, &response.removed_resources, whole);
        self.arrived(1, whole);
        rejected
    }

    fn arrived(&mut self, index: usize, accepted: bool) {
        self.complete[index] |= accepted;
        if self.complete == [true; 2]
            && let Some(synced) = self.synced.take()
        {
            synced();
        }
    }
}

/// Notes a resource as held or refused.
fn note(
    held: &mut Held,
    rejected: &mut Vec<String>,
    name: Arc<str>,
    version: Arc<str>,
    read: Result<(), String>,
) {
    match read {
        Ok(()) => {
            held.insert(name, version);
        }
        Err(error) => {
            held.remove(&name);
            rejected.push(format!("{name}: {error}"));
        }
    }
}

fn decode<M: Message + Default>(resource: &crate::proto::discovery::Resource) -> Result<M, String> {
    let any = resource.resource.as_ref().ok_or("the resource is empty")?;
    M::decode(&*any.value).map_err(|error| format!("cannot be decoded: {error}"))
}

/// Whether a status only means that the connection is to be made anew.
fn is_reconnect(status: &Status) -> bool {
    match status.code() {
        Code::Unknown | Code::Cancelled | Code::DeadlineExceeded => true,
        Code::Unavailable => ["transport is closing", "received prior goaway"]
            .iter()
            .any(|text| status.message().contains(text)),
        _ => false,
    }
}

fn hint(message: &str) -> &'static str {
    if message.contains("authentication failure") {
        " (hint: check the control plane logs for more information)"
    } else if message.contains("failed to lookup address") || message.contains("dns error") {
        " (hint: is the DNS server reachable?)"
    } else {
        ""
    }
}

fn node(config: &Config) -> Node {
    let text = |value: &str| Value {
        kind: Some(Kind::StringValue(value.to_string())),
    };
    let mut fields = BTreeMap::new();
    for (name, value) in [
        ("NAME", &config.pod_name),
        ("NAMESPACE", &config.pod_namespace),
        ("INSTANCE_IPS", &config.instance_ip),
        ("NODE_NAME", &config.node),
    ] {
        fields.insert(name.to_string(), text(value));
    }
    for (name, value) in &config.metadata {
        fields.insert(name.clone(), text(value));
    }
    for (name, value) in &config.metadata_json {
        fields.insert(name.clone(), json(value));
    }
    let (ip, pod, namespace) = (&config.instance_ip, &config.pod_name, &config.pod_namespace);
    Node {
        id: format!("ztunnel~{ip}~{pod}.{namespace}~{namespace}.svc.cluster.local"),
        cluster: String::new(),
        metadata: Some(Struct { fields }),
    }
}

fn json(value: &serde_json::Value) -> Value {
    let kind = match value {
        serde_json::Value::Null => Kind::NullValue(0),
        serde_json::Value::Bool(value) => Kind::BoolValue(*value),
        serde_json::Value::Number(value) => Kind::NumberValue(value.as_f64().unwrap_or_default()),
        serde_json::Value::String(value) => Kind::StringValue(value.clone()),
        serde_json::Value::Array(values) => Kind::ListValue(prost_types::ListValue {
            values: values.iter().map(json).collect(),
        }),
        serde_json::Value::Object(fields) => Kind::StructValue(Struct {
            fields: fields
                .iter()
                .map(|(name, value)| (name.clone(), json(value)))
                .collect(),
        }),
    };
    Value { kind: Some(kind) }
}

#[cfg(test)]
#[path = "client_tests.rs"]
mod tests;
