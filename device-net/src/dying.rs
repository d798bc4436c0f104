//! `bulkhead-net`, built with the feature `crash-points`: see `vmbus/src/journal/steps.rs`.
#![forbid(unsafe_code)]

#[path = "main.rs"]
mod program;

fn main() -> std::process::ExitCode {
    program::main()
}
