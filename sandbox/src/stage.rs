#![forbid(unsafe_code)]
//! How a process locks itself in. Theory of operation.
//!
//! A child is made by [`crate::spawn`] with an exact list of descriptors and, where the host allows it, in
//! namespaces of its own. It receives the rest of its descriptors over its control socket, opens and maps what
//! it needs, and calls [`enter`]. When that returns, the process says ready; from then on it opens no path,
//! makes no socket and no process, and has no right that does not sit in a descriptor it holds.
//!
//! ```text
//!   supervisor            child                                             why not earlier      why not later
//!   clone3 + exec   0  born with namespaces, uid map, exact fds, no tty     -                    -
//!   sends fds          receives, opens, maps, sets up io_uring and KVM      -                    paths are gone
//!                   1  namespaces the host did not give at birth            -                    needs capabilities
//!                   2  resource limits                                      needs 1 (threads)    order is free
//!                   3  empty root                                           needs 1; /proc read  needs CAP_SYS_ADMIN,
//!                                                                                                and Landlock bars mounts
//!                   4  user, groups, capabilities, no_new_privs, undumpable 3 needs them         5 and 6 need no_new_privs
//!                   5  Landlock, no rule                                    would bar 3          6 bars its calls
//!                   6  seccomp                                              bars 1 to 5          -
//! ```
//!
//! Each stage is one function in one file: [`crate::namespaces`], [`crate::limits`], `root.rs`, `identity.rs`,
//! `confine.rs`, `seccomp.rs`. The walls overlap on purpose. A process without capabilities can still make a
//! user namespace and be root there, so seccomp refuses it, and so does a limit in the namespace. io_uring does
//! its work outside of seccomp's sight, so whoever uses it restricts the ring's operations before stage 6, and
//! the empty root and Landlock stand behind that.
//!
//! **One thread.** Namespaces, capabilities, Landlock and no_new_privs belong to a thread and are inherited by
//! the threads it makes. [`enter`] therefore refuses a process that has more than one; vCPU threads are made
//! afterwards, by the rules for `clone` in the profile. (Binding a thread that has just been made by TSYNC
//! kills it: its own start-up calls are refused.) For the same reason glibc is told to keep one malloc arena:
//! newer ones open a file in `/sys` to count CPUs when a second thread first allocates.
//!
//! **First process of a PID namespace.** The kernel drops signals that such a process sends to itself, unless
//! they have a handler: `abort()` would end as SIGSEGV. A handler for SIGABRT exits with 128 + 6 instead, and
//! [`crate::Child`] reports that as the signal it stands for.
//!
//! **What a host lacks** costs that wall only: the stage notes one sentence in [`Report::missing`] and the next
//! one runs. [`Options::require_full`] turns the first such sentence into an error. What cannot be excused is a
//! privilege that could not be given up (stage 4) and a filter that was refused by a kernel that has seccomp.

use std::fs;
use std::io;

use nix::unistd::getpid;

use crate::birth::Birth;
use crate::namespaces::Namespaces;
use crate::profile::Profile;
use crate::report::{Landlock, Report, Root, Seccomp};
use crate::{confine, identity, limits, namespaces, root, seccomp, sys};

/// linux/seccomp.h SECCOMP_RET_TRAP
const TRAP: u32 = 0x0003_0000;

/// How strict [`enter`] is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Refuse to go on if the host lacks anything.
    pub require_full: bool,
}

