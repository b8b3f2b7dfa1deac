//! The `warren` program.

#[global_allocator]
static HEAP: warren::profile::heap::Heap = warren::profile::heap::Heap;

fn main() -> std::process::ExitCode {
    warren::cli::run()
}
