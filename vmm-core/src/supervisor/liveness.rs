#![forbid(unsafe_code)]
//! Servers that hang: one that does not answer a question in time is killed, and its death is one like any other.
//!
//! A server may hang without owing its work to anybody who would complain: stopped, or caught in a loop. So each
//! server is asked every [`PERIOD`], by one timer for all, and owes an answer within the VM's patience. A server's loop
//! turns also while its back end is slow (its I/O is asynchronous), so that an answer costs it nothing but its turn. An
//! idle VM wakes each server once in a period, which is far below what is allowed to us.
//!
//! The answers are read before the timers are looked at, in each turn: a supervisor that was itself stopped finds them
//! in its sockets, and kills nobody.

use std::time::{Duration, Instant};

use vmbus::ipc::SupervisorToServer;

use super::timers::Timer;
use super::{Phase, Supervisor};
use crate::spec::VmSpec;

/// How often each server is asked.
const PERIOD: Duration = Duration::from_secs(2);

/// How long a server of this VM may owe an answer; `None`: it is not asked.
pub fn patience(spec: &VmSpec) -> Option<Duration> {
    (spec.patience_seconds > 0).then(|| Duration::from_secs(spec.patience_seconds.into()))
}

/// A question that was not answered yet.
#[derive(Clone, Copy, Debug)]
pub struct Probe {
    pub token: u64,
    pub asked: Instant,
    pub generation: u32,
}

impl Supervisor {
    /// Begins to ask, if the VM is to be watched so.
    pub(super) fn begin_probing(&mut self) {
        if self.patience.is_some() {
            self.timers.set(Instant::now() + PERIOD, Timer::Probe);
        }
    }

    pub(super) fn on_probe_due(&mut self) {
        let (Some(patience), Phase::Running) = (self.patience, &self.phase) else {
            return;
        };
        self.oom.look();
        let now = Instant::now();
        let mut hanging = Vec::new();
        for (index, room) in self.rooms.iter_mut().enumerate() {
            let generation = room.generation;
            // One that waits takes over in whatever state it is: it must not be found hanging then.
            if let Some(successor) = &mut room.successor {
                match successor.asked {
                    Some(asked) if now.saturating_duration_since(asked) >= patience => {
                        hanging.push((index, successor.generation));
                    }
                    Some(_) => {}
                    None => {
                        let token = self.next_token;
                        self.next_token = token.wrapping_add(1);
                        let asked = successor.ask(&SupervisorToServer::Ping { token });
                        successor.asked = asked.then_some(now);
                    }
                }
            }
            match room.probe.filter(|probe| probe.generation == generation) {
                Some(probe) if now.saturating_duration_since(probe.asked) >= patience => {
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
                        asked: now,
                        generation,
                    });
                }
            }
        }
        for (index, generation) in hanging {
            let seconds = patience.as_secs();
            self.kill_server(
                index,
                generation,
                &format!("hangs: no answer for {seconds} seconds"),
            );
        }
        self.timers.set(now + PERIOD.min(patience), Timer::Probe);
    }

    pub(super) fn on_pong(&mut self, index: usize, token: u64) {
        if let Some(room) = self.rooms.get_mut(index)
            && room.probe.is_some_and(|probe| probe.token == token)
        {
            room.probe = None;
        }
    }
}
