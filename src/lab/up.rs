//! `warren lab up`: starts a lab and stays with it.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::bail;
use clap::Args;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::client::Lab;
use super::daemon::Settings;
use super::family::IpFamily;
use super::manifest::{self, Object};
use super::sandbox::{self, Launched};
use super::say::say;
use super::{addresses, plan, samples, services, state};

const LOOK: Duration = Duration::from_millis(100);

/// What a new lab is made of.
#[derive(Args, Clone, Debug, Default)]
pub struct UpArgs {
    /// Manifests: a file, a folder, or - for standard input [default: the sample application]
    #[arg(short = 'f', long = "filename")]
    pub file: Option<PathBuf>,
    /// How many nodes
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=i64::from(addresses::MOST_NODES)))]
    pub nodes: u8,
    /// The addresses of nodes, pods and services
    #[arg(long, value_enum, default_value_t)]
    pub ip_family: IpFamily,
    /// Return as soon as everything is ready, and leave the lab running
    #[arg(short, long)]
    pub detach: bool,
    /// A further variable of the proxies, NAME=VALUE
    #[arg(long = "proxy-env", value_name = "NAME=VALUE", value_parser = variable)]
    pub proxy_env: Vec<(String, String)>,
}

fn variable(text: &str) -> Result<(String, String), String> {
    text.split_once('=')
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .ok_or_else(|| "NAME=VALUE".to_owned())
}

/// Starts a lab; in the foreground, runs it until Ctrl-C.
///
/// # Errors
/// Why the lab did not come up.
pub fn run(lab: &Lab, arguments: &UpArgs) -> anyhow::Result<ExitCode> {
    let objects = match &arguments.file {
        Some(file) => manifest::load(file)?,
        None => samples::bookinfo()?,
    };
    let mut interrupted = Interrupts::block()?;
    let launched = start(lab, arguments, objects, &mut interrupted, |line| {
        say!("{line}")
    })?;
    let name = lab.dir().name();
    say!("lab {name} is up; see it with: warren lab status --name {name}");
    let Some(mut launched) = launched else {
        return Ok(ExitCode::SUCCESS);
    };
    say!("Ctrl-C takes it down");
    while !interrupted.pending()? {
        if launched.has_ended() {
            lab.dir().remove_if_dead()?;
            say!("lab {name} is down");
            return Ok(ExitCode::SUCCESS);
        }
        std::thread::sleep(LOOK);
    }
    say!("taking lab {name} down");
    lab.down()?;
    launched.wait()?;
    Ok(ExitCode::SUCCESS)
}

/// Starts a lab and waits until it is ready. `None` for one that goes on by itself.
///
/// # Errors
/// Why the lab did not come up; nothing of it is left then.
pub fn start(
    lab: &Lab,
    arguments: &UpArgs,
    objects: Vec<Object>,
    interrupted: &mut Interrupts,
    mut show: impl FnMut(&str),
) -> anyhow::Result<Option<Launched>> {
    // What cannot run is said before anything is started.
    plan::pods(objects.iter())?;
    services::addresses(arguments.ip_family, &objects)?;
    for name in state::remove_dead() {
        show(&format!("removed what lab {name} had left"));
    }
    let lock = lab.dir().create()?;
    Settings {
        nodes: arguments.nodes,
        families: arguments.ip_family,
        proxy_env: arguments.proxy_env.clone(),
        objects,
    }
    .save(lab.dir())?;
    let mut launched = sandbox::launch(lab.dir(), lock, arguments.detach)?;
    let ready = launched.wait_ready(|| interrupted.pending(), show);
    if let Err(reason) = ready {
        launched.kill();
        lab.down()?;
        bail!(reason);
    }
    Ok((!arguments.detach).then_some(launched))
}

/// Ctrl-C and its relatives, taken when there is time for them.
#[derive(Debug)]
pub struct Interrupts(SignalFd);

impl Interrupts {
    /// Keeps the signals from ending this process.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn block() -> anyhow::Result<Self> {
        let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]
            .into_iter()
            .collect();
        signals.thread_block()?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        Ok(Self(SignalFd::with_flags(&signals, flags)?))
    }

    /// Whether one has come.
    pub fn pending(&mut self) -> anyhow::Result<bool> {
        Ok(self.0.read_signal()?.is_some())
    }
}
