//! The step that puts the plugin's program where container runtimes look for it.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};

use super::entry::PLUGIN;
use super::replacement::{self, FileError, Replacement};
use super::{Drift, InstallConfig};

/// How much of two programs is compared at a time.
const PIECE: usize = 1 << 16;

/// Copies every program that differs; gives those that did.
pub(super) fn install(config: &InstallConfig) -> Result<Vec<PathBuf>, FileError> {
    let mut written = Vec::new();
    for (source, target) in pairs(config)? {
        if drift_of(&source, &target)?.is_some() {
            copy(&source, &target)?;
            written.push(target);
        }
    }
    Ok(written)
}

/// The first program that is not as in the image.
pub(super) fn drift(config: &InstallConfig) -> Result<Option<Drift>, FileError> {
    for (source, target) in pairs(config)? {
        if let Some(drift) = drift_of(&source, &target)? {
            return Ok(Some(drift));
        }
    }
    Ok(None)
}

/// Removes the plugin's program. Whatever else the image brought may be in use by others.
pub(super) fn uninstall(config: &InstallConfig) -> Vec<FileError> {
    let targets = config.bin_targets.iter();
    targets
        .filter_map(|folder| replacement::remove(&folder.join(PLUGIN)).err())
        .collect()
}

/// Each program of the image, and where it belongs.
fn pairs(config: &InstallConfig) -> Result<Vec<(PathBuf, PathBuf)>, FileError> {
    let folder = &config.bin_source;
    let list = || -> io::Result<Vec<_>> { fs::read_dir(folder)?.collect() };
    let entries = list().map_err(FileError::failed("list", folder))?;
    // Links to programs count as programs: the plugin may be another name of one.
    let mut programs: Vec<_> = entries
        .iter()
        .filter(|entry| fs::metadata(entry.path()).is_ok_and(|metadata| metadata.is_file()))
        .map(fs::DirEntry::file_name)
        .collect();
    programs.sort();
    if !programs.iter().any(|name| name == PLUGIN) {
        let folder = folder.clone();
        return Err(FileError::NoProgram {
            folder,
            name: PLUGIN,
        });
    }
    if let Some(missing) = config.bin_targets.iter().find(|target| !target.is_dir()) {
        return Err(FileError::NoFolder(missing.clone()));
    }
    let to = |target: &PathBuf| {
        let pair = |name| (folder.join(name), target.join(name));
        programs.iter().map(pair).collect::<Vec<_>>()
    };
    Ok(config.bin_targets.iter().flat_map(to).collect())
}

fn drift_of(source: &Path, target: &Path) -> Result<Option<Drift>, FileError> {
    let path = target.to_path_buf();
    let is_file = fs::symlink_metadata(target).map(|metadata| metadata.is_file());
    match is_file {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Ok(Some(Drift::ProgramMissing(path)));
        }
        Err(error) => return Err(FileError::failed("read", target)(error)),
        Ok(false) => return Ok(Some(Drift::ProgramChanged(path))),
        Ok(true) => {}
    }
    let same_mode = replacement::mode(source) == replacement::mode(target);
    let same = same_mode && same_content(source, target)?;
    Ok((!same).then_some(Drift::ProgramChanged(path)))
}

fn same_content(a: &Path, b: &Path) -> Result<bool, FileError> {
    let open = |path: &Path| File::open(path).map_err(FileError::failed("read", path));
    let (one, other) = (open(a)?, open(b)?);
    let compare = || -> io::Result<bool> {
        if one.metadata()?.len() != other.metadata()?.len() {
            return Ok(false);
        }
        let mut one = BufReader::with_capacity(PIECE, &one);
        let mut other = BufReader::with_capacity(PIECE, &other);
        loop {
            let (left, right) = (one.fill_buf()?, other.fill_buf()?);
            let length = left.len().min(right.len());
            if left[..length] != right[..length] {
                return Ok(false);
            }
            if length == 0 {
                return Ok(left.len() == right.len());
            }
            one.consume(length);
            other.consume(length);
        }
    };
    compare().map_err(FileError::failed("read", b))
}

/// A program that runs meanwhile runs on: its file is replaced, not written to.
fn copy(source: &Path, target: &Path) -> Result<(), FileError> {
    let mut from = File::open(source).map_err(FileError::failed("read", source))?;
    let mut next = Replacement::begin(target)?;
    io::copy(&mut from, &mut next).map_err(FileError::failed("write", target))?;
    next.commit(replacement::mode(source).unwrap_or(0o755))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_compared_to_their_last_byte() {
        let folder = std::env::temp_dir().join(format!("wrn-binaries-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let (a, b) = (folder.join("a"), folder.join("b"));
        let long = vec![7u8; 3 * PIECE + 1];
        let mut other = long.clone();
        other[3 * PIECE] = 8;
        let same = |left: &[u8], right: &[u8]| {
            fs::write(&a, left).unwrap();
            fs::write(&b, right).unwrap();
            same_content(&a, &b).unwrap()
        };
        let results = [
            same(&long, &long),
            same(&long, &other),
            same(&long, &long[1..]),
            same(b"", b""),
        ];
        fs::remove_dir_all(&folder).unwrap();
        assert_eq!(results, [true, false, false, true]);
    }
}
