//! What survives the agent: by which path a pod's network namespace is found.
//!
//! There are two journals. One has every pod that the plugin told of, so that a pod which is enrolled while it runs is
//! found without a search. The other has the pods that may hold rules: an entry is written before anything of a pod is
//! changed and removed when everything is undone, so an agent that was killed in between finds them all, whether or
//! not the API server knows.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use cni::eligibility::Map;

/// The folder of the entries, each named by a pod's UID.
#[derive(Clone, Debug)]
pub struct Journal(PathBuf);

impl Journal {
    /// Opens or makes the folder.
    ///
    /// # Errors
    /// When that is not possible.
    pub fn open(folder: PathBuf) -> io::Result<Self> {
        fs::create_dir_all(&folder)?;
        Ok(Self(folder))
    }

    /// Notes where a pod's namespace is.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn note(&self, uid: &str, netns: &Path) -> io::Result<()> {
        let text = netns.to_str().ok_or(io::ErrorKind::InvalidInput)?;
        let file = self.file(uid)?;
        if fs::read_to_string(&file).is_ok_and(|known| known == text) {
            return Ok(());
        }
        let fresh = self.0.join(format!(".{uid}"));
        fs::write(&fresh, text)?;
        fs::rename(fresh, file)
    }

    /// Forgets a pod.
    ///
    /// # Errors
    /// When the entry cannot be removed.
    pub fn forget(&self, uid: &str) -> io::Result<()> {
        match fs::remove_file(self.file(uid)?) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Where a pod's namespace is, if that was noted.
    pub fn place(&self, uid: &str) -> Option<PathBuf> {
        let text = fs::read_to_string(self.file(uid).ok()?).ok()?;
        Some(text.into())
    }

    /// All entries: paths by UID.
    pub fn entries(&self) -> Map {
        let folder = fs::read_dir(&self.0).into_iter().flatten().flatten();
        let entry = |entry: fs::DirEntry| {
            let name = entry.file_name().into_string().ok()?;
            let text = fs::read_to_string(entry.path()).ok()?;
            (!name.starts_with('.')).then_some((name, text))
        };
        folder.filter_map(entry).collect()
    }

    /// UIDs come from outside, and become names of files.
    fn file(&self, uid: &str) -> io::Result<PathBuf> {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        match (1..=64).contains(&uid.len()) && uid.chars().all(plain) {
            true => Ok(self.0.join(uid)),
            false => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{uid:?} is not a pod's UID"),
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_survive_and_are_forgotten() {
        let folder = std::env::temp_dir().join(format!("wrn-journal-{}", std::process::id()));
        let journal = Journal::open(folder.clone()).unwrap();
        journal
            .note("uid-1", Path::new("/var/run/netns/a"))
            .unwrap();
        journal
            .note("uid-1", Path::new("/var/run/netns/b"))
            .unwrap();
        journal.note("uid-2", Path::new("/proc/7/ns/net")).unwrap();
        fs::write(folder.join(".uid-3"), "/half").unwrap();
        let journal = Journal::open(folder.clone()).unwrap();
        let expected = [("uid-1", "/var/run/netns/b"), ("uid-2", "/proc/7/ns/net")];
        let expected = expected.map(|(uid, path)| (uid.to_string(), path.to_string()));
        assert_eq!(journal.entries(), Map::from(expected));
        let place = journal.place("uid-1");
        assert_eq!(place.as_deref(), Some(Path::new("/var/run/netns/b")));
        assert_eq!(journal.place("../uid-1"), None);
        journal.forget("uid-1").unwrap();
        journal.forget("uid-1").unwrap();
        assert_eq!(journal.entries().len(), 1);
        for uid in ["", "..", "a/b", ".hidden"] {
            assert!(journal.note(uid, Path::new("/x")).is_err(), "{uid}");
        }
        fs::remove_dir_all(folder).unwrap();
    }
}
