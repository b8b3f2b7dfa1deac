//! Certificates for trying things out: signed by a root that all processes of one user on one machine share, and
//! that nobody else has any reason to trust.

use std::fs::{DirBuilder, File};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, ensure};
use futures_util::future::BoxFuture;
use hbone::{Identity, TlsIdentity, TlsOptions};
use nix::fcntl::{Flock, FlockArg};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use super::csr::SigningRequest;
use super::{IdentityError, certificates};
use crate::control::ca;

const LIFETIME: Duration = Duration::from_secs(24 * 3600);

/// Signs whatever is asked for.
pub struct FakeCa {
    authority: ca::Authority,
    tls: TlsOptions,
}

impl FakeCa {
    /// The authority of this user on this machine, made at first use.
    ///
    /// # Errors
    /// When its folder cannot be had for this user alone.
    pub fn open(tls: TlsOptions) -> anyhow::Result<Self> {
        let uid = nix::unistd::geteuid();
        Self::open_in(
            &std::env::temp_dir().join(format!("warren-fake-ca-{uid}")),
            tls,
        )
    }

    fn open_in(folder: &Path, tls: TlsOptions) -> anyhow::Result<Self> {
        let name = || format!("the test CA's folder {}", folder.display());
        match DirBuilder::new().mode(0o700).create(folder) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(error).with_context(name);
            }
            _ => {}
        }
        let metadata = folder.symlink_metadata().with_context(name)?;
        let own = metadata.is_dir() && metadata.uid() == nix::unistd::geteuid().as_raw();
        ensure!(
            own && metadata.mode() & 0o077 == 0,
            "{} is not this user's alone; remove it",
            name()
        );
        // Processes that start together make one root.
        let file = File::create(folder.join("lock")).with_context(name)?;
        let _lock = Flock::lock(file, FlockArg::LockExclusive)
            .map_err(|(_, error)| error)
            .with_context(name)?;
        Ok(Self {
            authority: ca::Authority::open(folder, LIFETIME)?,
            tls,
        })
    }

    fn sign(&self, identity: &Identity) -> Result<TlsIdentity, IdentityError> {
        let local = |error: &dyn std::fmt::Display| IdentityError::Local(error.to_string());
        let request = SigningRequest::new(identity)?;
        let signed = self.authority.sign(&request.pem, identity, LIFETIME);
        let mut chain = signed
            .map_err(IdentityError::Local)?
            .iter()
            .map(|pem| CertificateDer::from_pem_slice(pem.as_bytes()))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| local(&error))?;
        let roots = chain.split_off(1);
        TlsIdentity::new(chain, request.into_private_key(), roots, &self.tls)
            .map_err(|error| local(&error))
    }
}

impl certificates::Authority for FakeCa {
    fn issue<'a>(
        &'a self,
        identity: &'a Identity,
    ) -> BoxFuture<'a, Result<TlsIdentity, IdentityError>> {
        Box::pin(async { self.sign(identity) })
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn folder(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("wrn-fake-{}-{name}", std::process::id()));
        let _ = std::fs::remove_dir_all(&folder);
        folder
    }

    #[test]
    fn processes_of_one_user_share_a_root() {
        let folder = folder("root");
        let open = || FakeCa::open_in(&folder, TlsOptions::default()).unwrap();
        let identity = Identity::new("td", "a", "b");
        let [one, other] = [open(), open()].map(|ca| ca.sign(&identity).unwrap());
        assert_eq!(one.roots(), other.roots());
        assert_eq!(one.identity(), Some(&identity));
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn a_folder_that_others_can_read_is_not_used() {
        let folder = folder("open");
        DirBuilder::new().mode(0o755).create(&folder).unwrap();
        let error = FakeCa::open_in(&folder, TlsOptions::default()).err();
        let text = error.unwrap().to_string();
        assert!(
            text.ends_with("is not this user's alone; remove it"),
            "{text}"
        );
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
