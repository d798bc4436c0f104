//! `cargo xtask`: the developer's commands. This file only reads the command line.
#![forbid(unsafe_code)]

use bulkhead_tests::xtask::guard::guarded;
use bulkhead_tests::{bench, demo, kill, xtask};
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
    /// Run all checks and tests.
    Test(xtask::test::TestArguments),
    /// Count our own lines of code in each program.
    Tcb(xtask::tcb::TcbArguments),
    /// Boot a Debian guest with disk and network, and show what ran it.
    Demo(demo::DemoArguments),
    /// Measure figures beside their baselines.
    Bench(bench::BenchArguments),
    /// Kill device servers under load and count what a guest would notice.
    Kill(kill::KillArguments),
    /// Replace device servers under load and count what a guest would notice.
    Swap(kill::SwapArguments),
    /// Run a program as if this host lacked something.
    #[command(hide = true)]
    Without {
        feature: xtask::without::Feature,
        /// The program and its arguments.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// The reading process of the ring benchmark.
    #[command(hide = true)]
    BenchPeer,
    /// The baseline of the storage benchmarks that is a process of its own.
    #[command(hide = true)]
    BenchStorage,
    /// The half of the rig's benchmarks that runs inside the rig.
    #[command(hide = true)]
    BenchRig {
        /// Names of figures.
        names: Vec<String>,
    },
}

fn main() -> ExitCode {
    // The supervisor of a VM whose processors are played starts this program under other names.
    let name = std::env::args().next().unwrap_or_default();
    if let Some(code) = kill::played::main(&name) {
        return code;
    }
    let result = match Arguments::parse().command {
        Task::Rig(command) => guarded(|| xtask::rig::main(command)),
        Task::Test(arguments) => guarded(|| xtask::test::main(&arguments)),
        Task::Tcb(arguments) => xtask::tcb::main(&arguments),
        Task::Demo(arguments) => guarded(|| demo::main(arguments)),
        Task::Bench(arguments) => guarded(|| bench::main(arguments)),
        Task::Kill(arguments) => guarded(|| kill::main(arguments.into())),
        Task::Swap(arguments) => guarded(|| kill::main(arguments.into())),
        Task::Without { feature, command } => xtask::without::main(feature, &command),
        Task::BenchPeer => bench::ring::peer(),
        Task::BenchStorage => bench::storvsp::server(),
        Task::BenchRig { names } => bench::rig::inside(&names),
    };
    result.unwrap_or_else(|error| {
        eprintln!("xtask: {error:#}");
        ExitCode::FAILURE
    })
}
