//! The guest's end of VMBus: for tests and benchmarks without a VM, and for filters.
//!
//! ```text
//!   PlayedSupervisor ══ control socket ══╗
//!                                        ▼
//!   SyntheticGuest ══ "bus" socket ══ a real device server, usually a sandboxed process
//!     │  guest RAM, event flags (real sealed memfds)
//!     └─ GuestChannel: rings, kick, interrupt (real shared memory and eventfds)
//! ```
//!
//! [`SyntheticGuest`] plays `bulkhead-bus` (it owns RAM and event flags, keeps the list of what is open, and tells
//! it to each server that attaches) and the guest (it makes GPADLs and opens channels). [`GuestChannel`] is the VSC's
//! end of one channel; it can be moved to a thread of its own. [`PlayedSupervisor`] starts a server and talks to it.
//!
//! To kill and replace a server: kill the process, [`SyntheticGuest::server_gone`], start another one, and
//! [`SyntheticGuest::attach`] it: it is told that the channels are open and not fresh. Channels stay usable throughout.
//!
//! Everything that waits takes a deadline and waits for an event, never for time to pass. A peer's misbehaviour is
//! an error, not a panic: what the server does is what these types exist to test.
#![forbid(unsafe_code)]

mod channel;
mod frozen;
mod guest;
mod spoil;
mod supervisor;

use std::os::fd::{AsFd, BorrowedFd};
use std::time::Instant;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::fault::{OutOfRange, RingFault};
use crate::ipc::{PeerFault, SendError};
use crate::mem::HostError;
use crate::ring::StageError;

pub use channel::{ChannelCounters, GuestChannel};
pub use frozen::{freeze, state_for_version_1, thaw};
pub use guest::{ChannelOptions, GuestOptions, SyntheticGuest};
pub use spoil::{Random, spoil};
pub use supervisor::{PlayedSupervisor, StartOptions};

/// What can go wrong for a synthetic guest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VscError {
    /// The deadline passed.
    #[error("waited too long for {0}")]
    Deadline(&'static str),
    /// The server said something wrong, or is gone.
    #[error(transparent)]
    Server(#[from] PeerFault),
    /// The server does not take messages.
    #[error(transparent)]
    Send(#[from] SendError),
    /// The server broke a rule of the ring to the guest.
    #[error(transparent)]
    Ring(#[from] RingFault),
    /// A packet cannot be sent now, or at all.
    #[error(transparent)]
    Stage(#[from] StageError),
    /// The host refused something.
    #[error(transparent)]
    Host(#[from] HostError),
    /// Our caller named memory that the guest does not have.
    #[error(transparent)]
    OutOfRange(#[from] OutOfRange),
    /// The server failed to start.
    #[error("the server says: {0}")]
    Failed(String),
    /// The guest's memory is used up.
    #[error("no {0} free pages in the guest")]
    OutOfMemory(usize),
    /// There is no server, or none such channel or GPADL.
    #[error("there is no {0}")]
    Missing(&'static str),
}

/// Waits until `fd` is readable. `false`: the deadline has passed.
fn wait_until(fd: impl AsFd, deadline: Instant) -> Result<bool, HostError> {
    wait_any(&[fd.as_fd()], deadline)
}

/// Waits until one of `fds` is readable. `false`: the deadline has passed.
fn wait_any(fds: &[BorrowedFd<'_>], deadline: Instant) -> Result<bool, HostError> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = match left.is_zero() {
            true => PollTimeout::ZERO,
            // Rounded up, so that a poll does not return just before the deadline over and over.
            false => PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX),
        };
        let mut polled: Vec<PollFd<'_>> = fds.iter().map(|&fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        match poll(&mut polled, timeout) {
            Ok(0) if Instant::now() >= deadline => return Ok(false),
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => return Ok(true),
            Err(errno) => return Err(HostError::new("wait for a descriptor", errno)),
        }
    }
}
