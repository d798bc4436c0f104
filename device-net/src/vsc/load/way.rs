//! Frames on their way, and which of those that never arrive a death may have swallowed.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Limit: deaths that are remembered. A frame that is older than so many of them has long been missed.
const DEATHS: usize = 4096;

/// When servers were dying: from just before the signal, or the word to stop, until it was known that nothing of them
/// is left. In the order of their beginnings.
#[derive(Debug, Default)]
pub(super) struct Deaths(Mutex<VecDeque<(Instant, Option<Instant>)>>);

impl Deaths {
    fn lock(&self) -> MutexGuard<'_, VecDeque<(Instant, Option<Instant>)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn begin(&self) {
        let mut deaths = self.lock();
        deaths.push_back((Instant::now(), None));
        while deaths.len() > DEATHS {
            deaths.pop_front();
        }
    }

    /// The oldest that is not over is over.
    pub fn end(&self) {
        let mut deaths = self.lock();
        let open = deaths.iter_mut().find(|(_, end)| end.is_none());
        if let Some((_, end)) = open {
            *end = Some(Instant::now());
        }
    }

    /// Whether any server was dying at any moment of `life`.
    fn touches(&self, life: &Life, now: Instant) -> bool {
        let until = life.done.unwrap_or(now);
        let deaths = self.lock();
        let mut later = deaths.iter().rev();
        later.any(|&(begin, end)| begin <= until && end.is_none_or(|end| end >= life.since))
    }
}

/// From handing a frame over until its sender was told that it is done with; senders to the guest are told nothing.
#[derive(Clone, Copy, Debug)]
struct Life {
    since: Instant,
    done: Option<Instant>,
}

/// What an arriving frame tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Arrival {
    /// It was due. So many older ones never arrive, of which a death may have swallowed the first number.
    Due { swallowed: u64, lost: u64 },
    /// It, or a younger one, was here before: this one was due.
    Again(u64),
    /// It was never sent.
    Unknown,
}

/// The frames of one sender that have not arrived, oldest first, numbered without gaps.
#[derive(Debug, Default)]
pub(super) struct Way {
    first: u64,
    lives: VecDeque<Life>,
}

impl Way {
    /// Numbers a frame that is handed over now.
    pub fn set_out(&mut self) -> u64 {
        self.lives.push_back(Life {
            since: Instant::now(),
            done: None,
        });
        self.first + self.lives.len() as u64 - 1
    }

    /// The sender was told that these are done with.
    pub fn complete(&mut self, numbers: Range<u64>, done: Instant) {
        for number in numbers {
            let place = number.checked_sub(self.first).map(|place| place as usize);
            if let Some(life) = place.and_then(|place| self.lives.get_mut(place)) {
                life.done = Some(done);
            }
        }
    }

    pub fn arrive(&mut self, number: u64, deaths: &Deaths) -> Arrival {
        let Some(place) = number.checked_sub(self.first) else {
            return Arrival::Again(self.first);
        };
        if place >= self.lives.len() as u64 {
            return Arrival::Unknown;
        }
        let now = Instant::now();
        let (mut swallowed, mut lost) = (0, 0);
        for life in self.lives.drain(..place as usize) {
            if deaths.touches(&life, now) {
                swallowed += 1;
            } else {
                lost += 1;
            }
        }
        self.lives.pop_front();
        self.first = number + 1;
        Arrival::Due { swallowed, lost }
    }

    /// Frames that must still arrive, because no server was dying since they were handed over.
    pub fn due(&self, deaths: &Deaths) -> u64 {
        let now = Instant::now();
        self.lives
            .iter()
            .filter(|life| !deaths.touches(life, now))
            .count() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_death_while_a_frame_was_under_way_excuses_its_loss() {
        let (deaths, mut way) = (Deaths::default(), Way::default());
        for number in 0..3 {
            assert_eq!(way.set_out(), number);
        }
        assert_eq!(way.due(&deaths), 3);
        way.complete(0..1, Instant::now());
        std::thread::yield_now();
        deaths.begin();
        deaths.end();
        assert_eq!(way.set_out(), 3);
        assert_eq!(way.set_out(), 4);
        // 0 was done with before, 3 was handed over after.
        assert_eq!(way.due(&deaths), 3);
        assert_eq!(
            way.arrive(4, &deaths),
            Arrival::Due {
                swallowed: 2,
                lost: 2
            }
        );
        assert_eq!(way.arrive(2, &deaths), Arrival::Again(5));
        assert_eq!(way.arrive(5, &deaths), Arrival::Unknown);
    }

    #[test]
    fn a_death_lasts_until_nothing_of_the_server_is_left() {
        let (deaths, mut way) = (Deaths::default(), Way::default());
        deaths.begin();
        way.set_out();
        assert_eq!(way.due(&deaths), 0);
        deaths.end();
        assert_eq!(way.due(&deaths), 0);
        way.set_out();
        assert_eq!(way.due(&deaths), 1);
    }
}
