#![forbid(unsafe_code)]
//! Resource limits, which a child has before it is let go (stage 0).
//!
//! Limits are only ever lowered, so no privilege is needed. Not limited on purpose: address space (`AS`: guest
//! RAM is mapped, so it would have to be larger than any sensible bound) and file size (`FSIZE`: it would count
//! the disk image of a block server, the memfds of the vCPU process, and a log file behind standard error).

use std::io;

use nix::unistd::Pid;
use rustix::process::{Resource, Rlimit, getrlimit, prlimit};

/// The resource limits of one program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Open descriptors, `RLIMIT_NOFILE`.
    pub open_files: u64,
    /// Threads, the first one and io_uring's workers included, `RLIMIT_NPROC`. Only set in a user namespace of
    /// its own: elsewhere the kernel counts all processes of the user, not those of this sandbox.
    pub threads: u64,
}

/// Sets the limits of a child of this process. `own_user_namespace`: see [`Limits::threads`].
///
/// # Errors
/// The kernel's. A host whose hard limit is already lower is not an error: it stays lower.
pub(crate) fn apply(child: Pid, limits: &Limits, own_user_namespace: bool) -> io::Result<()> {
    lower(child, Resource::Nofile, limits.open_files)?;
    lower(child, Resource::Core, 0)?;
    lower(child, Resource::Msgqueue, 0)?;
    lower(child, Resource::Nice, 0)?;
    lower(child, Resource::Rtprio, 0)?;
    if own_user_namespace {
        lower(child, Resource::Nproc, limits.threads)?;
    }
    Ok(())
}

/// The child has inherited our own limits, and has not run yet.
fn lower(child: Pid, resource: Resource, most: u64) -> io::Result<()> {
    // An absent limit is none.
    let limit = Some(getrlimit(resource).maximum.unwrap_or(u64::MAX).min(most));
    let new = Rlimit {
        current: limit,
        maximum: limit,
    };
    prlimit(rustix::process::Pid::from_raw(child.as_raw()), resource, new)?;
    Ok(())
}
