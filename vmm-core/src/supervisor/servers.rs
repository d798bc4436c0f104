#![forbid(unsafe_code)]
//! The servers: what they say, their deaths, their successors.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use vmbus::ipc::{ServerToSupervisor, SupervisorToVcpu};

use super::events::show_lines;
use super::report::say;
use super::room::Server;
use super::timers::Timer;
use super::{MESSAGES_PER_TURN, Phase, START_DEADLINE, Supervisor, policy, process, report};

/// Between two looks whether a dead server's I/O is over. As a rule it is after some hundred microseconds; on a disk that
/// does not answer it can take minutes.
const SHORTEST_FENCE_PAUSE: Duration = Duration::from_micros(50);
const LONGEST_FENCE_PAUSE: Duration = Duration::from_millis(100);

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
                let generation = room.generation;
                room.server.set_ready();
                self.timers.clear(Timer::ReadyOverdue {
                    room: index,
                    generation,
                });
                self.on_ready(report, false);
            }
            ServerToSupervisor::Failed { message } => room.server.blame(&process::printable(&message)),
            ServerToSupervisor::Pong { .. } | ServerToSupervisor::Warm | ServerToSupervisor::Released => {}
            ServerToSupervisor::Inspect { entries } => self.on_inspected(&name, entries),
            ServerToSupervisor::Event { text } => report::relay(&name, &process::printable(&text)),
        }
    }

    /// Kills the server of a device if it is still of that generation.
    pub(super) fn kill_server_of(&mut self, device: u32, generation: u32, why: &str) {
        if let Some(index) = self.rooms.iter().position(|room| room.plan.device == device) {
            self.kill_server(index, generation, why);
        }
    }

    pub(super) fn kill_server(&mut self, index: usize, generation: u32, why: &str) {
        if let Some(room) = self.rooms.get_mut(index)
            && room.generation == generation
        {
            room.server.blame(why);
            room.server.kill();
        }
    }

    pub(super) fn on_server_end(&mut self, index: usize) {
        // A last message (why it failed) may still be there.
        self.on_server_control(index);
        let Some(room) = self.rooms.get_mut(index) else {
            return;
        };
        let Some(death) = room.on_end() else {
            return;
        };
        match self.phase {
            Phase::Starting { .. } => self.fail_start(death.sentence),
            Phase::EndingServers(_) => self.finish_if_all_ended(),
            Phase::EndingVcpu(_) | Phase::Over(_) => {}
            // The VM is over, and this server has noticed before us. Its socket to `bulkhead-vcpu` is closed after the
            // one between that and us (a process's descriptors are closed in order), whose end was handled before this.
            Phase::Running if self.vcpu_said.is_some() || self.vcpu.control.is_none() => {
                room.server = Server::Held
            }
            Phase::Running => {
                say(&death.sentence);
                self.try_fence(index);
            }
        }
    }

    /// Once nothing of the dead server touches guest memory, tells the vCPU process and decides on a successor.
    pub(super) fn try_fence(&mut self, index: usize) {
        let Some(room) = self.rooms.get_mut(index) else {
            return;
        };
        let Server::Fencing { started, since } = room.server else {
            return;
        };
        if !room.is_fenced() {
            let waited = since.elapsed();
            let pause = (waited / 4).clamp(SHORTEST_FENCE_PAUSE, LONGEST_FENCE_PAUSE);
            self.timers
                .set(Instant::now() + pause, Timer::Fence { room: index });
            return;
        }
        let gone = SupervisorToVcpu::ServerGone {
            device: room.plan.device,
            generation: room.generation,
        };
        let now = self.timers.milliseconds(Instant::now());
        let name = room.plan.name.clone();
        match room.history.on_death(self.timers.milliseconds(started), now) {
            policy::Decision::Restart { after_ms } => {
                room.server = Server::Pausing;
                let at = Instant::now() + Duration::from_millis(after_ms);
                self.timers.set(at, Timer::Restart { room: index });
            }
            policy::Decision::Hold { deaths, within_ms } => {
                room.server = Server::Held;
                let seconds = within_ms / 1000;
                say(&format!(
                    "{name} died {deaths} times in {seconds} seconds and is left alone; the guest waits for it"
                ));
            }
        }
        self.send_to_vcpu(&gone, &[]);
    }

    pub(super) fn restart_server(&mut self, index: usize) {
        if !matches!(self.phase, Phase::Running) {
            return;
        }
        let Some(room) = self.rooms.get_mut(index) else {
            return;
        };
        let started = room
            .start_passt()
            .and_then(|()| room.start_server(&self.programs, &self.log, self.require_full_sandbox));
        match started {
            Ok(link) => {
                let generation = room.generation;
                let attached = SupervisorToVcpu::ServerAttached {
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
                self.send_to_vcpu(&attached, &[link.as_fd()]);
            }
            Err(error) => {
                say(&format!("{} has no successor: {error:#}", room.plan.name));
                let now = self.timers.milliseconds(Instant::now());
                match room.history.on_death(now, now) {
                    policy::Decision::Restart { after_ms } => {
                        let at = Instant::now() + Duration::from_millis(after_ms);
                        self.timers.set(at, Timer::Restart { room: index });
                    }
                    policy::Decision::Hold { .. } => room.server = Server::Held,
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
                self.kill_server(index, generation, "lost passt");
            }
            Phase::EndingVcpu(_) | Phase::EndingServers(_) | Phase::Over(_) => {}
        }
    }
}
