#![forbid(unsafe_code)]
//! A device, what is held open for it, and the servers that live in it one after the other.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};
use nix::fcntl::{Flock, FlockArg};
use vmbus::ipc::hello::PROTOCOL;
use vmbus::ipc::{PeerFault, ServerToSupervisor, SupervisorToServer, SupervisorToVcpu, pair};
use vmbus::journal;
use vmbus::mem::sealed_memfd;
use vmbus::record::Recorder;

use super::backend::{Held, same_file};
use super::plan::{Backend, Plan, Room};
use super::policy::History;
use super::process::Process;
use super::report;
use crate::spec::VmSpec;

/// A device of the running VM.
#[derive(Debug)]
pub struct RoomState {
    pub plan: Room,
    pub server: Server,
    /// Of the server that is there, or was last; 0 before the first.
    pub generation: u32,
    pub history: History,
    pub passt: Option<Process>,
    /// `None`: passt has to be started first.
    held: Option<Held>,
    journal: OwnedFd,
    mtu: u16,
}

/// The server of a device.
#[derive(Debug)]
pub enum Server {
    Running {
        process: Process,
        ready: bool,
        /// Why it is being killed, or has failed.
        blame: Option<String>,
    },
    /// It has ended; its I/O may not have.
    Fencing { started: Instant, since: Instant },
    /// A timer runs for its successor. Also before the first.
    Pausing,
    /// It gets no successor.
    Held,
}

/// The end of a server.
#[derive(Debug)]
pub struct Death {
    pub sentence: String,
}

/// Opens the rooms of a plan; passt is started later.
pub fn open(plan: &Plan, spec: &VmSpec) -> Result<Vec<RoomState>> {
    let mut rooms = Vec::new();
    for room in &plan.rooms {
        let held = match room.backend {
            Backend::Passt => None,
            _ => Some(Held::open(&room.backend)?),
        };
        let journal = sealed_memfd("bulkhead-journal", journal::required_len())
            .map_err(|error| anyhow!("cannot make a journal: {error}"))?;
        rooms.push(RoomState {
            plan: room.clone(),
            server: Server::Pausing,
            generation: 0,
            history: History::new(spec.restart),
            passt: None,
            held,
            journal,
            mtu: 0,
        });
    }
    let nets = spec.nets.iter();
    let first_net = rooms.len() - nets.len();
    for (room, net) in rooms.iter_mut().skip(first_net).zip(nets) {
        room.mtu = net.mtu;
    }
    let disks: Vec<&Held> = rooms.iter().filter_map(|room| room.held.as_ref()).collect();
    if let Some((first, second)) = same_file(&disks) {
        bail!(
            "disks {} and {} are the same file: say readonly for both, or leave one out",
            first + 1,
            second + 1
        );
    }
    disks.into_iter().try_for_each(Held::own)?;
    Ok(rooms)
}

impl RoomState {
    /// Starts passt, if this room needs one that runs.
    pub fn start_passt(&mut self) -> Result<()> {
        if self.plan.backend == Backend::Passt && self.passt.is_none() {
            let (held, process) = Held::start_passt(self.mtu)?;
            self.held = Some(held);
            self.passt = Some(process);
        }
        Ok(())
    }

    /// Starts the next server; returns the vCPU process's end of the socket between the two.
    pub fn start_server(
        &mut self,
        programs: &Path,
        log: &str,
        require_full_sandbox: bool,
    ) -> Result<OwnedFd> {
        let held = self.held.as_ref().context("the backend is not open")?;
        let backend = held.for_server()?;
        let (to_server, to_vcpu) = pair().context("cannot make a socket pair")?;
        let program = programs.join(self.plan.program.file_name());
        let mut process = Process::start(&program, self.plan.device.saturating_add(1))?;
        let generation = self.generation.saturating_add(1);
        let recorder =
            Recorder::new_memory().map_err(|error| anyhow!("cannot make a flight recorder: {error}"))?;
        let start = SupervisorToServer::Start {
            protocol: PROTOCOL,
            generation,
            name: self.plan.name.clone(),
            config: self.plan.config.clone(),
            require_full_sandbox,
            log: log.to_owned(),
            fds: vec![
                "vcpu".to_owned(),
                "journal".to_owned(),
                self.plan.backend.fd_name().to_owned(),
                "recorder".to_owned(),
            ],
        };
        let fds = [
            to_server.as_fd(),
            self.journal.as_fd(),
            backend.as_fd(),
            recorder.as_fd(),
        ];
        if let Some(control) = &mut process.control {
            let sent = control.send(&start, &fds);
            sent.map_err(|error| anyhow!("cannot talk to {}: {error}", self.plan.name))?;
        }
        process.recorder = Some(recorder);
        self.generation = generation;
        self.server = Server::Running {
            process,
            ready: false,
            blame: None,
        };
        Ok(to_vcpu)
    }

