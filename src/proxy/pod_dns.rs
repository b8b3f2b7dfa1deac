//! DNS for one pod: the mesh's answers for its namespace, and the node's upstream servers.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::time::Instant;

use hickory_proto::rr::RecordType;
use tokio::net::{TcpListener, TcpStream, UdpSocket};

use super::pod::Pod;
use crate::config::Mode;
use crate::dns::answer::{self, Resolution, Settings};
use crate::dns::forward::{self, Sockets, Upstream, forward};
use crate::dns::server::{self, Question, Resolver, Transport};
use crate::node::sockets;
use crate::xds::names;

const RESOLV_CONF: &str = "/etc/resolv.conf";

struct PodResolver {
    pod: Rc<Pod>,
    settings: Settings,
    upstream: Upstream,
}

/// Answers the pod's captured DNS queries until dropped.
pub async fn serve(pod: Rc<Pod>, udp: Vec<UdpSocket>, tcp: Vec<TcpListener>) {
    server::serve(Rc::new(PodResolver::new(pod)), udp, tcp).await;
}

/// The addresses of a name as the pod's DNS gives them.
///
/// # Errors
/// When nobody could be asked.
pub async fn lookup(pod: &Rc<Pod>, name: &str, v6: bool) -> io::Result<Vec<IpAddr>> {
    let resolver = PodResolver::new(pod.clone());
    let question = Question {
        name: name.to_ascii_lowercase().trim_end_matches('.').to_string(),
        kind: if v6 { RecordType::AAAA } else { RecordType::A },
        transport: Transport::Udp,
    };
    match resolver.resolve(&question).await {
        Ok(Resolution::Known { addresses, .. }) => return Ok(addresses),
        Ok(Resolution::Forward) => {}
        Err(error) => return Err(io::Error::other(error)),
    }
    let query = forward::query(&question.name, question.kind)?;
    let answer = resolver.forward(&query, &question).await?;
    Ok(forward::addresses(&answer)?.0)
}

impl PodResolver {
    fn new(pod: Rc<Pod>) -> Self {
        let (upstream, search) = match std::fs::read_to_string(RESOLV_CONF) {
            Ok(text) => (
                Upstream::new(forward::servers(&text)),
                forward::search(&text),
            ),
            Err(error) => {
                tracing::warn!(
                    "{RESOLV_CONF} cannot be read, names outside the mesh will not resolve: {error}"
                );
                (Upstream::default(), Vec::new())
            }
        };
        let config = &pod.shared.config;
        let settings = Settings {
            domain: config.cluster_domain.clone(),
            // A workload of its own has the search domains of its machine.
            search: (config.mode != Mode::Shared).then_some(search),
            preferred_namespace: config.preferred_service_namespace.clone(),
            ipv6: config.ipv6,
        };
        Self {
            pod,
            settings,
            upstream,
        }
    }
}

impl Resolver for PodResolver {
    async fn resolve(&self, question: &Question) -> Result<Resolution, String> {
        let client = self.pod.sender();
        let shared = &self.pod.shared;
        if shared.demand.is_needed() {
            let domain = &self.settings.domain;
            for key in names::keys(&question.name, &client.namespace, domain) {
                let known = shared.mesh.load().has(&key);
                if !known {
                    shared.demand.fetch(&key).await;
                }
            }
        }
        let mesh = shared.mesh.load();
        let v6 = question.kind == RecordType::AAAA;
        Ok(answer::resolve(
            &mesh,
            &self.settings,
            &client,
            &question.name,
            v6,
        ))
    }

    async fn forward(&self, query: &[u8], question: &Question) -> io::Result<Vec<u8>> {
        let id = forward::random_id();
        let start = Instant::now();
        let answer = forward(query, id, &self.upstream, self).await;
        let telemetry = &self.pod.shared.telemetry;
        self.with_labels(question, |labels| {
            telemetry.add(
                "istio_dns_upstream_requests",
                "Total number of DNS requests forwarded to upstream (unstable)",
                labels,
                1,
            );
            if answer.is_err() {
                telemetry.add(
                    "istio_dns_upstream_failures",
                    "Total number of DNS upstream failures (unstable)",
                    labels,
                    1,
                );
            }
            telemetry.observe(
                "istio_dns_upstream_request_duration_seconds",
                "Total time in seconds Istio takes to get DNS response from upstream (unstable)",
                labels,
                start.elapsed(),
            );
        });
        answer
    }

    fn answered(&self, question: &Question, result: &str, answers: usize) {
        let telemetry = &self.pod.shared.telemetry;
        self.with_labels(question, |labels| {
            telemetry.add(
                "istio_dns_requests",
                "Total number of DNS requests (unstable)",
                labels,
                1,
            );
        });
        let spec = &self.pod.spec;
        let (workload, namespace) = (&*spec.name, &*spec.namespace);
        tracing::debug!(target: "dns", { src.workload = workload, src.namespace = namespace, query = %question.kind,
            domain = %question.name, result, endpoints = answers }, "query");
    }

    fn random(&self, bound: u64) -> u64 {
        self.pod.random(bound)
    }
}

impl PodResolver {
    fn with_labels(&self, question: &Question, count: impl FnOnce(&[(&str, &str)])) {
        let workload = self.pod.known_workload();
        let or_unknown = |text: Option<&str>| {
            text.filter(|text| !text.is_empty())
                .unwrap_or("unknown")
                .to_string()
        };
        let service = or_unknown(workload.as_ref().map(|workload| &*workload.canonical_name));
        let revision = or_unknown(
            workload
                .as_ref()
                .map(|workload| &*workload.canonical_revision),
        );
        let kind = question.kind.to_string().to_ascii_lowercase();
        let transport = if question.transport == Transport::Udp {
            "udp"
        } else {
            "tcp"
        };
        count(&[
            ("request_query_type", &kind),
            ("request_protocol", transport),
            ("source_canonical_service", &service),
            ("source_canonical_revision", &revision),
        ]);
    }
}

impl Sockets for PodResolver {
    fn udp(&self, server: SocketAddr) -> io::Result<UdpSocket> {
        sockets::udp(&self.pod.spec.netns, &self.pod.shared.config, server)
    }

    async fn tcp(&self, server: SocketAddr) -> io::Result<TcpStream> {
        self.pod.connect(server).await
    }
}
