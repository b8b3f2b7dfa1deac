//! The file of revocation lists: read at start and whenever it changes.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use hbone::Revocations;

use crate::telemetry::Telemetry;

/// How often the file is looked at.
const LOOK: Duration = Duration::from_secs(2);

/// Reads the file for the first time; one that is not there yet revokes nothing.
///
/// # Errors
/// When it is there and cannot be read.
pub fn load(path: PathBuf) -> anyhow::Result<Lists> {
    let mut lists = Lists {
        path,
        content: None,
        revocations: Revocations::default(),
    };
    let path = lists.path.display().to_string();
    match lists.read() {
        Err(Unread::Missing) => tracing::warn!(
            "the revocation lists of CRL_PATH={path} are not there yet: nothing is revoked until they are"
        ),
        Err(Unread::Broken(error)) => {
            return Err(error).with_context(|| format!("CRL_PATH={path}"));
        }
        Ok(_) => {}
    }
    Ok(lists)
}

/// The file and what it says.
pub struct Lists {
    path: PathBuf,
    /// What was read last.
    content: Option<Vec<u8>>,
    pub revocations: Revocations,
}

enum Unread {
    Missing,
    Broken(anyhow::Error),
}

impl Lists {
    /// Reads the file; tells whether it has changed. What cannot be read changes nothing.
    fn read(&mut self) -> Result<bool, Unread> {
        let content = std::fs::read(&self.path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => Unread::Missing,
            _ => Unread::Broken(error.into()),
        })?;
        if self.content.as_ref() == Some(&content) {
            return Ok(false);
        }
        let replaced = self.revocations.replace(&content);
        self.content = Some(content);
        let count = replaced.map_err(|error| Unread::Broken(error.into()))?;
        tracing::info!("revocation lists read: {count} revoked certificates");
        Ok(true)
    }

    /// Follows the file and counts refusals, for ever.
    pub async fn follow(mut self, telemetry: Arc<Telemetry>) {
        let mut counted = [0; 2];
        let mut missing = self.content.is_none();
        loop {
            tokio::time::sleep(LOOK).await;
            match self.read() {
                Ok(_) => missing = false,
                Err(Unread::Missing) if missing => {}
                Err(Unread::Missing) => {
                    missing = true;
                    let path = self.path.display();
                    tracing::warn!("{path} is gone; what it revoked stays revoked");
                }
                Err(Unread::Broken(error)) => {
                    let path = self.path.display();
                    tracing::error!("{path}: {error}; what was revoked before stays revoked");
                }
            }
            let refused = self.revocations.refused();
            for (place, reporter) in ["destination", "source"].into_iter().enumerate() {
                telemetry.add(
                    "istio_crl_policy_rejections",
                    "The total number of connections rejected or ended because of a revoked certificate (unstable)",
                    &[("reporter", reporter)],
                    refused[place] - counted[place],
                );
            }
            counted = refused;
        }
    }
}