    /// What the vCPU process is told of the device, together with the socket to its first server.
    pub fn introduction(&self) -> SupervisorToVcpu {
        SupervisorToVcpu::AddDevice {
            device: self.plan.device,
            name: self.plan.name.clone(),
            interface: self.plan.interface,
            instance: self.plan.instance,
            max_sub_channels: self.plan.max_sub_channels,
        }
    }

    /// The next message of the server; at the end of the socket none, and none any more.
    pub fn receive(&mut self) -> Result<Option<ServerToSupervisor>, PeerFault> {
        let Server::Running { process, .. } = &mut self.server else {
            return Ok(None);
        };
        let Some(control) = &mut process.control else {
            return Ok(None);
        };
        let received = match control.flush() {
            Ok(()) => control.recv::<ServerToSupervisor>(),
            Err(_) => Err(PeerFault::Eof),
        };
        match received {
            Ok(message) => Ok(message.map(|(message, _)| message)),
            Err(PeerFault::Eof) => {
                process.control = None;
                Ok(None)
            }
            Err(fault) => {
                process.control = None;
                Err(fault)
            }
        }
    }

    /// Sends to a server that serves; whether there is one that took it.
    pub fn ask(&mut self, message: &SupervisorToServer) -> bool {
        match &mut self.server {
            Server::Running {
                process:
                    Process {
                        control: Some(control),
                        ..
                    },
                ready: true,
                ..
            } => control.send(message, &[]).is_ok(),
            _ => false,
        }
    }

    /// Asks the server to end; one that cannot be asked is killed.
    pub fn ask_to_stop(&mut self) {
        if !self.ask(&SupervisorToServer::Stop) {
            self.server.kill();
        }
        if !matches!(self.server, Server::Running { .. }) {
            self.server = Server::Held;
        }
    }

    /// If the server has ended: how.
    pub fn on_end(&mut self) -> Option<Death> {
        let Server::Running { process, blame, .. } = &mut self.server else {
            return None;
        };
        let cause = process.ended()?;
        for line in process.lines() {
            report::relay(&self.plan.name, &line);
        }
        let sentence = report::death(
            &self.plan.name,
            self.generation,
            cause,
            blame.as_deref(),
            process.log.last_words(),
        );
        let started = process.started;
        self.server = Server::Fencing {
            started,
            since: Instant::now(),
        };
        Some(Death { sentence })
    }

    /// Whether nothing that the dead server began is still under way: see the theory of [`super`].
    pub fn is_fenced(&self) -> bool {
        if let Some(held) = &self.held
            && !held.is_free(self.journal.as_fd())
        {
            return false;
        }
        // A description of its own: a lock belongs to it, not to the file.
        let path = format!("/proc/self/fd/{}", self.journal.as_raw_fd());
        let Ok(journal) = std::fs::OpenOptions::new().read(true).write(true).open(path) else {
            return false;
        };
        Flock::lock(journal, FlockArg::LockExclusiveNonblock).is_ok()
    }
}

impl Server {
    pub fn is_ready(&self) -> bool {
        matches!(self, Server::Running { ready: true, .. })
    }

    pub fn set_ready(&mut self) {
        if let Server::Running { ready, .. } = self {
            *ready = true;
        }
    }

    /// Remembers why it ends, for the report. The first reason is the one.
    pub fn blame(&mut self, why: &str) {
        if let Server::Running { blame, .. } = self {
            blame.get_or_insert_with(|| why.to_owned());
        }
    }

    pub fn kill(&self) {
        if let Server::Running { process, .. } = self {
            process.kill();
        }
    }
}
