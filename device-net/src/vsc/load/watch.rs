//! What became of a load, and what others may see of it and tell it while it runs.

use super::way::Deaths;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// What became of everything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Packets of frames given to the server, and those completed.
    pub packets: u64,
    pub completed: u64,
    /// Control messages, and their answers.
    pub requests: u64,
    pub answers: u64,
    /// Frames in those packets, and those that reached the network.
    pub sent: u64,
    pub arrived: u64,
    /// Frames given to the network, and those that reached the guest.
    pub put: u64,
    pub received: u64,
    /// Frames that went missing, as networks may lose them.
    pub dropped_out: u64,
    pub dropped_in: u64,
    /// Packets, requests and credits that never came back.
    pub lost: u64,
    pub double: u64,
    pub wrong: u64,
}

impl Tally {
    /// No fault was found.
    pub fn is_clean(&self) -> bool {
        (self.lost, self.double, self.wrong) == (0, 0, 0)
    }
}

/// What a running load tells other threads, and what they tell it.
#[derive(Debug, Default)]
pub struct Watch {
    pub(super) stop: AtomicBool,
    pub(super) progress: AtomicU64,
    pub(super) slowest_us: AtomicU64,
    pub(super) deaths: Deaths,
}

// Ordering: all relaxed. The words are counters and a request; nothing else is read because of them.
impl Watch {
    /// Packets completed and frames received so far.
    pub fn progress(&self) -> u64 {
        self.progress.load(Ordering::Relaxed)
    }

    /// The server is about to be killed or told to stop: frames that it has in hand may be lost.
    pub fn dying(&self) {
        self.deaths.begin();
    }

    /// Nothing of the server is left for which [`Watch::dying`] was called first.
    pub fn dead(&self) {
        self.deaths.end();
    }

    /// Ends [`super::Load::run`].
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// The longest time, in microseconds, between sending and completion of any packet completed since the last call.
    pub fn take_slowest(&self) -> u64 {
        self.slowest_us.swap(0, Ordering::Relaxed)
    }
}
