//! The commands of `warren lab`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::bail;
use clap::{Args, Subcommand};

use super::bench::{self, BenchArgs};
use super::client::Lab;
use super::demo::{self, DemoArgs};
use super::load::{self, LoadCommand};
use super::say::say;
use super::state::StateDir;
use super::up::{self, UpArgs};
use super::wire::PodName;
use super::{daemon, logs, manifest, sandbox, serve, status};

/// How soon the control plane has read a change.
const CONTROL_READS: Duration = Duration::from_millis(200);

/// Arguments of `warren lab`.
#[derive(Args, Debug)]
pub struct LabArgs {
    /// Which lab; several can stand side by side [default: $WARREN_LAB, or lab]
    #[arg(long, global = true)]
    name: Option<String>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Start a lab and run it until Ctrl-C
    Up(UpArgs),
    /// Take a lab down
    Down,
    /// Show nodes, pods and services
    Status,
    /// Create or change objects: a file, a folder, or - for standard input
    Apply {
        #[arg(short = 'f', long = "filename")]
        file: PathBuf,
    },
    /// Remove the objects of a file, a folder, or - for standard input
    Delete {
        #[arg(short = 'f', long = "filename")]
        file: PathBuf,
    },
    /// Run a command in a pod
    Exec {
        /// POD, deploy/NAME or node/NODE
        pod: String,
        #[arg(short, long, default_value = "default")]
        namespace: String,
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Show a log
    Logs {
        /// POD, deploy/NAME, proxy/NODE, control or lab [default: all proxies]
        of: Option<String>,
        #[arg(short, long, default_value = "default")]
        namespace: String,
        #[arg(short, long)]
        container: Option<String>,
        /// Go on with what is added
        #[arg(short, long)]
        follow: bool,
    },
    /// Show the main job, step by step, in a lab of its own
    Demo(DemoArgs),
    /// Measure bulk and requests through the mesh, in a lab of its own
    Bench(BenchArgs),
    /// Run a part of the sample application
    Serve(serve::ServeArgs),
    #[command(hide = true, subcommand)]
    Load(LoadCommand),
    #[command(hide = true)]
    Hold {
        #[arg(long)]
        state: PathBuf,
        #[arg(long)]
        parent: Option<i32>,
    },
    #[command(hide = true)]
    Init {
        #[arg(long)]
        state: PathBuf,
    },
    #[command(hide = true)]
    Daemon {
        #[arg(long)]
        state: PathBuf,
    },
}

/// Runs one `warren lab` command.
///
/// # Errors
/// What the command could not do, for an operator.
pub fn run(arguments: LabArgs) -> anyhow::Result<ExitCode> {
    let from_environment = || {
        std::env::var("WARREN_LAB")
            .ok()
            .filter(|name| !name.is_empty())
    };
    let otherwise = || match arguments.command {
        // They take their lab down, so it must not be one that somebody works in.
        Command::Demo(_) => format!("demo-{}", std::process::id()),
        Command::Bench(_) => format!("bench-{}", std::process::id()),
        _ => "lab".to_owned(),
    };
    let name = arguments
        .name
        .or_else(from_environment)
        .unwrap_or_else(otherwise);
    let lab = Lab::named(&name)?;
    match arguments.command {
        Command::Up(arguments) => return up::run(&lab, &arguments),
        Command::Down => {
            if !lab.down()? {
                bail!("there is no running lab called {name}");
            }
            say!("lab {name} is down");
        }
        Command::Status => say!("{}", status::render(&lab.status()?).trim_end()),
        Command::Apply { file } => {
            let objects = manifest::load(&file)?;
            let control = lab.dir().join("control.log");
            let before = std::fs::metadata(&control).map_or(0, |log| log.len());
            print_lines(&lab.apply(objects)?);
            // What the control plane does not understand is only in its log.
            std::thread::sleep(CONTROL_READS);
            let said = logs::lines_from(&control, before).unwrap_or_default();
            let errors: Vec<String> = said
                .into_iter()
                .filter(|l| l.contains("\terror\t"))
                .collect();
            if !errors.is_empty() {
                print_lines(&errors);
                return Ok(ExitCode::FAILURE);
            }
        }
        Command::Delete { file } => {
            let keys = manifest::load(&file)?.into_iter().map(|o| o.key).collect();
            print_lines(&lab.delete(keys)?);
        }
        Command::Exec {
            pod,
            namespace,
            command,
        } => {
            let name = PodName {
                namespace,
                name: pod,
            };
            let (stdin, stdout, stderr) = (std::io::stdin(), std::io::stdout(), std::io::stderr());
            let code = lab.exec(&name, command, stdin, stdout, stderr)?;
            return Ok(ExitCode::from(u8::try_from(code).unwrap_or(1)));
        }
        Command::Logs {
            of,
            namespace,
            container,
            follow,
        } => {
            let sources = match of {
                Some(of) => {
                    let path = logs::path(&lab, &namespace, &of, container.as_deref())?;
                    vec![(String::new(), path)]
                }
                None => logs::proxies(&lab)?,
            };
            logs::show(&sources, follow)?;
        }
        Command::Demo(arguments) => return demo::run(&lab, &arguments),
        Command::Bench(arguments) => return bench::run(&lab, &arguments),
        Command::Load(command) => load::run(&command)?,
        Command::Serve(arguments) => serve::run(arguments)?,
        Command::Hold { state, parent } => return sandbox::hold(&StateDir::at(&state), parent),
        Command::Init { state } => return sandbox::init(&StateDir::at(&state)),
        Command::Daemon { state } => return daemon::run(&StateDir::at(&state)),
    }
    Ok(ExitCode::SUCCESS)
}

fn print_lines(lines: &[String]) {
    for line in lines {
        say!("{line}");
    }
}
