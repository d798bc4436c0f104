#![forbid(unsafe_code)]
//! `bulkhead-vcpu`: what it says, and its end.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::Instant;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmbus::ipc::{ExitCause as VmExit, OnReset, SupervisorToVcpu, VcpuToSupervisor};

use super::chronicle::Event;
use super::events::show_lines;
use super::oom::Finding;
use super::process::{Budget, Spent, last_words};
use super::report::{Outcome, say};
use super::{MESSAGES_PER_TURN, Phase, Reporter, Supervisor, process, report, tell};
use crate::spec::OnCrash;

/// Limit: crashes and resets of the guest that are told of in a second.
const GUEST_EVENTS_PER_SECOND: u32 = 4;

pub(super) fn guest_budget() -> Budget {
    Budget::new(GUEST_EVENTS_PER_SECOND, Instant::now())
}

impl Supervisor {
    /// Sends; a vCPU process that does not take messages is killed, which ends the VM.
    pub(super) fn send_to_vcpu(&mut self, message: &SupervisorToVcpu) {
        if let Err(error) = tell("bulkhead-vcpu", &mut self.vcpu, message, &[])
            && self.vcpu_said.is_none()
        {
            self.kill_vcpu(format!("{error:#}"));
        }
    }

    /// Its end follows, and that of the VM.
    fn kill_vcpu(&mut self, why: String) {
        self.vcpu_failed.get_or_insert(why);
        self.vcpu.kill();
    }

    pub(super) fn on_vcpu_control(&mut self) {
        for _ in 0..MESSAGES_PER_TURN {
            match self.vcpu.receive() {
                Ok(Some(message)) => self.on_vcpu_message(message),
                // After the end of its socket its own follows, and says why.
                Ok(None) => return,
                Err(fault) => self.kill_vcpu(format!("it does not speak our protocol: {fault}")),
            }
        }
    }

    pub(super) fn on_vcpu_message(&mut self, message: VcpuToSupervisor) {
        match message {
            VcpuToSupervisor::Ready { report } => self.on_ready(report, Reporter::Vcpu),
            VcpuToSupervisor::Started => {}
            VcpuToSupervisor::Failed { message } => self.vcpu_failed = Some(process::printable(&message)),
            VcpuToSupervisor::GuestPowerOff => {}
            VcpuToSupervisor::GuestReset { count } => {
                if self.on_reset == OnReset::Reset {
                    self.crashed = false;
                }
                let said = format!("the guest reset itself ({count} so far)");
                self.tell_of_guest(&said, Event::GuestReset { count });
            }
            VcpuToSupervisor::GuestCrash { parameters, text } => {
                self.crashed = true;
                let said = report::guest_crash(&parameters, text.as_deref());
                let text = text.unwrap_or_default();
                self.tell_of_guest(&said, Event::GuestCrash { parameters, text });
                if self.on_crash == OnCrash::Exit {
                    self.end(Outcome::GuestCrashed);
                }
            }
            VcpuToSupervisor::Exited { cause } => self.vcpu_said = Some(cause),
            VcpuToSupervisor::Inspect { entries } => self.on_inspected("vcpu", entries),
        }
    }

    fn tell_of_guest(&mut self, said: &str, event: Event) {
        match self.guest_budget.spend(Instant::now()) {
            Spent::Yes => {
                say(said);
                self.note(event);
            }
            Spent::FirstRefused => say("the guest crashes or resets itself too often to tell of each time"),
            Spent::No => {}
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
                let why = self.vcpu_failed.take().unwrap_or_else(|| self.vcpu_died(cause));
                return self.fail_start(why);
            }
            Phase::EndingVcpu(outcome) => outcome,
            phase @ (Phase::EndingServers(_) | Phase::Over(_)) => {
                self.phase = phase;
                return;
            }
            Phase::Running => {
                let failed = self.vcpu_failed.clone();
                let outcome = self.outcome_of(cause);
                if matches!(outcome, Outcome::VcpuDied(_)) {
                    self.keep_report(self.report_of("vcpu", &self.vcpu, cause, failed));
                }
                self.note(Event::Ending {
                    why: outcome.to_string(),
                });
                outcome
            }
        };
        self.end_servers(outcome);
    }

    fn vcpu_died(&self, cause: sandbox::ExitCause) -> String {
        let cause = Finding::tell(self.oom.finding(), cause, self.vcpu_failed.is_some());
        last_words("bulkhead-vcpu", &self.vcpu, cause)
    }

    pub(super) fn outcome_of(&mut self, cause: sandbox::ExitCause) -> Outcome {
        match self.vcpu_said.take() {
            Some(VmExit::PowerOff | VmExit::Reset) if self.crashed => Outcome::GuestCrashed,
            Some(VmExit::PowerOff | VmExit::Reset) => Outcome::PoweredOff,
            Some(VmExit::Console | VmExit::Quit) => Outcome::Stopped,
            Some(VmExit::Fault { message }) => Outcome::VcpuDied(process::printable(&message)),
            None => {
                // A control plane that failed takes it along.
                let bus_failed = self.bus_failed.take().map(|why| format!("bulkhead-bus: {why}"));
                let failed = self.vcpu_failed.take().or(bus_failed);
                let died = self.vcpu_died(cause);
                Outcome::VcpuDied(failed.map_or(died.clone(), |why| format!("{died}; {why}")))
            }
        }
    }
}

pub(super) fn has_more(fd: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
    matches!(poll(&mut fds, PollTimeout::ZERO), Ok(1..))
}
