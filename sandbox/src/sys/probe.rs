//! Questions to the kernel that are answered by trying.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::ptr;

use nix::sched::CloneFlags;

/// Makes a process with these namespaces that ends at once.
///
/// # Errors
/// Why the kernel would not.
pub(crate) fn can_make_namespaces(flags: CloneFlags) -> io::Result<()> {
    let mut request = libc::clone_args {
        flags: u64::from(flags.bits().unsigned_abs()),
        pidfd: 0,
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
    // SAFETY: the request has the size that is passed. Without CLONE_VM the child has memory of its own, and
    // makes a single raw system call in it.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut request, size_of::<libc::clone_args>()) };
    match pid {
        0 => loop {
            // SAFETY: ends this process.
            unsafe { libc::syscall(libc::SYS_exit_group, 0) };
        },
        -1 => Err(io::Error::last_os_error()),
        pid => {
            let pid = nix::unistd::Pid::from_raw(pid as i32);
            while let Err(nix::errno::Errno::EINTR) = nix::sys::wait::waitpid(pid, None) {}
            Ok(())
        }
    }
}

/// Makes an io_uring with two entries and closes it.
///
/// # Errors
/// ENOSYS without io_uring in the kernel, EPERM where it is switched off.
pub(crate) fn can_make_io_uring() -> io::Result<()> {
    // linux/io_uring.h struct io_uring_params: 120 bytes, all zero is a plain ring.
    let mut parameters = [0u64; 15];
    // SAFETY: the kernel reads and writes 120 bytes, which the array has.
    let result = unsafe { libc::syscall(libc::SYS_io_uring_setup, 2, parameters.as_mut_ptr()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a descriptor the kernel has just made, and nobody else owns.
    drop(unsafe { OwnedFd::from_raw_fd(result as i32) });
    Ok(())
}

/// The Landlock ABI, from 1.
///
/// # Errors
/// ENOSYS: not built in; EOPNOTSUPP: switched off at boot.
pub(crate) fn landlock_abi() -> io::Result<u32> {
    // linux/landlock.h LANDLOCK_CREATE_RULESET_VERSION
    const VERSION: u32 = 1;
    // SAFETY: with this flag the kernel wants a null pointer and size 0.
    let result = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            ptr::null::<u8>(),
            0usize,
            VERSION,
        )
    };
    u32::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Whether seccomp can do this (linux/seccomp.h SECCOMP_RET_*).
pub(crate) fn seccomp_can(action: u32) -> bool {
    // SAFETY: the kernel reads one u32, which outlives the call.
    unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_GET_ACTION_AVAIL,
            0,
            &raw const action,
        ) == 0
    }
}
