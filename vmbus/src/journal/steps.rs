//! The moments at which what a successor finds changes, each with a name: `cargo xtask kill --steps` lets a server die at
//! every one of them.
//!
//! A step is passed *after* what its name says and before anything else. Servers are built with the feature
//! `crash-points` for that; in all other builds a step is nothing at all. The supervisor clears its children's
//! environments and their sandboxes hide the host's files, so the order to die comes through the journal itself: a
//! word in its header page that no server uses. Whoever can write there could as well kill.
#![forbid(unsafe_code)]

use std::os::fd::BorrowedFd;
use std::sync::atomic::Ordering;

use strum::VariantArray as _;

use super::{IN_RANGE, Journal, required_len};
use crate::mem::{Access, HostError, SharedMap};

/// Where the order stands in the header page: step + 1 in the low half (0: none), passes before the last one in the
/// high half.
const TRIGGER: u64 = 0x800;

/// A moment in a server's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::VariantArray, strum::IntoStaticStr)]
#[strum(serialize_all = "kebab-case")]
#[repr(u32)]
pub enum Step {
    // A request of the guest's is taken.
    RequestSlotBegun,
    RequestStaged,
    TakeIndexWritten,
    TakeCommitted,
    TakeShownToGuest,
    // It is executed.
    RequestQueued,
    IoSubmitted,
    IoDone,
    FramesSent,
    // It is answered.
    AnswerInRing,
    AnswerNoted,
    RecordIndexesWritten,
    RecordNumbered,
    Published,
    PublicationNoted,
    GuestInterrupted,
    // A packet of ours is held by the guest.
    FrameRead,
    HeldSlotBegun,
    HeldStaged,
    HeldInRing,
    ReleaseNoted,
    // The protocol's state changes.
    StateInvalidated,
    StateWritten,
    StateSaved,
    // A successor begins.
    ServiceClaimed,
    RecoveryJudged,
    RecoveredPublicationNoted,
    StaleSlotHalfCleared,
    RecoverySettled,
    RingWordsClaimed,
    RecoverySignalled,
    ReplayBegun,
}

impl Step {
    /// All of them.
    pub const ALL: &'static [Self] = Self::VARIANTS;

    /// As a person writes it.
    pub fn name(self) -> &'static str {
        self.into()
    }

    /// Passed only by a server that takes over from another one.
    pub fn is_of_successor(self) -> bool {
        self as u32 >= Self::ServiceClaimed as u32
    }
}

impl Journal {
    /// A step is passed: the process ends here if it was ordered to.
    #[inline]
    pub fn pass(&self, step: Step) {
        pass(&self.map, step);
    }
}

#[cfg(not(feature = "crash-points"))]
#[inline]
pub(super) fn pass(_: &SharedMap, _: Step) {}

/// Ends the process as suddenly as a signal would: in a PID namespace of its own it could not kill itself.
#[cfg(feature = "crash-points")]
pub(super) fn pass(map: &SharedMap, step: Step) {
    let word = map.load_u64(TRIGGER, Ordering::Acquire).expect(IN_RANGE);
    // The low half.
    if word as u32 != step as u32 + 1 {
        return;
    }
    let passes = word >> 32;
    let next = if passes == 0 { 0 } else { word - (1 << 32) };
    map.store_u64(TRIGGER, next, Ordering::Release).expect(IN_RANGE);
    if passes == 0 {
        std::process::abort();
    }
}

/// The order to die, for whoever has the journal of a running server.
#[derive(Debug)]
pub struct Trigger {
    map: SharedMap,
}

impl Trigger {
    /// Maps a journal.
    pub fn map(journal: BorrowedFd<'_>) -> Result<Self, HostError> {
        let length = usize::try_from(required_len()).expect("64-bit hosts only");
        let map = SharedMap::map(journal, length, Access::ReadWrite)?;
        Ok(Self { map })
    }

    /// The server dies when it passes `step` after having passed it so many times.
    pub fn arm(&self, step: Step, passes: u32) {
        let word = u64::from(step as u32 + 1) | u64::from(passes) << 32;
        // Ordering: one word; what it says needs nothing else to be seen.
        self.map
            .store_u64(TRIGGER, word, Ordering::Release)
            .expect(IN_RANGE);
    }

    /// Takes the order back; whether it was still there.
    pub fn disarm(&self) -> bool {
        let word = self.map.load_u64(TRIGGER, Ordering::Acquire).expect(IN_RANGE);
        self.map.store_u64(TRIGGER, 0, Ordering::Release).expect(IN_RANGE);
        word != 0
    }

    /// How often the server will pass the step before the pass of which it dies; `None`: it has died.
    pub fn passes_left(&self) -> Option<u32> {
        // Ordering: as above.
        let word = self.map.load_u64(TRIGGER, Ordering::Acquire).expect(IN_RANGE);
        (word != 0).then_some((word >> 32) as u32)
    }

    /// Whether the server has not died of it yet.
    pub fn is_armed(&self) -> bool {
        self.passes_left().is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_step_has_a_name_of_its_own() {
        let names: BTreeSet<&str> = Step::ALL.iter().map(|step| step.name()).collect();
        assert_eq!(names.len(), Step::ALL.len());
        assert_eq!(Step::TakeShownToGuest.name(), "take-shown-to-guest");
        assert!(Step::ReplayBegun.is_of_successor() && !Step::StateSaved.is_of_successor());
    }
}
