//! Programs as they are shipped, for whatever measures or kills them.

#![forbid(unsafe_code)]

use crate::rig::workspace_root;
use anyhow::{Context, Result, ensure};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// Packages whose programs make up a VM.
const PROGRAMS: [&str; 3] = ["vmm-core", "device-block", "device-net"];

/// Builds what a VM consists of; where it is.
pub fn build_programs() -> Result<PathBuf> {
    let mut args = vec!["build", "--release", "--bins"];
    args.extend(PROGRAMS.iter().flat_map(|package| ["-p", package]));
    build(&args)
}

/// The same and this xtask, which `cargo xtask` itself builds for quick building.
pub fn build_all() -> Result<PathBuf> {
    build(&["build", "--release", "--workspace", "--bins"])
}

/// Builds the server of a package that dies at a named step when it is told to; its file. Not optimized: who dies at a
/// given step need not be fast, and tests have most of it built already.
pub fn build_dying(package: &str) -> Result<PathBuf> {
    let name = match package {
        "device-block" => "bulkhead-block-dying",
        _ => "bulkhead-net-dying",
    };
    // cargo may wait for another cargo, and says nothing of it.
    eprintln!("cargo builds {name}, unless it is up to date");
    build(&[
        "build",
        "--quiet",
        "-p",
        package,
        "--features",
        "crash-points",
        "--bin",
        name,
    ])?;
    Ok(target_folder().join("debug").join(name))
}

/// Below the target folder: the disk's server without its journal.
const WITHOUT_JOURNAL: &str = "without-journal";

/// Builds the disk's server once more, with the journal compiled out, for the benchmark that tells what the journal costs. In a
/// folder of its own, so that nobody takes it for the real one.
pub fn build_block_without_journal() -> Result<()> {
    let args = [
        "build",
        "--quiet",
        "--release",
        "-p",
        "device-block",
        "--bin",
        "bulkhead-block",
    ];
    let mut cargo = cargo(&args);
    cargo.env("BULKHEAD_BENCH_NO_JOURNAL", "1");
    cargo.env("CARGO_TARGET_DIR", target_folder().join(WITHOUT_JOURNAL));
    run(cargo)
}

/// Where that is, seen from the programs as they are shipped.
pub fn block_without_journal(programs: &Path) -> Result<PathBuf> {
    let target = programs
        .parent()
        .context("the optimized programs have no target folder")?;
    let program = target.join(WITHOUT_JOURNAL).join("release/bulkhead-block");
    ensure!(
        program.exists(),
        "{} is not there: `cargo xtask bench` builds it",
        program.display()
    );
    Ok(program)
}

fn build(args: &[&str]) -> Result<PathBuf> {
    run(cargo(args))?;
    Ok(target_folder().join("release"))
}

fn cargo(args: &[&str]) -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(args).current_dir(workspace_root());
    cargo
}

fn run(mut cargo: Command) -> Result<()> {
    let status = cargo.status().context("cannot run cargo")?;
    ensure!(status.success(), "our programs do not build");
    Ok(())
}

fn target_folder() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace_root().join("target"), PathBuf::from)
}

/// Runs the xtask among `programs` in place of this one.
pub fn run_xtask(programs: &Path, args: impl IntoIterator<Item = OsString>) -> Result<ExitCode> {
    let status = Command::new(programs.join("xtask"))
        .args(args)
        .status()
        .context("cannot run the optimized xtask")?;
    Ok(if status.success() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
