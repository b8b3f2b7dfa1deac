use std::sync::atomic::{AtomicBool, Ordering};

use futures_util::future::BoxFuture;
use hbone::{Identity, TlsIdentity};
use prost_types::Any;

use super::*;
use crate::config::RootSource;
use crate::identity::{Authority, Certificates, IdentityError};
use crate::mesh::Store;
use crate::mesh_feed::SharedMesh;
use crate::proto::discovery::Resource;
use crate::proto::workload::address::Type;

/// Issues nothing.
struct Nobody;

impl Authority for Nobody {
    fn issue<'a>(&'a self, _: &'a Identity) -> BoxFuture<'a, Result<TlsIdentity, IdentityError>> {
        Box::pin(std::future::pending())
    }
}

struct Fixture {
    client: Client,
    mesh: SharedMesh,
    synced: Arc<AtomicBool>,
}

fn fixture() -> Fixture {
    let config = Config::from_environment(String::new()).unwrap();
    let mesh = SharedMesh::new(Store::new("").snapshot());
    let synced = Arc::new(AtomicBool::new(false));
    let told = synced.clone();
    let peer = Peer {
        address: "https://127.0.0.1:1".to_string(),
        root: RootSource::Inline(String::new()),
        alt_hostname: None,
        tls12: false,
        pqc: false,
    };
    let credentials = Credentials::new(config.token.clone(), "Kubernetes", &[]).unwrap();
    let client = Client::new(
        &config,
        peer,
        credentials,
        Rc::new(MeshWriter::new(
            "",
            mesh.clone(),
            Certificates::new(Arc::new(Nobody)),
        )),
        Arc::new(Telemetry::new("test")),
        None,
        move || told.store(true, Ordering::SeqCst),
    );
    Fixture {
        client,
        mesh,
        synced,
    }
}

fn resource(name: &str, version: &str, type_url: &str, record: &impl Message) -> Resource {
    let any = Any {
        type_url: type_url.to_string(),
        value: record.encode_to_vec(),
    };
    Resource {
        name: name.to_string(),
        version: version.to_string(),
        resource: Some(any),
        aliases: vec![],
    }
}

fn pod(name: &str, ip: &[u8]) -> workload::Address {
    let record = workload::Workload {
        uid: name.to_string(),
        name: name.to_string(),
        addresses: vec![ip.to_vec()],
        ..Default::default()
    };
    workload::Address {
        r#type: Some(Type::Workload(record)),
    }
}

fn response(type_url: &str, resources: Vec<Resource>, removed: &[&str]) -> DeltaDiscoveryResponse {
    DeltaDiscoveryResponse {
        type_url: type_url.to_string(),
        nonce: "n".to_string(),
        resources,
        removed_resources: removed.iter().map(ToString::to_string).collect(),
        ..Default::default()
    }
}

#[test]
fn good_resources_of_a_response_count_and_bad_ones_are_refused_by_name_and_field() {
    let mut fixture = fixture();
    let first = response(
        ADDRESS_TYPE,
        vec![
            resource("good", "1", ADDRESS_TYPE, &pod("good", &[10, 0, 0, 1])),
            resource(
                "later-bad",
                "1",
                ADDRESS_TYPE,
                &pod("later-bad", &[10, 0, 0, 2]),
            ),
        ],
        &[],
    );
    let answer = fixture.client.take(first);
    assert_eq!(
        (answer.response_nonce.as_str(), answer.error_detail),
        ("n", None)
    );
    let second = response(
        ADDRESS_TYPE,
        vec![
            resource(
                "later-bad",
                "2",
                ADDRESS_TYPE,
                &pod("later-bad", &[1, 2, 3]),
            ),
            resource("new", "1", ADDRESS_TYPE, &pod("new", &[10, 0, 0, 3])),
            Resource {
                name: "hollow".to_string(),
                ..Default::default()
            },
        ],
        &["good"],
    );
    let answer = fixture.client.take(second);
    assert_eq!(
        answer
            .error_detail
            .map(|refused| refused.message)
            .as_deref(),
        Some(
            "later-bad: addresses: failed to parse address, had 3 bytes; hollow: the resource is empty"
        )
    );
    let mesh = fixture.mesh.load();
    let known = |name: &str| {
        mesh.workload_by_uid(name)
            .map(|known| known.addresses[0].to_string())
    };
    assert_eq!(
        known("later-bad").as_deref(),
        Some("10.0.0.2"),
        "the last good value stays"
    );
    assert_eq!(
        (known("new").as_deref(), known("good")),
        (Some("10.0.0.3"), None)
    );
    // What was refused is not claimed to be held, so that it is sent again.
    let held: Vec<_> = fixture.client.held[0].keys().map(|name| &**name).collect();
    assert_eq!(held, ["new"]);
}

#[test]
fn nobody_is_let_in_until_all_policies_were_understood_once() {
    let mut fixture = fixture();
    let policy = |scope| security::Authorization {
        name: "p".into(),
        namespace: "a".into(),
        scope,
        ..Default::default()
    };
    fixture.client.take(response(ADDRESS_TYPE, vec![], &[]));
    let bad = resource("a/p", "1", AUTHORIZATION_TYPE, &policy(9));
    let answer = fixture
        .client
        .take(response(AUTHORIZATION_TYPE, vec![bad], &[]));
    assert_eq!(
        answer
            .error_detail
            .map(|refused| refused.message)
            .as_deref(),
        Some("a/p: scope: unknown value 9")
    );
    assert!(!fixture.mesh.load().policies_synced() && !fixture.synced.load(Ordering::SeqCst));
    let good = resource("a/p", "2", AUTHORIZATION_TYPE, &policy(1));
    fixture
        .client
        .take(response(AUTHORIZATION_TYPE, vec![good], &[]));
    assert!(fixture.mesh.load().policies_synced() && fixture.synced.load(Ordering::SeqCst));
    assert!(fixture.mesh.load().policy("a/p").is_some());
}

#[test]
fn an_unknown_type_is_acknowledged_and_changes_nothing() {
    let mut fixture = fixture();
    let answer = fixture
        .client
        .take(response("type.googleapis.com/other", vec![], &["x"]));
    assert_eq!(
        (answer.type_url.as_str(), answer.error_detail),
        ("type.googleapis.com/other", None)
    );
}

#[test]
fn only_some_statuses_mean_to_connect_anew_at_once() {
    assert!(is_reconnect(&Status::new(
        Code::Unavailable,
        "transport is closing"
    )));
    assert!(!is_reconnect(&Status::new(Code::Unavailable, "no")));
    assert!(is_reconnect(&Status::new(Code::Cancelled, "")));
    assert!(!is_reconnect(&Status::new(
        Code::Unauthenticated,
        "authentication failure"
    )));
}
