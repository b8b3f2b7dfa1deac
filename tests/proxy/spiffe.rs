//! Identities of a SPIFFE Workload API server: a process of its own, which is this test program once more.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::{Child, Command};
use std::time::Duration;

use futures_util::Stream;
use prost::Message;
use tokio::net::UnixListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tonic::{Request, Response, Status};
use warren::proto::spiffe::spiffe_workload_api_server::{
    SpiffeWorkloadApi, SpiffeWorkloadApiServer,
};
use warren::proto::spiffe::{X509svid, X509svidRequest, X509svidResponse};

use crate::harness::{Node, spawn, wait_for};
use crate::tunnel::{CURL, answer, config, request, tls};

const WEB: &str = "spiffe://cluster.local/ns/b/sa/web";
const OTHER: &str = "spiffe://cluster.local/ns/b/sa/other";
const APPLICATION: &str = "10.0.0.9:8080";
/// Names the server's folder to the server's process.
const FOLDER: &str = "WARREN_TEST_WORKLOAD_API";
/// What the server is to send; while there is no such file it knows nobody.
const RESPONSE: &str = "response";

/// A node whose identities come from a server of the Workload API.
struct Place {
    folder: PathBuf,
    server: Option<Child>,
    node: Option<Node>,
}

impl Place {
    /// Starts the node, but no server yet; none, with a line that says so, without root.
    async fn start(name: &str) -> Option<Self> {
        let folder = std::env::temp_dir().join(format!("wrn-spiffe-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let socket = format!("unix://{}/api.sock", folder.display());
        let mut place = Self {
            folder,
            server: None,
            node: None,
        };
        let variables = [("CA_ADDRESS", ""), ("SPIFFE_ENDPOINT_SOCKET", &*socket)];
        place.node = Some(Node::start(&format!("spiffe-{name}"), &variables).await?);
        Some(place)
    }

    fn node(&self) -> &Node {
        self.node.as_ref().unwrap()
    }

    fn start_server(&mut self) {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["--ignored", "--exact", "spiffe::the_server", "--nocapture"])
            .env(FOLDER, &self.folder);
        let log = self.folder.join("server.log");
        self.server = Some(spawn(&mut command, self.node().netns(), &log));
    }

    fn kill_server(&mut self) {
        if let Some(mut server) = self.server.take() {
            server.kill().unwrap();
            server.wait().unwrap();
        }
    }

    /// Has the server send that.
    fn send(&self, svids: Vec<X509svid>) {
        let response = X509svidResponse {
            svids,
            // Of these nothing is used.
            crl: vec![b"junk".to_vec()],
            federated_bundles: [("spiffe://elsewhere".to_string(), b"junk".to_vec())].into(),
        };
        let scratch = self.folder.join("scratch");
        std::fs::write(&scratch, response.encode_to_vec()).unwrap();
        std::fs::rename(scratch, self.folder.join(RESPONSE)).unwrap();
    }

    fn svid(&self, uri: &str) -> X509svid {
        self.node().certificate(uri).svid()
    }

    /// The status of a CONNECT on a new tunnel and the certificate that the pod presented; none if it has none.
    async fn visit(&self) -> Option<(u16, Vec<u8>)> {
        let client = self.node().certificate(CURL).identity();
        let stream = tls(self.node(), config(&client)).await.ok()?;
        let presented = stream.get_ref().1.peer_certificates()?.first()?.to_vec();
        let (send, connection) = h2::client::handshake(stream).await.ok()?;
        tokio::spawn(connection);
        let status = answer(send, request(APPLICATION)).await.ok()?;
        Some((status, presented))
    }

    /// Waits until the pod lets nobody in.
    async fn refuses(&self) {
        for _ in 0..500 {
            if self.visit().await.is_none() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("the pod still lets its client in");
    }

    /// Waits until the pod presents that certificate.
    async fn presents(&self, svid: &X509svid) {
        let expected = Some((200, svid.x509_svid.clone()));
        for _ in 0..500 {
            if self.visit().await == expected {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("the pod does not present the newest certificate");
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.kill_server();
        if std::thread::panicking() {
            let read = |path: PathBuf| std::fs::read_to_string(path).unwrap_or_default();
            eprintln!("{}", read(self.folder.join("server.log")));
            if let Some(node) = &self.node {
                eprintln!("{}", read(node.folder().join("proxy.log")));
            }
        }
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

#[tokio::test]
async fn identities_come_change_and_go_as_the_workload_api_says() {
    let Some(mut place) = Place::start("life").await else {
        return;
    };
    let _application = place.node().listen(8080);
    place.node().logged(&["retrying in"]).await;
    place.start_server();
    let hint = "add entries for this node's workloads";
    place
        .node()
        .logged(&["PermissionDenied: nobody is registered", hint])
        .await;
    assert_eq!(place.visit().await, None);
    place
        .node()
        .logged(&["signing error: SPIFFE Workload API at"])
        .await;

    let first = place.svid(WEB);
    place.send(vec![first.clone()]);
    place.presents(&first).await;
    place
        .node()
        .logged(&[
            "warn",
            "sends revocation lists, which are not used; give them in CRL_PATH",
        ])
        .await;

    let second = place.svid(WEB);
    place.send(vec![place.svid(OTHER), second.clone()]);
    place.presents(&second).await;

    let wrong_key = X509svid {
        x509_svid_key: first.x509_svid_key,
        ..place.svid(WEB)
    };
    place.send(vec![wrong_key]);
    place
        .node()
        .logged(&[
            "a malformed response changes nothing: the certificate of",
            WEB,
        ])
        .await;
    assert_eq!(place.visit().await, Some((200, second.x509_svid)));

    place.send(vec![place.svid(OTHER)]);
    place.refuses().await;
    let refused = format!("signing error: the SPIFFE Workload API server has no entry for {WEB}");
    place.node().logged(&[&refused, "hint: add one"]).await;

    let third = place.svid(WEB);
    place.send(vec![third.clone()]);
    place.presents(&third).await;
}

#[tokio::test]
async fn the_servers_death_and_return_are_survived() {
    let Some(mut place) = Place::start("death").await else {
        return;
    };
    let _application = place.node().listen(8080);
    let first = place.svid(WEB);
    place.send(vec![first.clone()]);
    place.start_server();
    place.presents(&first).await;

    let lost = place.node().count("retrying in");
    place.kill_server();
    wait_for("the stream's loss in the log", || {
        place.node().count("retrying in") > lost
    })
    .await;
    assert_eq!(place.visit().await, Some((200, first.x509_svid)));

    let second = place.svid(WEB);
    place.send(vec![second.clone()]);
    place.start_server();
    place.presents(&second).await;
}

#[tokio::test]
async fn peers_are_checked_against_the_newest_trust_bundle() {
    let Some(mut place) = Place::start("bundle").await else {
        return;
    };
    let _application = place.node().listen(8080);
    let first = place.svid(WEB);
    place.send(vec![first.clone()]);
    place.start_server();
    place.presents(&first).await;
    let elsewhere = rcgen::generate_simple_self_signed(["elsewhere".to_string()]).unwrap();
    let bundle = elsewhere.cert.der().to_vec();
    place.send(vec![X509svid { bundle, ..first }]);
    place.refuses().await;
    place.node().logged(&["UnknownIssuer"]).await;
}

#[test]
#[ignore = "the process that the other tests start as their server"]
fn the_server() {
    let folder = PathBuf::from(std::env::var_os(FOLDER).expect("only the other tests start it"));
    let socket = folder.join("api.sock");
    // Of a server that was killed.
    match std::fs::remove_file(&socket) {
        Err(error) if error.kind() != ErrorKind::NotFound => panic!("{error}"),
        _ => {}
    }
    let serve = async {
        let incoming = UnixListenerStream::new(UnixListener::bind(&socket).unwrap());
        let service = SpiffeWorkloadApiServer::new(Server { folder });
        let server = tonic::transport::Server::builder().add_service(service);
        server.serve_with_incoming(incoming).await.unwrap();
    };
    tokio::runtime::Runtime::new().unwrap().block_on(serve);
}

/// Sends what its folder says, and again whenever that has changed.
struct Server {
    folder: PathBuf,
}

fn response(folder: &Path) -> Option<Vec<u8>> {
    std::fs::read(folder.join(RESPONSE)).ok()
}

#[tonic::async_trait]
impl SpiffeWorkloadApi for Server {
    type FetchX509SVIDStream =
        Pin<Box<dyn Stream<Item = Result<X509svidResponse, Status>> + Send + 'static>>;

    async fn fetch_x509svid(
        &self,
        request: Request<X509svidRequest>,
    ) -> Result<Response<Self::FetchX509SVIDStream>, Status> {
        let header = request.metadata().get("workload.spiffe.io");
        if header.is_none_or(|value| value != "true") {
            return Err(Status::invalid_argument("the security header is missing"));
        }
        let folder = self.folder.clone();
        let mut newest =
            response(&folder).ok_or_else(|| Status::permission_denied("nobody is registered"))?;
        let (send, receive) = mpsc::channel(1);
        tokio::spawn(async move {
            let decode = |bytes: &[u8]| Ok(X509svidResponse::decode(bytes).unwrap());
            let mut sent = send.send(decode(&newest)).await;
            while sent.is_ok() {
                tokio::time::sleep(Duration::from_millis(20)).await;
                if let Some(next) = response(&folder).filter(|next| *next != newest) {
                    sent = send.send(decode(&next)).await;
                    newest = next;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receive))))
    }
}
