#![forbid(unsafe_code)]
//! Planned replacement of a server, and what a successor that waits says and does.
//!
//! ```text
//!   start the new one ──Ready, Warm, a pause──▶ Stop to the old one ──Released──▶ fence ──▶ ServerGone to bulkhead-bus
//! ```
//!
//! Until the old one is told to stop nothing has changed for the guest, and whatever goes wrong with the new one is told
//! to who asked for it. From then on the new one takes over, whatever the old one does: one that dies or does not let
//! go in time is a dead server with a successor that waits. Between Stop and ServerGone the supervisor waits for
//! nothing else, starts nothing, and writes nothing: the guest's requests wait, too.

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use vmbus::ipc::{ServerToSupervisor, SupervisorToBus, SupervisorToServer};

use super::chronicle::Event;
use super::control::Reply;
use super::program::Program;
use super::report::say;
use super::room::Server;
use super::successor::LEAVE_DEADLINE;
use super::timers::Timer;
use super::{MESSAGES_PER_TURN, Phase, Supervisor, process, report};

/// Limit: from Stop to Released. The old server waits for its own I/O; a disk that takes longer makes the guest wait
/// whether the server is killed or not.
pub(super) const STOP_DEADLINE: Duration = Duration::from_secs(5);

/// From a new server that is prepared to Stop. Its start has taken processor time from guest and old server; what waits
/// because of that is answered before, and does not wait for the replacement, too.
const SETTLE: Duration = Duration::from_millis(5);

/// A planned replacement under way.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Swap {
    from: u32,
    pub(super) to: u32,
    /// How the old server ended, if not as it should have.
    pub(super) mishap: Option<String>,
}

/// The beginning.
impl Supervisor {
    /// Begins to replace the server of a device. The answer comes later, unless this is an error.
    pub(super) fn begin_swap(
        &mut self,
        device: &str,
        program: Option<PathBuf>,
        patience: Duration,
    ) -> Result<usize, String> {
        let index = self.room_named(device)?;
        let room = self.rooms.get_mut(index).ok_or("no such device")?;
        if let Some(swap) = &room.swap {
            return Err(format!(
                "{device} is being swapped already (server {} for server {}): wait until that is done",
                swap.to, swap.from
            ));
        }
        match &room.server {
            Server::Running { ready: true, .. } if room.told_to_stop.is_none() => {}
            Server::Held => {
                return Err(format!(
                    "{device} is held, so there is no server to swap: bulkhead device resume starts one, of another program if you say --binary"
                ));
            }
            Server::Running { .. } | Server::Fencing { .. } | Server::Pausing => {
                return Err(format!(
                    "{device} has no server that serves just now: try again in a moment"
                ));
            }
        }
        let program = program.as_ref().unwrap_or(&room.program.path);
        let program = Program::open(program).map_err(|error| format!("{error:#}"))?;
        self.dismiss_successor(index);
        let room = self.rooms.get_mut(index).ok_or("no such device")?;
        let (link, to) = room
            .start_successor(Some(program), &self.settings)
            .map_err(|error| format!("{error:#}"))?;
        room.swap = Some(Swap {
            from: room.generation,
            to,
            mishap: None,
        });
        let overdue = Timer::ReadyOverdue {
            room: index,
            generation: to,
        };
        let attached = SupervisorToBus::ServerAttached {
            device: room.plan.device,
            generation: to,
        };
        self.timers.set(Instant::now() + patience, overdue);
        self.send_to_bus(&attached, &[link.as_fd()]);
        Ok(index)
    }

    fn room_named(&self, device: &str) -> Result<usize, String> {
        if !matches!(self.phase, Phase::Running) {
            return Err(format!("the VM is {} and does not run", self.state()));
        }
        let position = self.rooms.iter().position(|room| room.plan.name == device);
        position.ok_or_else(|| {
            let names: Vec<&str> = self.rooms.iter().map(|room| room.plan.name.as_str()).collect();
            format!("there is no device {device:?}; there are: {}", names.join(", "))
        })
    }

    /// If the new server is prepared, the old one is told to stop.
    pub(super) fn stop_predecessor(&mut self, index: usize) {
        let Some(room) = self.rooms.get_mut(index) else {
            return;
        };
        let prepared = room
            .successor
            .as_ref()
            .is_some_and(|successor| successor.is_prepared());
        let serves = matches!(room.server, Server::Running { .. });
        let is_over = !matches!(self.phase, Phase::Running);
        if is_over || room.swap.is_none() || !prepared || !serves || room.told_to_stop.is_some() {
            return;
        }
        let generation = room.generation;
        room.told_to_stop = Some(Instant::now());
        // It still serves. Were this process killed just after the next message, the next supervisor must know of it.
        self.tell_keeper();
        let Some(room) = self.rooms.get_mut(index) else {
            return;
        };
        room.told_to_stop = Some(Instant::now());
        room.gone_since = room.told_to_stop;
        if room.ask(&SupervisorToServer::Stop) {
            let overdue = Timer::StopOverdue {
                room: index,
                generation,
            };
            self.timers.set(Instant::now() + STOP_DEADLINE, overdue);
        } else {
            self.kill_server(index, generation, "could not be told to stop");
        }
    }
}

