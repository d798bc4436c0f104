#![forbid(unsafe_code)]
//! What the keeper gets, and what follows its death. The one place that lists what a supervisor holds: at the end of
//! each turn the keeper is told what has changed.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use super::keeper::mirror::Keeper;
use super::keeper::{FromKeeper, LISTENER, TERMINAL};
use super::process::Process;
use super::report::say;
use super::room::{RoomState, Server};
use super::saved::Texts;
use super::timers::Timer;
use super::{Part, Phase, Reporter, Supervisor, policy, report};

/// Descriptors by name.
type Belongings<'a> = Vec<(String, BorrowedFd<'a>)>;

impl Supervisor {
    /// Everything that a new supervisor would need.
    fn belongings(&self) -> Belongings<'_> {
        let mut all: Belongings<'_> = vec![
            ("folder.lock".to_owned(), self.folder.lock()),
            ("control".to_owned(), self.listener.as_fd()),
            (LISTENER.to_owned(), self.adopt_listener.as_fd()),
        ];
        all.extend(self.input.pipe().map(|pipe| ("console".to_owned(), pipe)));
        let terminal = self.input.raw_terminal();
        all.extend(terminal.map(|(terminal, _)| (TERMINAL.to_owned(), terminal)));
        add(&mut all, "vcpu", &self.vcpu);
        add(&mut all, "bus", &self.bus);
        for room in &self.rooms {
            add_room(&mut all, room);
        }
        all
    }

    /// What a new supervisor would have to know.
    fn texts(&self, keeper: &Process) -> Texts {
        let mut texts = match self.phase {
            Phase::Running => self.save(keeper),
            _ => Texts::new(),
        };
        let terminal = self.input.raw_terminal();
        texts.extend(terminal.map(|(_, to_restore)| (TERMINAL.to_owned(), to_restore.to_owned())));
        texts
    }

    /// Tells the keeper what has changed.
    pub(super) fn tell_keeper(&mut self) {
        let Some(mut keeper) = self.keeper.take() else {
            return;
        };
        let texts = self.texts(&keeper.process);
        if let Err(error) = keeper.tell(&self.belongings(), &texts) {
            // Its end follows.
            say(&format!("the keeper is killed: {error}"));
            keeper.process.kill();
            keeper.process.control = None;
        }
        self.keeper = Some(keeper);
    }

    /// The guest does not wait for the keeper, in whose socket all is safe, unless its sandbox matters.
    pub(super) fn waits_for_keeper(&self) -> bool {
        self.settings.strictness.require_full && !self.keeper.as_ref().is_some_and(|keeper| keeper.ready)
    }

    pub(super) fn on_keeper(&mut self, part: Part) {
        match part {
            Part::Control => self.on_keeper_control(),
            Part::Log => {
                if let Some(keeper) = &mut self.keeper {
                    for line in keeper.process.lines() {
                        report::relay("keeper", &line);
                    }
                }
            }
            Part::End => self.on_keeper_end(),
        }
    }

    fn on_keeper_control(&mut self) {
        let Some(keeper) = &mut self.keeper else {
            return;
        };
        match keeper.process.receive() {
            Ok(Some(FromKeeper::Ready { report })) => {
                keeper.ready = true;
                self.on_ready(report, Reporter::Other);
            }
            Ok(_) if keeper.process.control.is_some() => {}
            // One that does not listen holds nothing. If it has ended, that is handled by itself.
            Ok(_) | Err(_) => keeper.process.kill(),
        }
    }

    fn on_keeper_end(&mut self) {
        let Some(keeper) = &mut self.keeper else {
            return;
        };
        let Some(cause) = keeper.process.ended() else {
            return;
        };
        for line in keeper.process.lines() {
            report::relay("keeper", &line);
        }
        let started = self.timers.milliseconds(keeper.process.started);
        self.keeper = None;
        match self.phase {
            Phase::Starting { .. } => self.fail_start(format!("the keeper {cause}")),
            Phase::Running => {
                say(&format!("the keeper {cause}; another one is started"));
                self.start_keeper_again(started);
            }
            Phase::EndingVcpu(_) | Phase::EndingServers(_) | Phase::Over(_) => {}
        }
    }

    pub(super) fn start_keeper(&mut self) {
        if self.keeper.is_some() || !matches!(self.phase, Phase::Running) {
            return;
        }
        match Keeper::start(&self.name) {
            Ok(keeper) => self.keeper = Some(keeper),
            Err(error) => {
                say(&format!("there is no keeper: {error:#}"));
                self.start_keeper_again(self.timers.milliseconds(Instant::now()));
            }
        }
    }

    /// Like servers, but it is never given up: without it the VM ends with its supervisor.
    fn start_keeper_again(&mut self, started_ms: u64) {
        let now = Instant::now();
        let pause = match self
            .keeper_history
            .on_death(started_ms, self.timers.milliseconds(now))
        {
            policy::Decision::Restart { after_ms } => Duration::from_millis(after_ms),
            policy::Decision::Hold { within_ms, .. } => Duration::from_millis(within_ms),
        };
        self.timers.set(now + pause, Timer::Keeper);
    }
}

fn add<'a>(all: &mut Belongings<'a>, name: &str, process: &'a Process) {
    all.extend(process.held().map(|(part, fd)| (format!("{name}.{part}"), fd)));
}

fn add_room<'a>(all: &mut Belongings<'a>, room: &'a RoomState) {
    let name = &room.plan.name;
    let held = room.held().into_iter();
    all.extend(held.map(|(part, fd)| (format!("{name}.{part}"), fd)));
    if let Server::Running { process, .. } = &room.server {
        add(all, &format!("{name}.{}", room.generation), process);
    }
    if let Some(successor) = &room.successor {
        add(
            all,
            &format!("{name}.{}", successor.generation),
            &successor.process,
        );
    }
    for leaving in &room.leaving {
        add(all, &format!("{name}.{}", leaving.generation), &leaving.process);
    }
    if let Some(passt) = &room.passt {
        add(all, &format!("{name}.passt.{}", passt.child.pid), passt);
    }
}
