//! The control plane as a proxy sees it: over real TLS, with real tokens.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use hbone::Identity;
use prost_types::value::Kind;
use prost_types::{Struct, Value};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Request, Status, Streaming};

use super::*;
use crate::config::RootSource;
use crate::identity::channel::Peer;
use crate::identity::csr::SigningRequest;
use crate::proto::ca::IstioCertificateRequest;
use crate::proto::ca::istio_certificate_service_client::IstioCertificateServiceClient;
use crate::proto::discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use crate::proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use crate::xds::client::{ADDRESS_TYPE, AUTHORIZATION_TYPE};

const POD: &str = "apiVersion: v1
kind: Pod
metadata: {name: NAME, namespace: a}
spec: {nodeName: NODE, serviceAccountName: NAME}
status: {podIP: 10.0.0.1}
";

fn pod(name: &str, node: &str) -> String {
    POD.replace("NAME", name).replace("NODE", node)
}

struct Running {
    folder: PathBuf,
    channel: Channel,
    _stop: oneshot::Sender<()>,
}

impl Running {
    async fn start(name: &str) -> Self {
        // A port that was free a moment ago.
        let free = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let port = free.local_addr().unwrap().port();
        drop(free);
        let folder =
            std::env::temp_dir().join(format!("wrn-control-{}-{name}", std::process::id()));
        let manifests = folder.join("manifests");
        std::fs::create_dir_all(&manifests).unwrap();
        std::fs::write(manifests.join("one.yaml"), pod("one", "n1")).unwrap();
        std::fs::write(manifests.join("two.yaml"), pod("two", "n2")).unwrap();
        let arguments = ControlArgs {
            manifests,
            listen: SocketAddr::from(([127, 0, 0, 1], port)),
            state_dir: folder.join("state"),
            trust_domain: "cluster.local".into(),
            cluster_domain: "cluster.local".into(),
            cluster_id: "Kubernetes".into(),
            network: String::new(),
            root_namespace: "istio-system".into(),
            workload_cert_ttl: Duration::from_secs(3600),
            san: Vec::new(),
            node: vec!["n1".into(), "n2".into()],
        };
        let (stop, stopped) = oneshot::channel();
        tokio::spawn(async move {
            serve(&arguments, async { drop(stopped.await) })
                .await
                .unwrap()
        });
        let root = folder.join("state/root-cert.pem");
        let peer = Peer {
            address: format!("https://127.0.0.1:{port}"),
            root: RootSource::File(root),
            alt_hostname: None,
            tls12: false,
            pqc: false,
        };
        let mut attempts = 0;
        let channel = loop {
            match peer.connect().await {
                Ok(channel) => break channel,
                Err(error) => {
                    attempts += 1;
                    assert!(attempts < 500, "{error}");
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }
        };
        Self {
            folder,
            channel,
            _stop: stop,
        }
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.folder.join("manifests").join(name), text).unwrap();
    }

    fn request<T>(&self, node: &str, message: T) -> Request<T> {
        let mut request = Request::new(message);
        let token = std::fs::read_to_string(self.folder.join("state/tokens").join(node))
            .unwrap_or_default();
        request
            .metadata_mut()
            .insert("authorization", format!("Bearer {token}").parse().unwrap());
        request
    }

    async fn certificate(&self, node: &str, identity: &str) -> Result<Vec<String>, Status> {
        let wanted: Identity = identity.parse().unwrap();
        let csr = SigningRequest::new(&wanted).unwrap().pem;
        let name = Value {
            kind: Some(Kind::StringValue(identity.to_string())),
        };
        let fields = BTreeMap::from([("ImpersonatedIdentity".to_string(), name)]);
        let message = IstioCertificateRequest {
            csr,
            validity_duration: 0,
            metadata: Some(Struct { fields }),
        };
        let mut client = IstioCertificateServiceClient::new(self.channel.clone());
        let response = client
            .create_certificate(self.request(node, message))
            .await?;
        Ok(response.into_inner().cert_chain)
    }