/// What follows.
impl Supervisor {
    pub(super) fn on_successor_control(&mut self, index: usize) {
        for _ in 0..MESSAGES_PER_TURN {
            let Some(room) = self.rooms.get_mut(index) else {
                return;
            };
            match room.receive_from_successor() {
                Ok(Some(message)) => self.on_successor_message(index, message),
                Ok(None) => return,
                Err(fault) => {
                    let why = format!("does not speak our protocol: {fault}");
                    if let Some(successor) = &mut room.successor {
                        successor.blame(&why);
                        successor.process.kill();
                    }
                    return;
                }
            }
        }
    }

    fn on_successor_message(&mut self, index: usize, message: ServerToSupervisor) {
        let Some(room) = self.rooms.get_mut(index) else {
            return;
        };
        let Some(successor) = &mut room.successor else {
            return;
        };
        match message {
            // Of one that is being killed: nobody makes way for it.
            ServerToSupervisor::Ready { .. } | ServerToSupervisor::Warm if successor.blame.is_some() => {
                return;
            }
            ServerToSupervisor::Ready { .. } => successor.ready = true,
            ServerToSupervisor::Warm => successor.warm = true,
            ServerToSupervisor::Failed { message } => {
                return successor.blame(&process::printable(&message));
            }
            ServerToSupervisor::Event { text } => {
                return report::relay(&room.plan.name, &process::printable(&text));
            }
            ServerToSupervisor::Pong { .. } => {
                successor.asked = None;
                // Of one that is not, the earlier supervisor has heard that it is.
                successor.ready = true;
                return;
            }
            // It was not asked for these.
            ServerToSupervisor::Inspect { .. } | ServerToSupervisor::Released => return,
        }
        if successor.is_prepared() {
            let overdue = Timer::ReadyOverdue {
                room: index,
                generation: successor.generation,
            };
            self.timers.clear(overdue);
            let is_restart = successor.is_restart;
            match room.swap {
                Some(_) => self
                    .timers
                    .set(Instant::now() + SETTLE, Timer::Replace { room: index }),
                None if is_restart => {}
                None => self.on_standby_prepared(index),
            }
        }
    }

    pub(super) fn on_successor_end(&mut self, index: usize) {
        // A last message (why it failed) may still be there.
        self.on_successor_control(index);
        let vm_has_ended = self.has_ended();
        let Some(room) = self.rooms.get_mut(index) else {
            return;
        };
        let is_restart = room
            .successor
            .as_ref()
            .is_some_and(|successor| successor.is_restart);
        let Some((generation, lived, sentence)) = room.on_successor_end() else {
            return;
        };
        self.timers.clear(Timer::ReadyOverdue {
            room: index,
            generation,
        });
        if !matches!(self.phase, Phase::Running) || vm_has_ended {
            return;
        }
        let gone = SupervisorToBus::ServerGone {
            device: room.plan.device,
            generation,
        };
        let serves = matches!(room.server, Server::Running { .. }) && room.told_to_stop.is_none();
        let old = room.generation;
        let is_standby = room.swap.is_none();
        if let Server::Fencing { decision, .. } = &mut room.server
            && is_restart
        {
            // It is followed like any server that died.
            let now = self.timers.milliseconds(Instant::now());
            *decision = Some(room.history.on_death(now, now));
            say(&sentence);
            return self.send_to_bus(&gone, &[]);
        }
        self.send_to_bus(&gone, &[]);
        if is_standby {
            return self.on_standby_end(index, lived, &sentence);
        }
        let then = match serves {
            true => format!("server {old} goes on"),
            false => {
                format!("server {old} was at its end already, and is followed by one of its own program")
            }
        };
        self.fail_swap(index, generation, &format!("{sentence}; {then}"));
    }

    /// A successor that is no use any more, without a word to anybody but `bulkhead-bus`.
    pub(super) fn dismiss_successor(&mut self, index: usize) {
        let Some(room) = self.rooms.get_mut(index) else {
            return;
        };
        let device = room.plan.device;
        if let Some(generation) = room.dismiss_successor() {
            self.timers.clear(Timer::ReadyOverdue {
                room: index,
                generation,
            });
            self.send_to_bus(&SupervisorToBus::ServerGone { device, generation }, &[]);
        }
    }

