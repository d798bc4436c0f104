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
    /// Boot a Debian guest with disk and network, and show what happens.
    Demo,
    /// Run all checks and tests.
    Test(xtask::test::TestArguments),
    /// Measure, each figure beside its baseline.
    Bench,
    /// Count our own lines of code in each program.
    Tcb(xtask::tcb::TcbArguments),
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Task::Rig(command) => xtask::rig::main(command),
        Task::Demo => Ok(xtask::later::main("demo")),
        Task::Test(arguments) => xtask::test::main(&arguments),
        Task::Bench => Ok(xtask::later::main("bench")),
        Task::Tcb(arguments) => xtask::tcb::main(&arguments),
    };
    result.unwrap_or_else(|error| {
        eprintln!("xtask: {error:#}");
        ExitCode::FAILURE
    })
}
