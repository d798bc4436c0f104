#![forbid(unsafe_code)]
//! When a server that died gets a successor. Pure.
//!
//! The first death after a calm time is answered at once: the guest waits. Each further one waits longer, and a server
//! that does nothing but die is held: its device stays silent, the VM lives, and a person is told.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::spec::Restart;

/// A server that ran so long has been calm: what happened before is forgotten for the pause.
const CALM_MS: u64 = 10_000;

/// The pauses before a restart, by the number of deaths since the last calm time; the last one is for all further deaths.
/// The guest's disk driver notices nothing below a second.
const PAUSES_MS: [u64; 7] = [0, 20, 100, 250, 500, 1000, 2000];

/// So many deaths within [`LOOP_WINDOW_MS`] are a loop: no successor will fare better.
const LOOP_DEATHS: usize = 10;
const LOOP_WINDOW_MS: u64 = 60_000;

/// So many are enough for servers on trial, to which there is an alternative: the guest waits.
const TRIAL_DEATHS: usize = 3;

const _: () = assert!(LOOP_DEATHS > PAUSES_MS.len());

/// What is remembered of a room's servers. Times are in milliseconds of any clock that does not go back.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct History {
    restart: Restart,
    /// The last deaths, the newest at the back.
    deaths: VecDeque<u64>,
    since_calm: usize,
    /// Nobody has been calm since [`Self::begin_trial`].
    on_trial: bool,
}

/// What follows a death.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Decision {
    /// A successor is started after this pause.
    Restart { after_ms: u64 },
    /// None is started.
    Hold { deaths: usize, within_ms: u64 },
}

impl History {
    /// Nobody has died yet.
    pub fn new(restart: Restart) -> Self {
        History {
            restart,
            ..History::default()
        }
    }

    /// Whether the VM ends in place of the device being held.
    pub fn ends_the_vm(&self) -> bool {
        self.restart == Restart::OrEnd
    }

    /// Whether servers are started again however often they die. Those on trial are given up all the same: the device gets
    /// others.
    pub fn never_holds(&self) -> bool {
        self.restart == Restart::Always
    }

    /// Somebody has mended something: what was does not count any more.
    pub fn forget(&mut self) {
        *self = History::new(self.restart);
    }

    /// Servers of another program come, which could be given up for those that were.
    pub fn begin_trial(&mut self) {
        self.on_trial = true;
    }

    /// A server that was started at `started_ms` died at `now_ms`.
    pub fn on_death(&mut self, started_ms: u64, now_ms: u64) -> Decision {
        if now_ms.saturating_sub(started_ms) >= CALM_MS {
            self.since_calm = 0;
            self.on_trial = false;
        }
        if self.never_holds() && !self.on_trial {
            return Decision::Restart { after_ms: 0 };
        }
        self.deaths.push_back(now_ms);
        while let Some(&oldest) = self.deaths.front()
            && now_ms.saturating_sub(oldest) > LOOP_WINDOW_MS
        {
            self.deaths.pop_front();
        }
        let limit = if self.on_trial { TRIAL_DEATHS } else { LOOP_DEATHS };
        if self.deaths.len() >= limit {
            return Decision::Hold {
                deaths: self.deaths.len(),
                within_ms: LOOP_WINDOW_MS,
            };
        }
        if self.never_holds() {
            return Decision::Restart { after_ms: 0 };
        }
        let index = self.since_calm.min(PAUSES_MS.len() - 1);
        self.since_calm = self.since_calm.saturating_add(1);
        Decision::Restart {
            after_ms: PAUSES_MS[index],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn restart(after_ms: u64) -> Decision {
        Decision::Restart { after_ms }
    }

    #[test]
    fn the_first_death_is_answered_at_once() {
        assert_eq!(History::default().on_death(0, 5), restart(0));
    }

    #[test]
    fn further_deaths_wait_longer_up_to_a_limit_and_a_loop_is_held() {
        let mut history = History::default();
        let mut now = 0;
        let mut pauses = Vec::new();
        let held = loop {
            match history.on_death(now, now + 10) {
                Decision::Restart { after_ms } => {
                    pauses.push(after_ms);
                    now += 10 + after_ms;
                }
                hold @ Decision::Hold { .. } => break hold,
            }
        };
        assert_eq!(pauses, [0, 20, 100, 250, 500, 1000, 2000, 2000, 2000]);
        assert_eq!(
            held,
            Decision::Hold {
                deaths: 10,
                within_ms: 60_000
            }
        );
    }

    #[test]
    fn servers_on_trial_are_given_up_soon_unless_one_has_been_calm() {
        let mut history = History::default();
        history.begin_trial();
        assert_eq!(history.on_death(0, 1), restart(0));
        assert_eq!(history.on_death(1, 2), restart(20));
        let given_up = Decision::Hold {
            deaths: 3,
            within_ms: LOOP_WINDOW_MS,
        };
        assert_eq!(history.on_death(22, 23), given_up);
        let mut history = History::default();
        history.begin_trial();
        assert_eq!(history.on_death(0, CALM_MS), restart(0));
        for death in 1..=3 {
            let now = CALM_MS + death;
            assert!(matches!(history.on_death(now, now), Decision::Restart { .. }));
        }
    }

    #[test]
    fn who_is_told_to_restart_always_does_so_at_once() {
        let mut history = History::new(Restart::Always);
        for now in 0..1000 {
            assert_eq!(history.on_death(now, now), restart(0));
        }
    }

    #[test]
    fn who_is_told_to_restart_always_gives_up_servers_on_trial_all_the_same() {
        let mut history = History::new(Restart::Always);
        history.begin_trial();
        assert_eq!(history.on_death(0, 1), restart(0));
        assert_eq!(history.on_death(1, 2), restart(0));
        assert!(matches!(history.on_death(2, 3), Decision::Hold { .. }));
        history.forget();
        for now in 0..1000 {
            assert_eq!(history.on_death(now, now), restart(0));
        }
    }

    #[test]
    fn a_calm_time_makes_the_next_restart_quick_again() {
        let mut history = History::default();
        history.on_death(0, 1);
        assert_eq!(history.on_death(1, 2), restart(20));
        assert_eq!(history.on_death(100, 100 + CALM_MS), restart(0));
        assert_eq!(history.on_death(20_000, 20_001), restart(20));
    }

    #[test]
    fn rare_deaths_are_never_a_loop() {
        let mut history = History::default();
        for hour in 0..1000 {
            let now = hour * 3_600_000;
            assert_eq!(history.on_death(now, now + CALM_MS), restart(0));
        }
        assert!(history.deaths.len() <= LOOP_DEATHS);
    }

    #[test]
    fn a_clock_that_stands_still_is_no_trouble() {
        let mut history = History::default();
        assert_eq!(history.on_death(5, 0), restart(0));
        assert_eq!(history.on_death(u64::MAX, u64::MAX), restart(20));
    }
}
