//! Where frames go to and come from.
//!
//! A backend has one non-blocking descriptor, watched edge-triggered: it is readable or writable until it says
//! otherwise. It takes one frame after the other, never waits, and may say [`Sent::Full`]; it hands out one frame after
//! the other, each with the header that a TAP would give it.
//!
//! A frame to send stands partly in our memory (the head: what we had to change) and partly in the guest's; it goes to
//! the kernel from there, without a copy, unless something must be computed over it that the other side does not
//! compute. A received frame is read into private memory first: only its header says how long it is, into how many
//! frames it must be cut, and whether its checksum is there; and a stream hands over many frames in one read.
//!
//! What arrives is as hostile as what a guest sends.

mod software;
pub mod stream;
pub mod tap;

use crate::frame::vnet::VnetHeader;
use std::os::fd::BorrowedFd;
use thiserror::Error;
use vmbus::mem::{GuestSpans, HostError};

/// Longest frame in either direction, whatever header stands before it. Limit: what a TAP hands over at most (64 KiB of
/// IP behind an Ethernet header with two tags).
pub const FRAME_BYTES_MAX: usize = 65_536 + 22;

/// A frame to send: `head`, then `rest`; `vnet` says what is still to be done to it.
pub struct OutgoingFrame<'a> {
    pub vnet: &'a VnetHeader,
    pub head: &'a [u8],
    pub rest: &'a GuestSpans,
}

impl OutgoingFrame<'_> {
    pub fn bytes(&self) -> usize {
        self.head.len() + self.rest.len()
    }
}

/// What became of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// Handed over; the guest's memory is not needed any more.
    Done,
    /// The other side does not take it (wrong length, interface down): a network may lose frames.
    Dropped,
    /// Nothing was sent. Try again when the descriptor is writable.
    Full,
}

/// A received frame in private memory, and what its header says.
pub struct IncomingFrame<'a> {
    pub vnet: VnetHeader,
    pub frame: &'a mut [u8],
}

/// The other side is gone for good, and with it the link.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum Gone {
    #[error("the other side closed the connection")]
    Closed,
    #[error("the other side announces a frame of {0} bytes")]
    FrameLength(u32),
    /// What is on its way is out of step, for good.
    #[error("the kernel took a part of a frame, which a UNIX stream never does")]
    Torn,
    #[error(transparent)]
    Host(#[from] HostError),
}

pub trait Backend {
    fn as_fd(&self) -> BorrowedFd<'_>;

    /// Sends one frame.
    fn send(&mut self, frame: &OutgoingFrame<'_>) -> Result<Sent, Gone>;

    /// Sends on what the kernel did not take before. False: there is still something left.
    fn flush(&mut self) -> Result<bool, Gone>;

    /// Whether something is left to flush.
    fn is_behind(&self) -> bool;

    /// The next frame; `None` until the descriptor becomes readable again.
    fn receive(&mut self) -> Result<Option<IncomingFrame<'_>>, Gone>;
}

/// Frees a descriptor from waiting.
fn set_nonblocking(fd: BorrowedFd<'_>) -> Result<(), HostError> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    let attempt = "make the backend's descriptor non-blocking";
    let flags = fcntl(fd, FcntlArg::F_GETFL).map_err(|errno| HostError::new(attempt, errno))?;
    let flags = OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK;
    fcntl(fd, FcntlArg::F_SETFL(flags)).map_err(|errno| HostError::new(attempt, errno))?;
    Ok(())
}
