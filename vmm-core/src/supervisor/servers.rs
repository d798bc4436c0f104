#![forbid(unsafe_code)]
//! The servers: what they say, their deaths, their successors.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use vmbus::ipc::{ServerToSupervisor, SupervisorToBus};

use super::chronicle::Event;
use super::events::show_lines;
use super::report::say;
use super::room::{Death, Server};
use super::timers::Timer;
use super::{MESSAGES_PER_TURN, Phase, Reporter, START_DEADLINE, Supervisor, policy, process, report};

/// Between two looks whether a dead server's I/O is over. As a rule it is after some hundred microseconds; on a disk that
/// does not answer it can take minutes.
const SHORTEST_FENCE_PAUSE: Duration = Duration::from_micros(50);
const LONGEST_FENCE_PAUSE: Duration = Duration::from_millis(100);

/// How long this process waits after it has let a successor serve, before it goes on with what nobody waits for. The guest
/// waits for `bulkhead-bus` and for the successor, and the kernel runs those on the processor of who has woken them.
const BREATHER: Duration = Duration::from_millis(1);

/// A server that is gone.
#[derive(Clone, Copy, Debug)]
struct Gone {
    /// When `bulkhead-bus` was told.
    told: Instant,
    started: Instant,
    /// As it was told to.
    planned: bool,
    decision: Option<policy::Decision>,
}

/// What is left to do about a server that is gone.
#[derive(Debug)]
pub(super) struct Followed {
    index: usize,
    gone: Gone,
    death: Option<Death>,
}

impl Supervisor {
    pub(super) fn on_server_control(&mut self, index: usize) {
        for _ in 0..MESSAGES_PER_TURN {
            let Some(room) = self.rooms.get_mut(index) else {
                return;
            };
            let generation = room.generation;
            match room.receive() {
                Ok(Some(message)) => self.on_server_message(index, message),
                Ok(None) => return,
                Err(fault) => {
                    self.kill_server(
                        index,
                        generation,
                        &format!("does not speak our protocol: {fault}"),
                    );
                    return;
                }
            }
        }
    }

    pub(super) fn on_server_message(&mut self, index: usize, message: ServerToSupervisor) {
        let Some(room) = self.rooms.get_mut(index) else {
            return;
        };
        let name = room.plan.name.clone();
        match message {
            ServerToSupervisor::Ready { report } => {
                room.server.set_ready();
                self.on_ready(report, Reporter::Other);
                self.on_serving(index, Instant::now());
            }
            ServerToSupervisor::Failed { message } => room.server.blame(&process::printable(&message)),
            // It has said to an earlier supervisor that it is ready.
            ServerToSupervisor::Pong { .. }
                if matches!(self.phase, Phase::Running) && !room.server.is_ready() =>
            {
                room.server.set_ready();
                self.on_serving(index, Instant::now());
            }
            ServerToSupervisor::Pong { token } => self.on_pong(index, token),
            ServerToSupervisor::Warm => {}
            ServerToSupervisor::Released => self.on_released(index),
            ServerToSupervisor::Inspect { entries } => self.on_inspected(&name, entries),
            ServerToSupervisor::Event { text } => report::relay(&name, &process::printable(&text)),
        }
    }

    /// Kills the server of a device that is of that generation, if it is still there.
    pub(super) fn kill_server_of(&mut self, device: u32, generation: u32, why: &str) {
        if let Some(index) = self.rooms.iter().position(|room| room.plan.device == device) {
            self.kill_server(index, generation, why);
        }
    }

    pub(super) fn kill_server(&mut self, index: usize, generation: u32, why: &str) {
        let Some(room) = self.rooms.get_mut(index) else {
            return;
        };
        // What others see of one that was killed follows from that, and is no reason.
        if room.generation == generation && !room.server.is_killed() {
            room.server.blame(why);
            room.server.kill();
        }
        if let Some(successor) = &mut room.successor
            && successor.generation == generation
        {
            successor.blame(why);
            successor.process.kill();
        }
        room.kill_leaving(generation);
    }

