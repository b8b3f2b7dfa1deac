//! The token that the plugin shows to the API server.
//!
//! The agent's own token dies with the agent's pod, and with a dead token the plugin can tell of no pod whether it is
//! enrolled: while the agent is replaced, every pod of the node would have to wait. So the plugin gets a token of the
//! same account that is bound to no pod.

use std::path::Path;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use k8s_openapi::api::authentication::v1::{TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::ServiceAccount;
use kube::Api;
use kube::api::PostParams;
use serde::Deserialize;
use tokio::sync::watch;

/// How long a token is asked to live, in seconds; the API server may shorten it.
const LIFE: i64 = 86_400;
/// The pauses before the next token, and after a failure.
const RENEW: Duration = Duration::from_secs(3600);
const AGAIN: Duration = Duration::from_secs(30);
/// How often the agent's own token is read when no other is to be had.
const REREAD: Duration = Duration::from_secs(60);

/// Keeps the token fresh, for ever. The first one is there before anything else is done with `tokens`.
pub async fn follow(client: kube::Client, folder: &Path, tokens: &watch::Sender<String>) {
    let mut told = false;
    loop {
        let own = own(folder);
        let pause = match request(&client, own.as_deref()).await {
            Ok(token) => {
                tokens.send_replace(token);
                RENEW
            }
            Err(error) => {
                if !std::mem::replace(&mut told, true) {
                    tracing::warn!(
                        "the plugin gets the agent's own token, which ends with the agent's pod: {error}"
                    );
                }
                let own = own.unwrap_or_default();
                tokens.send_if_modified(|token| {
                    let changed = *token != own;
                    *token = own;
                    changed
                });
                if tokens.borrow().is_empty() {
                    AGAIN
                } else {
                    REREAD
                }
            }
        };
        tokio::time::sleep(pause).await;
    }
}

fn own(folder: &Path) -> Option<String> {
    let token = std::fs::read_to_string(folder.join("token")).ok()?;
    Some(token.trim().to_string())
}

async fn request(client: &kube::Client, own: Option<&str>) -> anyhow::Result<String> {
    let own = own.ok_or_else(|| anyhow::anyhow!("the agent has no service account's token"))?;
    let account = account(own)
        .ok_or_else(|| anyhow::anyhow!("the agent's token does not say whose it is"))?;
    let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), &account.namespace);
    let asked = TokenRequest {
        spec: Some(TokenRequestSpec {
            expiration_seconds: Some(LIFE),
            ..TokenRequestSpec::default()
        }),
        ..TokenRequest::default()
    };
    let name = account.serviceaccount.name;
    let given = accounts
        .create_token_request(&name, &PostParams::default(), &asked)
        .await?;
    let token = given.status.and_then(|status| status.token);
    let token = token.unwrap_or_default();
    anyhow::ensure!(!token.is_empty(), "the API server gave an empty token");
    Ok(token)
}

#[derive(Deserialize)]
struct Claims {
    #[serde(rename = "kubernetes.io")]
    kubernetes: Account,
}

/// Whose a token is.
#[derive(Deserialize)]
struct Account {
    namespace: String,
    serviceaccount: Named,
}

#[derive(Deserialize)]
struct Named {
    name: String,
}

/// The account of a token, by its claims, which only the API server needs to verify.
fn account(token: &str) -> Option<Account> {
    let claims = token.split('.').nth(1)?.trim_end_matches('=');
    let claims = URL_SAFE_NO_PAD.decode(claims).ok()?;
    let claims: Claims = serde_json::from_slice(&claims).ok()?;
    Some(claims.kubernetes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_says_whose_it_is() {
        // {"kubernetes.io":{"namespace":"mesh","serviceaccount":{"name":"node-agent","uid":"1"}}}
        let token = "e30.eyJrdWJlcm5ldGVzLmlvIjp7Im5hbWVzcGFjZSI6Im1lc2giLCJzZXJ2aWNlYWNjb3VudCI6eyJuYW1lIjoibm9kZS1hZ2VudCIsInVpZCI6IjEifX19.c2ln";
        let account = account(token).unwrap();
        assert_eq!(account.namespace, "mesh");
        assert_eq!(account.serviceaccount.name, "node-agent");
        for token in ["", "a.b", "a.e30.b", "a.!!.b"] {
            assert!(super::account(token).is_none(), "{token}");
        }
    }
}
