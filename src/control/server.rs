//! What the control plane serves: discovery and certificates, over one TLS listener.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::Stream;
use hbone::Identity;
use prost::Message;
use prost_types::value::Kind;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status, Streaming};
use xxhash_rust::xxh64::xxh64;

use super::ca::Authority;
use super::manifests::Objects;
use super::subscription::{Index, Subscription, Update};
use super::tokens::Tokens;
use super::translate::Resources;
use crate::proto::ca::istio_certificate_service_server::IstioCertificateService;
use crate::proto::ca::{IstioCertificateRequest, IstioCertificateResponse};
use crate::proto::discovery::aggregated_discovery_service_server::AggregatedDiscoveryService;
use crate::proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use crate::xds::client::{ADDRESS_TYPE, AUTHORIZATION_TYPE};

/// The types of resources that are served.
pub(super) const TYPES: [&str; 2] = [ADDRESS_TYPE, AUTHORIZATION_TYPE];

/// A resource as it goes over the wire.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Encoded {
    pub version: String,
    pub value: Vec<u8>,
}

/// Everything that is served at one moment.
#[derive(Debug, Default)]
pub struct Snapshot {
    number: u64,
    pub(super) types: [BTreeMap<String, Encoded>; 2],
    pub(super) index: Index,
    /// The nodes on which pods of a namespace and service account run.
    places: BTreeMap<(String, String), Vec<String>>,
}

impl Snapshot {
    /// Encodes everything.
    pub fn new(number: u64, resources: &Resources, objects: &Objects) -> Self {
        fn encode<M: Message>(records: &BTreeMap<String, M>) -> BTreeMap<String, Encoded> {
            let one = |(name, record): (&String, &M)| {
                let value = record.encode_to_vec();
                (
                    name.clone(),
                    Encoded {
                        version: format!("{:x}", xxh64(&value, 0)),
                        value,
                    },
                )
            };
            records.iter().map(one).collect()
        }
        let mut places: BTreeMap<_, Vec<String>> = BTreeMap::new();
        for pod in objects
            .pods
            .values()
            .filter(|pod| pod.status.phase != "Failed")
        {
            let account =
                Some(&pod.spec.service_account_name).filter(|account| !account.is_empty());
            let account = account.cloned().unwrap_or_else(|| "default".to_string());
            places
                .entry((pod.metadata.namespace.clone(), account))
                .or_default()
                .push(pod.spec.node_name.clone());
        }
        let types = [
            encode(&resources.addresses),
            encode(&resources.authorizations),
        ];
        Self {
            number,
            types,
            index: Index::new(&resources.addresses),
            places,
        }
    }

    /// Its number in the order of snapshots.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Whether pods run on the same nodes in another snapshot.
    pub fn same_places(&self, other: &Self) -> bool {
        self.places == other.places
    }

    /// How many resources differ from another snapshot.
    pub fn changes(&self, other: &Self) -> usize {
        let pairs = self.types.iter().zip(&other.types);
        pairs
            .map(|(new, old)| {
                let changed = new
                    .iter()
                    .filter(|(name, value)| old.get(*name) != Some(value))
                    .count();
                changed + old.keys().filter(|name| !new.contains_key(*name)).count()
            })
            .sum()
    }
}

/// What both services share.
pub struct Plane {
    pub snapshots: watch::Receiver<Arc<Snapshot>>,
    pub tokens: Mutex<Tokens>,
    pub authority: Authority,
    pub trust_domain: String,
}

impl Plane {
    /// The node whose token comes with a request.
    fn node(&self, metadata: &MetadataMap) -> Result<String, Status> {
        let header = metadata
            .get("authorization")
            .and_then(|value| value.to_str().ok());
        let token = header
            .and_then(|header| header.strip_prefix("Bearer "))
            .ok_or_else(|| Status::unauthenticated("authentication failure: no bearer token"))?;
        let tokens = self.tokens.lock().unwrap_or_else(PoisonError::into_inner);
        let node = tokens.node(token.trim());
        node.map(str::to_string).ok_or_else(|| {
            Status::unauthenticated("authentication failure: the token is of no node")
        })
    }
}

/// The discovery service.
pub struct Discovery(pub Arc<Plane>);

type Responses = Pin<Box<dyn Stream<Item = Result<DeltaDiscoveryResponse, Status>> + Send>>;

#[tonic::async_trait]
impl AggregatedDiscoveryService for Discovery {
    type DeltaAggregatedResourcesStream = Responses;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Responses>, Status> {
        let node = self.0.node(request.metadata())?;
        let (responses, outgoing) = mpsc::channel(4);
        let snapshots = self.0.snapshots.clone();
        tracing::info!(node, "a proxy subscribes");
        tokio::spawn(async move {
            let client = Client {
                node: node.clone(),
                snapshots,
                subscriptions: [const { None }; 2],
                nonce: 0,
            };
            if let Err(status) = client.serve(request.into_inner(), &responses).await {
                let _ = responses.send(Err(status)).await;
            }
            tracing::info!(node, "a proxy is gone");
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(outgoing))))
    }
}

/// One subscribed proxy.
struct Client {
    node: String,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    /// Of each type, if the proxy asked for it.
    subscriptions: [Option<Subscription>; 2],
    nonce: u64,
}

type Outgoing = mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>;

