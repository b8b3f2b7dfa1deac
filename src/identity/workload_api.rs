//! The client of the SPIFFE Workload API: one stream for the whole process, on which the server sends all SVIDs anew
//! whenever one of them or the trust bundle changes.

use std::sync::Arc;
use std::time::Duration;

use hbone::TlsOptions;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tonic::metadata::MetadataValue;
use tonic::transport::Endpoint;
use tonic::{Code, Request, Status};

use super::IdentityError;
use super::channel::{chain, explain};
use super::pushed::Delivered;
use super::retry::Failures;
use super::svids;
use crate::proto::spiffe::spiffe_workload_api_client::SpiffeWorkloadApiClient;
use crate::proto::spiffe::{X509svidRequest, X509svidResponse};

/// Longest wait for the first response on a stream, with the connection.
const FIRST_RESPONSE: Duration = Duration::from_secs(20);
/// Longest wait before the server is tried again. It is on the same machine.
const LONGEST_WAIT: Duration = Duration::from_secs(15);
/// Largest response, in bytes: some thousands of SVIDs.
const LARGEST: usize = 32 << 20;

/// Follows a server of the Workload API.
pub struct WorkloadApi {
    socket: String,
    tls: TlsOptions,
    newest: Delivered,
    failures: Failures,
    /// Whether it was told that revocation lists are not used.
    told_of_lists: bool,
}

impl WorkloadApi {
    /// A client that has not connected yet to the Unix socket of that path.
    pub fn new(socket: &str, tls: TlsOptions) -> Self {
        Self {
            socket: socket.to_string(),
            tls,
            newest: Delivered::default(),
            failures: Failures::default(),
            told_of_lists: false,
        }
    }

    /// Delivers what the server sends, for ever; what came last stays in use while the server cannot be reached.
    pub async fn run(mut self, deliver: watch::Sender<Delivered>) {
        loop {
            let Err(reason) = self.follow(&deliver).await;
            let delay = self.failures.next_delay().min(LONGEST_WAIT);
            let error = self.trouble(reason, &deliver);
            tracing::warn!("{error}, retrying in {delay:?}");
            sleep(delay).await;
        }
    }

    async fn follow(
        &mut self,
        deliver: &watch::Sender<Delivered>,
    ) -> Result<std::convert::Infallible, String> {
        let opening = async {
            // No pings: the kernel tells when a local peer is gone, and gRPC servers are wary of clients that ping.
            let channel = Endpoint::from_shared(format!("unix://{}", self.socket))
                .map_err(|error| chain(&error))?
                .user_agent(concat!("warren/", env!("CARGO_PKG_VERSION")))
                .map_err(|error| chain(&error))?
                .connect()
                .await
                .map_err(|error| chain(&error))?;
            let mut client =
                SpiffeWorkloadApiClient::new(channel).max_decoding_message_size(LARGEST);
            let mut request = Request::new(X509svidRequest {});
            // Servers refuse a call without it: it shows that nobody was tricked into making a request.
            let yes = MetadataValue::from_static("true");
            request.metadata_mut().insert("workload.spiffe.io", yes);
            let responses = client.fetch_x509svid(request).await;
            let mut responses = responses.map_err(|status| words(&status))?.into_inner();
            let first = responses.message().await;
            Ok::<_, String>((responses, first))
        };
        let late = || format!("no answer within {} s", FIRST_RESPONSE.as_secs());
        let (mut responses, mut next) = timeout(FIRST_RESPONSE, opening)
            .await
            .map_err(|_| late())??;
        loop {
            match next {
                Ok(Some(response)) => self.take(response, deliver),
                Ok(None) => return Err("the server ended the stream".to_string()),
                Err(status) => return Err(words(&status)),
            }
            next = responses.message().await;
        }
    }

    fn take(&mut self, response: X509svidResponse, deliver: &watch::Sender<Delivered>) {
        if !response.crl.is_empty() && !std::mem::replace(&mut self.told_of_lists, true) {
            tracing::warn!(
                "the SPIFFE Workload API server sends revocation lists, which are not used; give them in CRL_PATH"
            );
        }
        match svids::read(response, self.newest.set.as_deref(), &self.tls) {
            Ok(set) => {
                tracing::info!(
                    "SPIFFE Workload API at {}: certificates of {} identities",
                    self.socket,
                    set.len()
                );
                self.failures = Failures::default();
                self.newest = Delivered {
                    set: Some(Arc::new(set)),
                    trouble: None,
                };
                deliver.send_replace(self.newest.clone());
            }
            Err(malformed) => {
                let reason = format!("a malformed response changes nothing: {malformed}");
                tracing::error!("{}", self.trouble(reason, deliver));
            }
        }
    }

    /// Delivers why nothing newer comes.
    fn trouble(&mut self, reason: String, deliver: &watch::Sender<Delivered>) -> IdentityError {
        let error = IdentityError::WorkloadApi {
            socket: self.socket.clone(),
            reason,
        };
        self.newest.trouble = Some(error.clone());
        deliver.send_replace(self.newest.clone());
        error
    }
}

/// A status for the operator, with what to do.
fn words(status: &Status) -> String {
    let (code, text) = explain(status);
    let hint = match code {
        Code::PermissionDenied => {
            " (hint: add entries for this node's workloads whose selectors match this proxy's process)"
        }
        _ => "",
    };
    format!("{code:?}: {text}{hint}")
}
