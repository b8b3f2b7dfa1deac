//! Compiles the protobuf schemas of the control plane and CA in pure Rust.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = [
        "workload.proto",
        "authorization.proto",
        "ads.proto",
        "ca.proto",
    ];
    for file in files {
        println!("cargo::rerun-if-changed=src/proto/{file}");
    }
    let descriptors = protox::compile(files, ["src/proto"])?;
    tonic_prost_build::configure()
        .btree_map(".")
        .compile_fds(descriptors)?;
    Ok(())
}
