#![forbid(unsafe_code)]
//! The loop: what there is to wait for, and who handles what comes.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;

use super::process::Process;
use super::room::{RoomState, Server};
use super::timers::Timer;
use super::{Part, Phase, START_DEADLINE, Source, Supervisor, report};

/// Longer ones are waited for in parts.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);

impl Supervisor {
    /// Waits for events and handles them.
    pub(super) fn turn(&mut self) -> Result<()> {
        let events = self.wait()?;
        // The order in a list of events does not matter but for one: what a process said comes before its end.
        for (source, flags) in events {
            self.on_event(source, flags);
        }
        for timer in self.timers.due(Instant::now()) {
            self.on_timer(timer);
        }
        // A guest waits for others now.
        if self.followed.is_empty() {
            self.tell_keeper();
            self.store_reports();
        }
        Ok(())
    }

    pub(super) fn wait(&self) -> Result<Vec<(Source, PollFlags)>> {
        let (sources, mut fds): (Vec<Source>, Vec<PollFd<'_>>) = self.sources().into_iter().unzip();
        // Not in milliseconds, as `poll(2)` counts: a guest waits for some of these timers.
        let timeout = self.timers.next().map(|next| {
            let left = next.saturating_duration_since(Instant::now());
            TimeSpec::from_duration(left.min(LONGEST_WAIT))
        });
        match ppoll(&mut fds, timeout, None) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => bail!("poll failed: {}", errno.desc()),
        }
        let flags = fds.iter().map(|fd| fd.revents().unwrap_or(PollFlags::empty()));
        Ok(sources
            .into_iter()
            .zip(flags)
            .filter(|(_, flags)| !flags.is_empty())
            .collect())
    }

    pub(super) fn sources(&self) -> Vec<(Source, PollFd<'_>)> {
        let mut list = vec![(
            Source::Signals,
            PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
        )];
        if self.has_room_for_client() {
            list.push((
                Source::Listener,
                PollFd::new(self.listener.as_fd(), PollFlags::POLLIN),
            ));
        }
        if let Some(stdin) = self.input.wants_typed() {
            list.push((Source::Typed, PollFd::new(stdin, PollFlags::POLLIN)));
        }
        if let Some(pipe) = self.input.wants_pipe() {
            list.push((Source::InputPipe, PollFd::new(pipe, PollFlags::POLLOUT)));
        }
        for (index, client) in self.clients.iter().enumerate() {
            list.push((
                Source::Client(index),
                PollFd::new(client.socket.as_fd(), interest(client.socket.has_queued())),
            ));
        }
        // Once its end was handled there is nothing more to hear of it, and its descriptor stays readable.
        if !matches!(self.phase, Phase::EndingServers(_) | Phase::Over(_)) {
            add_process(&mut list, &self.vcpu, Source::Vcpu);
        }
        if !self.bus_ended {
            add_process(&mut list, &self.bus, Source::Bus);
        }
        if let Some(keeper) = &self.keeper {
            add_process(&mut list, &keeper.process, Source::Keeper);
        }
        for (index, room) in self.rooms.iter().enumerate() {
            if let Server::Running { process, .. } = &room.server {
                add_process(&mut list, process, |part| Source::Server(index, part));
            }
            if let Some(successor) = &room.successor {
                add_process(&mut list, &successor.process, |part| {
                    Source::Successor(index, part)
                });
            }
            for leaving in &room.leaving {
                let generation = leaving.generation;
                add_process(&mut list, &leaving.process, |part| {
                    Source::Leaving(index, generation, part)
                });
            }
            if let Some(passt) = &room.passt {
                add_process(&mut list, passt, |part| Source::Passt(index, part));
            }
        }
        list
    }

