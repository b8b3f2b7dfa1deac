//! The step that makes container runtimes call the plugin: its entry in their configuration.
//!
//! What should be there is computed from what is there, and compared with it: the entry's content counts, not its
//! presence. Files that cannot be read are never written to.

use std::fmt;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::entry::PLUGIN;
use super::folder::{ConfFile, ConfFolder, Damaged, is_list};
use super::network::{Flaw, Network};
use super::replacement::{self, FileError};
use super::{Drift, InstallConfig};

/// The file of a plugin that stands alone, if no other name is set.
const STANDALONE: &str = "YYY-istio-cni.conf";
/// How often to start over when somebody else writes the file at the same time.
const TRIES: usize = 5;

/// Why the plugin is not in the configuration.
#[derive(Debug, Error)]
pub enum ConfigError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error(
        "there is no usable CNI configuration in {} yet; waiting for the cluster's network{}",
        folder.display(), List(damaged)
    )]
    NoNetwork {
        folder: PathBuf,
        /// The files that might have been it.
        damaged: Vec<String>,
    },
    #[error("{} of CNI_CONF_NAME is not there yet; waiting for it", .0.display())]
    NotThere(PathBuf),
    #[error("{} is left alone because {problem}: mend or remove it", path.display())]
    Damaged { path: PathBuf, problem: String },
    #[error(
        "{} belongs to the plugin {plugin} and is left alone: set CNI_CONF_NAME to a name of its own",
        path.display()
    )]
    Foreign { path: PathBuf, plugin: String },
    #[error(
        "{} is to become {}, which is there already and differs: remove the one that is not in use",
        single.display(), list.display()
    )]
    Twins { single: PathBuf, list: PathBuf },
    #[error(
        "{} sorts before {}: set ISTIO_OWNED_CNI_CONFIG_FILENAME to a name that sorts first",
        first.display(), own.display()
    )]
    NotFirst { own: PathBuf, first: PathBuf },
    #[error("{setting} is {name:?}, but must be the name of a file that ends in {ending}")]
    BadName {
        setting: &'static str,
        name: String,
        ending: &'static str,
    },
    #[error("{} is written by somebody else all the time; trying again", .0.display())]
    Contended(PathBuf),
}

impl ConfigError {
    /// Whether it is only a matter of time.
    pub(super) fn is_waiting(&self) -> bool {
        matches!(
            self,
            Self::File(FileError::NoFolder(_))
                | Self::NoNetwork { .. }
                | Self::NotThere(_)
                | Self::Contended(_)
        )
    }
}

/// Appends what else is to be said.
struct List<'a>(&'a [String]);

impl fmt::Display for List<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|item| write!(f, "; {item}"))
    }
}

/// What one configuration file should be.
#[derive(Debug)]
pub(super) struct Plan {
    /// The file that is to name the plugin.
    pub path: PathBuf,
    /// What an operator should know although it works.
    pub warnings: Vec<String>,
    /// A single plugin's file whose place the list takes.
    single: Option<PathBuf>,
    /// The file that the plan was made from, and its content then.
    source: Option<(PathBuf, Vec<u8>)>,
    current: Option<Network>,
    wanted: Network,
    mode: u32,
    /// Whether the file is ours altogether, not just an entry of it.
    own: bool,
}

impl Plan {
    /// Finds out what should be where.
    pub fn make(config: &InstallConfig) -> Result<Self, ConfigError> {
        match (&config.owned, config.chained) {
            (Some(name), true) => owned(config, name),
            (None, true) => chained(config),
            (_, false) => standalone(config),
        }
    }

    /// What is not as it should be.
    pub fn drift(&self) -> Option<Drift> {
        if self.current.as_ref() == Some(&self.wanted) && self.single.is_none() {
            return None;
        }
        if let Some(single) = &self.single {
            return Some(Drift::EntryMissing(single.clone()));
        }
        let path = self.path.clone();
        Some(match &self.current {
            None => Drift::FileMissing(path),
            Some(_) if self.own => Drift::FileChanged(path),
            Some(current) => match current.flaw() {
                Flaw::Missing => Drift::EntryMissing(path),
                Flaw::Misplaced => Drift::EntryMisplaced(path),
                Flaw::Changed => Drift::EntryChanged(path),
            },
        })
    }

    /// Writes what is wanted; false if somebody else wrote the file meanwhile and nothing was done.
    fn apply(&self) -> Result<bool, FileError> {
        let next = replacement::prepare(&self.path, self.wanted.text().as_bytes())?;
        if let Some((path, content)) = &self.source
            && replacement::read(path)?.as_ref() != Some(content)
        {
            return Ok(false);
        }
        next.commit(self.mode)?;
        // Until here runtimes use the single plugin, which sorts before its list.
        if let Some(single) = &self.single {
            replacement::remove(single)?;
        }
        Ok(true)
    }
}

