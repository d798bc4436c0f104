#![forbid(unsafe_code)]
//! The supervisor's half of a child's jail: all that can be decided, made or set before the child runs.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::Pid;

use crate::jail::{JAIL, Jail, RULESET};
use crate::namespaces::Namespaces;
use crate::profile::Profile;
use crate::stage::Options;
use crate::sys::probe;
use crate::{confine, limits, seccomp};

/// linux/seccomp.h SECCOMP_RET_TRAP
const TRAP: u32 = 0x0003_0000;

/// How a child is made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Birth {
    /// Namespaces of its own.
    pub made: Namespaces,
    /// Namespaces that it should have.
    pub wanted: Namespaces,
    /// User and group that it must still become.
    pub become_user: Option<(u32, u32)>,
    /// The user that it will be, as seen by the host.
    pub user: u32,
}

/// Prepares the jail of one child.
#[derive(Debug)]
pub(crate) struct Warden {
    profile: Profile,
    options: Options,
    jail: File,
    ruleset: Option<OwnedFd>,
}

impl Warden {
    /// # Errors
    /// The kernel gives no memfd, or has Landlock and refuses the rules.
    pub fn new(profile: Profile, options: Options) -> io::Result<Self> {
        let ruleset = confine::deny_all().map_err(io::Error::other)?;
        Ok(Self {
            profile,
            options,
            jail: memfd_create("jail", MFdFlags::MFD_CLOEXEC)?.into(),
            ruleset,
        })
    }

    /// What the child inherits: number here, number there.
    pub fn descriptors(&self) -> impl Iterator<Item = (RawFd, RawFd)> {
        let ruleset = self.ruleset.as_ref().map(|fd| (fd.as_raw_fd(), RULESET));
        [(self.jail.as_raw_fd(), JAIL)].into_iter().chain(ruleset)
    }

    /// Sets the child's limits and writes its jail. Call it before the child is let go.
    ///
    /// # Errors
    /// A limit was refused, or the profile cannot be compiled: our own mistake, which the tests catch.
    pub fn commit(&self, pid: Pid, birth: &Birth) -> io::Result<()> {
        let own_user_namespace = birth.made.contains(Namespaces::USER);
        limits::apply(pid, &self.profile.limits, own_user_namespace)?;
        let jail = serde_json::to_vec(&self.draw_up(pid, birth)?)?;
        self.jail.set_len(0)?;
        // The child reads from the start: this moves no offset, which both share.
        self.jail.write_all_at(&jail, 0)
    }

    fn draw_up(&self, pid: Pid, birth: &Birth) -> io::Result<Jail> {
        let own_pid = match birth.made.contains(Namespaces::PID) {
            true => 1,
            false => pid.as_raw().unsigned_abs(),
        };
        let has_seccomp = probe::seccomp_can(TRAP);
        let filters = match has_seccomp {
            true => seccomp::compile(&self.profile, own_pid).map_err(io::Error::other)?,
            false => Vec::new(),
        };
        let has_landlock = self.ruleset.is_some();
        Ok(Jail {
            program: self.profile.name.to_owned(),
            missing: missing(birth, has_landlock, has_seccomp),
            has_user_namespace: birth.made.contains(Namespaces::USER),
            has_mount_namespace: birth.made.contains(Namespaces::MOUNT),
            become_user: birth.become_user,
            require_full: self.options.require_full,
            has_landlock,
            instructions: has_seccomp.then(|| filters.iter().map(Vec::len).sum()),
            filters,
            ruleset: None,
        })
    }
}

/// What the host lacks so far, one sentence each.
fn missing(birth: &Birth, has_landlock: bool, has_seccomp: bool) -> Vec<String> {
    let lacking = birth.wanted.without(birth.made);
    let mut missing: Vec<String> = lacking.iter().map(|(_, name)| lacks(name)).collect();
    if birth.user == 0 {
        missing.push("no user of its own: it runs as root, because no other was given".to_owned());
    }
    if !has_landlock {
        missing.push("no Landlock: the kernel was built or started without it".to_owned());
    }
    if !has_seccomp {
        missing.push("no system call filter: the kernel was built without seccomp".to_owned());
    }
    missing
}

fn lacks(namespace: &str) -> String {
    match namespace {
        "pid" => "no PID namespace of its own: the host refuses to make one".to_owned(),
        other => format!("no {other} namespace of its own: the host refuses to make one"),
    }
}
