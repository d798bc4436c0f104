//! Settings of the calling process that only C offers: signal handlers, malloc, Landlock, seccomp.

use std::ffi::{CString, c_int, c_void};
use std::io::{self, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr;
use std::sync::OnceLock;

use nix::unistd::getpid;

use crate::jail::Instruction;

/// What a process logs between its name and the number of a system call that its filter refused.
pub const REFUSED: &str = ": seccomp refused system call ";

/// Free memory at the end of the heap that malloc keeps: a server that waits for its turn has touched it beforehand
/// (vmbus `channel/port`), so that it need not while its guest waits.
const HEAP_KEPT_BYTES: c_int = 1 << 20;

/// Before stage 1: what has to be in place when the process can no longer ask for it.
pub(crate) fn prepare(name: &str) {
    install_abort_handler();
    // SAFETY: one integer each; must merely come before a second thread allocates, see `stage.rs`.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_TRIM_THRESHOLD, HEAP_KEPT_BYTES);
    }
    if let Ok(name) = CString::new(name) {
        // A name is for people; a kernel that would not set it changes nothing.
        let _ = rustix::thread::set_name(&name);
    }
}

/// Lets `abort()` end the first process of a PID namespace as it ends any other: the kernel discards a SIGABRT
/// that such a process sends itself, unless it has a handler (`man 7 pid_namespaces`). No effect elsewhere.
pub(crate) fn install_abort_handler() {
    extern "C" fn on_abort(_: c_int) {
        // SAFETY: _exit is async-signal-safe. `Child::try_wait` knows the status.
        unsafe { libc::_exit(128 + libc::SIGABRT) }
    }
    if getpid().as_raw() == 1 {
        install(libc::SIGABRT, on_abort as extern "C" fn(c_int) as usize, 0);
    }
}

fn install(signal: c_int, handler: usize, flags: c_int) {
    // SAFETY: a zeroed sigaction is a valid one; the handler has the signature that `flags` asks for and makes
    // async-signal-safe calls only.
    let result = unsafe {
        let mut action: libc::sigaction = MaybeUninit::zeroed().assume_init();
        action.sa_sigaction = handler;
        action.sa_flags = flags;
        libc::sigaction(signal, &raw const action, ptr::null_mut())
    };
    // It fails for bad numbers and pointers only.
    debug_assert_eq!(result, 0);
}

/// Enters the Landlock domain of this rule set, for good.
///
/// # Errors
/// The kernel's, also for a descriptor that is no rule set.
pub(crate) fn enter_landlock(ruleset: &OwnedFd) -> io::Result<()> {
    // SAFETY: two numbers.
    match unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Binds this process to a system call filter, for good. With TSYNC: should a second thread exist after all, it is bound,
/// too, or the call fails. The kernel refuses a filter that is empty or too long.
///
/// # Errors
/// The kernel's.
pub(crate) fn install_filter(filter: &[Instruction]) -> io::Result<()> {
    let filter = filter.iter();
    let mut filter: Vec<_> = filter
        .map(|&(code, jt, jf, k)| libc::sock_filter { code, jt, jf, k })
        .collect();
    let program = libc::sock_fprog {
        len: u16::try_from(filter.len()).unwrap_or(u16::MAX),
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: the kernel reads `program` and the instructions that it points to, of which there are at least `len`.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_TSYNC,
            &raw const program,
        )
    };
    match result {
        0 => Ok(()),
        -1 => Err(io::Error::last_os_error()),
        thread => Err(io::Error::other(format!("thread {thread} cannot be bound"))),
    }
}

/// Names a refused system call on standard error, and ends the process by SIGSYS as the kernel would have: the
/// supervisor's report of the death has the call then, which the kernel tells nobody else.
///
/// No profile lets a program change what SIGSYS does, and the kernel ends a process that has blocked it. So the
/// handler takes nothing from the filter: a process that made a forbidden call makes no other.
pub(crate) fn name_refusals(program: &str) {
    static PROGRAM: OnceLock<String> = OnceLock::new();
    extern "C" fn on_refusal(_: c_int, info: *mut libc::siginfo_t, _: *mut c_void) {
        // asm-generic/siginfo.h: the number of the call is an int at offset 24 of a SIGSYS.
        // SAFETY: the kernel passes a valid siginfo, 128 bytes long.
        let number = unsafe { info.cast::<u8>().add(24).cast::<c_int>().read_unaligned() };
        let program = PROGRAM.get().map_or("?", String::as_str);
        let mut line = [0; 80];
        let mut free = line.as_mut_slice();
        // Formatting a number neither allocates nor takes a lock. A line that were too long would be cut.
        let _ = writeln!(free, "{program}{REFUSED}{}", number.unsigned_abs());
        let length = 80_usize.saturating_sub(free.len());
        // SAFETY: write is async-signal-safe; the line is valid for its length.
        unsafe { libc::write(libc::STDERR_FILENO, line.as_ptr().cast(), length) };
        // SAFETY: no profile has the first call, so that it is refused while SIGSYS is blocked by this very handler, and
        // the kernel ends the process. Without a filter (there is none in unit tests) the second one does;
        // `Child::try_wait` knows its status.
        unsafe {
            libc::syscall(libc::SYS_ptrace, -1, 0, 0, 0);
            libc::_exit(128 + libc::SIGSYS)
        }
    }
    // A second call would bring the same name.
    PROGRAM.get_or_init(|| program.to_owned());
    let handler = on_refusal as extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) as usize;
    install(libc::SIGSYS, handler, libc::SA_SIGINFO);
}
