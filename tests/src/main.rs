//! `cargo xtask`: the developer's commands. This file only reads the command line.
#![forbid(unsafe_code)]

use bulkhead_tests::xtask;
use clap::{Parser, Subcommand};
use std::process::ExitCode;

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", about = "Build, run and check bulkhead")]
struct Arguments {
    #[command(subcommand)]
    command: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// The nested rig: an emulated machine in which Linux guests run on any host.
    #[command(subcommand)]
    Rig(xtask::rig::RigCommand),
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Task::Rig(command) => xtask::rig::main(command),
    };
    result.unwrap_or_else(|error| {
        eprintln!("xtask: {error:#}");
        ExitCode::FAILURE
    })
}