    async fn subscribe(&self, first: DeltaDiscoveryRequest) -> Stream {
        let (requests, outgoing) = mpsc::channel(8);
        requests.send(first).await.unwrap();
        let mut client = AggregatedDiscoveryServiceClient::new(self.channel.clone());
        let request = self.request("n1", ReceiverStream::new(outgoing));
        let responses = client
            .delta_aggregated_resources(request)
            .await
            .unwrap()
            .into_inner();
        Stream {
            requests,
            responses,
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

struct Stream {
    requests: mpsc::Sender<DeltaDiscoveryRequest>,
    responses: Streaming<DeltaDiscoveryResponse>,
}

impl Stream {
    /// The next response, acknowledged: what came and what went.
    async fn next(&mut self) -> (Vec<(String, String)>, Vec<String>) {
        let next = tokio::time::timeout(Duration::from_secs(20), self.responses.message());
        let response = next.await.unwrap().unwrap().unwrap();
        let ack = DeltaDiscoveryRequest {
            type_url: response.type_url,
            response_nonce: response.nonce,
            ..Default::default()
        };
        self.requests.send(ack).await.unwrap();
        let came = response
            .resources
            .into_iter()
            .map(|resource| (resource.name, resource.version));
        (came.collect(), response.removed_resources)
    }
}

fn addresses() -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        type_url: ADDRESS_TYPE.to_string(),
        ..Default::default()
    }
}

fn names(came: &[(String, String)]) -> Vec<&str> {
    came.iter().map(|(name, _)| &**name).collect()
}

#[tokio::test]
async fn a_node_gets_certificates_of_its_own_pods_only() {
    let running = Running::start("ca").await;
    let chain = running
        .certificate("n1", "spiffe://cluster.local/ns/a/sa/one")
        .await
        .unwrap();
    assert_eq!(chain.len(), 2);
    assert_eq!(
        chain[1],
        std::fs::read_to_string(running.folder.join("state/root-cert.pem")).unwrap()
    );
    let cases = [
        (
            "n1",
            "spiffe://cluster.local/ns/a/sa/two",
            "node n1 runs no pod of spiffe://cluster.local/ns/a/sa/two",
        ),
        (
            "n2",
            "spiffe://cluster.local/ns/a/sa/one",
            "node n2 runs no pod of spiffe://cluster.local/ns/a/sa/one",
        ),
        (
            "n1",
            "spiffe://other/ns/a/sa/one",
            "spiffe://other/ns/a/sa/one is not of trust domain cluster.local",
        ),
        (
            "nobody",
            "spiffe://cluster.local/ns/a/sa/one",
            "authentication failure: the token is of no node",
        ),
    ];
    for (node, identity, refusal) in cases {
        let status = running.certificate(node, identity).await.unwrap_err();
        assert_eq!(status.message(), refusal);
    }
    let key = std::fs::metadata(running.folder.join("state/root-key.pem")).unwrap();
    assert_eq!(
        std::os::unix::fs::PermissionsExt::mode(&key.permissions()) & 0o077,
        0
    );
}

#[tokio::test]
async fn changes_of_the_folder_are_pushed_and_bad_files_change_nothing() {
    let running = Running::start("push").await;
    let mut stream = running.subscribe(addresses()).await;
    let (came, gone) = stream.next().await;
    assert_eq!(
        names(&came),
        ["Kubernetes//Pod/a/one", "Kubernetes//Pod/a/two"]
    );
    assert!(gone.is_empty());
    // A file that cannot be read changes nothing, so the next push is of the file after it.
    running.write(
        "one.yaml",
        "apiVersion: v1\nkind: Pod\nmetadata: {name: one}\nspec: 7\n",
    );
    running.write("three.yaml", &pod("three", "n1"));
    let (came, gone) = stream.next().await;
    assert_eq!(
        (names(&came), gone),
        (vec!["Kubernetes//Pod/a/three"], vec![])
    );
    std::fs::remove_file(running.folder.join("manifests/two.yaml")).unwrap();
    let (came, gone) = stream.next().await;
    assert_eq!(
        (names(&came), gone),
        (vec![], vec!["Kubernetes//Pod/a/two".to_string()])
    );
    running.write("three.yaml", &pod("three", "n2"));
    assert_eq!(names(&stream.next().await.0), ["Kubernetes//Pod/a/three"]);
}

#[tokio::test]
async fn a_proxy_that_comes_back_gets_only_what_it_does_not_hold() {
    let running = Running::start("resume").await;
    let (held, _) = running.subscribe(addresses()).await.next().await;
    let mut again = addresses();
    again.initial_resource_versions = held
        .into_iter()
        .filter(|(name, _)| name.ends_with("one"))
        .collect();
    again
        .initial_resource_versions
        .insert("Kubernetes//Pod/a/gone".to_string(), "1".to_string());
    let (came, gone) = running.subscribe(again).await.next().await;
    assert_eq!(names(&came), ["Kubernetes//Pod/a/two"]);
    assert_eq!(gone, ["Kubernetes//Pod/a/gone"]);
}

#[tokio::test]
async fn a_type_without_resources_is_answered_too() {
    let running = Running::start("empty").await;
    let policies = DeltaDiscoveryRequest {
        type_url: AUTHORIZATION_TYPE.to_string(),
        ..Default::default()
    };
    let mut stream = running.subscribe(policies).await;
    assert_eq!(stream.next().await, (vec![], vec![]));
    let unknown = DeltaDiscoveryRequest {
        type_url: "x".to_string(),
        ..Default::default()
    };
    let mut refused = running.subscribe(unknown).await;
    assert_eq!(
        refused.responses.message().await.unwrap_err().code(),
        tonic::Code::InvalidArgument
    );
}

#[tokio::test]
async fn a_folder_in_the_place_of_another_is_followed() {
    let running = Running::start("replaced").await;
    let mut stream = running.subscribe(addresses()).await;
    stream.next().await;
    let manifests = running.folder.join("manifests");
    let next = running.folder.join("next");
    std::fs::create_dir_all(&next).unwrap();
    std::fs::write(next.join("one.yaml"), pod("one", "n1")).unwrap();
    std::fs::rename(&manifests, running.folder.join("before")).unwrap();
    std::fs::rename(&next, &manifests).unwrap();
    let (came, gone) = stream.next().await;
    assert_eq!(
        (names(&came), gone),
        (vec![], vec!["Kubernetes//Pod/a/two".to_string()])
    );
    // The new folder is watched, too.
    running.write("three.yaml", &pod("three", "n1"));
    assert_eq!(names(&stream.next().await.0), ["Kubernetes//Pod/a/three"]);
}

#[tokio::test]
async fn a_refused_resource_is_not_sent_again_and_the_next_change_is() {
    let running = Running::start("refused").await;
    let mut stream = running.subscribe(addresses()).await;
    let first = stream.responses.message().await.unwrap().unwrap();
    let refusal = DeltaDiscoveryRequest {
        type_url: first.type_url,
        response_nonce: first.nonce,
        error_detail: Some(crate::proto::discovery::Status {
            message: "Kubernetes//Pod/a/one: no".to_string(),
            ..Default::default()
        }),
        ..Default::default()
    };
    stream.requests.send(refusal).await.unwrap();
    running.write("three.yaml", &pod("three", "n1"));
    assert_eq!(names(&stream.next().await.0), ["Kubernetes//Pod/a/three"]);
}

#[tokio::test]
async fn a_new_policy_comes_before_the_workload_that_names_it() {
    let running = Running::start("order").await;
    let mut stream = running.subscribe(addresses()).await;
    stream.next().await;
    let policies = DeltaDiscoveryRequest {
        type_url: AUTHORIZATION_TYPE.to_string(),
        ..Default::default()
    };
    stream.requests.send(policies).await.unwrap();
    assert_eq!(stream.next().await, (vec![], vec![]));
    running.write(
        "policy.yaml",
        "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: p, namespace: a}
spec: {selector: {matchLabels: {}}}
",
    );
    assert_eq!(names(&stream.next().await.0), ["a/p"]);
    let (came, _) = stream.next().await;
    assert_eq!(
        names(&came),
        ["Kubernetes//Pod/a/one", "Kubernetes//Pod/a/two"]
    );
    std::fs::remove_file(running.folder.join("manifests/policy.yaml")).unwrap();
    assert_eq!(stream.next().await, (vec![], vec!["a/p".to_string()]));
    assert_eq!(stream.next().await.0.len(), 2);
}

#[tokio::test]
async fn discovery_is_for_nodes_only() {
    let running = Running::start("auth").await;
    let node = running.request("n1", ());
    let with_token = node.metadata().get("authorization").unwrap().clone();
    let without_scheme = with_token.to_str().unwrap().replace("Bearer ", "");
    let cases = [
        (Some("Bearer "), "the token is of no node"),
        (Some("Bearer 0000"), "the token is of no node"),
        (Some(&*without_scheme), "no bearer token"),
        (None, "no bearer token"),
    ];
    for (header, reason) in cases {
        let (_requests, outgoing) = mpsc::channel(1);
        let mut request = Request::new(ReceiverStream::new(outgoing));
        if let Some(header) = header {
            let header = header.parse().unwrap();
            request.metadata_mut().insert("authorization", header);
        }
        let mut client = AggregatedDiscoveryServiceClient::new(running.channel.clone());
        let status = client
            .delta_aggregated_resources(request)
            .await
            .unwrap_err();
        assert_eq!(
            (status.code(), status.message()),
            (
                tonic::Code::Unauthenticated,
                &*format!("authentication failure: {reason}")
            )
        );
    }
}

#[tokio::test]
async fn nodes_that_pods_are_on_get_tokens_that_last() {
    let running = Running::start("tokens").await;
    let tokens = running.folder.join("state/tokens");
    running.write("three.yaml", &pod("three", "n3"));
    let mut attempts = 0;
    while !tokens.join("n3").exists() {
        attempts += 1;
        assert!(attempts < 500);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let known = tokens::Tokens::open(tokens.clone()).unwrap();
    for node in ["n1", "n2", "n3"] {
        let token = std::fs::read_to_string(tokens.join(node)).unwrap();
        assert_eq!(known.node(&token), Some(node));
        let mode = std::fs::metadata(tokens.join(node)).unwrap().permissions();
        assert_eq!(std::os::unix::fs::PermissionsExt::mode(&mode) & 0o077, 0);
    }
    assert_eq!(known.node(""), None);
    let mut known = known;
    assert!(known.ensure("../n1").is_err() && known.ensure("").is_err());
}

#[test]
fn lifetimes_are_numbers_with_units() {
    assert_eq!(lifetime("90s"), Ok(Duration::from_secs(90)));
    assert_eq!(lifetime("24h"), Ok(Duration::from_secs(86_400)));
    for wrong in [
        "0s",
        "24",
        "h",
        "-1h",
        "1.5h",
        "99999999999999999999d",
        "3651d",
        "",
    ] {
        assert!(lifetime(wrong).is_err(), "{wrong}");
    }
}