    pub(super) fn on_server_end(&mut self, index: usize) {
        // A last message (why it failed) may still be there.
        self.on_server_control(index);
        let vm_has_ended = self.has_ended();
        let Some(room) = self.rooms.get_mut(index) else {
            return;
        };
        if matches!(self.phase, Phase::Running) && !vm_has_ended && room.has_obeyed() {
            return self.on_released(index);
        }
        let Some(death) = room.on_end() else {
            return;
        };
        match self.phase {
            Phase::Starting { .. } => self.fail_start(death.sentence),
            Phase::EndingServers(_) => self.finish_if_all_ended(),
            Phase::EndingVcpu(_) | Phase::Over(_) => {}
            Phase::Running if vm_has_ended => room.server = Server::Held,
            Phase::Running => {
                let generation = room.generation;
                if let Some(swap) = &mut room.swap
                    && swap.to != generation
                {
                    swap.mishap = Some(death.sentence.clone());
                }
                // The guest waits: what there is to write can wait.
                let fenced = self.tell_if_fenced(index);
                self.fail_swap(
                    index,
                    generation,
                    &format!("{} before it was ready", death.sentence),
                );
                match fenced {
                    Some(gone) => self.follow(index, gone, Some(death)),
                    None => {
                        self.start_before_fenced(index);
                        self.note_death(death);
                    }
                }
            }
        }
    }

    /// Once nothing of the server that is gone is under way, lets the next one follow.
    pub(super) fn try_fence(&mut self, index: usize) {
        if let Some(gone) = self.tell_if_fenced(index) {
            self.follow(index, gone, None);
        }
    }

    /// `bulkhead-bus` knows that a server is gone. If a successor waits, it serves now, and the rest can wait a moment.
    fn follow(&mut self, index: usize, gone: Gone, death: Option<Death>) {
        let left = Followed { index, gone, death };
        let is_followed = self.rooms.get(index).is_some_and(|room| room.successor.is_some());
        if is_followed {
            self.followed.push(left);
            self.timers.set(Instant::now() + BREATHER, Timer::Breather);
        } else {
            self.finish_following(left);
        }
    }

    /// What was left to do when successors began to serve. Before anything else is handled, so that nobody sees it undone.
    pub(super) fn catch_up(&mut self) {
        if self.followed.is_empty() {
            return;
        }
        self.timers.clear(Timer::Breather);
        for left in std::mem::take(&mut self.followed) {
            self.finish_following(left);
        }
    }

    fn finish_following(&mut self, left: Followed) {
        if let Some(death) = left.death {
            self.note_death(death);
        }
        self.find_successor(left.index, left.gone);
    }

    /// Tells the vCPU process that a server is gone, once nothing of it touches guest memory any more; until then,
    /// looks again from time to time.
    fn tell_if_fenced(&mut self, index: usize) -> Option<Gone> {
        let room = self.rooms.get_mut(index)?;
        let Server::Fencing {
            started,
            since,
            planned,
            decision,
        } = room.server
        else {
            return None;
        };
        if !room.is_fenced() {
            let waited = since.elapsed();
            let pause = (waited / 4).clamp(SHORTEST_FENCE_PAUSE, LONGEST_FENCE_PAUSE);
            self.timers
                .set(Instant::now() + pause, Timer::Fence { room: index });
            return None;
        }
        let gone = SupervisorToBus::ServerGone {
            device: room.plan.device,
            generation: room.generation,
        };
        self.send_to_bus(&gone, &[]);
        Some(Gone {
            told: Instant::now(),
            started,
            planned,
            decision,
        })
    }

    /// The guest waits: if the next server is to be started at once, it is started while the last one's I/O comes to
    /// its end, and waits for that like any successor.
    fn start_before_fenced(&mut self, index: usize) {
        let Some(room) = self.rooms.get_mut(index) else {
            return;
        };
        let Server::Fencing {
            started, decision, ..
        } = &mut room.server
        else {
            return;
        };
        let now = self.timers.milliseconds(Instant::now());
        let next = room.history.on_death(self.timers.milliseconds(*started), now);
        *decision = Some(next);
        if next != (policy::Decision::Restart { after_ms: 0 }) || room.successor.is_some() {
            return;
        }
        let device = room.plan.name.clone();
        match self.start_waiting(index) {
            Ok(generation) => self.note(Event::Restart { device, generation }),
            // It is tried again when the I/O is over.
            Err(error) => say(&format!("{device} has no successor yet: {error:#}")),
        }
    }

