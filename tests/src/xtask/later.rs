//! Commands that are named in the documents and have no code yet.

#![forbid(unsafe_code)]

use std::process::ExitCode;

/// Says so, and fails: nobody may take the absence of a result for a good one.
pub fn main(name: &str) -> ExitCode {
    eprintln!("cargo xtask {name}: not built yet");
    ExitCode::FAILURE
}
