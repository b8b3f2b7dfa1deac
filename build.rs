//! Compiles the protobuf schemas of the control plane, the CA and the tests' container runtime in pure Rust, and notes what the build is made of.

use std::path::Path;
use std::process::Command;

const RUNTIME: &str = "tests/runtime/cri.proto";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = [
        "workload.proto",
        "authorization.proto",
        "ads.proto",
        "ca.proto",
        "spiffe.proto",
    ];
    for file in files {
        println!("cargo::rerun-if-changed=src/proto/{file}");
    }
    println!("cargo::rerun-if-changed={RUNTIME}");
    tell(
        "WARREN_RUST_VERSION",
        &std::env::var("RUSTC")?,
        &["--version"],
    );
    tell("WARREN_GIT_REVISION", "git", &["rev-parse", "HEAD"]);
    // A commit alone builds nothing anew; what is released is built from a fresh clone.
    if Path::new(".git/HEAD").exists() {
        println!("cargo::rerun-if-changed=.git/HEAD");
    }
    let descriptors = protox::compile(files, ["src/proto"])?;
    tonic_prost_build::configure()
        .btree_map(".")
        .compile_fds(descriptors)?;
    // A kubelet's interface to the container runtime: the tests play kubelet.
    let runtime = protox::compile([RUNTIME], ["tests/runtime"])?;
    tonic_prost_build::configure()
        .build_server(false)
        .compile_fds(runtime)?;
    Ok(())
}

/// Gives a program's one line of output to the code as a variable; nothing where the program is not there.
fn tell(variable: &str, program: &str, arguments: &[&str]) {
    if let Ok(output) = Command::new(program).args(arguments).output()
        && output.status.success()
        && let Ok(text) = String::from_utf8(output.stdout)
    {
        println!("cargo::rustc-env={variable}={}", text.trim());
    }
}