impl Client {
    async fn serve(
        mut self,
        mut requests: Streaming<DeltaDiscoveryRequest>,
        responses: &Outgoing,
    ) -> Result<(), Status> {
        loop {
            tokio::select! {
                request = requests.message() => {
                    let Some(request) = request? else { return Ok(()) };
                    if !self.take(request, responses).await? {
                        return Ok(());
                    }
                }
                changed = self.snapshots.changed() => {
                    if changed.is_err() {
                        return Ok(());
                    }
                    // Policies first: a workload must not name what is not there yet.
                    for index in (0..TYPES.len()).rev() {
                        if !self.send(index, responses).await {
                            return Ok(());
                        }
                    }
                }
            }
        }
    }

    /// Takes a subscription, an ACK or a NACK; false once the proxy is gone.
    async fn take(
        &mut self,
        request: DeltaDiscoveryRequest,
        responses: &Outgoing,
    ) -> Result<bool, Status> {
        let Some(index) = TYPES.iter().position(|known| *known == request.type_url) else {
            return Err(Status::invalid_argument(format!(
                "resources of type {:?} are not served",
                request.type_url
            )));
        };
        if let Some(refused) = &request.error_detail {
            tracing::warn!(
                node = self.node,
                "a proxy refused resources: {}",
                refused.message
            );
        }
        if !request.response_nonce.is_empty()
            && request.resource_names_subscribe.is_empty()
            && request.resource_names_unsubscribe.is_empty()
        {
            return Ok(true);
        }
        let first = self.subscriptions[index].is_none();
        let subscription = self.subscriptions[index].get_or_insert_with(|| {
            Subscription::new(
                request.initial_resource_versions,
                &request.resource_names_subscribe,
                &request.resource_names_unsubscribe,
            )
        });
        let asked = request.resource_names_subscribe;
        subscription.change(&asked, &request.resource_names_unsubscribe);
        if first || !asked.is_empty() {
            return Ok(self.send_asked(index, &asked, responses).await);
        }
        Ok(true)
    }

    /// Sends what the proxy does not hold yet and names what is gone; nothing if there is neither.
    async fn send(&mut self, index: usize, responses: &Outgoing) -> bool {
        let Some(subscription) = &mut self.subscriptions[index] else {
            return true;
        };
        let snapshot = self.snapshots.borrow_and_update().clone();
        let update = subscription.update(&snapshot, index, &self.node, &[]);
        if update.resources.is_empty() && update.removed.is_empty() {
            return true;
        }
        self.respond(index, &snapshot, update, responses).await
    }

    /// The same, and what was just asked for even if it is held; an answer comes in any case.
    async fn send_asked(&mut self, index: usize, asked: &[String], responses: &Outgoing) -> bool {
        let Some(subscription) = &mut self.subscriptions[index] else {
            return true;
        };
        let snapshot = self.snapshots.borrow_and_update().clone();
        let update = subscription.update(&snapshot, index, &self.node, asked);
        self.respond(index, &snapshot, update, responses).await
    }

    async fn respond(
        &mut self,
        index: usize,
        snapshot: &Snapshot,
        update: Update,
        responses: &Outgoing,
    ) -> bool {
        self.nonce += 1;
        let response = DeltaDiscoveryResponse {
            system_version_info: snapshot.number.to_string(),
            resources: update.resources,
            type_url: TYPES[index].to_string(),
            nonce: self.nonce.to_string(),
            removed_resources: update.removed,
        };
        responses.send(Ok(response)).await.is_ok()
    }
}

/// The certificate service.
pub struct Certificates(pub Arc<Plane>);

#[tonic::async_trait]
impl IstioCertificateService for Certificates {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let node = self.0.node(request.metadata())?;
        let request = request.into_inner();
        let identity = impersonated(&request)?;
        self.may_have(&node, &identity)?;
        let wanted = Duration::from_secs(request.validity_duration.try_into().unwrap_or(0));
        let chain = self
            .0
            .authority
            .sign(&request.csr, &identity, wanted)
            .map_err(Status::invalid_argument)?;
        tracing::info!(node, "certificate for {identity}");
        Ok(Response::new(IstioCertificateResponse {
            cert_chain: chain,
        }))
    }
}

impl Certificates {
    /// A node may only be whom its own pods are.
    fn may_have(&self, node: &str, identity: &Identity) -> Result<(), Status> {
        if identity.trust_domain() != self.0.trust_domain {
            return Err(Status::permission_denied(format!(
                "{identity} is not of trust domain {}",
                self.0.trust_domain
            )));
        }
        let account = (
            identity.namespace().to_string(),
            identity.service_account().to_string(),
        );
        let snapshot = self.0.snapshots.borrow();
        if snapshot
            .places
            .get(&account)
            .is_some_and(|nodes| nodes.iter().any(|known| known == node))
        {
            return Ok(());
        }
        tracing::warn!(node, "a node asked for {identity}, of which it runs no pod");
        Err(Status::permission_denied(format!(
            "node {node} runs no pod of {identity}"
        )))
    }
}

fn impersonated(request: &IstioCertificateRequest) -> Result<Identity, Status> {
    let fields = request.metadata.as_ref().map(|metadata| &metadata.fields);
    let value = fields
        .and_then(|fields| fields.get("ImpersonatedIdentity"))
        .and_then(|value| value.kind.as_ref());
    let Some(Kind::StringValue(text)) = value else {
        return Err(Status::invalid_argument(
            "the request names no ImpersonatedIdentity",
        ));
    };
    text.parse()
        .map_err(|error: hbone::IdentityError| Status::invalid_argument(error.to_string()))
}
