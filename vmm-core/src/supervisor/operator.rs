#![forbid(unsafe_code)]
//! What an operator is told (events, crash reports), and what only an operator can do (resume a device).

use std::path::PathBuf;
use std::time::Instant;

use sandbox::ExitCause;

use super::chronicle::{Event, read_after};
use super::control::{Reply, event_replies};
use super::crash_report::{self, CrashReport};
use super::process::Process;
use super::program::Program;
use super::report::{Outcome, say};
use super::room::{Death, Server};
use super::timers::Timer;
use super::{Phase, Supervisor};

impl Supervisor {
    /// Writes an event down and tells those who follow. One who does not read loses its connection; nobody waits.
    pub(super) fn note(&mut self, event: Event) {
        let reply = Reply::Events(vec![self.chronicle.add(event)]);
        self.clients
            .retain_mut(|client| !client.follows || client.tell(&reply));
    }

    /// Says and notes that a server has died. The report is stored when its successor has been started.
    pub(super) fn note_death(&mut self, death: Death) {
        let mut report = death.report;
        report.oom = self.oom.finding();
        say(&death.sentence);
        if report.oom.is_some_and(|finding| finding.was_at_work()) {
            say(&format!("{} was {}", report.name, report.cause()));
        }
        self.note(Event::Death {
            device: report.name.clone(),
            generation: report.generation,
            cause: report.cause(),
            why: report.blame.clone(),
            report: Some(self.next_report),
        });
        self.keep_report(report);
    }

    /// What is known of the end of a process that is no server. The end of the VM tells of it.
    pub(super) fn report_of(
        &self,
        name: &str,
        process: &Process,
        cause: ExitCause,
        blame: Option<String>,
    ) -> CrashReport {
        CrashReport {
            name: name.to_owned(),
            generation: 0,
            process: process.child.pid.as_raw(),
            cause,
            blame,
            uptime: process.started.elapsed(),
            deaths: 1,
            oom: self.oom.finding(),
            log: process.log.last_lines(),
            recorder: None,
        }
    }

    /// Has a report stored, under the next number, once nothing is more urgent.
    pub(super) fn keep_report(&mut self, report: CrashReport) {
        self.reports.push((self.next_report, report));
        self.next_report = self.next_report.saturating_add(1);
    }

    pub(super) fn store_reports(&mut self) {
        for (number, report) in std::mem::take(&mut self.reports) {
            if let Err(error) = report.store(self.folder.path(), number) {
                say(&format!("cannot keep crash report {number}: {error}"));
            }
        }
    }

    /// The VM has ended: says whether there are reports of it.
    pub(super) fn tell_of_reports(&self) {
        let stored = crash_report::list(self.folder.path());
        let own = stored.iter().filter(|(number, _)| *number >= self.first_report);
        let name = &self.name;
        match own.count() {
            0 => {}
            1 => say(&format!("a crash report is kept: bulkhead crashes {name}")),
            count => say(&format!(
                "{count} crash reports are kept: bulkhead crashes {name}"
            )),
        }
    }

    /// A client wants the events after a number, and with `follow` those to come.
    pub(super) fn on_events_wanted(&mut self, index: usize, after: u64, follow: bool) {
        let replies = event_replies(&read_after(self.folder.path(), after), follow);
        if let Some(client) = self.clients.get_mut(index) {
            client.follows = follow;
        }
        self.answer_client(index, &replies);
    }

    /// The device gets no server; or the VM ends, if it was so ordered.
    pub(super) fn hold(&mut self, index: usize, why: &str) {
        let Some(room) = self.rooms.get_mut(index) else {
            return;
        };
        let device = room.plan.name.clone();
        if room.history.never_holds() {
            say(&format!("{why}: {device} is not held, and gets the next one"));
            room.history.forget();
            room.server = Server::Pausing;
            return self.timers.set(Instant::now(), Timer::Restart { room: index });
        }
        room.server = Server::Held;
        if room.history.ends_the_vm() {
            return self.end(Outcome::DeviceLost(why.to_owned()));
        }
        say(&format!(
            "{device} is held: {why}; the guest waits for it until you say bulkhead device resume"
        ));
        let why = why.to_owned();
        self.note(Event::Held { device, why });
    }

    /// Starts a server for a held device, of another program from now on if one is named.
    pub(super) fn resume(&mut self, device: &str, program: Option<PathBuf>) -> Reply {
        let Some(index) = self.rooms.iter().position(|room| room.plan.name == device) else {
            let names: Vec<&str> = self.rooms.iter().map(|room| room.plan.name.as_str()).collect();
            return Reply::Refused(format!(
                "there is no device {device:?}; there are: {}",
                names.join(", ")
            ));
        };
        let Some(room) = self
            .rooms
            .get_mut(index)
            .filter(|_| matches!(self.phase, Phase::Running))
        else {
            return Reply::Refused("the VM does not run".to_owned());
        };
        if !matches!(room.server, Server::Held) {
            return Reply::Refused(format!("{device} is not held"));
        }
        match program.map(|program| Program::open(&program)) {
            Some(Ok(program)) => room.set_program(program),
            Some(Err(error)) => return Reply::Refused(format!("{error:#}")),
            None => room.look_again(),
        }
        room.history.forget();
        room.server = Server::Pausing;
        let device = device.to_owned();
        self.note(Event::Resumed { device });
        self.timers.set(Instant::now(), Timer::Restart { room: index });
        Reply::Done
    }
}
