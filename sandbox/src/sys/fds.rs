//! Descriptors that were inherited.

use std::os::fd::{AsFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::socket::{SockType, getsockopt, sockopt};

use crate::stage::SandboxError;

/// The number of the control socket in every child.
pub const CONTROL: RawFd = 3;

/// Takes the control socket, descriptor 3, and marks it to be closed by a later `execve`. First call of a child's `main`.
///
/// # Errors
/// It was taken before, is not open, or is not a SOCK_SEQPACKET socket: the program was not started by a supervisor.
pub fn inherited_control_fd() -> Result<OwnedFd, SandboxError> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    super::process::install_abort_handler();
    let error = |text: String| SandboxError::ControlSocket(text);
    // Ordering: one flag that guards nothing but itself.
    if TAKEN.swap(true, Ordering::Relaxed) {
        return Err(error("it was taken before".to_owned()));
    }
    nix::fcntl::fcntl(
        // SAFETY: borrowed for this one call, which answers EBADF if the number is not open.
        unsafe { std::os::fd::BorrowedFd::borrow_raw(CONTROL) },
        nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC),
    )
    .map_err(|errno| error(errno.desc().to_owned()))?;
    // SAFETY: the number is open, was inherited, and `TAKEN` lets only one owner take it.
    let control = unsafe { OwnedFd::from_raw_fd(CONTROL) };
    match getsockopt(&control.as_fd(), sockopt::SockType) {
        Ok(SockType::SeqPacket) => Ok(control),
        Ok(other) => Err(error(format!("it is a socket of type {other:?}"))),
        Err(errno) => Err(error(errno.desc().to_owned())),
    }
}
