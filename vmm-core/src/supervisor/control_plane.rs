#![forbid(unsafe_code)]
//! `bulkhead-bus`: what it is told and says, and its end.

use std::os::fd::BorrowedFd;
use std::time::Instant;

use sandbox::ExitCause;

use vmbus::ipc::{BusToSupervisor, SupervisorToBus};

use super::events::show_lines;
use super::oom::Finding;
use super::process::last_words;
use super::report::Outcome;
use super::timers::Timer;
use super::{END_DEADLINE, MESSAGES_PER_TURN, Part, Phase, Reporter, Supervisor, process, tell};

impl Supervisor {
    /// Sends; a control plane that does not take messages is killed, which ends the VM.
    pub(super) fn send_to_bus(&mut self, message: &SupervisorToBus, fds: &[BorrowedFd<'_>]) {
        let attached = match message {
            SupervisorToBus::ServerAttached { device, generation } => Some((*device, *generation)),
            _ => None,
        };
        if attached.is_some() {
            // A supervisor that is killed after this has told its keeper that there may be a server of that generation.
            self.tell_keeper();
        }
        let told = tell("bulkhead-bus", &mut self.bus, message, fds);
        let is_taken = self
            .bus
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
            && matches!(self.phase, Phase::Running)
        {
            self.kill_bus(format!("{error:#}"));
        }
    }

    /// Its end follows, and that of the VM.
    pub(super) fn kill_bus(&mut self, why: String) {
        self.bus_failed.get_or_insert(why);
        self.bus.kill();
    }

    pub(super) fn on_bus(&mut self, part: Part) {
        match part {
            Part::Control => self.on_bus_control(),
            Part::Log => show_lines("bus", &mut self.bus),
            Part::End => self.on_bus_end(),
        }
    }

    fn on_bus_control(&mut self) {
        for _ in 0..MESSAGES_PER_TURN {
            match self.bus.receive() {
                Ok(Some(message)) => self.on_bus_message(message),
                // After the end of its socket its own follows, and says why.
                Ok(None) => return,
                Err(fault) => self.kill_bus(format!("it does not speak our protocol: {fault}")),
            }
        }
    }

    fn on_bus_message(&mut self, message: BusToSupervisor) {
        match message {
            BusToSupervisor::Ready { report } => self.on_ready(report, Reporter::Bus),
            BusToSupervisor::Failed { message } => self.bus_failed = Some(process::printable(&message)),
            BusToSupervisor::ServerMisbehaves {
                device,
                generation,
                why,
            } => self.kill_server_of(
                device,
                generation,
                &format!("bulkhead-bus says: {}", process::printable(&why)),
            ),
            BusToSupervisor::ServerSlow {
                device,
                generation,
                waiting_for,
            } => {
                let why = format!("did not answer in time: {}", process::printable(&waiting_for));
                self.kill_server_of(device, generation, &why);
            }
            BusToSupervisor::Inspect { entries } => self.on_inspected("bus", entries),
            BusToSupervisor::Pong => self.bus_asked = None,
        }
    }

    fn on_bus_end(&mut self) {
        let Some(cause) = self.bus.ended() else {
            return;
        };
        self.on_bus_control();
        show_lines("bus", &mut self.bus);
        self.bus_ended = true;
        let in_order = match cause {
            ExitCause::Exited(status) => status == 0,
            // An earlier supervisor had started it; if nobody complained of it, it may have been.
            ExitCause::Unknown => self.bus_failed.is_none(),
            ExitCause::Signaled { .. } => false,
        };
        if in_order {
            // It sees the end of `bulkhead-vcpu` before we do.
            let overdue = Instant::now() + END_DEADLINE;
            return self.timers.set(overdue, Timer::VcpuEndOverdue);
        }
        // A start that fails has its sentence, whichever process has said it first.
        let has_run = !matches!(
            self.phase,
            Phase::Starting { .. }
                | Phase::EndingVcpu(Outcome::Setup(_))
                | Phase::EndingServers(Outcome::Setup(_))
                | Phase::Over(Outcome::Setup(_))
        );
        if has_run {
            let failed = self.bus_failed.clone();
            self.keep_report(self.report_of("bus", &self.bus, cause, failed));
        }
        // Then what it has said itself is all that a person needs.
        let refused = matches!(self.phase, Phase::Starting { .. }) && matches!(cause, ExitCause::Exited(_));
        let cause = Finding::tell(self.oom.finding(), cause, self.bus_failed.is_some());
        let died = last_words("bulkhead-bus", &self.bus, cause);
        let why = match self.bus_failed.take() {
            Some(why) if refused => why,
            Some(why) => format!("{died}; {why}"),
            None => died,
        };
        self.on_bus_lost(why);
    }

    /// Without it the guest can open no channel any more, and no server can be replaced.
    pub(super) fn on_bus_lost(&mut self, why: String) {
        match self.phase {
            Phase::Starting { .. } => self.fail_start(why),
            Phase::Running => self.end(Outcome::VcpuDied(why)),
            Phase::EndingVcpu(_) | Phase::EndingServers(_) | Phase::Over(_) => {}
        }
    }
}
