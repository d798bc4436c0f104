#![forbid(unsafe_code)]
//! How a process locks itself in. Theory of operation.
//!
//! A child is made by [`crate::spawn`] with an exact list of descriptors and, where the host allows it, in
//! namespaces of its own. It receives the rest of its descriptors over its control socket, opens and maps what
//! it needs, and calls [`Jail::lock_in`]. When that returns, the process says ready; from then on it opens no path,
//! makes no socket and no process, and has no right that does not sit in a descriptor it holds.
//!
//! ```text
//!   supervisor            child                                             why not earlier      why not later
//!   makes           0  rule set for 5 and filters for 6 (the jail)          -                    -
//!   clone3 + exec   1  born with namespaces, uid map, exact fds, no tty     -                    -
//!   before exec     2  resource limits                                      needs 1 (threads)    -
//!   sends fds          receives, opens, maps, sets up io_uring and KVM      -                    paths are gone
//!                   3  empty root                                           /proc is read        needs CAP_SYS_ADMIN,
//!                                                                                                and Landlock bars mounts
//!                   4  user, groups, capabilities, no_new_privs, undumpable 3 needs them         5 and 6 need no_new_privs
//!                   5  Landlock, no rule                                    would bar 3          6 bars its calls
//!                   6  seccomp                                              bars 3 to 5          -
//! ```
//!
//! What can be decided, made or set from outside is the supervisor's: `warden.rs`, `sys/spawn.rs`, `limits.rs`,
//! `confine.rs`, `seccomp.rs`. The child trusts it, as in all else, and links none of it; it only checks that nothing was
//! cut off on the way. Its own stages: `root.rs`, `identity.rs`, and this file. The walls overlap on purpose. A process
//! without capabilities can still make a user namespace and be root there, so seccomp refuses it, and so does a limit in
//! the namespace. io_uring does its work outside of seccomp's sight, so whoever uses it restricts the ring's operations
//! before stage 6, and the empty root and Landlock stand behind that.
//!
//! **One thread.** Namespaces, capabilities, Landlock and no_new_privs belong to a thread and are inherited by
//! the threads it makes. [`Jail::lock_in`] therefore refuses a process that has more than one; vCPU threads are made
//! afterwards, by the rules for `clone` in the profile. (Binding a thread that has just been made by TSYNC
//! kills it: its own start-up calls are refused.) For the same reason glibc is told to keep one malloc arena:
//! newer ones open a file in `/sys` to count CPUs when a second thread first allocates.
//!
//! **First process of a PID namespace.** The kernel drops signals that such a process sends to itself, unless
//! they have a handler: `abort()` would end as SIGSEGV. A handler for SIGABRT exits with 128 + 6 instead, and
//! [`crate::Child`] reports that as the signal it stands for.
//!
//! **What a host lacks** costs that wall only: it is one sentence in [`Report::missing`], and the next stage runs.
//! [`Options::require_full`] turns the first such sentence into an error. What cannot be excused is a privilege that could
//! not be given up (stage 4) and a filter that was refused by a kernel that has seccomp.

use std::fs;
use std::io;

use crate::jail::{Instruction, Jail, Report};
use crate::{identity, root, sys};

/// How strict [`Jail::lock_in`] is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Refuse to go on if the host lacks anything.
    pub require_full: bool,
}

/// Why a process could not lock itself in. It must not serve a guest then, but exit.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    #[error("a full sandbox was asked for, and this host lacks: {}", .0.join("; "))]
    HostLacks(Vec<String>),
    #[error("the process has {0} threads; it must lock itself in while it has one")]
    MoreThanOneThread(usize),
    #[error("cannot read /proc/self/task: {0}")]
    Proc(io::Error),
    #[error("cannot {step}: {error}")]
    Privilege { step: &'static str, error: io::Error },
    #[error("Landlock refused its rules: {0}")]
    Landlock(io::Error),
    #[error("the system call filter was refused: {0}")]
    Seccomp(io::Error),
    #[error("descriptor 4 is no jail: {0}")]
    Jail(String),
    #[error("descriptor 3 is not the control socket: {0}")]
    ControlSocket(String),
}

impl Jail {
    /// Walks through the stages that are left. Call it with every descriptor in hand, and with one thread.
    ///
    /// # Errors
    /// [`SandboxError`]; the process may then be anywhere between the stages and has to exit.
    pub fn lock_in(self) -> Result<Report, SandboxError> {
        let (program, mut missing) = (self.program, self.missing);
        // One entry per thread, those of io_uring included: a ring that polls by a kernel thread is refused as well,
        // because that thread would keep the rights of the stage it was made in.
        match fs::read_dir("/proc/self/task")
            .map_err(SandboxError::Proc)?
            .count()
        {
            1 => {}
            count => return Err(SandboxError::MoreThanOneThread(count)),
        }
        sys::process::prepare(&program);
        if self.has_user_namespace {
            // It makes none below itself: a second lock behind the seccomp rule, because a process without any capability
            // may still make one and has all of them inside it. `/proc` may be read-only (containers): seccomp then stands
            // alone.
            fs::write("/proc/sys/user/max_user_namespaces", "0").ok();
        }
        let root = match self.has_mount_namespace {
            true => root::empty(),
            false => Err("that needs a mount namespace".to_owned()),
        };
        missing.extend(
            root.err()
                .map(|why| format!("the root directory is not empty: {why}")),
        );
        identity::give_up(self.become_user)?;
        if let Some(ruleset) = self.ruleset {
            sys::process::enter_landlock(&ruleset).map_err(SandboxError::Landlock)?;
        }
        // This answer comes before stage 6: afterwards an error could still be reported, but the point of
        // `require_full` is that nothing weaker ever runs.
        if self.require_full && !missing.is_empty() {
            return Err(SandboxError::HostLacks(missing));
        }
        if let Some(instructions) = self.instructions {
            sys::process::name_refusals(&program);
            install(&self.filters, instructions).map_err(SandboxError::Seccomp)?;
        }
        Ok(Report { program, missing })
    }
}

/// Stage 6, the last.
fn install(filters: &[Vec<Instruction>], instructions: usize) -> io::Result<()> {
    // Part of a filter could allow what the whole refuses.
    if filters.is_empty() || filters.iter().map(Vec::len).sum::<usize>() != instructions {
        return Err(io::Error::other("it has another length than it should"));
    }
    filters
        .iter()
        .try_for_each(|filter| sys::process::install_filter(filter))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// linux/filter.h: BPF_RET with SECCOMP_RET_ALLOW, so that nothing happens should it be installed after all.
    const ALLOW: Instruction = (0x06, 0, 0, 0x7fff_0000);

    #[test]
    fn a_filter_that_was_cut_is_not_installed() {
        for (filters, instructions) in [
            (vec![], 0),
            (vec![], 7),
            (vec![vec![ALLOW]], 2),
            (vec![vec![ALLOW; 2]], 1),
            (vec![vec![ALLOW; 4097]], 4097),
            (vec![vec![ALLOW; 65_537]], 65_537),
            (vec![vec![]], 0),
        ] {
            let count = filters.len();
            assert!(
                install(&filters, instructions).is_err(),
                "{instructions} in {count} filters"
            );
        }
    }
}
