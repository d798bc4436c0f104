#![forbid(unsafe_code)]
//! What a process says about its sandbox after [`crate::Jail::lock_in`].

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::namespaces::Namespaces;

/// What the host gave. A child sends this to its supervisor with its ready message; it is the child's own word
/// ([`crate::audit()`] is the view from outside).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// [`crate::Profile::name`].
    pub program: String,
    /// Namespaces of its own.
    pub namespaces: Namespaces,
    pub root: Root,
    /// User and group as seen by the host, not by the user namespace.
    pub uid: u32,
    pub gid: u32,
    /// True if the user namespace refuses to make further ones, so that this does not rest on seccomp alone.
    pub nested_users_forbidden: bool,
    pub landlock: Landlock,
    pub seccomp: Seccomp,
    /// What the host lacks, one sentence each; empty for a full sandbox.
    pub missing: Vec<String>,
}

/// The root directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Root {
    /// An empty, read-only tmpfs; the old root was detached by `pivot_root`.
    Empty,
    /// An empty, read-only tmpfs moved over the old root: the host runs from its initramfs, whose root the
    /// kernel cannot detach.
    EmptyOverInitramfs,
    /// The host's own root; the report's `missing` says why.
    Host,
}

/// The Landlock domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Landlock {
    /// Everything that the kernel's Landlock of this version can deny is denied.
    DeniesAll {
        abi: u32,
    },
    Absent,
}

/// The system call filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Seccomp {
    /// `syscalls` system calls are allowed, some of them for certain arguments only; any other kills the process.
    AllowList {
        syscalls: u32,
        instructions: u32,
    },
    Absent,
}

impl Report {
    /// True if nothing is missing.
    pub fn is_full(&self) -> bool {
        self.missing.is_empty()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: uid {}, namespaces {}, root {}, landlock {}, seccomp {}",
            self.program, self.uid, self.namespaces, self.root, self.landlock, self.seccomp
        )?;
        match self.missing.as_slice() {
            [] => Ok(()),
            [one] => write!(f, "; missing: {one}"),
            more => write!(f, "; {} missing: {}", more.len(), more.join("; ")),
        }
    }
}

impl fmt::Display for Root {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Root::Empty => "empty",
            Root::EmptyOverInitramfs => "empty (over the initramfs)",
            Root::Host => "the host's",
        })
    }
}

impl fmt::Display for Landlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Landlock::DeniesAll { abi } => write!(f, "denies all (ABI {abi})"),
            Landlock::Absent => f.write_str("absent"),
        }
    }
}

impl fmt::Display for Seccomp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Seccomp::AllowList { syscalls, .. } => write!(f, "allows {syscalls} calls"),
            Seccomp::Absent => f.write_str("absent"),
        }
    }
}
