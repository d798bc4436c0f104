#![forbid(unsafe_code)]
//! The bus's deadlines, kept by one timerfd. Without a deadline nothing ticks.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use crate::bus::DeadlineId;

/// All deadlines that are set. Bounded by what the bus waits for.
#[derive(Debug)]
pub struct Timers {
    fd: TimerFd,
    alarms: BTreeMap<DeadlineId, Instant>,
    /// What the timerfd is set to.
    set_to: Option<Instant>,
}

impl Timers {
    pub fn new() -> io::Result<Self> {
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        let fd = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?;
        Ok(Self {
            fd,
            alarms: BTreeMap::new(),
            set_to: None,
        })
    }

    /// Sets a deadline.
    pub fn set(&mut self, alarm: DeadlineId, after: Duration) -> io::Result<()> {
        self.alarms.insert(alarm, Instant::now() + after);
        self.arm()
    }

    /// Forgets a deadline.
    pub fn clear(&mut self, alarm: DeadlineId) -> io::Result<()> {
        match self.alarms.remove(&alarm) {
            Some(_) => self.arm(),
            None => Ok(()),
        }
    }

    /// Takes the deadlines that have passed.
    pub fn take_due(&mut self) -> io::Result<Vec<DeadlineId>> {
        let now = Instant::now();
        let due: Vec<DeadlineId> = self
            .alarms
            .iter()
            .filter(|(_, at)| **at <= now)
            .map(|(alarm, _)| *alarm)
            .collect();
        self.alarms.retain(|_, at| *at > now);
        // Whatever woke us has been dealt with: setting the timer anew also clears its expiration count.
        self.set_to = None;
        self.arm()?;
        Ok(due)
    }

    fn arm(&mut self) -> io::Result<()> {
        let next = self.alarms.values().min().copied();
        if next == self.set_to && next.is_some() {
            return Ok(());
        }
        self.set_to = next;
        match next {
            Some(at) => {
                // A zero would switch the timer off.
                let after = at
                    .saturating_duration_since(Instant::now())
                    .max(Duration::from_micros(1));
                let expiration = Expiration::OneShot(TimeSpec::from_duration(after));
                self.fd.set(expiration, TimerSetTimeFlags::empty())?;
            }
            None => self.fd.unset()?,
        }
        Ok(())
    }
}

impl AsFd for Timers {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::poll::{PollFd, PollFlags, poll};

    fn is_readable(timers: &Timers, ms: u16) -> bool {
        poll(&mut [PollFd::new(timers.as_fd(), PollFlags::POLLIN)], ms).expect("polls") == 1
    }

    #[test]
    fn the_earliest_alarm_wakes_and_only_what_is_due_is_taken() {
        let mut timers = Timers::new().expect("timerfd");
        timers.set(DeadlineId(1), Duration::from_secs(3600)).expect("set");
        timers.set(DeadlineId(2), Duration::from_millis(1)).expect("set");
        assert!(is_readable(&timers, 10_000));
        assert_eq!(timers.take_due().expect("taken"), [DeadlineId(2)]);
        assert!(!is_readable(&timers, 0), "nothing else is due");
    }

    #[test]
    fn a_cleared_alarm_does_not_wake() {
        let mut timers = Timers::new().expect("timerfd");
        timers.set(DeadlineId(2), Duration::from_millis(1)).expect("set");
        timers.clear(DeadlineId(2)).expect("cleared");
        assert!(!is_readable(&timers, 20));
        assert_eq!(timers.take_due().expect("taken"), []);
    }
}
