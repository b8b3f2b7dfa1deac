//! Puts the CNI plugin onto the node and keeps it there: its program, its kubeconfig and its entry in the configuration
//! of the cluster's network (node-agent.md §1.1).
//!
//! Every step compares before it writes, so that installing again is free and wakes no container runtime.

mod binaries;
mod configuration;
mod entry;
mod folder;
mod guard;
mod kubeconfig;
mod network;
mod replacement;
mod watch;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use thiserror::Error;

pub use configuration::ConfigError;
pub use entry::{PLUGIN, PluginEntry};
pub use guard::Status;
pub use kubeconfig::{KubeconfigConfig, KubeconfigError, Trust, server_url};
pub use replacement::FileError;

use crate::event::KUBECONFIG;
use configuration::Plan;

/// What is installed and where.
#[derive(Clone, Debug)]
pub struct InstallConfig {
    /// The image's folder of programs; all are copied.
    pub bin_source: PathBuf,
    /// Where the node's container runtime looks for programs.
    pub bin_targets: Vec<PathBuf>,
    /// Where the node's container runtime looks for configurations.
    pub conf_dir: PathBuf,
    /// The configuration file to use (`CNI_CONF_NAME`) instead of the first that is usable.
    pub conf_name: Option<String>,
    /// Whether the plugin is called after those of the cluster's network, or stands in a file alone.
    pub chained: bool,
    /// A file of our own (`ISTIO_OWNED_CNI_CONFIG_FILENAME`) that gets a copy of the cluster's network; it must sort
    /// first and belongs to us, whatever it holds.
    pub owned: Option<String>,
    /// Whether the group may read files of our own.
    pub group_read: bool,
    /// The agent's run folder, as the plugin sees it; the kubeconfig is written there.
    pub run_dir: PathBuf,
    /// The folder of the agent's service account.
    pub service_account: PathBuf,
    pub kubeconfig: KubeconfigConfig,
    pub entry: PluginEntry,
}

/// What an installation did.
#[derive(Debug)]
pub struct Installed {
    /// The configuration that names the plugin.
    pub conf: PathBuf,
    /// The files that were not as they should be; none if everything was in place.
    pub written: Vec<PathBuf>,
    /// What an operator should know although it works.
    pub warnings: Vec<String>,
}

