#![forbid(unsafe_code)]
//! What a person wants: signals, the console's escape, the control socket.

use std::time::Duration;

use nix::sys::signal::Signal;

use super::console::{self, Command};
use super::control::{MAX_CLIENTS, Reply, Request};
use super::inspection::Client;
use super::report::{Outcome, say};
use super::room::{RoomState, Server};
use super::{Phase, Supervisor};
use vmbus::ipc::SupervisorToVcpu;

impl Supervisor {
    pub(super) fn on_signals(&mut self) {
        while let Ok(Some(info)) = self.signals.read_signal() {
            let number = i32::try_from(info.ssi_signo).unwrap_or(0);
            if number == Signal::SIGTSTP as i32 {
                self.input.stop_and_go_on();
            } else if matches!(self.phase, Phase::EndingVcpu(_) | Phase::EndingServers(_)) {
                // Somebody is impatient.
                self.over(Outcome::Signal(number));
            } else {
                self.end(Outcome::Signal(number));
            }
        }
    }

    pub(super) fn on_typed(&mut self) {
        match self.input.on_typed() {
            Some(Command::Quit) => self.end(Outcome::Stopped),
            Some(Command::Help) => say(console::HELP),
            None => {}
        }
    }

    pub(super) fn on_new_client(&mut self) {
        // A listener that fails will fail again; the VM needs none.
        while self.has_room_for_client()
            && let Ok(Some(socket)) = self.listener.accept()
        {
            self.clients.push(Client {
                socket,
                waits_for_inspection: false,
                waits_for_swap: None,
                follows: false,
            });
        }
    }

    /// One more waits in the listener's backlog until somebody has gone.
    pub(super) fn has_room_for_client(&self) -> bool {
        self.clients.len() < MAX_CLIENTS
    }

    /// A number may name another client than the one whose event it was, if one before it has just gone: it is only
    /// looked at then, and found to have said nothing.
    pub(super) fn on_client(&mut self, index: usize) {
        let Some(client) = self.clients.get_mut(index) else {
            return;
        };
        let request = match client.socket.flush().map(|()| client.socket.recv::<Request>()) {
            Ok(Ok(Some((request, _)))) => request,
            Ok(Ok(None)) => return,
            Ok(Err(_)) | Err(_) => {
                self.clients.remove(index);
                return;
            }
        };
        let replies = match request {
            Request::Status => vec![self.status()],
            Request::Inspect => {
                client.waits_for_inspection = true;
                self.begin_inspection();
                return;
            }
            Request::Events { after, follow } => {
                self.on_events_wanted(index, after, follow);
                return;
            }
            Request::Resume { device, program } => vec![self.resume(&device, program)],
            Request::Swap {
                device,
                program,
                patience_s,
            } => {
                let patience = Duration::from_secs(patience_s.into());
                match self.begin_swap(&device, program, patience) {
                    Ok(room) => {
                        if let Some(client) = self.clients.get_mut(index) {
                            client.waits_for_swap = Some(room);
                        }
                        return;
                    }
                    Err(why) => vec![Reply::Refused(why)],
                }
            }
            Request::Devices => {
                let lines = self.rooms.iter().map(RoomState::line);
                vec![Reply::Devices(lines.collect())]
            }
            Request::Stop => {
                self.end(Outcome::Stopped);
                vec![Reply::Done]
            }
            Request::PowerButton => {
                self.send_to_vcpu(&SupervisorToVcpu::PowerButton);
                vec![Reply::Done]
            }
        };
        self.answer_client(index, &replies);
    }

    pub(super) fn answer_client(&mut self, index: usize, replies: &[Reply]) {
        let Some(client) = self.clients.get_mut(index) else {
            return;
        };
        if replies
            .iter()
            .any(|reply| client.socket.send(reply, &[]).is_err())
        {
            self.clients.remove(index);
        }
    }

    pub(super) fn status(&self) -> Reply {
        let mut processes = vec![
            ("vcpu".to_owned(), self.vcpu.child.pid.as_raw()),
            ("bus".to_owned(), self.bus.child.pid.as_raw()),
        ];
        for room in &self.rooms {
            if let Server::Running { process, .. } = &room.server {
                processes.push((room.plan.name.clone(), process.child.pid.as_raw()));
            }
            if let Some(successor) = &room.successor {
                let name = format!("{} successor", room.plan.name);
                processes.push((name, successor.process.child.pid.as_raw()));
            }
            if let Some(passt) = &room.passt {
                processes.push((format!("{} passt", room.plan.name), passt.child.pid.as_raw()));
            }
        }
        if let Some(keeper) = &self.keeper {
            processes.push(("keeper".to_owned(), keeper.process.child.pid.as_raw()));
        }
        Reply::Status {
            supervisor: nix::unistd::getpid().as_raw(),
            state: self.state().to_owned(),
            processes,
        }
    }

    pub(super) fn state(&self) -> &'static str {
        match self.phase {
            Phase::Starting { .. } => "starting",
            Phase::Running if self.crashed => "crashed",
            Phase::Running => "running",
            Phase::EndingVcpu(_) | Phase::EndingServers(_) | Phase::Over(_) => "ending",
        }
    }
}
