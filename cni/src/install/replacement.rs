//! Files that change in one step: whoever reads them finds the old content or the new one, never a part.
//!
//! The new content is written beside the target, because container runtimes do not notice files that are moved in from
//! another folder. Symbolic links at the target are replaced, not followed.

use std::fmt;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use thiserror::Error;

/// What names of unfinished files have between the target's name and the process's number.
const MARK: &str = ".tmp.warren-";

/// Why a file is not as it should be.
#[derive(Debug, Error)]
pub enum FileError {
    #[error("there is no folder {}: mount the node's folder there; waiting for it", .0.display())]
    NoFolder(PathBuf),
    #[error("{} holds no {name}: the image is incomplete", folder.display())]
    NoProgram { folder: PathBuf, name: &'static str },
    #[error("cannot {doing} {}: {error}{}", path.display(), Hint(error))]
    Failed {
        doing: &'static str,
        path: PathBuf,
        error: io::Error,
    },
}

/// What to do about an error of the operating system, if that is known.
struct Hint<'a>(&'a io::Error);

impl fmt::Display for Hint<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.kind() {
            io::ErrorKind::ReadOnlyFilesystem => f.write_str(
                "; some platforms keep CNI plugins elsewhere: set global.platform to the node's platform",
            ),
            _ => Ok(()),
        }
    }
}

impl FileError {
    /// For `map_err`.
    pub(super) fn failed(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |error| Self::Failed { doing, path, error }
    }
}

/// The next content of a file; without [`Self::commit`] it never happened.
pub(super) struct Replacement {
    target: PathBuf,
    temporary: PathBuf,
    file: File,
    committed: bool,
}

impl Replacement {
    /// Begins an empty file that nobody else can read.
    pub fn begin(target: &Path) -> Result<Self, FileError> {
        let mut name = target.file_name().unwrap_or_default().to_os_string();
        name.push(format!("{MARK}{}", std::process::id()));
        let temporary = target.with_file_name(name);
        // Containers reuse process numbers, so a killed run may have left this very name.
        remove(&temporary)?;
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&temporary)
            .map_err(FileError::failed("create", &temporary))?;
        Ok(Self {
            target: target.to_path_buf(),
            temporary,
            file,
            committed: false,
        })
    }

    /// Puts the file in its place, also in the face of a power cut.
    pub fn commit(mut self, mode: u32) -> Result<(), FileError> {
        self.file
            .set_permissions(Permissions::from_mode(mode))
            .and_then(|()| self.file.sync_all())
            .map_err(FileError::failed("write", &self.temporary))?;
        fs::rename(&self.temporary, &self.target)
            .map_err(FileError::failed("replace", &self.target))?;
        self.committed = true;
        sync_folder_of(&self.target);
        Ok(())
    }
}

impl Write for Replacement {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Drop for Replacement {
    fn drop(&mut self) {
        if !self.committed {
            // What stays is swept by the next installation.
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

/// Begins the replacement of a file by a content that is at hand.
pub(super) fn prepare(target: &Path, content: &[u8]) -> Result<Replacement, FileError> {
    let mut next = Replacement::begin(target)?;
    next.write_all(content)
        .map_err(FileError::failed("write", target))?;
    Ok(next)
}

/// Removes a file; that there is none is fine.
pub(super) fn remove(path: &Path) -> Result<(), FileError> {
    match fs::remove_file(path) {
        Ok(()) => {
            sync_folder_of(path);
            Ok(())
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(FileError::failed("remove", path)(error)),
    }
}

/// Removes what killed runs left half done in a folder.
pub(super) fn sweep(folder: &Path) -> Result<(), FileError> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(FileError::failed("list", folder)(error)),
    };
    for entry in entries.flatten() {
        if is_unfinished(&entry.path()) {
            remove(&entry.path())?;
        }
    }
    Ok(())
}

/// Whether a path is that of an unfinished replacement.
pub(super) fn is_unfinished(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    name.split_once(MARK)
        .is_some_and(|(_, pid)| !pid.is_empty() && pid.bytes().all(|byte| byte.is_ascii_digit()))
}

/// The content of a file, or `None` if there is none.
pub(super) fn read(path: &Path) -> Result<Option<Vec<u8>>, FileError> {
    match fs::read(path) {
        Ok(content) => Ok(Some(content)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(FileError::failed("read", path)(error)),
    }
}

/// The permission bits of a file, or `None` if there is none.
pub(super) fn mode(path: &Path) -> Option<u32> {
    let metadata = fs::metadata(path).ok()?;
    Some(metadata.permissions().mode() & 0o7777)
}

/// Makes a rename durable. Not every file system can; the rename itself has happened.
fn sync_folder_of(path: &Path) {
    if let Some(folder) = path.parent() {
        let _ = File::open(folder).and_then(|folder| folder.sync_all());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(name: &str) -> PathBuf {
        let path =
            std::env::temp_dir().join(format!("wrn-replacement-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        path
    }

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        let mut names: Vec<String> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_replacement_that_is_given_up_leaves_the_old_file_and_nothing_else() {
        let folder = folder("given-up");
        let target = folder.join("a");
        fs::write(&target, "old").unwrap();
        let next = prepare(&target, b"new").unwrap();
        let during = names(&folder);
        drop(next);
        let after = (names(&folder), fs::read_to_string(&target).unwrap());
        fs::remove_dir_all(&folder).unwrap();
        assert_eq!(during.len(), 2);
        assert_eq!(after, (vec!["a".to_string()], "old".to_string()));
    }

    #[test]
    fn a_replacement_takes_its_place_with_its_mode_whatever_a_killed_run_left() {
        let folder = folder("commit");
        let target = folder.join("a");
        fs::write(&target, "old").unwrap();
        std::mem::forget(prepare(&target, b"half").unwrap());
        let next = prepare(&target, b"new").unwrap();
        next.commit(0o641).unwrap();
        let (content, mode) = (fs::read_to_string(&target).unwrap(), mode(&target));
        let names = names(&folder);
        fs::remove_dir_all(&folder).unwrap();
        assert_eq!((content.as_str(), mode), ("new", Some(0o641)));
        assert_eq!(names, ["a"]);
    }

    #[test]
    fn only_our_own_leftovers_are_swept() {
        let folder = folder("sweep");
        for name in [
            "a",
            "a.tmp.warren-77",
            "a.tmp.12",
            "b.tmp.warren-",
            "warren-cni",
        ] {
            fs::write(folder.join(name), "").unwrap();
        }
        sweep(&folder).unwrap();
        let left = names(&folder);
        fs::remove_dir_all(&folder).unwrap();
        assert_eq!(left, ["a", "a.tmp.12", "b.tmp.warren-", "warren-cni"]);
        sweep(&folder).unwrap();
    }

    #[test]
    fn a_read_only_file_system_brings_a_hint() {
        let error = io::Error::from(io::ErrorKind::ReadOnlyFilesystem);
        let error = FileError::failed("create", Path::new("/bin/x"))(error).to_string();
        assert!(error.contains("global.platform"), "{error}");
    }
}