/// Makes the configuration as it should be.
pub(super) fn install(config: &InstallConfig) -> Result<(Plan, bool), ConfigError> {
    let mut plan = Plan::make(config)?;
    for _ in 0..TRIES {
        if plan.drift().is_none() {
            return Ok((plan, false));
        }
        if plan.apply()? {
            return Ok((plan, true));
        }
        plan = Plan::make(config)?;
    }
    Err(ConfigError::Contended(plan.path))
}

/// Takes the plugin out of every configuration, and away the files that hold nothing else.
///
/// A list that was made of a single plugin stays a list: it means the same, and bears the same network's name.
pub(super) fn uninstall(config: &InstallConfig) -> Vec<ConfigError> {
    let all = match ConfFolder::read(&config.conf_dir) {
        Ok(all) => all,
        Err(FileError::NoFolder(_)) => return Vec::new(),
        Err(error) => return vec![error.into()],
    };
    let own = config.owned.as_ref().map(|name| config.conf_dir.join(name));
    let mut errors: Vec<ConfigError> = Vec::new();
    for damaged in all.damaged {
        if own.as_ref() == Some(&damaged.path) {
            errors.extend(replacement::remove(&damaged.path).err().map(Into::into));
        } else if damaged.mentions(PLUGIN) {
            errors.push(damaged.into());
        }
    }
    for file in all.files {
        let done = match own.as_ref() == Some(&file.path) {
            true => replacement::remove(&file.path).map_err(Into::into),
            false => take_out(file),
        };
        errors.extend(done.err());
    }
    errors
}

/// Takes the plugin out of a file, also if somebody else writes it at the same time.
fn take_out(mut file: ConfFile) -> Result<(), ConfigError> {
    for _ in 0..TRIES {
        let wanted = file.network.without();
        if wanted.as_ref() == Some(&file.network) {
            return Ok(());
        }
        let next = match &wanted {
            Some(network) => Some(replacement::prepare(&file.path, network.text().as_bytes())?),
            None => None,
        };
        if replacement::read(&file.path)?.as_ref() == Some(&file.content) {
            match next {
                Some(next) => next.commit(mode_of(&file.path))?,
                None => replacement::remove(&file.path)?,
            }
            return Ok(());
        }
        match read(&file.path)? {
            Some(again) => file = again,
            None => return Ok(()),
        }
    }
    Err(ConfigError::Contended(file.path))
}

/// Our entry as the last of the cluster's network.
fn chained(config: &InstallConfig) -> Result<Plan, ConfigError> {
    let all = ConfFolder::read(&config.conf_dir)?;
    let (primary, warnings) = primary(config, &all)?;
    let entry = config.entry.object(&config.run_dir);
    let plan = |path, single, current, mode| Plan {
        path,
        warnings,
        single,
        source: Some((primary.path.clone(), primary.content.clone())),
        current,
        wanted: primary.network.with(&entry),
        mode,
        own: false,
    };
    let mode = mode_of(&primary.path);
    if let Network::List { .. } = primary.network {
        let (path, current) = (primary.path.clone(), primary.network.clone());
        return Ok(plan(path, None, Some(current), mode));
    }
    let path = primary.path.with_extension("conflist");
    let current = match read(&path)? {
        // Left by a killed run, or by ours before the network's own installer wrote its file again.
        Some(list) if list.network.foreign_types() == primary.network.types() => Some(list.network),
        Some(_) => {
            let single = primary.path.clone();
            return Err(ConfigError::Twins { single, list: path });
        }
        None => None,
    };
    Ok(plan(path, Some(primary.path.clone()), current, mode))
}