    pub(super) fn on_event(&mut self, source: Source, flags: PollFlags) {
        self.catch_up();
        match source {
            Source::Signals => self.on_signals(),
            Source::Typed => self.on_typed(),
            Source::InputPipe => self.input.flush(),
            Source::Listener => self.on_new_client(),
            Source::Client(index) => self.on_client(index),
            Source::Vcpu(Part::Control) => self.on_vcpu_control(),
            Source::Vcpu(Part::Log) => show_lines("vcpu", &mut self.vcpu),
            Source::Vcpu(Part::End) => self.on_vcpu_end(),
            Source::Bus(part) => self.on_bus(part),
            Source::Keeper(part) => self.on_keeper(part),
            Source::Server(index, Part::Control) => self.on_server_control(index),
            Source::Server(index, Part::Log) => {
                if let Some(room) = self.rooms.get_mut(index)
                    && let Server::Running { process, .. } = &mut room.server
                {
                    show_lines(&room.plan.name, process);
                }
            }
            Source::Server(index, Part::End) => self.on_server_end(index),
            Source::Successor(index, Part::Control) => self.on_successor_control(index),
            Source::Successor(index, Part::Log) => {
                if let Some(room) = self.rooms.get_mut(index)
                    && let Some(successor) = &mut room.successor
                {
                    show_lines(&room.plan.name, &mut successor.process);
                }
            }
            Source::Successor(index, Part::End) => self.on_successor_end(index),
            Source::Leaving(index, generation, _) => self.on_leaving(index, generation),
            Source::Passt(index, Part::End) => self.on_passt_end(index),
            Source::Passt(index, Part::Control | Part::Log) => {
                if let Some(RoomState {
                    passt: Some(passt),
                    plan,
                    ..
                }) = self.rooms.get_mut(index)
                {
                    let lines = passt.lines();
                    // It has much to say at each start; what it said last is told if it dies.
                    if is_verbose(&self.settings.log) {
                        lines
                            .iter()
                            .for_each(|line| report::relay(&format!("{} passt", plan.name), line));
                    }
                }
            }
        }
        // Nothing is asked of a descriptor that only says that it is broken; its owner has just seen that, too.
        debug_assert!(!flags.is_empty());
    }

    pub(super) fn on_timer(&mut self, timer: Timer) {
        self.catch_up();
        match timer {
            // That was it.
            Timer::Breather => {}
            Timer::StartOverdue => self.on_start_overdue(),
            Timer::ReadyOverdue { room, generation } => {
                self.kill_server(room, generation, "did not get ready in time")
            }
            Timer::StopOverdue { room, generation } => self.on_stop_overdue(room, generation),
            Timer::LeaveOverdue { room, generation } => {
                if let Some(room) = self.rooms.get(room) {
                    room.kill_leaving(generation);
                }
            }
            Timer::Fence { room } => self.try_fence(room),
            Timer::Replace { room } => self.stop_predecessor(room),
            Timer::Restart { room } => self.restart_server(room),
            Timer::Standby { room } => self.on_standby_due(room),
            Timer::Keeper => self.start_keeper(),
            Timer::Probe => self.on_probe_due(),
            Timer::VcpuEndOverdue => self.on_bus_lost("bulkhead-bus ended by itself".to_owned()),
            Timer::EndOverdue => self.on_end_overdue(),
            Timer::InspectOverdue => self.finish_inspection(),
        }
    }

    pub(super) fn on_start_overdue(&mut self) {
        let Phase::Starting {
            vcpu_ready,
            bus_ready,
            ..
        } = self.phase
        else {
            return;
        };
        let mut waiting: Vec<&str> = Vec::new();
        if !vcpu_ready {
            waiting.push("vcpu");
        }
        if !bus_ready {
            waiting.push("bus");
        }
        if self.waits_for_keeper() {
            waiting.push("keeper");
        }
        waiting.extend(
            self.rooms
                .iter()
                .filter(|room| !room.server.is_ready())
                .map(|room| room.plan.name.as_str()),
        );
        let seconds = START_DEADLINE.as_secs();
        self.fail_start(format!(
            "not ready after {seconds} seconds: {}",
            waiting.join(", ")
        ));
    }
}

/// Whether a person asked for more than warnings.
fn is_verbose(log: &str) -> bool {
    ["info", "debug", "trace"].iter().any(|level| log.contains(level))
}

fn interest(queued: bool) -> PollFlags {
    if queued {
        PollFlags::POLLIN | PollFlags::POLLOUT
    } else {
        PollFlags::POLLIN
    }
}

fn add_process<'a>(
    list: &mut Vec<(Source, PollFd<'a>)>,
    process: &'a Process,
    source: impl Fn(Part) -> Source,
) {
    if let Some(control) = &process.control {
        list.push((
            source(Part::Control),
            PollFd::new(control.as_fd(), interest(control.has_queued())),
        ));
    }
    if let Some(log) = &process.log.fd {
        list.push((source(Part::Log), PollFd::new(log.as_fd(), PollFlags::POLLIN)));
    }
    list.push((
        source(Part::End),
        PollFd::new(process.child.as_fd(), PollFlags::POLLIN),
    ));
}

pub(super) fn show_lines(name: &str, process: &mut Process) {
    for line in process.lines() {
        report::relay(name, &line);
    }
}
