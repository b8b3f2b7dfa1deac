//! Certificates that come unasked: what was delivered last, and what follows from it for each identity.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::SystemTime;

use hbone::{Identity, TlsIdentity};

use super::IdentityError;

/// All certificates of one delivery.
pub type Set = HashMap<Identity, Arc<TlsIdentity>>;

/// What was delivered last.
#[derive(Clone, Default)]
pub struct Delivered {
    /// The newest set; it is kept while nothing newer comes.
    pub set: Option<Arc<Set>>,
    /// What went wrong since.
    pub trouble: Option<IdentityError>,
}

impl Delivered {
    /// The identity's certificate, or why there is none; nothing before it is known whether there will be one.
    pub fn certificate(
        &self,
        identity: &Identity,
    ) -> Option<Result<Arc<TlsIdentity>, IdentityError>> {
        let Some(set) = &self.set else {
            return self.trouble.clone().map(Err);
        };
        Some(match set.get(identity) {
            Some(tls) if tls.not_after() > SystemTime::now() => Ok(tls.clone()),
            Some(_) => Err(IdentityError::NotRenewed {
                identity: identity.clone(),
                reason: match &self.trouble {
                    Some(error) => error.to_string(),
                    None => {
                        "the SPIFFE Workload API server is connected but sends none".to_string()
                    }
                },
            }),
            None => Err(match &self.trouble {
                None => IdentityError::NoEntry(identity.clone()),
                Some(error) => IdentityError::NoNewerEntry {
                    identity: identity.clone(),
                    reason: error.to_string(),
                },
            }),
        })
    }
}
