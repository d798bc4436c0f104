#![forbid(unsafe_code)]
//! The end of a VM: the processors first, then the servers, and nothing left behind.

use std::time::Instant;

use vmbus::ipc::SupervisorToVcpu;

use super::chronicle::Event;
use super::process::Process;
use super::report::Outcome;
use super::room::Server;
use super::timers::Timer;
use super::{END_DEADLINE, Phase, Supervisor};

impl Supervisor {
    /// Begins the end: the processors first, then the servers.
    pub(super) fn end(&mut self, outcome: Outcome) {
        match self.phase {
            Phase::Starting { .. } => self.over(outcome),
            Phase::Running => {
                self.note(Event::Ending {
                    why: outcome.to_string(),
                });
                self.phase = Phase::EndingVcpu(outcome);
                self.timers.set(Instant::now() + END_DEADLINE, Timer::EndOverdue);
                self.send_to_vcpu(&SupervisorToVcpu::Quit);
            }
            Phase::EndingVcpu(_) | Phase::EndingServers(_) | Phase::Over(_) => {}
        }
    }

    /// Whether the VM is over, as far as can be seen: its servers end with it, and we may hear of their end before that of
    /// the process that they ended with. But a process's descriptors are closed in order, its socket to us before those to
    /// servers, and the end of that socket has been handled by then.
    pub(super) fn has_ended(&self) -> bool {
        self.vcpu_said.is_some() || self.vcpu.control.is_none() || self.bus.control.is_none()
    }

    pub(super) fn end_servers(&mut self, outcome: Outcome) {
        self.phase = Phase::EndingServers(outcome);
        self.timers.clear(Timer::EndOverdue);
        self.timers.set(Instant::now() + END_DEADLINE, Timer::EndOverdue);
        for room in &mut self.rooms {
            room.dismiss_successor();
            room.ask_to_stop();
        }
        self.finish_if_all_ended();
    }

    pub(super) fn finish_if_all_ended(&mut self) {
        let running = self
            .rooms
            .iter()
            .any(|room| matches!(room.server, Server::Running { .. }) || !room.leaving.is_empty());
        if running {
            return;
        }
        if let Phase::EndingServers(outcome) = &self.phase {
            let outcome = outcome.clone();
            self.over(outcome);
        }
    }

    pub(super) fn on_end_overdue(&mut self) {
        match &self.phase {
            Phase::EndingVcpu(_) => self.vcpu.kill(),
            Phase::EndingServers(outcome) => {
                let outcome = outcome.clone();
                self.over(outcome);
            }
            Phase::Starting { .. } | Phase::Running | Phase::Over(_) => {}
        }
    }

    /// Nothing more is waited for. Whatever still runs is killed, and its end seen: nothing is left behind.
    pub(super) fn over(&mut self, outcome: Outcome) {
        let mut last: Vec<&mut Process> = vec![&mut self.vcpu, &mut self.bus];
        for room in &mut self.rooms {
            if let Server::Running { process, .. } = &mut room.server {
                last.push(process);
            }
            last.extend(room.successor.as_mut().map(|successor| &mut successor.process));
            last.extend(room.leaving.iter_mut().map(|leaving| &mut leaving.process));
            last.extend(room.passt.as_mut());
        }
        for process in &last {
            process.kill();
        }
        for process in last {
            // A killed process that does not end (it waits for a dead disk) is init's, then.
            let _ = process.child.wait_at_most(END_DEADLINE);
        }
        self.keeper = None;
        self.input.restore();
        self.phase = Phase::Over(outcome);
    }

    pub(super) fn finished(&self) -> Option<Outcome> {
        match &self.phase {
            Phase::Over(outcome) => Some(outcome.clone()),
            Phase::Starting { .. } | Phase::Running | Phase::EndingVcpu(_) | Phase::EndingServers(_) => None,
        }
    }
}
