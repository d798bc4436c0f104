//! From `clone3` to `execve`: the child's side of [`super::spawn`].
//!
//! ```text
//!   parent                              child
//!   clone3 (all signals blocked)   -->  close the parent's ends of both pipes
//!   write uid_map, gid_map              wait for one byte on `go`
//!   write `go`                     -->  user and groups of the new user namespace; session; signals;
//!                                       descriptors; cwd and umask; execveat
//!   read `failure`                 <--  end of file (execve closed it), or step and errno
//! ```

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use libc::{c_char, c_int, c_long, c_uint};
use nix::sys::signal::{SigSet, SigmaskHow, pthread_sigmask};
use nix::unistd::Pid;

/// What the child does; each is named in an error if it fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Step {
    WaitForParent,
    TakeUser,
    NewSession,
    ResetSignals,
    MoveDescriptors,
    Execute,
}

const STEPS: [Step; 6] = [
    Step::WaitForParent,
    Step::TakeUser,
    Step::NewSession,
    Step::ResetSignals,
    Step::MoveDescriptors,
    Step::Execute,
];

impl Step {
    pub fn describe(self) -> &'static str {
        match self {
            Step::WaitForParent => "wait for its parent",
            Step::TakeUser => "take the user of its namespace",
            Step::NewSession => "open a session",
            Step::ResetSignals => "reset its signals",
            Step::MoveDescriptors => "put its descriptors in place",
            Step::Execute => "execute the program",
        }
    }
}

/// Why the child gave up before it became the program.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Failure {
    pub step: Step,
    pub errno: i32,
}

/// Everything the child needs, laid out before it exists.
pub(crate) struct Plan {
    /// The program, opened by the parent; executed without looking at a path again.
    pub program: OwnedFd,
    pub arguments: Vec<CString>,
    pub environment: Vec<CString>,
    /// Descriptor here, number there.
    pub descriptors: Vec<(RawFd, RawFd)>,
    /// Take user and group 0 of the new user namespace.
    pub take_namespace_user: bool,
    /// Leave the supplementary groups (allowed if a privileged parent wrote the group map).
    pub leave_groups: bool,
    pub clone_flags: c_int,
}

/// A child that waits for [`Started::let_go`].
pub(crate) struct Started {
    pub pid: Pid,
    pub pidfd: OwnedFd,
    go: OwnedFd,
    failure: OwnedFd,
}

/// The child's working copy of the plan: pointers and numbers only.
struct Orders {
    program: RawFd,
    arguments: *const *const c_char,
    environment: *const *const c_char,
    /// Number here, number there, number in between.
    moves: Vec<(RawFd, RawFd, RawFd)>,
    /// Above every number there.
    floor: RawFd,
    go: RawFd,
    failure: RawFd,
    parents_ends: [RawFd; 2],
    take_namespace_user: bool,
    leave_groups: bool,
}

/// Makes the child. It waits until [`Started::let_go`] is called, and exits if the handle is dropped instead.
///
/// # Errors
/// `clone3` was refused (the caller may try with fewer flags), or no pipe could be made.
pub(crate) fn start(plan: &Plan) -> io::Result<Started> {
    let (go_out, go_in) = pipe()?;
    let (failure_out, failure_in) = pipe()?;
    let arguments = pointers(&plan.arguments);
    let environment = pointers(&plan.environment);
    let highest = plan
        .descriptors
        .iter()
        .map(|(_, there)| *there)
        .max()
        .unwrap_or(0);
    let mut orders = Orders {
        program: plan.program.as_raw_fd(),
        arguments: arguments.as_ptr(),
        environment: environment.as_ptr(),
        moves: plan
            .descriptors
            .iter()
            .map(|(here, there)| (*here, *there, -1))
            .collect(),
        floor: highest.saturating_add(1).max(16),
        go: go_out.as_raw_fd(),
        failure: failure_in.as_raw_fd(),
        parents_ends: [go_in.as_raw_fd(), failure_out.as_raw_fd()],
        take_namespace_user: plan.take_namespace_user,
        leave_groups: plan.leave_groups,
    };

    let mut pidfd: c_int = -1;
    let mut request = libc::clone_args {
        flags: u64::from((plan.clone_flags | libc::CLONE_PIDFD).unsigned_abs()),
        pidfd: &raw mut pidfd as u64,
        child_tid: 0,
        parent_tid: 0,
        exit_signal: libc::SIGCHLD.unsigned_abs().into(),
        stack: 0,
        stack_size: 0,
        tls: 0,
        set_tid: 0,
        set_tid_size: 0,
        cgroup: 0,
    };
    // A handler of the parent must not run in the child, which has not yet let go of it.
    let mut before = SigSet::empty();
    pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), Some(&mut before))?;
    // SAFETY: `request` has the size that is passed and, like `pidfd`, which it points to, outlives the call.
    // Without CLONE_VM the child has a copy of this stack and memory, and runs nothing but `run_child` on it.
    let result = unsafe { libc::syscall(libc::SYS_clone3, &raw mut request, size_of::<libc::clone_args>()) };
    if result == 0 {
        // SAFETY: this is the child; `orders` and all it points to were made before and live in its copy.
        unsafe { run_child(&mut orders) }
    }
    let error = io::Error::last_os_error();
    pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&before), None)?;
    if result < 0 {
        return Err(error);
    }
    // SAFETY: clone3 succeeded with CLONE_PIDFD, so it stored a descriptor that nobody else owns.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    // Process ids are at most 2^22 (linux/threads.h PID_MAX_LIMIT).
    let pid = Pid::from_raw(result as c_int);
    Ok(Started {
        pid,
        pidfd,
        go: go_in,
        failure: failure_out,
    })
}

