//! What to run in the rig, and what comes back.

#![forbid(unsafe_code)]

use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A payload that ends with this status (EX_TEMPFAIL of sysexits.h) says that the rig was at fault, for instance because
/// an inner guest hung: the run becomes a [`RigFailed`] and is tried again.
pub const EXIT_RIG_AT_FAULT: i32 = 75;

/// Where a file's bytes come from.
#[derive(Debug, Clone)]
pub enum FileSource {
    /// A file of this host.
    Path(PathBuf),
    /// These bytes.
    Bytes(Vec<u8>),
}

impl FileSource {
    pub(super) fn open(&self) -> Result<(u64, Box<dyn Read + '_>)> {
        match self {
            FileSource::Path(path) => {
                let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
                let length = file.metadata()?.len();
                Ok((length, Box::new(file.take(length))))
            }
            FileSource::Bytes(bytes) => Ok((bytes.len() as u64, Box::new(&bytes[..]))),
        }
    }
}

impl From<PathBuf> for FileSource {
    fn from(path: PathBuf) -> Self {
        FileSource::Path(path)
    }
}

impl From<&Path> for FileSource {
    fn from(path: &Path) -> Self {
        FileSource::Path(path.to_path_buf())
    }
}

impl From<Vec<u8>> for FileSource {
    fn from(bytes: Vec<u8>) -> Self {
        FileSource::Bytes(bytes)
    }
}

impl From<&str> for FileSource {
    fn from(text: &str) -> Self {
        FileSource::Bytes(text.as_bytes().to_vec())
    }
}

/// A command to run in the rig, and the machine to run it on.
#[derive(Debug, Clone)]
pub struct RigSpec {
    /// Program and arguments. Run as root in `/root`; what it leaves in `/out` is handed back.
    pub command: Vec<String>,
    /// Processors of the outer machine.
    pub cpu_count: u32,
    /// Memory of the outer machine.
    pub memory_mib: u32,
    /// How long the command may run. Booting the outer machine does not count.
    pub timeout: Duration,
    /// Files to put into the rig: absolute path there, and where the bytes come from. All are executable.
    pub files: Vec<(String, FileSource)>,
    /// A folder with our programs; those it holds are put at `/usr/bin`. None: no programs of ours in the rig.
    pub binaries: Option<PathBuf>,
    /// Let memfds use huge pages where they ask for it (`shmem_enabled=advise`); Debian's default is never.
    pub shmem_thp: bool,
    /// How many times to try when the rig, not the payload, fails. At least 1.
    pub attempts: u32,
    /// Show the payload's output while it runs.
    pub echo: bool,
    /// Connect this terminal to the payload; implies `echo`, one attempt, and no limit of time.
    pub interactive: bool,
}

impl RigSpec {
    /// A run of `command` on 2 processors and 2 GiB within two minutes, with up to three attempts.
    pub fn new<S: Into<String>>(command: impl IntoIterator<Item = S>) -> RigSpec {
        RigSpec {
            command: command.into_iter().map(Into::into).collect(),
            cpu_count: 2,
            memory_mib: 2048,
            timeout: Duration::from_secs(120),
            files: Vec::new(),
            binaries: None,
            shmem_thp: false,
            attempts: 3,
            echo: false,
            interactive: false,
        }
    }

    /// A run of a shell script; it stops at the first command that fails.
    pub fn script(text: &str) -> RigSpec {
        RigSpec::new(["sh", "-euc", text])
    }

    /// Puts a file into the rig at an absolute path.
    pub fn file(mut self, path: &str, source: impl Into<FileSource>) -> RigSpec {
        self.files.push((path.to_string(), source.into()));
        self
    }
}

/// What a run brought back. The payload ran to its end, whatever its status says.
#[derive(Debug, Clone)]
pub struct RigOutcome {
    /// The payload's exit status; 128 and the signal's number if a signal ended it.
    pub status: i32,
    /// What the payload wrote to its standard output and error.
    pub output: String,
    /// What the outer kernel and the rig's own start-up wrote to their console.
    pub console: String,
    /// The outer kernel's log.
    pub kernel_log: String,
    /// What the payload left below `/out`, by path relative to it.
    pub files: BTreeMap<String, Vec<u8>>,
    /// The number of the attempt that succeeded, from 1: anything above 1 means that the rig failed before.
    pub attempts: u32,
    /// From the start of this attempt's QEMU to its end.
    pub took: Duration,
}

/// The emulated machine broke down, which says nothing about the payload.
#[derive(Debug, Clone)]
pub struct RigFailed {
    /// What was seen.
    pub reason: String,
    /// Attempts made, all of which failed.
    pub attempts: u32,
    /// The payload's output of the last attempt, as far as it came.
    pub output: String,
    /// The outer console of the last attempt.
    pub console: String,
    /// What could still be collected of the last attempt; after a deadline that includes `state.txt`, the processes
    /// with their kernel stacks.
    pub files: BTreeMap<String, Vec<u8>>,
}

impl fmt::Display for RigFailed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rig failed {} time(s), last: {}", self.attempts, self.reason)
    }
}

/// Why there is no [`RigOutcome`].
#[derive(Debug)]
pub enum RigError {
    /// The emulator broke down every time.
    Failed(Box<RigFailed>),
    /// The rig could not be built or started: this host's fault, or a wrong [`RigSpec`].
    Setup(anyhow::Error),
}

impl fmt::Display for RigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RigError::Failed(failed) => failed.fmt(f),
            RigError::Setup(error) => write!(f, "the rig cannot be used: {error:#}"),
        }
    }
}

impl std::error::Error for RigError {}

impl From<anyhow::Error> for RigError {
    fn from(error: anyhow::Error) -> Self {
        RigError::Setup(error)
    }
}
