//! The metadata that authenticates a request to the control plane: bearer token, cluster and extra headers.

use http::{HeaderMap, HeaderName, HeaderValue};
use thiserror::Error;
use tonic::metadata::MetadataMap;

use crate::config::TokenSource;

/// Why a request cannot be authenticated. The token itself is never part of a text.
#[derive(Debug, Error)]
pub enum TokenError {
    #[error("cannot read the token file {path}: {source}")]
    Unreadable {
        path: String,
        source: std::io::Error,
    },
    #[error("the token file {0} is empty")]
    Empty(String),
    #[error("the token is not a valid header value")]
    Malformed,
    #[error("invalid header {0}")]
    Header(String),
}

/// Makes the metadata of each request; a token file is read anew every time, for tokens rotate.
#[derive(Clone, Debug)]
pub struct Credentials {
    token: TokenSource,
    cluster_id: HeaderValue,
    extra: HeaderMap,
}

impl Credentials {
    /// # Errors
    /// A cluster id or an extra header that cannot be sent over HTTP.
    pub fn new(
        token: TokenSource,
        cluster_id: &str,
        headers: &[(String, String)],
    ) -> Result<Self, TokenError> {
        let mut extra = HeaderMap::new();
        for (name, value) in headers {
            let (Ok(key), Ok(value)) = (
                HeaderName::try_from(name.as_str()),
                HeaderValue::try_from(value.as_str()),
            ) else {
                return Err(TokenError::Header(name.clone()));
            };
            extra.append(key, value);
        }
        let cluster_id = HeaderValue::try_from(cluster_id)
            .map_err(|_| TokenError::Header("clusterid".to_string()))?;
        Ok(Self {
            token,
            cluster_id,
            extra,
        })
    }

    /// The metadata of one request: `authorization` and `clusterid` where there is a token, and the extra headers.
    ///
    /// # Errors
    /// A token that cannot be read or sent.
    pub async fn metadata(&self) -> Result<MetadataMap, TokenError> {
        let mut headers = self.extra.clone();
        if let Some(token) = self.token().await? {
            let mut value = HeaderValue::try_from(format!("Bearer {token}"))
                .map_err(|_| TokenError::Malformed)?;
            value.set_sensitive(true);
            headers.insert(http::header::AUTHORIZATION, value);
            headers.insert(
                HeaderName::from_static("clusterid"),
                self.cluster_id.clone(),
            );
        }
        Ok(MetadataMap::from_headers(headers))
    }

    async fn token(&self) -> Result<Option<String>, TokenError> {
        match &self.token {
            TokenSource::None => Ok(None),
            TokenSource::Static(token) => Ok(Some(token.trim().to_string())),
            TokenSource::File(path) => {
                let text = tokio::fs::read_to_string(path).await.map_err(|source| {
                    TokenError::Unreadable {
                        path: path.display().to_string(),
                        source,
                    }
                })?;
                match text.trim() {
                    "" => Err(TokenError::Empty(path.display().to_string())),
                    token => Ok(Some(token.to_string())),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn credentials(token: TokenSource) -> Credentials {
        Credentials::new(token, "east", &[("x-a".to_string(), "1".to_string())]).unwrap()
    }

    #[tokio::test]
    async fn a_token_brings_the_cluster_and_stays_out_of_debug_output() {
        let credentials = credentials(TokenSource::Static("s3cret".to_string()));
        let metadata = credentials.metadata().await.unwrap();
        assert_eq!(metadata.get("authorization").unwrap(), "Bearer s3cret");
        assert_eq!(metadata.get("clusterid").unwrap(), "east");
        assert_eq!(metadata.get("x-a").unwrap(), "1");
        assert!(!format!("{metadata:?}{credentials:?}").contains("s3cret"));
    }

    #[tokio::test]
    async fn without_a_token_only_the_extra_headers_are_sent() {
        let metadata = credentials(TokenSource::None).metadata().await.unwrap();
        assert!(metadata.get("authorization").is_none());
        assert!(metadata.get("clusterid").is_none());
        assert!(metadata.get("x-a").is_some());
    }

    #[tokio::test]
    async fn a_token_file_is_read_again_and_may_not_be_empty() {
        let path = std::env::temp_dir().join(format!("warren-token-{}", std::process::id()));
        let credentials = credentials(TokenSource::File(path.clone()));
        for token in ["one", "two"] {
            std::fs::write(&path, format!("{token}\n")).unwrap();
            let metadata = credentials.metadata().await.unwrap();
            assert_eq!(
                metadata.get("authorization").unwrap(),
                format!("Bearer {token}").as_str()
            );
        }
        std::fs::write(&path, "\n").unwrap();
        assert!(matches!(
            credentials.metadata().await,
            Err(TokenError::Empty(_))
        ));
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(
            credentials.metadata().await,
            Err(TokenError::Unreadable { .. })
        ));
    }
}