    /// Starts a server that waits for its turn; its generation.
    pub(super) fn start_waiting(&mut self, index: usize) -> Result<u32> {
        let room = self.rooms.get_mut(index).context("there is no such device")?;
        room.start_passt()?;
        let (link, generation) = room.start_successor(None, &self.settings)?;
        let attached = SupervisorToBus::ServerAttached {
            device: room.plan.device,
            generation,
        };
        let overdue = Timer::ReadyOverdue {
            room: index,
            generation,
        };
        self.timers.set(Instant::now() + START_DEADLINE, overdue);
        self.send_to_bus(&attached, &[link.as_fd()]);
        Ok(generation)
    }

    /// The server is gone, and `bulkhead-bus` knows: who serves now?
    fn find_successor(&mut self, index: usize, gone: Gone) {
        let Some(room) = self.rooms.get_mut(index) else {
            return;
        };
        let now = self.timers.milliseconds(Instant::now());
        let decision = match gone.decision {
            Some(decision) => decision,
            None if gone.planned => policy::Decision::Restart { after_ms: 0 },
            None => room.history.on_death(self.timers.milliseconds(gone.started), now),
        };
        // A person has chosen the new one of a swap, and perhaps because of the deaths.
        let held = matches!(decision, policy::Decision::Hold { .. }) && room.swap.is_none();
        let name = room.plan.name.clone();
        if !held && self.promote(index, gone.told) {
            return;
        }
        match decision {
            policy::Decision::Restart { after_ms } => {
                if let Some(room) = self.rooms.get_mut(index) {
                    room.server = Server::Pausing;
                }
                let at = Instant::now() + Duration::from_millis(after_ms);
                self.timers.set(at, Timer::Restart { room: index });
            }
            policy::Decision::Hold { deaths, within_ms } => {
                let seconds = within_ms / 1000;
                self.dismiss_successor(index);
                self.give_up(index, &format!("{name} died {deaths} times in {seconds} seconds"));
            }
        }
    }

    pub(super) fn restart_server(&mut self, index: usize) {
        if !matches!(self.phase, Phase::Running) {
            return;
        }
        let Some(room) = self.rooms.get_mut(index) else {
            return;
        };
        let name = room.plan.name.clone();
        let started = room
            .start_passt()
            .and_then(|()| room.start_server(&self.settings));
        match started {
            Ok(link) => {
                let generation = room.generation;
                let attached = SupervisorToBus::ServerAttached {
                    device: room.plan.device,
                    generation,
                };
                let deadline = Instant::now() + START_DEADLINE;
                self.timers.set(
                    deadline,
                    Timer::ReadyOverdue {
                        room: index,
                        generation,
                    },
                );
                self.send_to_bus(&attached, &[link.as_fd()]);
                self.note(Event::Restart {
                    device: name,
                    generation,
                });
            }
            Err(error) => {
                say(&format!("{name} has no successor: {error:#}"));
                let now = self.timers.milliseconds(Instant::now());
                match room.history.on_death(now, now) {
                    policy::Decision::Restart { after_ms } => {
                        let at = Instant::now() + Duration::from_millis(after_ms);
                        self.timers.set(at, Timer::Restart { room: index });
                    }
                    policy::Decision::Hold { .. } => self.give_up(index, &format!("{error:#}")),
                }
            }
        }
    }

    /// passt is gone, and with it the far end of the server's stream: the next server gets a new one.
    pub(super) fn on_passt_end(&mut self, index: usize) {
        let Some(room) = self.rooms.get_mut(index) else {
            return;
        };
        let Some(passt) = &mut room.passt else {
            return;
        };
        let name = format!("{} passt", room.plan.name);
        let Some(cause) = passt.ended() else {
            return;
        };
        show_lines(&name, passt);
        room.passt = None;
        let generation = room.generation;
        match self.phase {
            Phase::Starting { .. } => self.fail_start(format!("{name} {cause}")),
            Phase::Running => {
                say(&format!(
                    "{name} {cause}; it is started again, and connections through it are lost"
                ));
                let device = room.plan.name.clone();
                let cause = cause.to_string();
                self.note(Event::NetworkLost { device, cause });
                // A successor has the old stream, too.
                self.lose_successor(index, "lost passt");
                self.kill_server(index, generation, "lost passt");
            }
            Phase::EndingVcpu(_) | Phase::EndingServers(_) | Phase::Over(_) => {}
        }
    }
}
