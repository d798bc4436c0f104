//! What an endpoint does before its server waits for the kick.
#![forbid(unsafe_code)]

use super::{Endpoint, Stall};
use crate::fault::GuestFault;

/// A guest that has sent so many packets since we last slept is in the middle of a burst, and sends again soon.
const BURST: u32 = 8;

/// How often the processor pauses before the last look at the ring of a guest in a burst: some hundred nanoseconds, once for
/// [`BURST`] packets at least. See [`Endpoint::linger`].
const LINGER_PAUSES: u32 = 16;

impl Endpoint {
    /// To be called before waiting for the kick: publishes everything and arranges to be kicked. `true`: there is
    /// something to do already, do not wait.
    ///
    /// While reading is stalled (a packet was put back, or [`Self::can_answer`] said no) packets in the ring are no
    /// reason to stay awake, but an answered request since then is.
    pub fn prepare_sleep(&mut self) -> Result<bool, GuestFault> {
        self.publish()?;
        if self.wanted_bytes != 0 {
            self.wish_is_set = true;
            match self.writer.request_space(self.wanted_bytes) {
                Ok(false) => {}
                Ok(true) => {
                    (self.wanted_bytes, self.wish_is_set, self.stall) = (0, false, Stall::No);
                    return Ok(true);
                }
                Err(fault) => return Err(self.fail(fault.into())),
            }
        }
        match self.stall {
            Stall::Yes => Ok(false),
            Stall::Over => {
                self.stall = Stall::No;
                Ok(true)
            }
            Stall::No => {
                if self.linger()? {
                    return Ok(true);
                }
                self.masked = false;
                self.burst = 0;
                self.reader
                    .unmask_and_check()
                    .map_err(|fault| self.fail(fault.into()))
            }
        }
    }

    /// Gives a guest that is in the middle of a burst a moment before we look for the last time. `true`: it has used it.
    ///
    /// Whoever catches up with such a guest and looks at once finds one packet, or arranges to be kicked for it. Either way
    /// the two processors take the cache line with the indexes and the mask from each other for each packet, which
    /// costs both more than the packet does. Nothing is held up: answers are out already, and the guest may send on.
    fn linger(&mut self) -> Result<bool, GuestFault> {
        if self.burst < BURST {
            return Ok(false);
        }
        for _ in 0..LINGER_PAUSES {
            std::hint::spin_loop();
        }
        self.reader.has_more().map_err(|fault| self.fail(fault.into()))
    }
}
