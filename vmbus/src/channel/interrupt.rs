//! The server's right to interrupt the guest: one event flag, one eventfd.
//!
//! The flag lives in the SIEFP page of the target VP, in a memfd of ours (not in guest memory that could move).
//! The guest clears flags with atomic operations, the servers of all channels set them with atomic operations.
//! Flag first, eventfd second: the eventfd makes the guest look at its flags.
//!
//! A flag that is still set does not mean that an interrupt is on its way (its setter may have died, or the VP
//! may have been reset in between), so the eventfd is written every time.
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::VMBUS_SINT;
use crate::mem::{HostError, PAGE_BYTES, SharedMap};

/// Bytes of event flags for each SINT in a SIEFP page (TLFS section 11.9).
const FLAGS_BYTES_PER_SINT: u64 = 256;

/// Value of `target_vp` that means "do not interrupt".
pub(super) const NO_VP: u16 = u16::MAX;

/// One channel's interrupt.
#[derive(Debug)]
pub(super) struct Interrupt {
    flags: Arc<SharedMap>,
    eventfd: OwnedFd,
    channel: u32,
    target_vp: u16,
    count: u64,
}

impl Interrupt {
    /// `target_vp` and `channel` are checked by the caller against the map and the flags of a page.
    pub(super) fn new(
        flags: Arc<SharedMap>,
        eventfd: OwnedFd,
        channel: u32,
        target_vp: u16,
    ) -> Result<Self, HostError> {
        set_nonblocking(&eventfd)?;
        Ok(Self {
            flags,
            eventfd,
            channel,
            target_vp,
            count: 0,
        })
    }

    /// Interrupts that were raised.
    pub(super) fn count(&self) -> u64 {
        self.count
    }

    pub(super) fn target_vp(&self) -> u16 {
        self.target_vp
    }

    pub(super) fn retarget(&mut self, target_vp: u16) {
        self.target_vp = target_vp;
    }

    /// Sets the flag and raises the interrupt.
    pub(super) fn raise(&mut self) {
        if self.target_vp == NO_VP {
            return;
        }
        let word = flag_offset(self.target_vp, self.channel);
        // Ordering: release, so that the guest that sees the flag sees the ring's index; the index store itself is
        // followed by a full fence in ring/writer.rs.
        let set = self
            .flags
            .fetch_or_u32(word, 1 << (self.channel % 32), Ordering::Release);
        set.expect("VP and channel were checked at open");
        self.count += 1;
        match nix::unistd::write(&self.eventfd, &1u64.to_ne_bytes()) {
            // EAGAIN: the count is at its maximum, so an interrupt is on its way.
            Ok(_) | Err(Errno::EAGAIN) => {}
            Err(errno) => tracing::error!(channel = self.channel, %errno, "cannot interrupt the guest"),
        }
    }
}

/// Where the word with a channel's flag lies in the event-flags memfd.
pub(crate) fn flag_offset(vp: u16, channel: u32) -> u64 {
    u64::from(vp) * PAGE_BYTES + u64::from(VMBUS_SINT) * FLAGS_BYTES_PER_SINT + u64::from(channel / 32) * 4
}

/// Eventfds come from another process; a call on them must not block whatever flags they were made with.
pub(super) fn set_nonblocking(fd: &OwnedFd) -> Result<(), HostError> {
    let get = fcntl(fd.as_fd(), FcntlArg::F_GETFL);
    let flags = get.map_err(|errno| HostError::new("read the flags of an eventfd", errno))?;
    let flags = OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK;
    let set = fcntl(fd.as_fd(), FcntlArg::F_SETFL(flags));
    set.map(drop)
        .map_err(|errno| HostError::new("set the flags of an eventfd", errno))
}
