//! Starting a program with an exact list of descriptors, in namespaces of its own.
//!
//! Root and normal users take the same path. With a user namespace the program's user 0 is one unprivileged
//! user outside: the caller itself, or, if the caller is root, the user it names. So the program has the
//! capabilities to build its sandbox and has them over nothing but that sandbox, from its first instruction on.
//! Where user namespaces are switched off, root starts the program with the other namespaces, and
//! [`crate::Jail::lock_in`] changes the user; a normal user starts it with none, and the report says so.

use std::ffi::{CString, OsStr, OsString};
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::Arc;

use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, getegid, geteuid};

use super::launch::{self, Failure, Plan, Started};
use super::pidfd::Child;
use crate::lasting::Lasting;
use crate::namespaces::Namespaces;
use crate::profile::Profile;
use crate::stage::Options;
use crate::warden::{Birth, Warden};

/// Limit: the highest number a descriptor can be given in the child; far above what any program is started with,
/// and below the lowest hard limit on open files that is met in practice (1,024 soft, 4,096 hard).
const MAX_TARGET: RawFd = 511;

/// What to start, and what it gets.
#[derive(Debug)]
pub struct Spawn {
    pub program: PathBuf,
    /// The program, held open whatever has its name by now (`O_PATH` is enough); `None`: the file that has its name.
    pub file: Option<OwnedFd>,
    /// Without the program's name, which is put in front.
    pub args: Vec<OsString>,
    /// The whole environment: nothing is inherited.
    pub env: Vec<(OsString, OsString)>,
    /// Each source, and the number it has in the child. Numbers 0, 1 and 2 replace the default: 0 and 1 are
    /// `/dev/null`, 2 is `stderr`. All else is closed.
    pub fds: Vec<(OwnedFd, RawFd)>,
    /// A wish; what the host refuses is missing in the child's [`crate::Report`]. A user namespace is added
    /// for callers who are not root, because they get no other one without it.
    pub namespaces: Namespaces,
    /// Those of them that were made already. Only root can use them.
    pub lasting: Option<Arc<Lasting>>,
    /// The child's standard error; the caller's own if absent.
    pub stderr: Option<OwnedFd>,
    pub identity: Identity,
    /// What the child locks itself in with, in descriptors 4 and 5; `None` for a program that does not.
    pub jail: Option<(Profile, Options)>,
}

/// The user a child runs as, seen from the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Identity {
    /// The caller's.
    Keep,
    /// This one; only root can give it.
    Uid { uid: u32, gid: u32 },
}

impl Identity {
    /// A user of its own for child `index` of this process if this process is root, else [`Identity::Keep`]; also
    /// [`Identity::Keep`] for the root of a container whose user namespace has no such user.
    ///
    /// The numbers are 1,900,000,000 + 16 x process id + `index` (at most 15), hence below 2^31 and outside of
    /// the ranges that distributions and systemd give away (its UIDS-GIDS document): nobody owns a file or
    /// another process under them, and two VMs of one host never share one.
    pub fn own(index: u32) -> Self {
        const FIRST: u32 = 1_900_000_000;
        if !geteuid().is_root() {
            return Identity::Keep;
        }
        // linux/threads.h: process ids are below 2^22, so this is below 1,967,108,864.
        let block = (std::process::id() & 0x3f_ffff) << 4;
        let id = FIRST + block + (index & 15);
        if crate::identity::is_mapped(id, id) {
            Identity::Uid { uid: id, gid: id }
        } else {
            Identity::Keep
        }
    }
}

