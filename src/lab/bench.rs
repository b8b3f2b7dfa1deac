//! `warren lab bench`: what the mesh carries between two nodes of this machine, beside the bare network.

use std::io::Read;
use std::net::SocketAddr;
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::Args;

use super::client::Lab;
use super::load::Figures;
use super::say::say;
use super::up::{self, Interrupts, UpArgs};
use super::wire::{PodName, Status};
use super::{logs, manifest};

/// A client and a target in the mesh, and the same outside it, on two nodes.
const PODS: &str = include_str!("bench.yaml");
const PORT: u16 = 9000;

/// How to measure.
#[derive(Args, Clone, Debug)]
pub struct BenchArgs {
    /// Seconds for each figure
    #[arg(long, default_value_t = 3)]
    seconds: u64,
}

/// One line of the table.
struct Measurement {
    name: &'static str,
    kind: &'static str,
    connections: u16,
}

const MEASUREMENTS: [Measurement; 5] = [
    Measurement::new("bulk, 1 flow", "bulk", 1),
    Measurement::new("bulk, 8 flows", "bulk", 8),
    Measurement::new("requests of 1 KiB, 1 connection", "requests", 1),
    Measurement::new("requests of 1 KiB, 64 connections", "requests", 64),
    Measurement::new(
        "a connection for every request, 8 at a time",
        "connections",
        8,
    ),
];

impl Measurement {
    const fn new(name: &'static str, kind: &'static str, connections: u16) -> Self {
        Self {
            name,
            kind,
            connections,
        }
    }
}

/// Measures and prints a table.
///
/// # Errors
/// When the lab does not come up or a flow fails.
pub fn run(lab: &Lab, arguments: &BenchArgs) -> anyhow::Result<ExitCode> {
    let mut interrupted = Interrupts::block()?;
    let up = UpArgs {
        nodes: 2,
        ..UpArgs::default()
    };
    let objects = manifest::parse("bench.yaml", PODS)?;
    let launched = up::start(lab, &up, objects, &mut interrupted, |line| say!("{line}"))?;
    let measured = measure(lab, arguments, &mut interrupted);
    lab.down()?;
    if let Some(mut launched) = launched {
        launched.wait()?;
    }
    measured?;
    Ok(ExitCode::SUCCESS)
}

fn measure(lab: &Lab, arguments: &BenchArgs, interrupted: &mut Interrupts) -> anyhow::Result<()> {
    if cfg!(debug_assertions) {
        say!("this is a debug build: its figures mean little");
    }
    say!(
        "\n| {}s each, client and target on different nodes | through the mesh | bare network |\n|---|---|---|",
        arguments.seconds
    );
    let status = lab.status()?;
    for measurement in &MEASUREMENTS {
        let mut cells = Vec::new();
        for namespace in ["mesh", "bare"] {
            if interrupted.pending()? {
                bail!("interrupted");
            }
            cells.push(one(
                lab,
                &status,
                namespace,
                measurement,
                arguments.seconds,
            )?);
        }
        say!("| {} | {} |", measurement.name, cells.join(" | "));
    }
    Ok(())
}

fn one(
    lab: &Lab,
    status: &Status,
    namespace: &str,
    measurement: &Measurement,
    seconds: u64,
) -> anyhow::Result<String> {
    let target = logs::pod(status, namespace, "target").context("no target")?;
    let words = [
        "warren",
        "lab",
        "load",
        "run",
        measurement.kind,
        &SocketAddr::new(target.addresses.first(), PORT).to_string(),
        "--connections",
        &measurement.connections.to_string(),
        "--seconds",
        &seconds.to_string(),
    ];
    let client = PodName {
        namespace: namespace.into(),
        name: "client".into(),
    };
    let (mut reader, writer) = std::io::pipe()?;
    let nothing = std::fs::File::open("/dev/null")?;
    let command = words.map(str::to_owned).to_vec();
    let code = lab.exec(&client, command, nothing, &writer, std::io::stderr())?;
    drop(writer);
    let mut text = String::new();
    reader.read_to_string(&mut text)?;
    if code != 0 {
        bail!("the load generator ended with {code}");
    }
    let figures: Figures = serde_json::from_str(&text)?;
    if figures.errors > 0 {
        bail!(
            "{} of {} connections failed",
            figures.errors,
            measurement.connections
        );
    }
    Ok(cell(measurement.kind, &figures))
}

fn cell(kind: &str, figures: &Figures) -> String {
    if kind == "bulk" {
        let gigabits = figures.bytes as f64 * 8.0 / figures.seconds / 1e9;
        return format!("{gigabits:.2} Gbit/s");
    }
    format!(
        "{:.0}/s, median {} us, p99 {} us",
        figures.requests as f64 / figures.seconds,
        figures.median,
        figures.p99
    )
}

#[cfg(test)]
mod tests {
    use super::super::plan;
    use super::*;

    #[test]
    fn cells_carry_their_units() {
        let figures = Figures {
            seconds: 2.0,
            bytes: 1_000_000_000,
            requests: 5,
            median: 7,
            p99: 9,
            errors: 0,
        };
        assert_eq!(cell("bulk", &figures), "4.00 Gbit/s");
        assert_eq!(cell("requests", &figures), "2/s, median 7 us, p99 9 us");
    }

    #[test]
    fn client_and_target_are_on_different_nodes_in_and_out_of_the_mesh() {
        let objects = manifest::parse("bench.yaml", PODS).unwrap();
        let pods = plan::pods(objects.iter()).unwrap();
        let placed: Vec<_> = pods
            .iter()
            .map(|p| (p.namespace.as_str(), p.node.as_deref(), p.captured))
            .collect();
        let expected = [
            ("mesh", Some("node-0"), true),
            ("mesh", Some("node-1"), true),
            ("bare", Some("node-0"), false),
            ("bare", Some("node-1"), false),
        ];
        assert_eq!(placed, expected);
    }
}
