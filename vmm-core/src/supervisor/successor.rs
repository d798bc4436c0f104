#![forbid(unsafe_code)]
//! A server that waits beside the one that serves, and servers that serve no more.
//!
//! A successor is started, locked in, and told of the guest's memory like any server, and then waits: it touches neither
//! rings nor journal nor back end. `bulkhead-bus` lets it serve when it hears that the one before is gone. So taking
//! over costs no start of a process.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::Result;
use sandbox::ExitCause;
use vmbus::ipc::{PeerFault, ServerToSupervisor, SupervisorToServer};

use super::process::Process;
use super::program::Program;
use super::report;
use super::room::{RoomState, Server, ServerSettings};

/// Limit: from the word that it serves no more to the end of a server's process.
pub(super) const LEAVE_DEADLINE: Duration = Duration::from_secs(1);

/// A server that waits.
#[derive(Debug)]
pub struct Successor {
    pub process: Process,
    pub generation: u32,
    /// It is locked in.
    pub ready: bool,
    /// It has the guest's memory before it: nothing is left to do but to serve.
    pub warm: bool,
    /// Why it is being killed, or has failed.
    pub blame: Option<String>,
    /// At which look it was asked whether it still turns, if it has not answered since.
    pub asked: Option<u32>,
    /// It was started because the present one has died, and waits for nothing but the end of that one's I/O.
    pub is_restart: bool,
}

/// A server that gave up its place, or never had it, and has not ended.
#[derive(Debug)]
pub struct Leaving {
    pub process: Process,
    pub generation: u32,
}

impl Successor {
    pub fn is_prepared(&self) -> bool {
        self.ready && self.warm
    }

    /// For a person.
    pub fn state(&self) -> &'static str {
        match self.is_prepared() {
            true => "waits",
            false => "starts",
        }
    }

    /// Sends to one that is prepared; whether it took it.
    pub fn ask(&mut self, message: &SupervisorToServer) -> bool {
        let prepared = self.is_prepared();
        match &mut self.process.control {
            Some(control) if prepared => control.send(message, &[]).is_ok(),
            _ => false,
        }
    }

    /// Remembers why it ends, for the report. The first reason is the one.
    pub fn blame(&mut self, why: &str) {
        self.blame.get_or_insert_with(|| why.to_owned());
    }
}

impl RoomState {
    /// Starts a successor; `next`: for a swap, of this program. Returns the vCPU process's end of the socket
    /// between the two, and the successor's generation.
    pub fn start_successor(
        &mut self,
        next: Option<Program>,
        settings: &ServerSettings,
    ) -> Result<(OwnedFd, u32)> {
        self.prepare_fence();
        let program = match &next {
            Some(program) => program.clone(),
            None => {
                self.program.hold()?;
                self.program.clone()
            }
        };
        let (process, to_bus) = self.launch(&program, settings)?;
        self.next = next;
        let generation = self.newest;
        self.successor = Some(Successor {
            process,
            generation,
            ready: false,
            warm: false,
            blame: None,
            asked: None,
            is_restart: matches!(self.server, Server::Fencing { .. }),
        });
        Ok((to_bus, generation))
    }

    /// The next message of the successor; at the end of the socket none, and none any more.
    pub fn receive_from_successor(&mut self) -> Result<Option<ServerToSupervisor>, PeerFault> {
        match &mut self.successor {
            Some(successor) => successor.process.receive(),
            None => Ok(None),
        }
    }

    /// If the successor has ended: its generation, how long it lived, and how it ended. It is none any more.
    pub fn on_successor_end(&mut self) -> Option<(u32, Duration, String)> {
        let successor = self.successor.as_mut()?;
        let cause = successor.process.ended()?;
        for line in successor.process.lines() {
            report::relay(&self.plan.name, &line);
        }
        let successor = self.successor.take()?;
        let sentence = report::death(
            &self.plan.name,
            successor.generation,
            cause,
            successor.blame.as_deref(),
            successor.process.log.last_words(),
        );
        let lived = successor.process.started.elapsed();
        Some((successor.generation, lived, sentence))
    }

    /// The successor is not wanted any more: it is killed. Its generation, if there was one.
    pub fn dismiss_successor(&mut self) -> Option<u32> {
        let successor = self.successor.take()?;
        successor.process.kill();
        Some(self.let_leave(successor.process, successor.generation))
    }

    /// The present server has let go of everything: its place is free once its I/O is over. False: there is none.
    pub fn release(&mut self) -> bool {
        let Server::Running { process, .. } = &self.server else {
            return false;
        };
        let fencing = Server::Fencing {
            started: process.started,
            since: Instant::now(),
            planned: true,
            decision: None,
        };
        if let Server::Running { process, .. } = std::mem::replace(&mut self.server, fencing) {
            self.let_leave(process, self.generation);
        }
        true
    }

    fn let_leave(&mut self, mut process: Process, generation: u32) -> u32 {
        // It has nothing more to say, but its last lines.
        process.control = None;
        self.leaving.push(Leaving { process, generation });
        generation
    }

    /// It has had time enough.
    pub fn kill_leaving(&self, generation: u32) {
        for leaving in &self.leaving {
            if leaving.generation == generation {
                leaving.process.kill();
            }
        }
    }

    /// What a leaving server logs, and its end.
    pub fn on_leaving(&mut self, generation: u32) -> Option<ExitCause> {
        let position = self
            .leaving
            .iter()
            .position(|leaving| leaving.generation == generation)?;
        let process = &mut self.leaving.get_mut(position)?.process;
        let cause = process.ended();
        for line in process.lines() {
            report::relay(&self.plan.name, &line);
        }
        if cause.is_some() {
            self.leaving.remove(position);
        }
        cause
    }

    /// The successor takes the place of the server that is gone. False: there is none.
    pub fn promote(&mut self) -> bool {
        let Some(successor) = self.successor.take() else {
            return false;
        };
        self.generation = successor.generation;
        self.told_to_stop = None;
        self.server = Server::Running {
            process: successor.process,
            ready: successor.ready,
            blame: successor.blame,
        };
        true
    }
}
