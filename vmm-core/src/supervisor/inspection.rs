#![forbid(unsafe_code)]
//! Collecting what all processes of the VM know about themselves.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use vmbus::ipc::{Socket, SupervisorToBus, SupervisorToServer, SupervisorToVcpu};

use super::control::{Reply, replies};
use super::room::Server;
use super::timers::Timer;
use super::{Phase, Supervisor, process};

/// Limit: how long the answers of all are waited for; what has come then is shown.
const DEADLINE: Duration = Duration::from_secs(1);

/// Limit: pairs of one process.
const MAX_ENTRIES: usize = 4096;

/// Somebody at the control socket.
#[derive(Debug)]
pub struct Client {
    pub socket: Socket,
    pub waits_for_inspection: bool,
    /// Has asked for a swap in this room.
    pub waits_for_swap: Option<usize>,
    /// Wants to hear of each event.
    pub follows: bool,
}

/// Limit: what may wait for a client that does not read.
const MAX_WAITING_BYTES: usize = 1024 * 1024;

impl Client {
    /// Sends; false: the client is gone or does not read.
    pub fn tell(&mut self, reply: &Reply) -> bool {
        self.socket.send(reply, &[]).is_ok() && self.socket.queued_bytes() <= MAX_WAITING_BYTES
    }
}

/// An inspection under way.
#[derive(Debug)]
pub struct Inspection {
    /// Processes that have not answered.
    waiting: BTreeSet<String>,
    entries: Vec<(String, String)>,
}

impl Supervisor {
    /// Asks all processes; a client that comes later shares the answers.
    pub(super) fn begin_inspection(&mut self) {
        if self.inspection.is_some() {
            return;
        }
        let mut waiting = BTreeSet::from(["vcpu".to_owned(), "bus".to_owned()]);
        for room in &mut self.rooms {
            if room.ask(&SupervisorToServer::Inspect) {
                waiting.insert(room.plan.name.clone());
            }
        }
        self.inspection = Some(Inspection {
            waiting,
            entries: self.own_entries(),
        });
        self.timers.set(Instant::now() + DEADLINE, Timer::InspectOverdue);
        self.send_to_vcpu(&SupervisorToVcpu::Inspect);
        self.send_to_bus(&SupervisorToBus::Inspect, &[]);
    }

    pub(super) fn on_inspected(&mut self, name: &str, entries: Vec<(String, String)>) {
        let Some(inspection) = &mut self.inspection else {
            return;
        };
        if !inspection.waiting.remove(name) {
            return;
        }
        for (path, value) in entries.into_iter().take(MAX_ENTRIES) {
            let path = format!("{name}.{}", process::printable(&path));
            inspection.entries.push((path, process::printable(&value)));
        }
        if inspection.waiting.is_empty() {
            self.finish_inspection();
        }
    }

    pub(super) fn finish_inspection(&mut self) {
        self.timers.clear(Timer::InspectOverdue);
        let Some(mut inspection) = self.inspection.take() else {
            return;
        };
        for name in inspection.waiting {
            inspection.entries.push((name, "(did not answer)".to_owned()));
        }
        let replies = replies(inspection.entries);
        for client in &mut self.clients {
            if std::mem::take(&mut client.waits_for_inspection) {
                // One that does not take its answers is found broken at its next event.
                for reply in &replies {
                    if client.socket.send(reply, &[]).is_err() {
                        break;
                    }
                }
            }
        }
    }

    fn own_entries(&self) -> Vec<(String, String)> {
        let mut entries = vec![
            ("supervisor.process".to_owned(), nix::unistd::getpid().to_string()),
            (
                "supervisor.folder".to_owned(),
                self.folder.path().display().to_string(),
            ),
            ("supervisor.state".to_owned(), self.state().to_owned()),
            (
                "supervisor.vcpu.process".to_owned(),
                self.vcpu.child.pid.to_string(),
            ),
            (
                "supervisor.bus.process".to_owned(),
                self.bus.child.pid.to_string(),
            ),
        ];
        if let Phase::Starting { vcpu_ready, .. } = self.phase {
            entries.push(("supervisor.vcpu.ready".to_owned(), vcpu_ready.to_string()));
        }
        if let Some(keeper) = &self.keeper {
            let process = keeper.process.child.pid.to_string();
            entries.push(("supervisor.keeper.process".to_owned(), process));
        }
        for room in &self.rooms {
            let path = format!("supervisor.{}", room.plan.name);
            let mut add = |key: &str, value: String| entries.push((format!("{path}.{key}"), value));
            add("generation", room.generation.to_string());
            add("instance", room.plan.instance.to_string());
            match &room.server {
                Server::Running { process, ready, .. } => {
                    add("state", if *ready { "serves" } else { "starts" }.to_owned());
                    add("process", process.child.pid.to_string());
                    add("seconds", process.started.elapsed().as_secs().to_string());
                }
                Server::Fencing { .. } => add("state", "ended, its I/O is not over".to_owned()),
                Server::Pausing => add("state", "ended, a successor comes".to_owned()),
                Server::Held => add("state", "held".to_owned()),
            }
            if let Some(successor) = &room.successor {
                add("successor.generation", successor.generation.to_string());
                add("successor.process", successor.process.child.pid.to_string());
                add("successor.state", successor.state().to_owned());
            }
            if let Some(passt) = &room.passt {
                add("passt.process", passt.child.pid.to_string());
            }
        }
        entries
    }
}
