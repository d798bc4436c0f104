#![forbid(unsafe_code)]
//! Processes that hang: one that does not answer a question in time is killed, and its death is one like any other. That of
//! a server brings its successor, that of `bulkhead-bus` ends the VM.
//!
//! A server may hang without owing its work to anybody who would complain: stopped, or caught in a loop. So each
//! server is asked every [`PERIOD`], by one timer for all, and owes an answer within the VM's patience. A server's loop
//! turns also while its back end is slow (its I/O is asynchronous), so that an answer costs it nothing but its turn; that of
//! `bulkhead-bus` waits for nobody at all. An idle VM wakes each of them once in a period, which is far below what is
//! allowed to us.
//!
//! The answers are read before the timers are looked at, in each turn: a supervisor that was itself stopped finds them
//! in its sockets, and kills nobody. If the whole VM was stopped, a question may have been under way. So time is counted in
//! looks: however long nothing ran, it is one period.
//!
//! `bulkhead-vcpu` is not asked. While a reset empties the guest's memory it may be silent for long and in order; one that
//! is stopped for a debugger may go on, with its guest; and if it does hang, a person sees so (`bulkhead inspect` says that
//! it does not answer), and what the guest still does is not taken away by us.

use std::time::{Duration, Instant};

use vmbus::ipc::{SupervisorToBus, SupervisorToServer};

use super::timers::Timer;
use super::{Phase, Supervisor};
use crate::spec::VmSpec;

/// How often each of them is asked.
const PERIOD: Duration = Duration::from_secs(2);

/// With little patience, more often: no single look decides.
fn period(patience: Duration) -> Duration {
    PERIOD.min(patience / 2)
}

/// Whether at the look with this number too much is owed by one that was asked at an earlier one.
fn is_overdue(asked: u32, looks: u32, patience: Duration) -> bool {
    period(patience).saturating_mul(looks.saturating_sub(asked)) >= patience
}

/// How long a server of this VM may owe an answer; `None`: it is not asked.
pub fn patience(spec: &VmSpec) -> Option<Duration> {
    (spec.patience_seconds > 0).then(|| Duration::from_secs(spec.patience_seconds.into()))
}

/// A question that was not answered yet.
#[derive(Clone, Copy, Debug)]
pub struct Probe {
    pub token: u64,
    /// At which look.
    pub asked: u32,
    pub generation: u32,
}

impl Supervisor {
    /// Begins to ask, if the VM is to be watched so.
    pub(super) fn begin_probing(&mut self) {
        if let Some(patience) = self.patience {
            self.timers.set(Instant::now() + period(patience), Timer::Probe);
        }
    }

    pub(super) fn on_probe_due(&mut self) {
        let (Some(patience), Phase::Running) = (self.patience, &self.phase) else {
            return;
        };
        self.oom.look();
        self.looks = self.looks.wrapping_add(1);
        let looks = self.looks;
        let is_overdue = |asked| is_overdue(asked, looks, patience);
        let hangs = format!("hangs: no answer for {} seconds", patience.as_secs());
        let mut hanging = Vec::new();
        for (index, room) in self.rooms.iter_mut().enumerate() {
            let generation = room.generation;
            // One that waits takes over in whatever state it is: it must not be found hanging then.
            if let Some(successor) = &mut room.successor {
                match successor.asked {
                    Some(asked) if is_overdue(asked) => {
                        hanging.push((index, successor.generation));
                    }
                    Some(_) => {}
                    None => {
                        let token = self.next_token;
                        self.next_token = token.wrapping_add(1);
                        let asked = successor.ask(&SupervisorToServer::Ping { token });
                        successor.asked = asked.then_some(looks);
                    }
                }
            }
            match room.probe.filter(|probe| probe.generation == generation) {
                Some(probe) if is_overdue(probe.asked) => {
                    hanging.push((index, generation));
                    room.probe = None;
                }
                Some(_) => {}
                None => {
                    let token = self.next_token;
                    self.next_token = token.wrapping_add(1);
                    let asked = room.ask(&SupervisorToServer::Ping { token });
                    room.probe = asked.then_some(Probe {
                        token,
                        asked: looks,
                        generation,
                    });
                }
            }
        }
        for (index, generation) in hanging {
            self.kill_server(index, generation, &hangs);
        }
        match self.bus_asked {
            _ if self.bus_ended => {}
            Some(asked) if is_overdue(asked) => self.kill_bus(hangs),
            Some(_) => {}
            None => {
                self.bus_asked = Some(looks);
                self.send_to_bus(&SupervisorToBus::Ping, &[]);
            }
        }
        self.timers.set(Instant::now() + period(patience), Timer::Probe);
    }

    pub(super) fn on_pong(&mut self, index: usize, token: u64) {
        if let Some(room) = self.rooms.get_mut(index)
            && room.probe.is_some_and(|probe| probe.token == token)
        {
            room.probe = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Looks at which nothing was heard, until that is too much.
    fn silent_looks(patience_seconds: u64) -> u32 {
        let patience = Duration::from_secs(patience_seconds);
        let is_overdue = |silent: &u32| is_overdue(7, 7 + silent, patience);
        (0..1000).find(is_overdue).expect("patience ends")
    }

    #[test]
    fn patience_lasts_as_long_as_it_is_and_is_never_ended_by_the_one_look_after_a_pause_of_everything() {
        for seconds in 1..100 {
            let silent = silent_looks(seconds);
            assert!(silent >= 2, "{seconds} s end after one look");
            let patience = Duration::from_secs(seconds);
            let lasts = period(patience) * silent;
            assert!(
                (patience..patience + PERIOD).contains(&lasts),
                "{seconds} s last {lasts:?}"
            );
        }
    }
}
