#![forbid(unsafe_code)]
//! Standbys: for a device that wants one, a successor waits all the time, so that a death costs no start of a process.
//!
//! One is started once the guest runs, and the next one in calm, after the last one has taken the place. A standby that
//! ends has harmed nobody: it is started again, with growing pauses, and does not count as a death of the device's
//! servers. Where there is none at the moment of a death, the device is served as if it had asked for none.

use std::time::{Duration, Instant};

use super::chronicle::Event;
use super::report::say;
use super::room::Server;
use super::timers::Timer;
use super::{Phase, Supervisor};

/// Before a standby is started: the server that has just begun to serve has requests to catch up with.
const CALM: Duration = Duration::from_millis(200);

/// Before one is started again that has ended, by how often that was so; the last one is for all further ones.
const PAUSES_S: [u64; 7] = [1, 2, 4, 8, 16, 32, 60];

/// One that has waited so long was in order.
const IN_ORDER: Duration = Duration::from_secs(60);

/// How often a room's standbys have ended one after the other.
#[derive(Clone, Copy, Debug, Default)]
pub struct StandbyEnds(usize);

impl StandbyEnds {
    /// One has ended that lived so long; the pause before the next.
    fn on_end(&mut self, lived: Duration) -> Duration {
        if lived >= IN_ORDER {
            self.0 = 0;
        }
        let index = self.0.min(PAUSES_S.len() - 1);
        self.0 = self.0.saturating_add(1);
        Duration::from_secs(PAUSES_S[index])
    }
}

impl Supervisor {
    /// A standby is started soon, if this device wants one and there is no other that waits.
    pub(super) fn want_standby(&mut self, index: usize) {
        self.set_standby_timer(index, CALM);
    }

    fn set_standby_timer(&mut self, index: usize, after: Duration) {
        if self.rooms.get(index).is_some_and(|room| room.plan.standby) {
            let timer = Timer::Standby { room: index };
            self.timers.clear(timer);
            self.timers.set(Instant::now() + after, timer);
        }
    }

    pub(super) fn on_standby_due(&mut self, index: usize) {
        let Some(room) = self.rooms.get(index) else {
            return;
        };
        let serves =
            matches!(room.server, Server::Running { ready: true, .. }) && room.told_to_stop.is_none();
        // When the device is served again, or its swap is over, this comes again.
        if !matches!(self.phase, Phase::Running) || !serves || room.successor.is_some() {
            return;
        }
        if let Err(error) = self.start_waiting(index) {
            self.on_standby_end(index, Duration::ZERO, &format!("it does not start: {error:#}"));
        }
    }

    /// The standby waits.
    pub(super) fn on_standby_prepared(&mut self, index: usize) {
        let Some(room) = self.rooms.get(index) else {
            return;
        };
        if let Some(successor) = &room.successor {
            self.note(Event::Standby {
                device: room.plan.name.clone(),
                generation: successor.generation,
            });
        }
    }

    /// It has ended, while it waited or before.
    pub(super) fn on_standby_end(&mut self, index: usize, lived: Duration, why: &str) {
        let Some(room) = self.rooms.get_mut(index) else {
            return;
        };
        let pause = room.standby_ends.on_end(lived);
        let (device, seconds) = (room.plan.name.clone(), pause.as_secs());
        say(&format!(
            "the standby of {device} is lost ({why}); the next one is started in {seconds} seconds"
        ));
        let why = why.to_owned();
        self.note(Event::StandbyLost { device, why });
        self.set_standby_timer(index, pause);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn standbys_that_do_nothing_but_end_are_started_ever_more_rarely() {
        let mut ends = StandbyEnds::default();
        let pauses: Vec<u64> = (0..9).map(|_| ends.on_end(Duration::ZERO).as_secs()).collect();
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 60, 60, 60]);
        assert_eq!(ends.on_end(IN_ORDER).as_secs(), 1);
        assert_eq!(ends.on_end(Duration::ZERO).as_secs(), 2);
    }
}
