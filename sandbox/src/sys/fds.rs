//! Descriptors that were inherited.

use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{SockType, getsockopt, sockopt};

use crate::jail::{JAIL, Jail, RULESET};
use crate::stage::SandboxError;

/// The number of the control socket in every child.
pub const CONTROL: RawFd = 3;

/// Taking inherited numbers is for the first call of `main` only, when no other code can have opened or closed one.
static TAKEN: AtomicBool = AtomicBool::new(false);

/// Takes the control socket, descriptor 3, and the process's jail. First call of a child's `main`.
///
/// # Errors
/// As [`inherited_control_fd`], or the jail is not there.
pub fn inherited() -> Result<(OwnedFd, Jail), SandboxError> {
    let control = inherited_control_fd()?;
    let mut jail = Jail::read(inherit(JAIL).map_err(|errno| SandboxError::Jail(errno.desc().to_owned()))?)?;
    if jail.has_landlock {
        let ruleset = inherit(RULESET).map_err(|errno| SandboxError::Landlock(errno.into()))?;
        jail.ruleset = Some(ruleset);
    }
    Ok((control, jail))
}

/// Takes the control socket, descriptor 3, and marks it to be closed by a later `execve`. First call of the `main` of a
/// process that does not lock itself in.
///
/// # Errors
/// It was taken before, is not open, or is not a SOCK_SEQPACKET socket: the program was not started by a supervisor.
pub fn inherited_control_fd() -> Result<OwnedFd, SandboxError> {
    super::process::install_abort_handler();
    let error = |text: String| SandboxError::ControlSocket(text);
    // Ordering: one flag that guards nothing but itself.
    if TAKEN.swap(true, Ordering::Relaxed) {
        return Err(error("it was taken before".to_owned()));
    }
    let control = inherit(CONTROL).map_err(|errno| error(errno.desc().to_owned()))?;
    match getsockopt(&control.as_fd(), sockopt::SockType) {
        Ok(SockType::SeqPacket) => Ok(control),
        Ok(other) => Err(error(format!("it is a socket of type {other:?}"))),
        Err(errno) => Err(error(errno.desc().to_owned())),
    }
}

fn inherit(number: RawFd) -> Result<OwnedFd, Errno> {
    // SAFETY: borrowed for this one call, which answers EBADF if the number is not open.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    fcntl(borrowed, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    // SAFETY: the number is open, was inherited, and `TAKEN` lets only the first call come here, once for each number.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}
