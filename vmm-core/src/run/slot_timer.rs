#![forbid(unsafe_code)]
//! When to look again at message slots that the guest has not emptied: a timerfd that the control thread waits on.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

/// See the module. While no slot is full nothing ticks.
#[derive(Debug)]
pub struct SlotTimer {
    fd: TimerFd,
    is_set: bool,
}

impl SlotTimer {
    pub fn new() -> io::Result<Self> {
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        let fd = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?;
        Ok(Self { fd, is_set: false })
    }

    /// Goes off after `ms`, unless it is set already; `None`: does not.
    pub fn want(&mut self, ms: Option<u64>) -> io::Result<()> {
        match ms {
            Some(_) if self.is_set => return Ok(()),
            Some(ms) => {
                // A zero would switch the timer off.
                let after = TimeSpec::from_duration(Duration::from_millis(ms.max(1)));
                self.fd
                    .set(Expiration::OneShot(after), TimerSetTimeFlags::empty())?;
            }
            None if self.is_set => self.fd.unset()?,
            None => return Ok(()),
        }
        self.is_set = ms.is_some();
        Ok(())
    }

    /// It has gone off.
    pub fn take(&mut self) -> io::Result<()> {
        self.is_set = false;
        // Clears the count of expirations, which is what woke us.
        Ok(self.fd.unset()?)
    }
}

impl AsFd for SlotTimer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::poll::{PollFd, PollFlags, poll};

    fn is_readable(timer: &SlotTimer, ms: u16) -> bool {
        poll(&mut [PollFd::new(timer.as_fd(), PollFlags::POLLIN)], ms).expect("polls") == 1
    }

    #[test]
    fn it_goes_off_once_and_can_be_set_again() {
        let mut timer = SlotTimer::new().expect("timerfd");
        for _ in 0..2 {
            timer.want(Some(1)).expect("set");
            assert!(is_readable(&timer, 10_000));
            timer.take().expect("taken");
            assert!(!is_readable(&timer, 0), "nothing else is due");
        }
    }

    #[test]
    fn one_that_is_set_is_not_put_off_and_one_that_is_not_wanted_does_not_wake() {
        let mut timer = SlotTimer::new().expect("timerfd");
        timer.want(Some(1)).expect("set");
        timer.want(Some(3_600_000)).expect("set");
        assert!(is_readable(&timer, 10_000));
        timer.take().expect("taken");
        timer.want(Some(1)).expect("set");
        timer.want(None).expect("cleared");
        assert!(!is_readable(&timer, 20));
    }
}