impl Started {
    /// Lets the child run until it is the program, or has failed.
    ///
    /// Waits for the child, but only for code of this file, and for `execve`.
    ///
    /// # Errors
    /// The outer error: the pipes broke. The inner one: what the child could not do; it has exited.
    pub fn let_go(self) -> io::Result<Result<(Pid, OwnedFd), Failure>> {
        nix::unistd::write(&self.go, &[1])?;
        let mut word = [0; 8];
        let mut filled = 0;
        while let Some(rest) = word.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            match nix::unistd::read(&self.failure, rest) {
                Ok(0) => break,
                Ok(count) => filled = filled.saturating_add(count),
                Err(nix::errno::Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        if filled < word.len() {
            return Ok(Ok((self.pid, self.pidfd)));
        }
        let [a, b, c, d, e, f, g, h] = word;
        let step = u32::from_ne_bytes([a, b, c, d]);
        let step = STEPS
            .into_iter()
            .find(|known| *known as u32 == step)
            .unwrap_or(Step::Execute);
        Ok(Err(Failure {
            step,
            errno: i32::from_ne_bytes([e, f, g, h]),
        }))
    }
}

fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?)
}

fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings
        .iter()
        .map(|string| string.as_ptr())
        .chain([ptr::null()])
        .collect()
}

/// The child's whole life before the program.
///
/// # Safety
/// Only in a process just made by `clone3` without `CLONE_VM`; the pointers in `orders` are valid there.
unsafe fn run_child(orders: &mut Orders) -> ! {
    // SAFETY: passed on.
    let failure = unsafe { become_program(orders) };
    let mut word = [0u8; 8];
    let (step, errno) = word.split_at_mut(4);
    step.copy_from_slice(&(failure.step as u32).to_ne_bytes());
    errno.copy_from_slice(&failure.errno.to_ne_bytes());
    // SAFETY: the buffer is 8 bytes long; the process ends here, whether the parent still reads or not.
    unsafe {
        libc::syscall(libc::SYS_write, orders.failure, word.as_ptr(), word.len());
        libc::syscall(libc::SYS_exit_group, 127);
    }
    loop {
        std::hint::spin_loop();
    }
}

/// Returns only if a step failed.
///
/// # Safety
/// As [`run_child`].
unsafe fn become_program(orders: &mut Orders) -> Failure {
    // SAFETY: each function makes raw system calls on numbers, and on memory of `orders` or of its own stack.
    unsafe {
        let result = wait_for_parent(orders)
            .and_then(|()| take_user(orders))
            .and_then(|()| call(Step::NewSession, libc::syscall(libc::SYS_setsid)).map(drop))
            .and_then(|()| reset_signals())
            .and_then(|()| move_descriptors(orders));
        if let Err(failure) = result {
            return failure;
        }
        // Neither fails on a host whose root can be entered, and if one did the sandbox would not care.
        libc::syscall(libc::SYS_chdir, c"/".as_ptr());
        libc::syscall(libc::SYS_umask, 0o077);
        libc::syscall(
            libc::SYS_execveat,
            orders.program,
            c"".as_ptr(),
            orders.arguments,
            orders.environment,
            libc::AT_EMPTY_PATH,
        );
        Failure {
            step: Step::Execute,
            errno: errno(),
        }
    }
}

