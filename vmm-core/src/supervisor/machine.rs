#![forbid(unsafe_code)]
//! `bulkhead-vcpu`: what it says, and its end.

use std::os::fd::{AsFd, BorrowedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmbus::ipc::{ExitCause as VmExit, OnReset, PeerFault, SupervisorToVcpu, VcpuToSupervisor};

use super::chronicle::Event;
use super::events::show_lines;
use super::oom::Finding;
use super::report::{Outcome, say};
use super::{MESSAGES_PER_TURN, Phase, Supervisor, process, report, tell_vcpu};
use crate::spec::OnCrash;

impl Supervisor {
    /// Sends; a vCPU process that does not take messages is killed, which ends the VM.
    pub(super) fn send_to_vcpu(&mut self, message: &SupervisorToVcpu, fds: &[BorrowedFd<'_>]) {
        let attached = match message {
            SupervisorToVcpu::ServerAttached { device, generation } => Some((*device, *generation)),
            _ => None,
        };
        if attached.is_some() {
            // A supervisor that is killed after this has told its keeper that there may be a server of that generation.
            self.tell_keeper();
        }
        let told = tell_vcpu(&mut self.vcpu, message, fds);
        let is_taken = self
            .vcpu
            .control
            .as_ref()
            .is_some_and(|control| !control.has_queued());
        if let Some((device, generation)) = attached
            && is_taken
            && let Some(room) = self.rooms.iter_mut().find(|room| room.plan.device == device)
        {
            room.introduced(generation);
        }
        if let Err(error) = told
            && self.vcpu_said.is_none()
        {
            self.vcpu_failed.get_or_insert(format!("{error:#}"));
            self.vcpu.kill();
        }
    }

    pub(super) fn on_vcpu_control(&mut self) {
        for _ in 0..MESSAGES_PER_TURN {
            let Some(socket) = &mut self.vcpu.control else {
                return;
            };
            let received = match socket.flush() {
                Ok(()) => socket.recv::<VcpuToSupervisor>(),
                Err(_) => Err(PeerFault::Eof),
            };
            match received {
                Ok(Some((message, _))) => self.on_vcpu_message(message),
                Ok(None) => return,
                // Its end follows, and says why.
                Err(PeerFault::Eof) => self.vcpu.control = None,
                Err(fault) => {
                    self.vcpu.control = None;
                    self.vcpu_failed
                        .get_or_insert(format!("it does not speak our protocol: {fault}"));
                    self.vcpu.kill();
                }
            }
        }
    }

    pub(super) fn on_vcpu_message(&mut self, message: VcpuToSupervisor) {
        match message {
            VcpuToSupervisor::Ready { report } => self.on_ready(report, true),
            VcpuToSupervisor::Started => {}
            VcpuToSupervisor::Failed { message } => self.vcpu_failed = Some(process::printable(&message)),
            VcpuToSupervisor::ServerMisbehaves {
                device,
                generation,
                why,
            } => self.kill_server_of(
                device,
                generation,
                &format!("bulkhead-vcpu says: {}", process::printable(&why)),
            ),
            VcpuToSupervisor::ServerSlow {
                device,
                generation,
                waiting_for,
            } => {
                let why = format!("did not answer in time: {}", process::printable(&waiting_for));
                self.kill_server_of(device, generation, &why);
            }
            VcpuToSupervisor::GuestPowerOff => {}
            VcpuToSupervisor::GuestReset { count } => {
                if self.on_reset == OnReset::Reset {
                    self.crashed = false;
                }
                say(&format!("the guest reset itself ({count} so far)"));
                self.note(Event::GuestReset { count });
            }
            VcpuToSupervisor::GuestCrash { parameters, text } => {
                self.crashed = true;
                say(&report::guest_crash(&parameters, text.as_deref()));
                let text = text.unwrap_or_default();
                self.note(Event::GuestCrash { parameters, text });
                if self.on_crash == OnCrash::Exit {
                    self.end(Outcome::GuestCrashed);
                }
            }
            VcpuToSupervisor::Exited { cause } => self.vcpu_said = Some(cause),
            VcpuToSupervisor::Inspect { entries } => self.on_inspected("vcpu", entries),
        }
    }

    pub(super) fn on_vcpu_end(&mut self) {
        let Some(cause) = self.vcpu.ended() else {
            return;
        };
        // What it said last is still in the sockets.
        while self.vcpu.control.is_some() {
            self.on_vcpu_control();
            if let Some(socket) = &self.vcpu.control
                && !has_more(socket.as_fd())
            {
                break;
            }
        }
        show_lines("vcpu", &mut self.vcpu);
        let outcome = match std::mem::replace(&mut self.phase, Phase::Running) {
            Phase::Starting { .. } => {
                let why = self.vcpu_failed.take().unwrap_or_else(|| self.last_words(cause));
                return self.fail_start(why);
            }
            Phase::EndingVcpu(outcome) => outcome,
            phase @ (Phase::EndingServers(_) | Phase::Over(_)) => {
                self.phase = phase;
                return;
            }
            Phase::Running => {
                let outcome = self.outcome_of(cause);
                self.note(Event::Ending {
                    why: outcome.to_string(),
                });
                outcome
            }
        };
        self.end_servers(outcome);
    }

    pub(super) fn last_words(&self, cause: sandbox::ExitCause) -> String {
        let said = self
            .vcpu
            .log
            .last_words()
            .map(|line| format!("; its last words: {line:?}"))
            .unwrap_or_default();
        let cause = Finding::tell(self.oom.finding(), cause, self.vcpu_failed.is_some());
        format!("bulkhead-vcpu {cause}{said}")
    }

    pub(super) fn outcome_of(&mut self, cause: sandbox::ExitCause) -> Outcome {
        match self.vcpu_said.take() {
            Some(VmExit::PowerOff | VmExit::Reset) if self.crashed => Outcome::GuestCrashed,
            Some(VmExit::PowerOff | VmExit::Reset) => Outcome::PoweredOff,
            Some(VmExit::Console | VmExit::Quit) => Outcome::Stopped,
            Some(VmExit::Fault { message }) => Outcome::VcpuDied(process::printable(&message)),
            None => {
                let failed = self.vcpu_failed.take();
                let died = self.last_words(cause);
                Outcome::VcpuDied(failed.map_or(died.clone(), |why| format!("{died}; {why}")))
            }
        }
    }
}

fn has_more(fd: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
    matches!(poll(&mut fds, PollTimeout::ZERO), Ok(1..))
}