/// Why a program could not be started.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    #[error("cannot open {}: {error}", .path.display())]
    Program { path: PathBuf, error: io::Error },
    #[error("{} may not be executed by user {uid}: chmod o+x it", .path.display())]
    NotExecutable { path: PathBuf, uid: u32 },
    #[error("only root can start a program as another user")]
    NotRoot,
    #[error("descriptor number {0} is given twice or out of range")]
    Target(RawFd),
    #[error("an argument or environment variable contains a zero byte")]
    ZeroByte,
    #[error("cannot {what}: {error}")]
    Host { what: &'static str, error: io::Error },
    #[error("cannot make the jail of the new process: {0}")]
    Jail(io::Error),
    #[error("the new process cannot {step}: {error}")]
    Child { step: &'static str, error: io::Error },
}

/// One way to make the child; they are tried in turn.
#[derive(Clone, Copy)]
struct Rung {
    namespaces: Namespaces,
    /// The user outside that user 0 of the user namespace stands for.
    mapped: Option<(u32, u32)>,
    /// The user that the child has to become.
    become_user: Option<(u32, u32)>,
}

/// Starts the program. It has been executed when this returns.
///
/// The child does not die with this process: it sees its sockets at their end, and knows what that means. Waits for
/// nothing but the child's way to `execve`.
///
/// # Errors
/// [`SpawnError`]; no process is left behind.
pub fn spawn(spec: Spawn) -> Result<Child, SpawnError> {
    let caller_is_root = geteuid().is_root();
    let identity = match spec.identity {
        Identity::Keep => None,
        Identity::Uid { uid, gid } if caller_is_root => Some((uid, gid)),
        Identity::Uid { .. } => return Err(SpawnError::NotRoot),
    };
    let program = open_program(&spec, identity)?;
    let null = open("/dev/null", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty()).map_err(|errno| {
        SpawnError::Host {
            what: "open /dev/null",
            error: errno.into(),
        }
    })?;
    let warden = match spec.jail.clone() {
        None => None,
        Some((profile, options)) => Some(Warden::new(profile, options).map_err(SpawnError::Jail)?),
    };
    let mut plan = Plan {
        program,
        arguments: arguments(&spec)?,
        environment: environment(&spec)?,
        descriptors: descriptors(&spec, warden.as_ref(), null.as_fd())?,
        take_namespace_user: false,
        leave_groups: false,
        clone_flags: 0,
    };

    let mut last = SpawnError::Host {
        what: "make a process",
        error: io::ErrorKind::Unsupported.into(),
    };
    let gives = |set: Namespaces| super::probe::can_make_namespaces(set.clone_flags()).is_ok();
    let lasting = spec.lasting.as_deref();
    let ways = rungs(spec.namespaces, identity, caller_is_root, gives).flat_map(|rung| {
        let usable = lasting.filter(|lasting| rung.namespaces.contains(lasting.kinds()));
        // If they cannot be entered, the process gets all of its own.
        usable
            .map(Some)
            .into_iter()
            .chain([None])
            .map(move |lasting| (rung, lasting))
    });
    for (rung, lasting) in ways {
        let birth = Birth {
            made: rung.namespaces,
            wanted: wanted(spec.namespaces, caller_is_root),
            become_user: rung.become_user,
            user: (rung.mapped.or(rung.become_user)).map_or_else(crate::identity::outside, |(uid, _)| uid),
        };
        plan.take_namespace_user = rung.mapped.is_some();
        plan.leave_groups = rung.mapped.is_some() && caller_is_root;
        let to_make = lasting.map_or(rung.namespaces, |lasting| {
            rung.namespaces.without(lasting.kinds())
        });
        plan.clone_flags = to_make.clone_flags().bits();
        match try_rung(
            &plan,
            (rung, lasting),
            warden.as_ref().map(|warden| (warden, birth)),
            caller_is_root,
        ) {
            Ok(child) => return Ok(child),
            Err(error @ SpawnError::Jail(_)) => return Err(error),
            // The program itself cannot be executed; no other rung changes that.
            Err(error @ SpawnError::Child { step, .. }) if step == launch::Step::Execute.describe() => {
                return Err(error);
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn wanted(wish: Namespaces, caller_is_root: bool) -> Namespaces {
    if caller_is_root || wish.is_empty() {
        wish
    } else {
        wish.with(Namespaces::USER)
    }
}

/// The best first. The last one makes no namespace at all: whether that is good enough is for the child's report to say.
///
/// `gives` asks the host for a set. It is asked only when the whole set was refused, and for each kind by itself: a
/// kernel that was built without one kind does not cost the others.
fn rungs(
    wish: Namespaces,
    identity: Option<(u32, u32)>,
    caller_is_root: bool,
    gives: impl Fn(Namespaces) -> bool,
) -> impl Iterator<Item = Rung> {
    let full = wanted(wish, caller_is_root);
    let without_user = full.without(Namespaces::USER);
    let some = move || {
        let user = full.without(without_user);
        // A normal user gets no other kind without it.
        let (base, kinds) = match (user.is_empty() || gives(user), caller_is_root) {
            (true, _) => (user, without_user),
            (false, true) => (Namespaces::none(), without_user),
            (false, false) => (Namespaces::none(), Namespaces::none()),
        };
        let given = kinds
            .iter()
            .map(|(kind, _)| kind)
            .filter(|kind| gives(base.with(*kind)));
        given.fold(base, Namespaces::with)
    };
    let whole = [Some(full), caller_is_root.then_some(without_user)];
    whole
        .into_iter()
        .flatten()
        .chain(std::iter::once_with(some))
        .filter(|set| !set.is_empty())
        .chain([Namespaces::none()])
        .map(move |namespaces| {
            let has_user = namespaces.contains(Namespaces::USER);
            let caller = (geteuid().as_raw(), getegid().as_raw());
            Rung {
                namespaces,
                mapped: has_user.then(|| identity.unwrap_or(caller)),
                become_user: identity.filter(|_| !has_user),
            }
        })
}

fn try_rung(
    plan: &Plan,
    (rung, lasting): (Rung, Option<&Lasting>),
    jail: Option<(&Warden, Birth)>,
    caller_is_root: bool,
) -> Result<Child, SpawnError> {
    let started = match lasting {
        Some(lasting) => lasting.within(|| launch::start(plan)),
        None => launch::start(plan),
    };
    let started = started.map_err(|error| SpawnError::Host {
        what: "make a process",
        error,
    })?;
    if let Some(user) = rung.mapped
        && let Err(error) = write_maps(started.pid, user, caller_is_root)
    {
        abandon(started, rung);
        return Err(SpawnError::Host {
            what: "give the new user namespace a user",
            error,
        });
    }
    if let Some((warden, birth)) = jail
        && let Err(source) = warden.commit(started.pid, &birth)
    {
        abandon(started, rung);
        return Err(SpawnError::Jail(source));
    }
    let pid = started.pid;
    let namespace_init = rung.namespaces.contains(Namespaces::PID);
    match started.let_go() {
        Ok(Ok((pid, pidfd))) => Ok(Child::new(pid, pidfd, namespace_init)),
        Ok(Err(Failure { step, errno })) => {
            reap(pid);
            Err(SpawnError::Child {
                step: step.describe(),
                error: io::Error::from_raw_os_error(errno),
            })
        }
        Err(error) => Err(SpawnError::Host {
            what: "talk to the new process",
            error,
        }),
    }
}

/// Ends a child that still waits for its `go`: it never ran anything of the program.
fn abandon(started: Started, rung: Rung) {
    let pid = started.pid;
    drop(Child::new(
        pid,
        started.pidfd,
        rung.namespaces.contains(Namespaces::PID),
    ));
    reap(pid);
}

/// Waits for a child that is certain to end at once: it was killed, or is about to call `exit_group`.
fn reap(pid: Pid) {
    while let Err(nix::errno::Errno::EINTR) = nix::sys::wait::waitpid(pid, None) {}
}

/// `man 7 user_namespaces`: a normal user maps its own id only, and must give up `setgroups` for it first.
fn write_maps(pid: Pid, (uid, gid): (u32, u32), caller_is_root: bool) -> io::Result<()> {
    if !caller_is_root {
        fs::write(format!("/proc/{pid}/setgroups"), "deny")?;
    }
    fs::write(format!("/proc/{pid}/uid_map"), format!("0 {uid} 1"))?;
    fs::write(format!("/proc/{pid}/gid_map"), format!("0 {gid} 1"))
}

fn open_program(spec: &Spawn, identity: Option<(u32, u32)>) -> Result<OwnedFd, SpawnError> {
    let path = || spec.program.clone();
    let opened = match &spec.file {
        Some(file) => file.try_clone(),
        None => open(&spec.program, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).map_err(io::Error::from),
    };
    let program = opened.map_err(|error| SpawnError::Program { path: path(), error })?;
    if let Some((uid, _)) = identity {
        let executable = launch::is_executable_by_others(program.as_fd())
            .map_err(|error| SpawnError::Program { path: path(), error })?;
        if !executable {
            return Err(SpawnError::NotExecutable { path: path(), uid });
        }
    }
    Ok(program)
}

fn arguments(spec: &Spawn) -> Result<Vec<CString>, SpawnError> {
    let name = spec.program.as_os_str();
    std::iter::once(name)
        .chain(spec.args.iter().map(OsString::as_os_str))
        .map(c_string)
        .collect()
}

fn environment(spec: &Spawn) -> Result<Vec<CString>, SpawnError> {
    spec.env
        .iter()
        .cloned()
        .map(|(name, value)| {
            let mut text = name;
            text.push("=");
            text.push(value);
            c_string(&text)
        })
        .collect()
}

fn c_string(text: &OsStr) -> Result<CString, SpawnError> {
    CString::new(text.as_bytes()).map_err(|_| SpawnError::ZeroByte)
}

fn descriptors(
    spec: &Spawn,
    warden: Option<&Warden>,
    null: BorrowedFd<'_>,
) -> Result<Vec<(RawFd, RawFd)>, SpawnError> {
    let stderr = spec
        .stderr
        .as_ref()
        .map_or(libc::STDERR_FILENO, AsRawFd::as_raw_fd);
    let mut list: Vec<(RawFd, RawFd)> = Vec::new();
    let given = spec
        .fds
        .iter()
        .map(|(source, target)| (source.as_raw_fd(), *target));
    for (source, target) in given.chain(warden.into_iter().flat_map(Warden::descriptors)) {
        if !(0..=MAX_TARGET).contains(&target) || list.iter().any(|(_, taken)| *taken == target) {
            return Err(SpawnError::Target(target));
        }
        list.push((source, target));
    }
    for (source, target) in [(null.as_raw_fd(), 0), (null.as_raw_fd(), 1), (stderr, 2)] {
        if !list.iter().any(|(_, taken)| *taken == target) {
            list.push((source, target));
        }
    }
    Ok(list)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_normal_user_always_asks_for_a_user_namespace_first() {
        let wish = Namespaces::all().without(Namespaces::USER);
        let rungs: Vec<Rung> = rungs(wish, None, false, |_| false).collect();
        assert!(
            rungs
                .first()
                .is_some_and(|rung| rung.namespaces == Namespaces::all() && rung.mapped.is_some())
        );
        assert!(rungs.last().is_some_and(|rung| rung.namespaces.is_empty()));
    }

    #[test]
    fn root_without_a_user_namespace_leaves_the_change_of_user_to_the_child() {
        let rungs: Vec<Rung> = rungs(Namespaces::all(), Some((7, 8)), true, |_| false).collect();
        let [first, second, .., third] = rungs.as_slice() else {
            panic!("{} rungs", rungs.len())
        };
        assert_eq!((first.mapped, first.become_user), (Some((7, 8)), None));
        assert_eq!((second.mapped, second.become_user), (None, Some((7, 8))));
        assert!(!second.namespaces.contains(Namespaces::USER) && second.namespaces.contains(Namespaces::PID));
        assert_eq!((third.mapped, third.become_user), (None, Some((7, 8))));
    }

    #[test]
    fn a_kind_that_the_host_lacks_does_not_cost_the_others() {
        let most = Namespaces::all().without(Namespaces::UTS);
        for root in [false, true] {
            let mut rungs = rungs(Namespaces::all(), None, root, |set| most.contains(set));
            assert!(rungs.any(|rung| rung.namespaces == most), "root: {root}");
        }
    }

    #[test]
    fn a_normal_user_without_a_user_namespace_gets_none() {
        let host = |set: Namespaces| !set.contains(Namespaces::USER);
        let mut rungs = rungs(Namespaces::all(), None, false, host).skip(1);
        assert!(rungs.all(|rung| rung.namespaces.is_empty()));
    }

    #[test]
    fn no_namespaces_wished_means_none_are_tried() {
        for root in [false, true] {
            let rungs: Vec<Rung> = rungs(Namespaces::none(), None, root, |_| true).collect();
            assert!(rungs.len() == 1 && rungs.iter().all(|rung| rung.namespaces.is_empty()));
        }
    }
}