/// # Safety
/// As [`run_child`].
unsafe fn wait_for_parent(orders: &Orders) -> Result<(), Failure> {
    // SAFETY: the parent's ends are numbers of this process's own copy of the table; the buffer is one byte.
    unsafe {
        // Else this process would itself keep the pipe open that tells it of its parent's death.
        for end in orders.parents_ends {
            libc::syscall(libc::SYS_close, end);
        }
        let mut byte = 0u8;
        loop {
            let read = libc::syscall(libc::SYS_read, orders.go, &raw mut byte, 1usize);
            match read {
                1 => return Ok(()),
                -1 if errno() == libc::EINTR => {}
                -1 => {
                    return Err(Failure {
                        step: Step::WaitForParent,
                        errno: errno(),
                    });
                }
                _ => {
                    return Err(Failure {
                        step: Step::WaitForParent,
                        errno: libc::ESRCH,
                    });
                }
            }
        }
    }
}

/// # Safety
/// As [`run_child`].
unsafe fn take_user(orders: &Orders) -> Result<(), Failure> {
    // SAFETY: numbers only, but for the null list of no groups.
    unsafe {
        if orders.leave_groups {
            call(
                Step::TakeUser,
                libc::syscall(libc::SYS_setgroups, 0usize, ptr::null::<u32>()),
            )?;
        }
        if orders.take_namespace_user {
            call(Step::TakeUser, libc::syscall(libc::SYS_setresgid, 0, 0, 0))?;
            call(Step::TakeUser, libc::syscall(libc::SYS_setresuid, 0, 0, 0))?;
        }
    }
    Ok(())
}

/// Every signal to its default action, then none blocked. `execve` would reset handlers, but not what is ignored
/// (Rust ignores SIGPIPE) nor the mask.
///
/// # Safety
/// As [`run_child`].
unsafe fn reset_signals() -> Result<(), Failure> {
    // The kernel's struct sigaction: handler (SIG_DFL is 0), flags, restorer, mask; eight bytes each.
    let default = [0u64; 4];
    // Signals 1 to 64; KILL and STOP answer EINVAL and have their default action anyway.
    for signal in 1..=64 {
        // SAFETY: the kernel reads 32 bytes, of which `default` has exactly that many.
        unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                default.as_ptr(),
                ptr::null::<u64>(),
                8usize,
            )
        };
    }
    let none = 0u64;
    // SAFETY: the kernel reads the 8 bytes of `none`.
    let result = unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            &raw const none,
            ptr::null::<u64>(),
            8usize,
        )
    };
    call(Step::ResetSignals, result).map(drop)
}

/// All numbers from 3 on are marked to be closed by `execve`; then each descriptor of the list goes first to a
/// number above all targets, so that no target can overwrite a source, and then to its own, unmarked.
///
/// # Safety
/// As [`run_child`].
unsafe fn move_descriptors(orders: &mut Orders) -> Result<(), Failure> {
    const STEP: Step = Step::MoveDescriptors;
    // SAFETY: numbers only, in this process's own table.
    unsafe {
        let marked = libc::syscall(
            libc::SYS_close_range,
            3 as c_uint,
            c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        );
        call(STEP, marked)?;
        orders.failure = lift(orders.failure, orders.floor)?;
        orders.program = lift(orders.program, orders.floor)?;
        for (here, _, between) in &mut orders.moves {
            *between = lift(*here, orders.floor)?;
        }
        for (_, there, between) in &orders.moves {
            call(STEP, libc::syscall(libc::SYS_dup3, *between, *there, 0))?;
        }
    }
    Ok(())
}

/// # Safety
/// As [`run_child`].
unsafe fn lift(number: RawFd, floor: RawFd) -> Result<RawFd, Failure> {
    // SAFETY: numbers only.
    let lifted = unsafe { libc::syscall(libc::SYS_fcntl, number, libc::F_DUPFD_CLOEXEC, floor) };
    call(Step::MoveDescriptors, lifted).map(|number| number as RawFd)
}

fn call(step: Step, result: c_long) -> Result<c_long, Failure> {
    if result < 0 {
        Err(Failure { step, errno: errno() })
    } else {
        Ok(result)
    }
}

fn errno() -> i32 {
    // SAFETY: glibc's errno of this thread; always valid to read.
    unsafe { *libc::__errno_location() }
}

/// Executable by a user who is neither the file's owner nor in its group, as far as the mode says.
pub(crate) fn is_executable_by_others(program: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(nix::sys::stat::fstat(program)?.st_mode & 0o001 != 0)
}
