//! The tokens by which nodes are known.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::PathBuf;

use anyhow::Context;

use super::ca::secret;

/// Bytes of randomness in a token.
const BYTES: usize = 32;

/// A folder with one token file per node, named after it.
pub struct Tokens {
    folder: PathBuf,
    nodes: BTreeMap<String, String>,
}

impl Tokens {
    /// Reads the folder, making it if need be.
    ///
    /// # Errors
    /// When it cannot be read or made.
    pub fn open(folder: PathBuf) -> anyhow::Result<Self> {
        std::fs::create_dir_all(&folder)
            .with_context(|| format!("cannot make {}", folder.display()))?;
        let mut tokens = Self {
            folder,
            nodes: BTreeMap::new(),
        };
        let entries = std::fs::read_dir(&tokens.folder)
            .with_context(|| format!("cannot read {}", tokens.folder.display()))?;
        for entry in entries.flatten() {
            let Ok(node) = entry.file_name().into_string() else {
                continue;
            };
            if let Ok(token) = std::fs::read_to_string(entry.path())
                && token.trim().len() >= BYTES
                && !node.starts_with('.')
            {
                tokens.nodes.insert(token.trim().to_string(), node);
            }
        }
        Ok(tokens)
    }

    /// Makes a token for a node that has none.
    ///
    /// # Errors
    /// When the name cannot be a file's, or the file cannot be written.
    pub fn ensure(&mut self, node: &str) -> anyhow::Result<()> {
        if self.nodes.values().any(|known| known == node) {
            return Ok(());
        }
        let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
        anyhow::ensure!(
            !node.is_empty() && !node.starts_with('.') && node.chars().all(fits),
            "{node:?} cannot be a node's name"
        );
        let mut random = [0; BYTES];
        std::fs::File::open("/dev/urandom")?.read_exact(&mut random)?;
        let token: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
        let path = self.folder.join(node);
        secret(&path, &token).with_context(|| format!("cannot write {}", path.display()))?;
        self.nodes.insert(token, node.to_string());
        Ok(())
    }

    /// The node of a token.
    pub fn node(&self, token: &str) -> Option<&str> {
        self.nodes.get(token).map(String::as_str)
    }
}