/// Why the plugin is not installed, by the step that failed.
#[derive(Debug, Error)]
pub enum InstallError {
    #[error("the CNI plugin's program is not in place: {0}")]
    Binaries(#[source] FileError),
    #[error("the CNI plugin's kubeconfig is not in place: {0}")]
    Kubeconfig(#[source] KubeconfigError),
    #[error("container runtimes do not call the CNI plugin: {0}")]
    Config(#[source] ConfigError),
}

impl InstallError {
    /// The `result` of the metric of installations.
    pub fn result(&self) -> &'static str {
        match self {
            Self::Binaries(_) => "COPY_BINARIES_FAILURE",
            Self::Kubeconfig(_) => "CREATE_KUBECONFIG_FAILURE",
            Self::Config(_) => "CREATE_CNI_CONFIG_FAILURE",
        }
    }

    /// Whether nothing is wrong yet: something else has to come first, and usually does.
    pub fn is_waiting(&self) -> bool {
        match self {
            Self::Binaries(error) => matches!(error, FileError::NoFolder(_)),
            Self::Kubeconfig(error) => matches!(error, KubeconfigError::NoToken),
            Self::Config(error) => error.is_waiting(),
        }
    }
}

/// What is not as it was installed.
#[derive(Debug, Error)]
pub enum Drift {
    #[error("nothing has been installed yet")]
    NotInstalled,
    #[error("{} is gone", .0.display())]
    ProgramMissing(PathBuf),
    #[error("{} is not the program of this agent's image", .0.display())]
    ProgramChanged(PathBuf),
    #[error("{} is gone or out of date", .0.display())]
    Kubeconfig(PathBuf),
    #[error("{} does not name the plugin", .0.display())]
    EntryMissing(PathBuf),
    #[error("the plugin is not the last of {}", .0.display())]
    EntryMisplaced(PathBuf),
    #[error("the plugin's entry in {} was changed, or another's is still there", .0.display())]
    EntryChanged(PathBuf),
    #[error("{} is gone", .0.display())]
    FileMissing(PathBuf),
    #[error("{} was changed, or the network that it is a copy of", .0.display())]
    FileChanged(PathBuf),
    /// It cannot be told, or not be put right.
    #[error(transparent)]
    Unclear(#[from] InstallError),
}

/// What of an installation is still there.
#[derive(Debug, Error)]
#[error("the CNI plugin is not wholly removed: {}", join(.0))]
pub struct UninstallError(pub Vec<InstallError>);

fn join(errors: &[InstallError]) -> String {
    let texts: Vec<String> = errors.iter().map(ToString::to_string).collect();
    texts.join("; ")
}

/// Installs the plugin, guards it and removes it. Clones share nothing but the configuration.
#[derive(Clone)]
pub struct Installer {
    config: Arc<InstallConfig>,
    /// The token that the kubeconfig should hold. Never logged.
    token: Option<String>,
}

impl Installer {
    pub fn new(config: InstallConfig) -> Self {
        let config = Arc::new(config);
        Self {
            config,
            token: None,
        }
    }

    /// Makes everything as it should be: programs, then the kubeconfig, then the configuration that leads to them.
    ///
    /// Blocks on the disk.
    ///
    /// # Errors
    /// Which step failed and what to do about it; later steps were not taken.
    pub fn install(&mut self, token: &str) -> Result<Installed, InstallError> {
        self.token = Some(token.to_string());
        self.put()
    }

    fn put(&self) -> Result<Installed, InstallError> {
        let token = self.token.as_deref().unwrap_or_default();
        self.sweep();
        let mut written = binaries::install(&self.config).map_err(InstallError::Binaries)?;
        if kubeconfig::install(&self.config, token).map_err(InstallError::Kubeconfig)? {
            written.push(self.config.run_dir.join(KUBECONFIG));
        }
        let (plan, changed) = configuration::install(&self.config).map_err(InstallError::Config)?;
        if changed {
            written.push(plan.path.clone());
        }
        Ok(Installed {
            conf: plan.path,
            written,
            warnings: plan.warnings,
        })
    }

    /// Whether everything is still as it was installed, by content. Blocks on the disk.
    ///
    /// # Errors
    /// The first thing that is not.
    pub fn check(&self) -> Result<(), Drift> {
        let token = self.token.as_deref().ok_or(Drift::NotInstalled)?;
        let program = binaries::drift(&self.config).map_err(InstallError::Binaries)?;
        program.map_or(Ok(()), Err)?;
        let kubeconfig =
            kubeconfig::drift(&self.config, token).map_err(InstallError::Kubeconfig)?;
        kubeconfig.map_or(Ok(()), Err)?;
        let plan = Plan::make(&self.config).map_err(InstallError::Config)?;
        plan.drift().map_or(Ok(()), Err)
    }

    /// Removes the plugin: first from what leads runtimes to it, its program last. Blocks on the disk.
    ///
    /// # Errors
    /// What could not be removed; everything else was.
    pub fn uninstall(&self) -> Result<(), UninstallError> {
        self.sweep();
        let config = &self.config;
        let mut errors: Vec<InstallError> = configuration::uninstall(config)
            .into_iter()
            .map(InstallError::Config)
            .collect();
        let kubeconfig = kubeconfig::uninstall(config).err();
        errors.extend(kubeconfig.map(|error| InstallError::Kubeconfig(error.into())));
        let programs = binaries::uninstall(config).into_iter();
        errors.extend(programs.map(InstallError::Binaries));
        match errors.is_empty() {
            true => Ok(()),
            false => Err(UninstallError(errors)),
        }
    }

    /// Every folder on which the installation depends.
    fn folders(&self) -> Vec<PathBuf> {
        let config = &self.config;
        let ca = kubeconfig::ca_file(config);
        let ca = ca.as_deref().and_then(Path::parent).map(Path::to_path_buf);
        let own = [config.conf_dir.clone(), config.run_dir.clone()];
        let targets = config.bin_targets.iter().cloned();
        targets.chain(own).chain(ca).collect()
    }

    /// Leftovers do no harm, so that a failure to remove them is not worth more than a line.
    fn sweep(&self) {
        let config = &self.config;
        let own = [&config.conf_dir, &config.run_dir];
        for folder in config.bin_targets.iter().chain(own) {
            if let Err(error) = replacement::sweep(folder) {
                tracing::debug!("{error}");
            }
        }
    }
}
