#![forbid(unsafe_code)]
//! What a process has to know to lock itself in. Whoever starts it has decided it (`warden.rs`), and is trusted with it.
//!
//! It lies as JSON in descriptor [`JAIL`], beside it the Landlock rule set as descriptor [`RULESET`], if the kernel has
//! Landlock. So the process needs to know neither its profile nor how filters and rules are made, only to apply them.

use std::fs::File;
use std::io;
use std::os::fd::{OwnedFd, RawFd};

use serde::{Deserialize, Serialize};

use crate::stage::SandboxError;

/// The number of the jail's descriptor in every child that has one.
pub(crate) const JAIL: RawFd = 4;
/// The number of the Landlock rule set, if there is one.
pub(crate) const RULESET: RawFd = 5;

/// See the module. Taken by [`crate::inherited`].
#[derive(Debug, Serialize, Deserialize)]
pub struct Jail {
    /// [`crate::Profile::name`].
    pub(crate) program: String,
    /// What the host lacks so far, one sentence each.
    pub(crate) missing: Vec<String>,
    pub(crate) has_user_namespace: bool,
    pub(crate) has_mount_namespace: bool,
    /// User and group that the process must still become: its parent is root and there is no user namespace.
    pub(crate) become_user: Option<(u32, u32)>,
    /// Refuse to go on if the host lacks anything.
    pub require_full: bool,
    pub(crate) has_landlock: bool,
    /// Instructions of all filters; `None`: the kernel has no seccomp.
    pub(crate) instructions: Option<usize>,
    /// The system call filters, in the order in which they are to be installed.
    pub(crate) filters: Vec<Vec<Instruction>>,
    #[serde(skip)]
    pub(crate) ruleset: Option<OwnedFd>,
}

/// What a process says about its sandbox when it has locked itself in. It is the child's own word ([`crate::audit()`] is
/// the view from outside), and goes to its supervisor with its ready message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// [`crate::Profile::name`].
    pub program: String,
    /// What the host lacks, one sentence each; empty for a full sandbox.
    pub missing: Vec<String>,
}

/// linux/filter.h struct sock_filter: code, jump if true, jump if false, value.
pub(crate) type Instruction = (u16, u8, u8, u32);

impl Jail {
    /// Reads what the parent has written.
    pub(crate) fn read(from: OwnedFd) -> Result<Self, SandboxError> {
        let text =
            io::read_to_string(File::from(from)).map_err(|error| SandboxError::Jail(error.to_string()))?;
        serde_json::from_str(&text).map_err(|error| SandboxError::Jail(error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Seek, Write};

    use super::*;

    #[test]
    fn a_descriptor_with_anything_else_in_it_is_no_jail() {
        for text in ["", "{}", "{\"filters\":[[[6,0,0"] {
            let mut file = tempfile::tempfile().expect("a file");
            file.write_all(text.as_bytes()).expect("written");
            file.rewind().expect("rewound");
            assert!(
                matches!(Jail::read(file.into()), Err(SandboxError::Jail(_))),
                "{text}"
            );
        }
    }
}
