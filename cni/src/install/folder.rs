//! The folder of CNI configurations, read as the runtimes read it: the first usable file by name is the network.

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use super::network::Network;
use super::replacement::FileError;

/// Configurations are a few kilobytes; nothing else is read whole.
const LARGEST: u64 = 1 << 20;

/// A configuration file that a runtime can use.
#[derive(Clone, Debug)]
pub(super) struct ConfFile {
    pub path: PathBuf,
    pub content: Vec<u8>,
    pub network: Network,
}

/// A configuration file that no runtime can use, and why.
#[derive(Clone, Debug)]
pub(super) struct Damaged {
    pub path: PathBuf,
    pub problem: String,
}

/// All configurations, in the order of their names.
#[derive(Debug, Default)]
pub(super) struct ConfFolder {
    pub files: Vec<ConfFile>,
    pub damaged: Vec<Damaged>,
}

impl ConfFolder {
    /// Reads the folder.
    ///
    /// # Errors
    /// When it is not there or cannot be listed. Files that cannot be read are among the damaged.
    pub fn read(folder: &Path) -> Result<Self, FileError> {
        let list = || -> io::Result<Vec<PathBuf>> {
            let entries = fs::read_dir(folder)?;
            entries.map(|entry| Ok(entry?.path())).collect()
        };
        let mut paths = match list() {
            Ok(paths) => paths,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(FileError::NoFolder(folder.to_path_buf()));
            }
            Err(error) => return Err(FileError::failed("list", folder)(error)),
        };
        paths.sort();
        let mut all = Self::default();
        for path in paths {
            match ConfFile::read(&path) {
                Ok(Some(file)) => all.files.push(file),
                Ok(None) => {}
                Err(problem) => all.damaged.push(Damaged { path, problem }),
            }
        }
        Ok(all)
    }

    /// The configuration that runtimes use, of those that have a plugin besides ours.
    pub fn primary(&self) -> Option<&ConfFile> {
        let foreign = |file: &&ConfFile| !file.network.foreign_types().is_empty();
        self.files.iter().find(foreign)
    }
}

impl ConfFile {
    /// Reads a file; `None` if it is gone or no runtime would look at it.
    ///
    /// # Errors
    /// Why a runtime could not use it.
    pub fn read(path: &Path) -> Result<Option<Self>, String> {
        let Some(list) = is_list(path) else {
            return Ok(None);
        };
        let content = match content(path) {
            Ok(Some(content)) => content,
            Ok(None) => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error.to_string()),
        };
        let network = Network::parse(&content, list)?;
        Ok(Some(Self {
            path: path.to_path_buf(),
            content,
            network,
        }))
    }
}

impl Damaged {
    /// Whether a word stands in the file, as far as it is worth reading.
    pub fn mentions(&self, word: &str) -> bool {
        let mut content = Vec::new();
        let file = fs::File::open(&self.path);
        let read = file.and_then(|file| file.take(LARGEST).read_to_end(&mut content));
        let mut parts = content.windows(word.len());
        read.is_ok() && parts.any(|part| part == word.as_bytes())
    }
}

/// Whether a file of this name holds a list of plugins or one; `None` if it is no configuration.
pub(super) fn is_list(path: &Path) -> Option<bool> {
    match path.extension()?.to_str()? {
        "conflist" => Some(true),
        "conf" => Some(false),
        _ => None,
    }
}

fn content(path: &Path) -> io::Result<Option<Vec<u8>>> {
    // Opening anything else might block or have effects.
    if !fs::metadata(path)?.is_file() {
        return Ok(None);
    }
    let mut content = Vec::new();
    let file = fs::File::open(path)?;
    file.take(LARGEST + 1).read_to_end(&mut content)?;
    match content.len() as u64 > LARGEST {
        true => Err(io::Error::other("it is larger than 1 MiB")),
        false => Ok(Some(content)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_usable_file_by_name_is_the_network_whatever_else_lies_there() {
        let folder = std::env::temp_dir().join(format!("wrn-conf-folder-{}", std::process::id()));
        fs::create_dir_all(folder.join("00-folder.conflist")).unwrap();
        let list = r#"{"name":"n","plugins":[{"type":"a"}]}"#;
        for (name, text) in [
            ("00-empty.conf", ""),
            ("01-half.conflist", "{\"name\":"),
            ("02-no-plugins.conflist", r#"{"name":"n","plugins":[]}"#),
            ("03-no-type.conf", r#"{"name":"n"}"#),
            ("04-list.json", list),
            ("05-list.conflist.bak", list),
            ("06-list.conflist.tmp.warren-7", list),
            ("07-ours.conf", r#"{"type":"warren-cni"}"#),
            (
                "07-theirs.conflist",
                r#"{"name":"n","plugins":[{"type":"istio-cni"}]}"#,
            ),
            ("10-b.conflist", list),
            ("10-c.conf", r#"{"type":"c"}"#),
            ("README", "hello"),
        ] {
            fs::write(folder.join(name), text).unwrap();
        }
        nix::unistd::mkfifo(&folder.join("00-pipe.conf"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let all = ConfFolder::read(&folder);
        fs::remove_dir_all(&folder).unwrap();
        let all = all.unwrap();
        let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_string();
        let damaged: Vec<_> = all.damaged.iter().map(|file| name(&file.path)).collect();
        assert_eq!(name(&all.primary().unwrap().path), "10-b.conflist");
        assert_eq!(
            damaged,
            [
                "00-empty.conf",
                "01-half.conflist",
                "02-no-plugins.conflist",
                "03-no-type.conf"
            ]
        );
        assert_eq!(all.files.len(), 4);
    }

    #[test]
    fn a_folder_that_is_not_there_says_so() {
        let error = ConfFolder::read(Path::new("/wrn/none")).unwrap_err();
        assert!(matches!(error, FileError::NoFolder(_)));
    }
}