/// Why a process could not lock itself in. It must not serve a guest then, but exit.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    #[error("the host lacks what a full sandbox needs: {}", .0.join("; "))]
    HostLacks(Vec<String>),
    #[error("the process has {0} threads; it must lock itself in while it has one")]
    MoreThanOneThread(usize),
    #[error("cannot read {path}: {source}")]
    Proc { path: &'static str, source: io::Error },
    #[error("cannot {step}: {source}")]
    Privilege { step: &'static str, source: io::Error },
    #[error("cannot lower the limit on {limit}: {source}")]
    Limit { limit: &'static str, source: io::Error },
    #[error("Landlock refused its rules: {0}")]
    Landlock(String),
    #[error("the system call filter was refused: {0}")]
    Seccomp(String),
    #[error("the environment says {0:?} about how this process was started")]
    Birth(String),
    #[error("descriptor 3 is not the control socket: {0}")]
    ControlSocket(String),
}

/// Walks through all stages. Call it with every descriptor in hand, and with one thread.
///
/// # Errors
/// [`SandboxError`]; the process may then be anywhere between the stages and has to exit.
pub fn enter(profile: &Profile, options: &Options) -> Result<Report, SandboxError> {
    let birth = Birth::of_this_process().map_err(|misspelt| SandboxError::Birth(misspelt.0))?;
    require_one_thread()?;
    sys::process::prepare(profile.name);

    let mut missing = Vec::new();
    let own = namespaces::complete(birth.made, birth.wanted, &mut missing);
    let nested_users_forbidden = namespaces::forbid_nested_users(own);
    let (uid, gid) = birth.become_user.unwrap_or_else(identity::outside);
    if uid == 0 {
        missing.push("no user of its own: it runs as root, because no other was given".to_owned());
    }

    limits::apply(&profile.limits, own.contains(Namespaces::USER)).map_err(|(limit, errno)| {
        SandboxError::Limit {
            limit,
            source: errno.into(),
        }
    })?;
    let root = empty_root(own, &mut missing);
    identity::give_up(birth.become_user).map_err(|refused| SandboxError::Privilege {
        step: refused.step,
        source: io::Error::from_raw_os_error(refused.errno),
    })?;
    let landlock = confine::deny_all().map_err(|error| SandboxError::Landlock(error.to_string()))?;
    if landlock == Landlock::Absent {
        missing.push("no Landlock: the kernel was built or started without it".to_owned());
    }
    let seccomp = filter_system_calls(profile, options, &mut missing)?;
    Ok(Report {
        program: profile.name.to_owned(),
        namespaces: own,
        root,
        uid,
        gid,
        nested_users_forbidden,
        landlock,
        seccomp,
        missing,
    })
}

/// `/proc/self/task` has one entry per thread, those of io_uring included: a ring that polls by a kernel thread
/// is refused as well, because that thread would keep the rights of the stage it was made in.
fn require_one_thread() -> Result<(), SandboxError> {
    const PATH: &str = "/proc/self/task";
    match fs::read_dir(PATH).map(Iterator::count) {
        Ok(1) => Ok(()),
        Ok(count) => Err(SandboxError::MoreThanOneThread(count)),
        Err(source) => Err(SandboxError::Proc { path: PATH, source }),
    }
}

fn empty_root(own: Namespaces, missing: &mut Vec<String>) -> Root {
    if !own.contains(Namespaces::MOUNT) {
        missing.push("the root directory is not empty: that needs a mount namespace".to_owned());
        return Root::Host;
    }
    root::empty().unwrap_or_else(|root::NotEmptied(why)| {
        missing.push(why);
        Root::Host
    })
}

/// Stage 6. The answer about a full sandbox must be given before it: afterwards an error could still be
/// reported, but the point of `require_full` is that nothing weaker ever runs.
fn filter_system_calls(
    profile: &Profile,
    options: &Options,
    missing: &mut Vec<String>,
) -> Result<Seccomp, SandboxError> {
    if !sys::probe::seccomp_can(TRAP) {
        missing.push("no system call filter: the kernel was built without seccomp".to_owned());
    }
    if options.require_full && !missing.is_empty() {
        return Err(SandboxError::HostLacks(std::mem::take(missing)));
    }
    if !sys::probe::seccomp_can(TRAP) {
        return Ok(Seccomp::Absent);
    }
    sys::process::name_refusals(profile.name);
    let filters = seccomp::compile(profile, getpid().as_raw().unsigned_abs())
        .map_err(|error| SandboxError::Seccomp(error.to_string()))?;
    let summary = filters.summary();
    filters
        .install()
        .map_err(|error| SandboxError::Seccomp(error.to_string()))?;
    Ok(summary)
}
