//! `cargo xtask rig`: builds the nested rig, and runs a command in it.

#![forbid(unsafe_code)]

use crate::release;
use crate::rig::{FileSource, Rig, RigError, RigFailed, RigOutcome, RigSpec};
use anyhow::{Context, Result, ensure};
use clap::{Args, Subcommand};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

/// Exit status of `rig run` when the emulator failed: nothing is known about the command.
pub const EXIT_RIG_FAILED: u8 = 97;

/// `cargo xtask rig …`
#[derive(Debug, Subcommand)]
pub enum RigCommand {
    /// Build the rig from Debian packages below target/rig (needs the network once).
    Build,
    /// Run a command in the rig, as root; the exit status is the command's, or 97 if the rig failed.
    Run(RunArguments),
}

/// `cargo xtask rig run …`
#[derive(Debug, Args)]
pub struct RunArguments {
    /// Processors of the emulated machine.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=16))]
    cpus: u32,
    /// Memory of the emulated machine, in MiB.
    #[arg(long, default_value_t = 2048, value_parser = clap::value_parser!(u32).range(256..=65536))]
    memory: u32,
    /// Seconds that the command may run.
    #[arg(long, default_value_t = 120)]
    timeout: u64,
    /// How often to try when the rig fails.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=10))]
    attempts: u32,
    /// A file to put into the rig; NAME is an absolute path there, or a name in /root.
    #[arg(long = "file", value_name = "HOST:NAME")]
    files: Vec<String>,
    /// Where to put what the command leaves in /out, and the logs.
    #[arg(long, value_name = "DIR")]
    collect: Option<PathBuf>,
    /// Take our programs from here and build nothing (for instance target/debug).
    #[arg(long, value_name = "DIR", conflicts_with = "no_binaries")]
    bin_dir: Option<PathBuf>,
    /// Put none of our programs into the rig.
    #[arg(long)]
    no_binaries: bool,
    /// Let memfds use huge pages (shmem_enabled=advise).
    #[arg(long)]
    shmem_thp: bool,
    /// Connect this terminal to the command; no limit of time.
    #[arg(long)]
    interactive: bool,
    /// The command and its arguments.
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

/// Runs the subcommand.
pub fn main(command: RigCommand) -> Result<ExitCode> {
    match command {
        RigCommand::Build => {
            Rig::build()?;
            eprintln!("rig: built");
            Ok(ExitCode::SUCCESS)
        }
        RigCommand::Run(arguments) => run(arguments),
    }
}

fn run(arguments: RunArguments) -> Result<ExitCode> {
    let mut spec = RigSpec::new(arguments.command);
    spec.cpu_count = arguments.cpus;
    spec.memory_mib = arguments.memory;
    spec.timeout = Duration::from_secs(arguments.timeout);
    spec.attempts = arguments.attempts;
    spec.shmem_thp = arguments.shmem_thp;
    spec.interactive = arguments.interactive;
    spec.echo = true;
    spec.files = arguments
        .files
        .iter()
        .map(|file| parse_file(file))
        .collect::<Result<_>>()?;
    spec.binaries = match (arguments.no_binaries, arguments.bin_dir) {
        (true, _) => None,
        (false, Some(folder)) => {
            let there = folder.join("bulkhead").is_file();
            ensure!(there, "--bin-dir: there is no bulkhead in {}", folder.display());
            Some(folder)
        }
        (false, None) => Some(release::build_programs()?),
    };
    let rig = Rig::build()?;
    let _terminal = spec.interactive.then(RawTerminal::enter);
    match rig.run(&spec) {
        Ok(outcome) => {
            if let Some(folder) = &arguments.collect {
                collect_outcome(folder, &outcome)?;
            }
            if outcome.attempts > 1 {
                eprintln!("rig: succeeded at attempt {}", outcome.attempts);
            }
            Ok(ExitCode::from(u8::try_from(outcome.status).unwrap_or(u8::MAX)))
        }
        Err(RigError::Failed(failed)) => {
            if let Some(folder) = &arguments.collect {
                collect_failure(folder, &failed)?;
            }
            eprintln!("{failed}");
            Ok(ExitCode::from(EXIT_RIG_FAILED))
        }
        Err(RigError::Setup(error)) => Err(error),
    }
}

fn parse_file(text: &str) -> Result<(String, FileSource)> {
    let (host, name) = text
        .rsplit_once(':')
        .with_context(|| format!("--file wants HOST:NAME, not {text}"))?;
    ensure!(Path::new(host).is_file(), "--file: {host} is no file");
    let name = if name.starts_with('/') {
        name.to_string()
    } else {
        format!("/root/{name}")
    };
    Ok((name, FileSource::Path(host.into())))
}

fn collect_outcome(folder: &Path, outcome: &RigOutcome) -> Result<()> {
    write_files(folder, &outcome.files)?;
    write_file(folder, "rig-output.log", outcome.output.as_bytes())?;
    write_file(folder, "rig-kernel.log", outcome.kernel_log.as_bytes())?;
    write_file(folder, "rig-console.log", outcome.console.as_bytes())
}

fn collect_failure(folder: &Path, failed: &RigFailed) -> Result<()> {
    write_files(folder, &failed.files)?;
    write_file(folder, "rig-output.log", failed.output.as_bytes())?;
    write_file(folder, "rig-console.log", failed.console.as_bytes())
}

fn write_files(folder: &Path, files: &BTreeMap<String, Vec<u8>>) -> Result<()> {
    files
        .iter()
        .try_for_each(|(name, bytes)| write_file(folder, name, bytes))
}

fn write_file(folder: &Path, name: &str, bytes: &[u8]) -> Result<()> {
    let path = folder.join(name);
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))
}

/// The terminal in raw mode, restored when dropped.
struct RawTerminal {
    before: Option<nix::sys::termios::Termios>,
}

impl RawTerminal {
    fn enter() -> RawTerminal {
        use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};
        let stdin = std::io::stdin();
        let before = tcgetattr(&stdin).ok();
        if let Some(before) = &before {
            let mut raw = before.clone();
            cfmakeraw(&mut raw);
            if tcsetattr(&stdin, SetArg::TCSANOW, &raw).is_err() {
                eprintln!("rig: cannot switch this terminal to raw mode");
            }
        }
        RawTerminal { before }
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        use nix::sys::termios::{SetArg, tcsetattr};
        if let Some(before) = &self.before
            && tcsetattr(std::io::stdin(), SetArg::TCSANOW, before).is_err()
        {
            eprintln!("rig: cannot restore this terminal; `reset` does");
        }
    }
}