/// A copy of the cluster's network with our entry, in a file that is ours and sorts first.
fn owned(config: &InstallConfig, name: &str) -> Result<Plan, ConfigError> {
    let own = config.conf_dir.join(name);
    if is_list(&own) != Some(true) || name.contains('/') {
        return Err(ConfigError::BadName {
            setting: "ISTIO_OWNED_CNI_CONFIG_FILENAME",
            name: name.to_string(),
            ending: ".conflist",
        });
    }
    let mut all = ConfFolder::read(&config.conf_dir)?;
    let place = all.files.iter().position(|file| file.path == own);
    let current = place.map(|place| all.files.remove(place));
    all.damaged.retain(|file| file.path != own);
    if let Some(first) = all.files.iter().find(|file| file.path < own) {
        let first = first.path.clone();
        return Err(ConfigError::NotFirst { own, first });
    }
    let entry = config.entry.object(&config.run_dir);
    let (network, warnings) = match (primary(config, &all), &current) {
        (Ok((primary, warnings)), _) => (&primary.network, warnings),
        // The network's own file goes with its agent; the copy is there to outlive it.
        (Err(error), Some(current))
            if error.is_waiting() && !current.network.foreign_types().is_empty() =>
        {
            (&current.network, Vec::new())
        }
        (Err(error), _) => return Err(error),
    };
    Ok(Plan {
        path: own,
        warnings,
        single: None,
        source: None,
        wanted: network.with(&entry),
        current: current.map(|file| file.network),
        mode: own_mode(config),
        own: true,
    })
}

/// Our entry in a file of its own, for runtimes that are told elsewhere to call it.
fn standalone(config: &InstallConfig) -> Result<Plan, ConfigError> {
    if !config.conf_dir.is_dir() {
        return Err(FileError::NoFolder(config.conf_dir.clone()).into());
    }
    let name = config.conf_name.as_deref().unwrap_or(STANDALONE);
    let path = config.conf_dir.join(name);
    if is_list(&path) != Some(false) || name.contains('/') {
        return Err(bad_conf_name(name, ".conf"));
    }
    let current = read(&path)?.map(|file| file.network);
    let foreign = current.as_ref().map(Network::foreign_types);
    if let Some(plugin) = foreign.and_then(|types| types.first().map(ToString::to_string)) {
        return Err(ConfigError::Foreign { path, plugin });
    }
    Ok(Plan {
        path,
        warnings: Vec::new(),
        single: None,
        source: None,
        current,
        wanted: Network::alone(config.entry.object(&config.run_dir)),
        mode: own_mode(config),
        own: true,
    })
}

/// The configuration of the cluster's network, and what is odd about it.
fn primary<'a>(
    config: &InstallConfig,
    all: &'a ConfFolder,
) -> Result<(&'a ConfFile, Vec<String>), ConfigError> {
    let said =
        |damaged: &Damaged| format!("{} is damaged: {}", damaged.path.display(), damaged.problem);
    let mut warnings: Vec<String> = all.damaged.iter().map(said).collect();
    let Some(name) = &config.conf_name else {
        let folder = config.conf_dir.clone();
        return match all.primary() {
            Some(primary) => Ok((primary, warnings)),
            None => Err(ConfigError::NoNetwork {
                folder,
                damaged: warnings,
            }),
        };
    };
    let path = config.conf_dir.join(name);
    if is_list(&path).is_none() || name.contains('/') {
        return Err(bad_conf_name(name, ".conf or .conflist"));
    }
    let twin = path.with_extension(if is_list(&path) == Some(true) {
        "conf"
    } else {
        "conflist"
    });
    for path in [&path, &twin] {
        if let Some(damaged) = all.damaged.iter().find(|file| file.path == *path) {
            return Err(damaged.clone().into());
        }
        let Some(file) = all.files.iter().find(|file| file.path == *path) else {
            continue;
        };
        if file.network.foreign_types().is_empty() {
            let (path, problem) = (path.clone(), "it holds nothing of the cluster's network");
            return Err(ConfigError::Damaged {
                path,
                problem: problem.into(),
            });
        }
        if let Some(first) = all.primary()
            && first.path < *path
        {
            warnings.push(format!(
                "{} of CNI_CONF_NAME is not what runtimes use: {} sorts before it",
                path.display(),
                first.path.display()
            ));
        }
        return Ok((file, warnings));
    }
    Err(ConfigError::NotThere(path))
}

fn bad_conf_name(name: &str, ending: &'static str) -> ConfigError {
    ConfigError::BadName {
        setting: "CNI_CONF_NAME",
        name: name.to_string(),
        ending,
    }
}

impl From<Damaged> for ConfigError {
    fn from(Damaged { path, problem }: Damaged) -> Self {
        Self::Damaged { path, problem }
    }
}

fn read(path: &Path) -> Result<Option<ConfFile>, ConfigError> {
    ConfFile::read(path).map_err(|problem| {
        let path = path.to_path_buf();
        ConfigError::Damaged { path, problem }
    })
}

/// The mode that an edited file keeps.
fn mode_of(path: &Path) -> u32 {
    replacement::mode(path).unwrap_or(0o600)
}

fn own_mode(config: &InstallConfig) -> u32 {
    if config.group_read { 0o640 } else { 0o600 }
}
