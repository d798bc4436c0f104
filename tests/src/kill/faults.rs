//! What went wrong, counted.

#![forbid(unsafe_code)]

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// Limit: faults that are told in words. One of a kind is enough to begin with.
const TOLD: u64 = 20;

/// The three ways in which a guest can notice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A request without completion, or acknowledged data that is gone.
    Lost,
    /// A completion of what is not under way, or a frame that comes again.
    Double,
    /// Other data than was written, an error, a broken channel, a rule of the protocol that is not kept.
    Wrong,
}

/// The count of each.
#[derive(Debug, Default)]
pub struct Faults {
    lost: AtomicU64,
    double: AtomicU64,
    wrong: AtomicU64,
    told: Mutex<u64>,
}

impl Faults {
    /// Counts one, and tells it if not too many were told.
    pub fn count(&self, fault: Fault, text: std::fmt::Arguments<'_>) {
        let counter = match fault {
            Fault::Lost => &self.lost,
            Fault::Double => &self.double,
            Fault::Wrong => &self.wrong,
        };
        // Ordering: a count; its readers come after the threads' ends.
        counter.fetch_add(1, Ordering::Relaxed);
        if let Ok(mut told) = self.told.lock()
            && *told < TOLD
        {
            *told += 1;
            eprintln!("{fault:?}: {text}");
        }
    }

    /// Lost, double, wrong.
    pub fn counts(&self) -> [u64; 3] {
        // Ordering: as above.
        [&self.lost, &self.double, &self.wrong].map(|counter| counter.load(Ordering::Relaxed))
    }

    /// Whether anything was counted.
    pub fn any(&self) -> bool {
        self.counts() != [0; 3]
    }
}
