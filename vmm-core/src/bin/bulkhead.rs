#![forbid(unsafe_code)]
//! The command line, and the supervisor of a VM.

fn main() -> std::process::ExitCode {
    vmm_core::cli::main()
}
