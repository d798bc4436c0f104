//! Forbidden things, tried on purpose: what the process tests need and no safe wrapper offers.

use std::io;
use std::ptr;

use libc::c_long;

/// Calls that no profile allows, with arguments that are numbers or null, so that one that gets through harms nobody.
const RAW: [(&str, c_long, [c_long; 4]); 12] = [
    (
        "unshare-user",
        libc::SYS_unshare,
        [libc::CLONE_NEWUSER as c_long, 0, 0, 0],
    ),
    ("setns", libc::SYS_setns, [0, 0, 0, 0]),
    (
        "clone-process",
        libc::SYS_clone,
        [libc::SIGCHLD as c_long | libc::CLONE_NEWUSER as c_long, 0, 0, 0],
    ),
    ("clone3", libc::SYS_clone3, [0, 0, 0, 0]),
    ("execve", libc::SYS_execve, [0, 0, 0, 0]),
    (
        "ptrace",
        libc::SYS_ptrace,
        [libc::PTRACE_TRACEME as c_long, 0, 0, 0],
    ),
    ("mount", libc::SYS_mount, [0, 0, 0, 0]),
    ("io-uring-setup", libc::SYS_io_uring_setup, [1, 0, 0, 0]),
    ("kill-parent", libc::SYS_kill, [0, 0, 0, 0]),
    ("tgkill-another", libc::SYS_tgkill, [2, 2, 0, 0]),
    ("ioctl-unknown", libc::SYS_ioctl, [0, 0x5412, 0, 0]),
    ("x32-getpid", 0x4000_0000 | libc::SYS_getpid, [0, 0, 0, 0]),
];

/// Makes the call of this name; `None` if there is none.
pub fn raw(name: &str) -> Option<io::Result<c_long>> {
    let (_, number, [a, b, c, d]) = RAW.into_iter().find(|(known, ..)| *known == name)?;
    // SAFETY: the table holds no address but null, and none of its calls changes memory of this process. The
    // `clone` is without CLONE_VM: should it succeed, the child has a copy of this memory.
    let result = unsafe { libc::syscall(number, a, b, c, d) };
    Some(if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    })
}

/// Maps one fresh page that could be executed.
///
/// # Errors
/// The kernel's answer.
pub fn map_executable_page() -> io::Result<()> {
    // SAFETY: an anonymous page at an address of the kernel's choice, which nobody uses.
    let page = unsafe {
        let protection = libc::PROT_READ | libc::PROT_EXEC;
        libc::mmap(
            ptr::null_mut(),
            4096,
            protection,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    if page == libc::MAP_FAILED {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Maps one fresh page and asks to make it executable afterwards.
///
/// # Errors
/// The kernel's answer.
pub fn make_page_executable() -> io::Result<()> {
    // SAFETY: the page is made here and used by nobody else.
    let result = unsafe {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let page = libc::mmap(
            ptr::null_mut(),
            4096,
            protection,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        );
        if page == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        libc::mprotect(page, 4096, libc::PROT_READ | libc::PROT_EXEC)
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
