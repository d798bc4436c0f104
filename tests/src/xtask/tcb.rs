//! `cargo xtask tcb`: how much code of ours one has to trust in each program.
//!
//! Counted are the lines with code on them (no comments, no blank lines, no tests) of all modules of our crates that a
//! program can use; [`crate::source::reach`] says how these are found. Foreign crates do not count.

#![forbid(unsafe_code)]

use crate::rig::workspace_root;
use crate::source::reach::reachable;
use crate::source::tokens::line_count;
use crate::source::tree::CrateTree;
use anyhow::{Context, Result};
use clap::Args;
use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;

/// What can be read and reviewed whole: where the process that every guest's fate hangs on has to get to.
pub const GOAL_VCPU_LINES: usize = 6000;

/// Limit: a ratchet while the goal is not reached. It holds what has been counted, and may only ever be lowered.
pub const MAX_VCPU_LINES: usize = 10_450;

/// Program and root file; `bulkhead-vcpu` first.
const PROGRAMS: &[(&str, &str)] = &[
    ("bulkhead-vcpu", "vmm-core/src/bin/bulkhead-vcpu.rs"),
    ("bulkhead-block", "device-block/src/main.rs"),
    ("bulkhead-net", "device-net/src/main.rs"),
    ("bulkhead", "vmm-core/src/bin/bulkhead.rs"),
];

const LIBRARIES: &[(&str, &str)] = &[
    ("vmbus", "vmbus/src/lib.rs"),
    ("sandbox", "sandbox/src/lib.rs"),
    ("vmm_core", "vmm-core/src/lib.rs"),
    ("device_block", "device-block/src/lib.rs"),
    ("device_net", "device-net/src/lib.rs"),
];

/// `cargo xtask tcb …`
#[derive(Debug, Default, Args)]
pub struct TcbArguments {
    /// Also print each file and its lines.
    #[arg(long)]
    files: bool,
}

/// One program's lines by file, relative to the workspace.
#[derive(Debug)]
pub struct ProgramLines {
    /// The program's name.
    pub program: &'static str,
    /// Lines of code by file.
    pub files: BTreeMap<String, usize>,
}

impl ProgramLines {
    /// All lines of the program.
    pub fn total(&self) -> usize {
        self.files.values().sum()
    }
}

/// Counts every program of the workspace at `root`.
pub fn count(root: &Path) -> Result<Vec<ProgramLines>> {
    let mut crates = BTreeMap::new();
    for (name, file) in LIBRARIES {
        crates.insert(name.to_string(), CrateTree::read(&root.join(file))?);
    }
    PROGRAMS
        .iter()
        .map(|(program, file)| count_program(root, &mut crates, program, file))
        .collect()
}

fn count_program(
    root: &Path,
    crates: &mut BTreeMap<String, CrateTree>,
    program: &'static str,
    file: &str,
) -> Result<ProgramLines> {
    const ROOT: &str = "program";
    crates.insert(ROOT.to_string(), CrateTree::read(&root.join(file))?);
    let mut files = BTreeMap::new();
    for (name, path) in reachable(crates, ROOT) {
        let module = crates
            .get(&name)
            .and_then(|tree| tree.modules.get(&path))
            .context("a found module exists")?;
        let shown = module
            .file
            .strip_prefix(root)
            .unwrap_or(&module.file)
            .display()
            .to_string();
        files.insert(shown, line_count(&module.tokens));
    }
    Ok(ProgramLines { program, files })
}

/// Prints the table; fails if `bulkhead-vcpu` has grown to its limit.
pub fn main(arguments: &TcbArguments) -> Result<ExitCode> {
    let mut within = true;
    println!("{:<16} {:>6}  of which", "program", "lines");
    for lines in count(&workspace_root())? {
        let mut by_crate: BTreeMap<&str, usize> = BTreeMap::new();
        for (file, count) in &lines.files {
            *by_crate
                .entry(file.split('/').next().unwrap_or(file))
                .or_default() += count;
        }
        let parts: Vec<String> = by_crate
            .iter()
            .map(|(name, count)| format!("{name} {count}"))
            .collect();
        println!("{:<16} {:>6}  {}", lines.program, lines.total(), parts.join(", "));
        if arguments.files {
            lines
                .files
                .iter()
                .for_each(|(file, count)| println!("    {count:>5}  {file}"));
        }
        if lines.program == "bulkhead-vcpu" && lines.total() >= GOAL_VCPU_LINES {
            println!(
                "    NOT YET below the goal of {GOAL_VCPU_LINES}; until then it must stay below {MAX_VCPU_LINES}"
            );
        }
        within &= lines.program != "bulkhead-vcpu" || lines.total() < MAX_VCPU_LINES;
    }
    if !within {
        eprintln!("tcb: bulkhead-vcpu has {MAX_VCPU_LINES} lines or more; it must stay below");
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}
