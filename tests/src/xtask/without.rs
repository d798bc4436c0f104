//! A host that lacks what sandboxes are made of: this one, for one program and all that it starts.

#![forbid(unsafe_code)]

use anyhow::{Context, Result};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{getegid, geteuid};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

/// What can be lacking.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Feature {
    /// Its system calls are unknown.
    Landlock,
    /// Likewise.
    Seccomp,
    /// No more can be made.
    Namespaces,
}

/// Becomes the program. As far as it and its children can tell, the kernel has not got the feature.
pub fn main(feature: Feature, command: &[String]) -> Result<ExitCode> {
    match feature {
        Feature::Landlock => forget(libc::SYS_landlock_create_ruleset)?,
        Feature::Seccomp => forget(libc::SYS_seccomp)?,
        Feature::Namespaces => exhaust_namespaces()?,
    }
    let (program, arguments) = command.split_first().context("no program is named")?;
    let error = Command::new(program).args(arguments).exec();
    Err(error).with_context(|| format!("cannot run {program}"))
}

fn forget(call: i64) -> Result<()> {
    let filter = SeccompFilter::new(
        BTreeMap::from([(call, Vec::new())]),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::ENOSYS.unsigned_abs()),
        TargetArch::x86_64,
    )?;
    let program: BpfProgram = filter.try_into()?;
    seccompiler::apply_filter(&program).context("this host has no filters to take something away with")
}

/// In a user namespace of its own a process may limit the namespaces that are made in it (`man 7 namespaces`).
fn exhaust_namespaces() -> Result<()> {
    let (uid, gid) = (geteuid(), getegid());
    unshare(CloneFlags::CLONE_NEWUSER).context("this host gives no user namespace")?;
    fs::write("/proc/self/setgroups", "deny")?;
    fs::write("/proc/self/uid_map", format!("{uid} {uid} 1"))?;
    fs::write("/proc/self/gid_map", format!("{gid} {gid} 1"))?;
    for kind in ["user", "mnt", "pid", "net", "ipc", "uts", "cgroup"] {
        fs::write(format!("/proc/sys/user/max_{kind}_namespaces"), "0")?;
    }
    Ok(())
}
