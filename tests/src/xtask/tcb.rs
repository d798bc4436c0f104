//! `cargo xtask tcb`: how much code of ours one has to trust in each program.
//!
//! Counted are the lines with code on them (no comments, no blank lines, no tests) of what is linked into a program: of
//! all modules of our crates that it can use ([`crate::source::reach`]), the functions for which it has code, and what
//! these name ([`crate::source::linked`]). Foreign crates do not count.

#![forbid(unsafe_code)]

use crate::rig::workspace_root;
use crate::source::linked::{Source, code_lines, counted_lines};
use crate::source::reach::reachable;
use crate::source::tree::CrateTree;
use anyhow::{Context, Result, ensure};
use clap::Args;
use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// Limit: what can be read and reviewed whole, for the process that every guest's fate hangs on.
pub const MAX_VCPU_LINES: usize = 6_000;

/// Program and root file; `bulkhead-vcpu` first.
const PROGRAMS: &[(&str, &str)] = &[
    ("bulkhead-vcpu", "vmm-core/src/bin/bulkhead-vcpu.rs"),
    ("bulkhead-bus", "vmm-core/src/bin/bulkhead-bus.rs"),
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

/// Builds every program of the workspace at `root` and counts it.
pub fn count(root: &Path) -> Result<Vec<ProgramLines>> {
    let programs = build(root)?;
    let mut crates = BTreeMap::new();
    for (name, file) in LIBRARIES {
        crates.insert(name.to_string(), CrateTree::read(&root.join(file))?);
    }
    PROGRAMS
        .iter()
        .map(|(program, file)| count_program(root, &mut crates, program, file, &programs.join(program)))
        .collect()
}

/// Builds the programs without optimization and says where they are.
fn build(root: &Path) -> Result<PathBuf> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .args(["build", "--quiet", "--profile", "tcb", "--bins"])
        .args(["-p", "vmm-core", "-p", "device-block", "-p", "device-net"])
        .current_dir(root)
        .status()
        .context("cannot run cargo")?;
    ensure!(status.success(), "our programs do not build");
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    Ok(target.join("tcb"))
}

fn count_program(
    root: &Path,
    crates: &mut BTreeMap<String, CrateTree>,
    program: &'static str,
    file: &str,
    built: &Path,
) -> Result<ProgramLines> {
    const ROOT: &str = "program";
    crates.insert(ROOT.to_string(), CrateTree::read(&root.join(file))?);
    let modules = reachable(crates, ROOT)
        .into_iter()
        .map(|(name, path)| crates.get(&name).and_then(|tree| tree.modules.get(&path)))
        .collect::<Option<Vec<_>>>()
        .context("a found module exists")?;
    let sources: Vec<Source<'_>> = modules
        .iter()
        .map(|module| Source {
            path: &module.file,
            tokens: &module.tokens,
        })
        .collect();
    let code = code_lines(built)?;
    let root_has_code = code.contains_key(&root.join(file));
    ensure!(
        root_has_code,
        "{} says nothing about the lines of {file}",
        built.display()
    );
    let lines = counted_lines(&sources, &code);
    let shown = |path: &Path| path.strip_prefix(root).unwrap_or(path).display().to_string();
    let files = sources.iter().zip(lines);
    let files = files
        .map(|(source, lines)| (shown(source.path), lines.len()))
        .filter(|(_, lines)| *lines > 0)
        .collect();
    Ok(ProgramLines { program, files })
}

/// Prints the table; fails if `bulkhead-vcpu` has grown to its limit.
pub fn main(arguments: &TcbArguments) -> Result<ExitCode> {
    let programs = count(&workspace_root())?;
    print(&programs, arguments.files, &mut std::io::stdout().lock()).context("cannot print the table")?;
    let is_too_large =
        |lines: &ProgramLines| lines.program == "bulkhead-vcpu" && lines.total() >= MAX_VCPU_LINES;
    if programs.iter().any(is_too_large) {
        eprintln!("tcb: bulkhead-vcpu has {MAX_VCPU_LINES} lines or more; it must stay below");
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

/// A reader that has seen enough (`| head -1`) is no error.
fn print(programs: &[ProgramLines], files: bool, out: &mut impl Write) -> io::Result<()> {
    match write_table(programs, files, out) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written,
    }
}

/// A line for each program: its name, its lines, and those of each of our crates; `files`: followed by those of each file.
fn write_table(programs: &[ProgramLines], files: bool, out: &mut impl Write) -> io::Result<()> {
    writeln!(out, "{:<16} {:>6}  of which", "program", "lines")?;
    for lines in programs {
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
        writeln!(
            out,
            "{:<16} {:>6}  {}",
            lines.program,
            lines.total(),
            parts.join(", ")
        )?;
        if files {
            for (file, count) in &lines.files {
                writeln!(out, "    {count:>5}  {file}")?;
            }
        }
    }
    out.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn programs() -> Vec<ProgramLines> {
        let files = |files: &[(&str, usize)]| {
            let files = files.iter();
            files.map(|(file, count)| (file.to_string(), *count)).collect()
        };
        vec![
            ProgramLines {
                program: "bulkhead-vcpu",
                files: files(&[
                    ("sandbox/src/lib.rs", 20),
                    ("vmm-core/src/a.rs", 4000),
                    ("vmm-core/src/b.rs", 5),
                ]),
            },
            ProgramLines {
                program: "bulkhead",
                files: files(&[("vmbus/src/lib.rs", 7)]),
            },
        ]
    }

    fn printed(files: bool) -> String {
        let mut out = Vec::new();
        print(&programs(), files, &mut out).expect("a vector takes all");
        String::from_utf8(out).expect("text")
    }

    #[test]
    fn each_program_is_a_line_with_its_sum_and_that_of_each_crate() {
        let table = "\
program           lines  of which
bulkhead-vcpu      4025  sandbox 20, vmm-core 4005
bulkhead              7  vmbus 7
";
        assert_eq!(printed(false), table);
    }

    #[test]
    fn files_follow_their_program_if_they_are_asked_for() {
        let table = "\
program           lines  of which
bulkhead-vcpu      4025  sandbox 20, vmm-core 4005
       20  sandbox/src/lib.rs
     4000  vmm-core/src/a.rs
        5  vmm-core/src/b.rs
bulkhead              7  vmbus 7
        7  vmbus/src/lib.rs
";
        assert_eq!(printed(true), table);
    }

    /// Takes nothing.
    struct Refusing(io::ErrorKind);

    impl Write for Refusing {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(self.0.into())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_reader_that_has_gone_is_no_error_and_a_full_disk_is_one() {
        let print_to = |kind| print(&programs(), false, &mut Refusing(kind)).map_err(|error| error.kind());
        assert_eq!(print_to(io::ErrorKind::BrokenPipe), Ok(()));
        assert_eq!(
            print_to(io::ErrorKind::StorageFull),
            Err(io::ErrorKind::StorageFull)
        );
    }
}
