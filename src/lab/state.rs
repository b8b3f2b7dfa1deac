//! The folder of a lab, and the lock that tells a living lab from what a dead one left.

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io::{Error, ErrorKind, Result};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

const LONGEST_NAME: usize = 32;
/// The paths of sockets in the folder have to fit a socket address.
const LONGEST_PATH: usize = 80;

/// Where a lab keeps its files.
#[derive(Clone, Debug)]
pub struct StateDir {
    path: PathBuf,
}

impl StateDir {
    /// The folder of the lab called `name`; nothing is created.
    ///
    /// # Errors
    /// A name that is no simple word.
    pub fn of(name: &str) -> Result<Self> {
        let fits = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        if name.is_empty() || name.len() > LONGEST_NAME || !name.bytes().all(fits) {
            let reason = format!(
                "bad lab name {name:?}: lower-case letters, digits and '-', at most {LONGEST_NAME}"
            );
            return Err(Error::new(ErrorKind::InvalidInput, reason));
        }
        let path = root().join(name);
        if path.as_os_str().len() > LONGEST_PATH {
            let reason = format!("{} is too long a path; set TMPDIR=/tmp", path.display());
            return Err(Error::new(ErrorKind::InvalidInput, reason));
        }
        Ok(Self { path })
    }

    /// A folder that is known to exist.
    pub fn at(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path.join(name)
    }

    pub fn name(&self) -> String {
        self.path
            .file_name()
            .map(|n| n.to_string_lossy().into_owned())
            .unwrap_or_default()
    }

    /// Where the lab is spoken to.
    pub fn socket(&self) -> PathBuf {
        self.join("control.sock")
    }

    /// Makes a subfolder and returns its path.
    pub fn folder(&self, name: impl AsRef<Path>) -> Result<PathBuf> {
        let path = self.join(name);
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&path)?;
        Ok(path)
    }

    /// Makes the folder anew, removing what a dead lab of this name left. The file it returns is
    /// the lock: the lab lives as long as any process has it open.
    ///
    /// # Errors
    /// `AlreadyExists` when a lab of this name is alive.
    pub fn create(&self) -> Result<File> {
        self.remove_if_dead()?;
        if let Some(root) = self.path.parent() {
            make_private(root)?;
        }
        DirBuilder::new().mode(0o700).create(&self.path)?;
        // Somebody who looks whether the lab is alive has the lock for a moment.
        for _ in 0..50 {
            if let Some(lock) = self.lock()? {
                return Ok(lock);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Err(self.alive())
    }

    /// Whether a lab holds this folder.
    pub fn is_alive(&self) -> bool {
        matches!(self.lock(), Ok(None))
    }

    /// Removes the folder of a lab that is no more; does nothing where there is none.
    ///
    /// # Errors
    /// `AlreadyExists` when the lab is alive.
    pub fn remove_if_dead(&self) -> Result<()> {
        match self.lock() {
            Ok(Some(_lock)) => std::fs::remove_dir_all(&self.path)?,
            Ok(None) => return Err(self.alive()),
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(e) => return Err(e),
        }
        if let Some(root) = self.path.parent() {
            // Fails, as it should, while other labs have folders.
            let _ = std::fs::remove_dir(root);
        }
        Ok(())
    }

    fn alive(&self) -> Error {
        let reason = format!(
            "a lab called {0} is running; take it down with: warren lab down --name {0}",
            self.name()
        );
        Error::new(ErrorKind::AlreadyExists, reason)
    }

    /// The lock, or `None` while a living lab holds it.
    fn lock(&self) -> Result<Option<File>> {
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(self.join("lock"))?;
        match file.try_lock() {
            Ok(()) => Ok(Some(file)),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(e)) => Err(e),
        }
    }
}

/// Removes the folders of all labs of this user that are no more, and returns their names.
pub fn remove_dead() -> Vec<String> {
    let mut removed = Vec::new();
    for entry in std::fs::read_dir(root()).into_iter().flatten().flatten() {
        let dir = StateDir { path: entry.path() };
        if dir.join("lock").exists() && dir.remove_if_dead().is_ok() {
            removed.push(dir.name());
        }
    }
    removed
}

/// The names of this user's living labs.
pub fn living() -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(root())
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| StateDir { path: entry.path() })
        .filter(StateDir::is_alive)
        .map(|dir| dir.name())
        .collect();
    names.sort();
    names
}

/// In `$TMPDIR`, or `/tmp`.
fn root() -> PathBuf {
    std::env::temp_dir().join(format!("warren-lab-{}", nix::unistd::getuid()))
}

/// Makes a folder that only this user can read, and refuses one that is somebody else's.
fn make_private(path: &Path) -> Result<()> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(e) if e.kind() != ErrorKind::AlreadyExists => return Err(e),
        _ => {}
    }
    let found = std::fs::symlink_metadata(path)?;
    if found.is_dir() && found.uid() == nix::unistd::getuid().as_raw() && found.mode() & 0o077 == 0
    {
        return Ok(());
    }
    let reason = format!(
        "{} is not a private folder of this user; remove it",
        path.display()
    );
    Err(Error::new(ErrorKind::PermissionDenied, reason))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(name: &str) -> StateDir {
        let unique = format!("warren-lab-test-{}-{name}", std::process::id());
        StateDir::at(&std::env::temp_dir().join(unique).join("lab"))
    }

    #[test]
    fn a_folder_is_alive_as_long_as_its_lock_is_open() {
        let dir = scratch("alive");
        let lock = dir.create().unwrap();
        let copy = lock.try_clone().unwrap();
        drop(lock);
        assert!(dir.is_alive());
        assert_eq!(dir.create().unwrap_err().kind(), ErrorKind::AlreadyExists);
        drop(copy);
        assert!(!dir.is_alive());
        std::fs::write(dir.join("rest"), "x").unwrap();
        let lock = dir.create().unwrap();
        assert!(!dir.join("rest").exists());
        drop(lock);
        dir.remove_if_dead().unwrap();
        assert!(!dir.path().exists());
        dir.remove_if_dead().unwrap();
    }

    #[test]
    fn names_are_simple_words() {
        assert!(StateDir::of("demo-1").is_ok());
        for name in ["", "a/b", "..", "A", &"x".repeat(33)] {
            assert!(StateDir::of(name).is_err(), "{name}");
        }
    }
}
