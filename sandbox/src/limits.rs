#![forbid(unsafe_code)]
//! Stage 2: resource limits.
//!
//! Limits are only ever lowered, so no privilege is needed. Not limited on purpose: address space (`AS`: guest
//! RAM is mapped, so it would have to be larger than any sensible bound) and file size (`FSIZE`: it would count
//! the disk image of a block server, the memfds of the vCPU process, and a log file behind standard error).

use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// The resource limits of one program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Open descriptors, `RLIMIT_NOFILE`.
    pub open_files: u64,
    /// Threads, the first one and io_uring's workers included, `RLIMIT_NPROC`. Only set in a user namespace of
    /// its own: elsewhere the kernel counts all processes of the user, not those of this sandbox.
    pub threads: u64,
}

/// Sets the limits. `own_user_namespace`: see [`Limits::threads`].
///
/// # Errors
/// The resource's name and the errno. A host whose hard limit is already lower is not an error: it stays lower.
pub(crate) fn apply(limits: &Limits, own_user_namespace: bool) -> Result<(), (&'static str, Errno)> {
    lower(Resource::RLIMIT_NOFILE, limits.open_files).map_err(|errno| ("open files", errno))?;
    lower(Resource::RLIMIT_CORE, 0).map_err(|errno| ("core size", errno))?;
    lower(Resource::RLIMIT_MSGQUEUE, 0).map_err(|errno| ("message queues", errno))?;
    lower(Resource::RLIMIT_NICE, 0).map_err(|errno| ("nice", errno))?;
    lower(Resource::RLIMIT_RTPRIO, 0).map_err(|errno| ("real-time priority", errno))?;
    if own_user_namespace {
        lower(Resource::RLIMIT_NPROC, limits.threads).map_err(|errno| ("threads", errno))?;
    }
    Ok(())
}

fn lower(resource: Resource, most: u64) -> Result<(), Errno> {
    let (_, hard) = getrlimit(resource)?;
    let limit = hard.min(most);
    setrlimit(resource, limit, limit)
}
