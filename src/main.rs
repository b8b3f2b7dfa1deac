//! The `warren` program.

fn main() -> std::process::ExitCode {
    warren::cli::run()
}
