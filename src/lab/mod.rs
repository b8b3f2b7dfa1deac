//! A whole mesh on one machine.

mod addresses;
mod agent;
mod capture;
mod cluster;
mod components;
mod container;
mod daemon;
mod dns;
mod health;
mod links;
mod live;
mod manifest;
mod names;
mod namespaces;
mod plan;
mod pod;
mod process;
mod progress;
mod sandbox;
mod serve;
mod server;
mod service_rules;
mod services;
mod sniff;
mod state;
mod status;
mod topology;
mod wire;

use std::process::ExitCode;

use clap::{Args, Subcommand};

/// Arguments of `warren lab`.
#[derive(Args, Debug)]
pub struct LabArgs {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Run a part of the sample application
    Serve(serve::ServeArgs),
}

/// Runs one `warren lab` command.
///
/// # Errors
/// What the command could not do, for an operator.
pub fn run(arguments: LabArgs) -> anyhow::Result<ExitCode> {
    match arguments.command {
        Command::Serve(arguments) => serve::run(arguments)?,
    }
    Ok(ExitCode::SUCCESS)
}
