//! `warren-cni`, the CNI plugin; see [`cni::plugin`].

use std::process::ExitCode;

fn main() -> ExitCode {
    cni::plugin::main()
}
