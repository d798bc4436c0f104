//! `cargo xtask test`: everything that has to hold before a change lands.
//!
//! Cheap checks come first. Every step runs, whatever the ones before it said, so that one run shows all that is wrong.
//! A check (formatting, lints, the line budget, a build) counts as one passed or failed; test programs count by what their
//! harness reports. A line `SKIP …` (see [`crate::tier`]) turns one passed test into a skipped one.

#![forbid(unsafe_code)]

use super::tcb;
use crate::release;
use crate::rig::{Rig, workspace_root};
use crate::tier::{PROGRAMS_VARIABLE, RIG_VARIABLE, SKIP_PREFIX};
use anyhow::{Context, Result};
use clap::Args;
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

/// `cargo xtask test …`
#[derive(Debug, Args)]
pub struct TestArguments {
    /// Leave out what needs the rig; those tests are then counted as skipped.
    #[arg(long)]
    no_rig: bool,
}

/// Tests and checks by their outcome.
#[derive(Debug, Default, PartialEq, Eq)]
struct Tally {
    passed: usize,
    failed: usize,
    skipped: usize,
    /// Skipped tests of the program that is running, which its harness will report as passed.
    passed_but_skipped: usize,
    /// Names of what failed.
    failures: Vec<String>,
    /// Attempts of the rig that failed and were made again.
    rig_retries: usize,
}

/// Runs everything; the last line is `N passed, N failed, N skipped`.
pub fn main(arguments: &TestArguments) -> Result<ExitCode> {
    let begun = Instant::now();
    let mut tally = Tally::default();
    tally.check("formatting", || cargo(&["fmt", "--all", "--check"]));
    tally.check("clippy", || {
        cargo(&[
            "clippy",
            "--quiet",
            "--workspace",
            "--all-targets",
            "--",
            "-D",
            "warnings",
        ])
    });
    tally.check("line budget of bulkhead-vcpu", || {
        Ok(tcb::main(&tcb::TcbArguments::default())? == ExitCode::SUCCESS)
    });
    let mut programs = None;
    tally.check("release programs", || {
        programs = Some(release::build_programs()?);
        Ok(true)
    });
    let with_rig = !arguments.no_rig && {
        let failed_before = tally.failed;
        tally.check("rig", || Rig::build().map(|_| true));
        tally.failed == failed_before
    };

    let mut tests = cargo_command(&["test", "--workspace", "--no-fail-fast"]);
    if let Some(programs) = &programs {
        tests.env(PROGRAMS_VARIABLE, programs);
    }
    if with_rig {
        tests.env(RIG_VARIABLE, "1");
    }
    tally.test_programs("tests", &mut tests)?;

    // Another cfg for every crate: a target folder of its own keeps the usual one warm.
    let mut loom = cargo_command(&["test", "--release", "-p", "vmbus", "--lib", "loom"]);
    loom.env("RUSTFLAGS", "--cfg loom")
        .env("CARGO_TARGET_DIR", workspace_root().join("target/loom"));
    loom.env("LOOM_MAX_PREEMPTIONS", "3");
    tally.test_programs("loom", &mut loom)?;

    println!();
    tally.failures.iter().for_each(|name| println!("failed: {name}"));
    if tally.rig_retries > 0 {
        println!("the rig failed and was tried again {} time(s)", tally.rig_retries);
    }
    println!("took {} s", begun.elapsed().as_secs());
    println!(
        "{} passed, {} failed, {} skipped",
        tally.passed, tally.failed, tally.skipped
    );
    Ok(if tally.failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

impl Tally {
    /// One check; an error is a failure that is printed.
    fn check(&mut self, name: &str, check: impl FnOnce() -> Result<bool>) {
        println!("=== {name}");
        let begun = Instant::now();
        let passed = check().unwrap_or_else(|error| {
            eprintln!("{error:#}");
            false
        });
        println!(
            "=== {name}: {} ({} s)",
            if passed { "ok" } else { "FAILED" },
            begun.elapsed().as_secs()
        );
        if passed {
            self.passed += 1;
        } else {
            self.failed += 1;
            self.failures.push(name.to_string());
        }
    }

    /// Runs test programs, shows what they write, and counts what they report.
    fn test_programs(&mut self, name: &str, command: &mut Command) -> Result<()> {
        println!("=== {name}");
        let begun = Instant::now();
        let (reader, writer) = std::io::pipe()?;
        command
            .stdin(Stdio::null())
            .stdout(writer.try_clone()?)
            .stderr(writer);
        let mut child = command.spawn().context("cannot run cargo")?;
        // The command holds this side's copies of the pipe, which would keep it open for ever.
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let failed_before = self.failed;
        let mut reader = BufReader::new(reader);
        let mut line = Vec::new();
        while reader.read_until(b'\n', &mut line)? > 0 {
            std::io::stdout().write_all(&line)?;
            self.take_line(&String::from_utf8_lossy(&line));
            line.clear();
        }
        let status = child.wait()?;
        if !status.success() && self.failed == failed_before {
            self.failed += 1;
            self.failures
                .push(format!("{name}: did not run to the end ({status})"));
        }
        println!("=== {name}: done ({} s)", begun.elapsed().as_secs());
        Ok(())
    }

    fn take_line(&mut self, line: &str) {
        let line = line.trim_end();
        if line.starts_with(SKIP_PREFIX) {
            self.skipped += 1;
            self.passed_but_skipped += 1;
        } else if let Some(counts) = line.strip_prefix("test result: ") {
            let count = |what: &str| {
                let words = counts
                    .split([' ', ';', '.'])
                    .filter(|word| !word.is_empty())
                    .collect::<Vec<_>>();
                let at = words.iter().position(|word| *word == what)?;
                words[at.checked_sub(1)?].parse::<usize>().ok()
            };
            // The lines of skipped tests come before their program's result.
            self.passed += count("passed")
                .unwrap_or(0)
                .saturating_sub(self.passed_but_skipped);
            self.passed_but_skipped = 0;
            self.failed += count("failed").unwrap_or(0);
            self.skipped += count("ignored").unwrap_or(0);
        } else if let Some(name) = line
            .strip_prefix("---- ")
            .and_then(|rest| rest.strip_suffix(" stdout ----"))
        {
            self.failures.push(name.to_string());
        } else if line.contains("rig: attempt ") {
            self.rig_retries += 1;
        }
    }
}

fn cargo(arguments: &[&str]) -> Result<bool> {
    Ok(cargo_command(arguments)
        .status()
        .context("cannot run cargo")?
        .success())
}

fn cargo_command(arguments: &[&str]) -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(arguments).current_dir(workspace_root());
    cargo
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_of_several_programs_are_added_up() {
        let mut tally = Tally::default();
        for line in [
            "SKIP linux_boot: no rig\n",
            "test result: ok. 11 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.01s\n",
            "---- ring::wraps stdout ----\n",
            "test result: FAILED. 3 passed; 1 failed; 2 ignored; 0 measured; 0 filtered out; finished in 0.01s\n",
        ] {
            tally.take_line(line);
        }
        assert_eq!((tally.passed, tally.failed, tally.skipped), (13, 1, 3));
        assert_eq!(tally.failures, ["ring::wraps"]);
    }
}
