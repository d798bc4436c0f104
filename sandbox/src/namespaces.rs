#![forbid(unsafe_code)]
//! Sets of namespaces.
//!
//! [`crate::spawn`] asks for all of them in the one `clone3` that makes the process, because a PID namespace
//! cannot be entered later, only born into.

use std::fmt;

use nix::sched::CloneFlags;
use serde::{Deserialize, Serialize};

/// A set of Linux namespaces (`man 7 namespaces`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Namespaces(u8);

/// Every kind with its name in `/proc/PID/ns`, in the order in which reports print them.
const KINDS: [(Namespaces, &str, CloneFlags); 7] = [
    (Namespaces::USER, "user", CloneFlags::CLONE_NEWUSER),
    (Namespaces::MOUNT, "mnt", CloneFlags::CLONE_NEWNS),
    (Namespaces::PID, "pid", CloneFlags::CLONE_NEWPID),
    (Namespaces::NET, "net", CloneFlags::CLONE_NEWNET),
    (Namespaces::IPC, "ipc", CloneFlags::CLONE_NEWIPC),
    (Namespaces::UTS, "uts", CloneFlags::CLONE_NEWUTS),
    (Namespaces::CGROUP, "cgroup", CloneFlags::CLONE_NEWCGROUP),
];

impl Namespaces {
    pub const USER: Self = Self(1);
    pub const MOUNT: Self = Self(2);
    pub const PID: Self = Self(4);
    pub const NET: Self = Self(8);
    pub const IPC: Self = Self(16);
    pub const UTS: Self = Self(32);
    pub const CGROUP: Self = Self(64);

    /// What every child process of a VM gets where the host allows it.
    pub const fn all() -> Self {
        Self(127)
    }

    /// None: the child shares everything with its parent, and keeps the host's root directory.
    pub const fn none() -> Self {
        Self(0)
    }

    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// The kinds in this set with their names in `/proc/PID/ns`.
    pub fn iter(self) -> impl Iterator<Item = (Namespaces, &'static str)> {
        KINDS
            .into_iter()
            .filter(move |(kind, ..)| self.contains(*kind))
            .map(|(kind, name, _)| (kind, name))
    }

    /// The flags of `clone3` and `unshare` that make this set.
    pub(crate) fn clone_flags(self) -> CloneFlags {
        KINDS
            .into_iter()
            .filter(|(kind, ..)| self.contains(*kind))
            .map(|(.., flag)| flag)
            .collect()
    }
}

impl fmt::Display for Namespaces {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("none");
        }
        for (position, (_, name)) in self.iter().enumerate() {
            let separator = if position == 0 { "" } else { " " };
            write!(f, "{separator}{name}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_prints_the_names_of_proc_in_one_line() {
        assert_eq!(Namespaces::all().to_string(), "user mnt pid net ipc uts cgroup");
        assert_eq!(Namespaces::NET.with(Namespaces::USER).to_string(), "user net");
        assert_eq!(Namespaces::none().to_string(), "none");
    }

    #[test]
    fn clone_flags_name_exactly_the_kinds_of_the_set() {
        let set = Namespaces::MOUNT.with(Namespaces::PID);
        assert_eq!(
            set.clone_flags(),
            CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWPID
        );
        assert_eq!(
            set.without(Namespaces::PID).clone_flags(),
            CloneFlags::CLONE_NEWNS
        );
    }
}