    /// The same, and if a swap was on its way to it, that is over.
    pub(super) fn lose_successor(&mut self, index: usize, why: &str) {
        let generation = self.rooms.get(index).and_then(|room| room.successor.as_ref());
        if let Some(generation) = generation.map(|successor| successor.generation) {
            self.dismiss_successor(index);
            self.fail_swap(index, generation, why);
        }
    }

    /// The present server says that it has let go.
    pub(super) fn on_released(&mut self, index: usize) {
        let Some(room) = self.rooms.get_mut(index) else {
            return;
        };
        let generation = room.generation;
        if !matches!(self.phase, Phase::Running) {
            return;
        }
        if room.told_to_stop.is_none() {
            self.kill_server(
                index,
                generation,
                "says Released without having been told to stop",
            );
        } else if room.release() {
            self.try_fence(index);
            self.timers.clear(Timer::StopOverdue {
                room: index,
                generation,
            });
            let overdue = Timer::LeaveOverdue {
                room: index,
                generation,
            };
            self.timers.set(Instant::now() + LEAVE_DEADLINE, overdue);
        }
    }

    pub(super) fn on_stop_overdue(&mut self, index: usize, generation: u32) {
        let seconds = STOP_DEADLINE.as_secs();
        let why = format!("did not let go within {seconds} seconds after it was told to stop");
        self.kill_server(index, generation, &why);
    }

    pub(super) fn on_leaving(&mut self, index: usize, generation: u32) {
        if let Some(room) = self.rooms.get_mut(index)
            && room.on_leaving(generation).is_some()
        {
            self.timers.clear(Timer::LeaveOverdue {
                room: index,
                generation,
            });
            self.finish_if_all_ended();
        }
    }

    /// `bulkhead-bus` was told then that the old server is gone: the successor serves. False: there is none.
    pub(super) fn promote(&mut self, index: usize, told: Instant) -> bool {
        let Some(room) = self.rooms.get_mut(index) else {
            return false;
        };
        let is_restart = room
            .successor
            .as_ref()
            .is_some_and(|successor| successor.is_restart);
        if !room.promote() {
            return false;
        }
        let ready = room.server.is_ready();
        let device = room.plan.name.clone();
        let generation = room.generation;
        if room.swap.is_none() && !is_restart {
            self.note(Event::Promoted { device, generation });
        }
        if ready {
            self.on_serving(index, told);
        }
        true
    }

    /// The present server is ready and has no predecessor since then: the stall, if there was one, is over.
    pub(super) fn on_serving(&mut self, index: usize, since: Instant) {
        let Some(room) = self.rooms.get_mut(index) else {
            return;
        };
        let generation = room.generation;
        let device = room.plan.name.clone();
        self.timers.clear(Timer::ReadyOverdue {
            room: index,
            generation,
        });
        // One that is being killed serves nobody.
        let Server::Running {
            process, blame: None, ..
        } = &room.server
        else {
            return;
        };
        let process = process.child.pid.as_raw();
        let stall = room.gone_since.take();
        let stall = stall.map(|gone| since.saturating_duration_since(gone));
        let stall_us = stall.map(|stall| u64::try_from(stall.as_micros()).unwrap_or(u64::MAX));
        match room.swap.take_if(|swap| swap.to == generation) {
            Some(swap) => {
                room.begin_trial();
                let stall_us = stall_us.unwrap_or(0);
                self.answer_swap(
                    index,
                    &Reply::Swapped {
                        from: swap.from,
                        to: swap.to,
                        process,
                        stall_us,
                        mishap: swap.mishap,
                    },
                );
                self.note(Event::Swap {
                    device,
                    from: swap.from,
                    to: swap.to,
                    stall_us,
                });
            }
            None => {
                if let Some(stall_us) = stall_us {
                    self.note(Event::Serving {
                        device,
                        generation,
                        stall_us,
                    });
                }
            }
        }
        self.want_standby(index);
    }

    /// If a swap to that generation is under way, it has come to nothing.
    pub(super) fn fail_swap(&mut self, index: usize, generation: u32, why: &str) {
        let Some(room) = self.rooms.get_mut(index) else {
            return;
        };
        if room.swap.take_if(|swap| swap.to == generation).is_none() {
            return;
        }
        room.next = None;
        let device = room.plan.name.clone();
        say(&format!("the swap of {device} has failed: {why}"));
        self.answer_swap(index, &Reply::Refused(format!("the swap has failed: {why}")));
        self.note(Event::SwapFailed {
            device,
            why: why.to_owned(),
        });
        self.want_standby(index);
    }

    fn answer_swap(&mut self, index: usize, reply: &Reply) {
        self.clients.retain_mut(|client| {
            client.waits_for_swap.take_if(|room| *room == index).is_none() || client.tell(reply)
        });
    }
}
