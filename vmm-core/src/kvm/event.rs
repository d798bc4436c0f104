//! An eventfd, as KVM and our sockets both want it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};

use vmm_sys_util::eventfd::EventFd;

/// A non-blocking, close-on-exec eventfd with counter semantics.
#[derive(Debug)]
pub struct Event(EventFd);

impl Event {
    /// A new eventfd that has not been written.
    pub fn new() -> io::Result<Self> {
        EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map(Self)
    }

    /// Another handle on the same counter.
    pub fn try_clone(&self) -> io::Result<Self> {
        self.0.try_clone().map(Self)
    }

    /// Adds one. A counter that is full has been written often enough.
    pub fn signal(&self) {
        self.0.write(1).ok();
    }

    /// Resets the counter; true if it was written since the last time.
    pub fn drain(&self) -> bool {
        self.0.read().is_ok()
    }

    pub(super) fn inner(&self) -> &EventFd {
        &self.0
    }

    /// For the 16550's interrupt line and the like.
    pub fn into_inner(self) -> EventFd {
        self.0
    }
}

impl From<OwnedFd> for Event {
    /// One that another process of ours has made, without blocking. If it is something else, KVM refuses it.
    fn from(fd: OwnedFd) -> Self {
        // SAFETY: the descriptor is open, and from here on only the result's.
        Self(unsafe { EventFd::from_raw_fd(fd.into_raw_fd()) })
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open for as long as `self` lives, to which the result is bound.
        unsafe { BorrowedFd::borrow_raw(self.0.as_raw_fd()) }
    }
}
