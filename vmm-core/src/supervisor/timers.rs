#![forbid(unsafe_code)]
//! Deadlines as events.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};

/// What a deadline is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Timer {
    /// Not all processes are ready.
    StartOverdue,
    /// A successor is not ready.
    ReadyOverdue { room: usize, generation: u32 },
    /// A server that was told to stop has not let go.
    StopOverdue { room: usize, generation: u32 },
    /// A server that serves no more has not ended.
    LeaveOverdue { room: usize, generation: u32 },
    /// Look again whether a dead server's I/O is over.
    Fence { room: usize },
    /// Finish what was left when a successor began to serve.
    Breather,
    /// Tell the old server of a swap to stop.
    Replace { room: usize },
    /// Start a successor.
    Restart { room: usize },
    /// Start a standby.
    Standby { room: usize },
    /// Start another keeper.
    Keeper,
    /// `bulkhead-bus` has ended as it does when `bulkhead-vcpu` has.
    VcpuEndOverdue,
    /// A process that was asked to end has not.
    EndOverdue,
    /// Ask servers and control plane whether they still turn.
    Probe,
    /// A process has not answered to an inspection.
    InspectOverdue,
}

/// All deadlines that are set. Their number is bounded by the number of rooms.
#[derive(Debug)]
pub struct Timers {
    origin: Instant,
    origin_ms: u64,
    next_number: u64,
    set: BTreeMap<(Instant, u64), Timer>,
}

impl Default for Timers {
    fn default() -> Self {
        Timers {
            origin: Instant::now(),
            origin_ms: monotonic_ms(),
            next_number: 0,
            set: BTreeMap::new(),
        }
    }
}

impl Timers {
    /// With times that are counted from a moment in the past, of [`Self::origin_ms`] of another process.
    pub fn since(origin_ms: u64) -> Self {
        let mut timers = Timers::default();
        let age = Duration::from_millis(timers.origin_ms.saturating_sub(origin_ms));
        if let Some(origin) = timers.origin.checked_sub(age) {
            timers.origin = origin;
            timers.origin_ms = origin_ms;
        }
        timers
    }

    /// Where [`Self::milliseconds`] begins to count, as a time that all processes share.
    pub fn origin_ms(&self) -> u64 {
        self.origin_ms
    }

    /// The other way round than [`Self::milliseconds`]; a time to come is now.
    pub fn instant(&self, milliseconds: u64) -> Instant {
        let now = Instant::now();
        let at = self.origin.checked_add(Duration::from_millis(milliseconds));
        at.map_or(now, |at| at.min(now))
    }

    pub fn set(&mut self, at: Instant, timer: Timer) {
        self.next_number = self.next_number.wrapping_add(1);
        self.set.insert((at, self.next_number), timer);
    }

    /// Forgets it, if it is set.
    pub fn clear(&mut self, timer: Timer) {
        self.set.retain(|_, set| *set != timer);
    }

    /// When the next one is due.
    pub fn next(&self) -> Option<Instant> {
        self.set.keys().next().map(|(at, _)| *at)
    }

    /// Takes out those that are due, the earliest first.
    pub fn due(&mut self, now: Instant) -> Vec<Timer> {
        let later = self.set.split_off(&(now, u64::MAX));
        std::mem::replace(&mut self.set, later).into_values().collect()
    }

    /// A time for pure code: milliseconds since this was made.
    pub fn milliseconds(&self, at: Instant) -> u64 {
        let elapsed = at.saturating_duration_since(self.origin);
        u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX)
    }
}

/// CLOCK_MONOTONIC, which is what [`Instant`] is, in milliseconds.
fn monotonic_ms() -> u64 {
    let time = clock_gettime(ClockId::CLOCK_MONOTONIC).map(Duration::from);
    time.map_or(0, |time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timers_come_in_order_and_once() {
        let mut timers = Timers::default();
        let now = Instant::now();
        let second = Duration::from_secs(1);
        timers.set(now + 2 * second, Timer::EndOverdue);
        timers.set(now + second, Timer::Fence { room: 1 });
        timers.set(now + second, Timer::Fence { room: 2 });
        timers.set(now + second, Timer::InspectOverdue);
        timers.clear(Timer::InspectOverdue);
        assert_eq!(timers.next(), Some(now + second));
        assert_eq!(timers.due(now), []);
        assert_eq!(
            timers.due(now + second),
            [Timer::Fence { room: 1 }, Timer::Fence { room: 2 }]
        );
        assert_eq!(timers.due(now + 9 * second), [Timer::EndOverdue]);
        assert_eq!(timers.next(), None);
    }
}
