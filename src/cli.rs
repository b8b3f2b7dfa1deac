//! The command line: which role this process takes.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::{agent, control, daemon, lab, version};

/// A node-level L4 zero-trust tunnel for Kubernetes ambient meshes.
#[derive(Parser)]
#[command(name = "warren", version = version::VERSION, disable_help_subcommand = false)]
struct Arguments {
    #[command(subcommand)]
    role: Option<Role>,
}

#[derive(Subcommand)]
enum Role {
    /// Run the node's tunnel daemon (configured by its environment, see docs/configuration.md)
    Proxy {
        /// Accepted and recorded for the configuration dump
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        rest: Vec<String>,
    },
    /// Capture the pods of a node and hand them to its proxy
    NodeAgent(Box<agent::NodeAgentArgs>),
    /// Run a whole mesh on this machine
    Lab(lab::LabArgs),
    /// Serve a folder of Kubernetes manifests as a control plane with a CA
    Control(control::ControlArgs),
    /// Print the build
    Version,
}

/// Runs the role that the arguments ask for.
pub fn run() -> ExitCode {
    let result = match Arguments::parse().role {
        None => daemon::run(),
        Some(Role::Proxy { .. }) => daemon::run(),
        Some(Role::NodeAgent(arguments)) => agent::main(*arguments),
        Some(Role::Lab(arguments)) => lab::run(arguments),
        Some(Role::Control(arguments)) => control::main(arguments),
        Some(Role::Version) => {
            println!("{}", version::build_info());
            Ok(ExitCode::SUCCESS)
        }
    };
    result.unwrap_or_else(|error| {
        eprintln!("warren: {error:#}");
        ExitCode::FAILURE
    })
}
