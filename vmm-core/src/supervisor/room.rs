#![forbid(unsafe_code)]
//! A device, what is held open for it, and the servers that live in it one after the other.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};
use nix::fcntl::{Flock, FlockArg};
use sandbox::{ExitCause, Lasting, Namespaces};
use vmbus::ipc::hello::PROTOCOL;
use vmbus::ipc::{PeerFault, SendError, ServerToSupervisor, SupervisorToBus, SupervisorToServer, pair};
use vmbus::journal;
use vmbus::mem::sealed_memfd;
use vmbus::record::Recorder;

use super::backend::{Held, same_file};
use super::control::DeviceLine;
use super::crash_report::CrashReport;
use super::liveness::Probe;
use super::plan::{Backend, Plan, Room};
use super::policy::{Decision, History};
use super::process::Process;
use super::program::Program;
use super::report;
use super::standby::StandbyEnds;
use super::successor::{Leaving, Successor};
use super::swap::Swap;
use crate::spec::VmSpec;

/// A device of the running VM.
#[derive(Debug)]
pub struct RoomState {
    pub plan: Room,
    /// The servers' program, held since the first one was started.
    pub program: Program,
    /// That of the servers before the last swap, if it was another one: see `fallback.rs`.
    pub before: Option<Program>,
    /// The one of the last swap, if it was given up.
    pub gave_up: Option<Program>,
    /// That of the swap under way.
    pub next: Option<Program>,
    pub server: Server,
    /// Of the server that is there, or was last; 0 before the first.
    pub generation: u32,
    /// When that server was told to stop.
    pub told_to_stop: Option<Instant>,
    /// Waits to take its place.
    pub successor: Option<Successor>,
    /// Serve no more, and have not ended.
    pub leaving: Vec<Leaving>,
    /// A planned replacement under way.
    pub swap: Option<Swap>,
    pub standby_ends: StandbyEnds,
    /// The highest generation that was given to a server.
    pub(super) newest: u32,
    pub history: History,
    /// Servers that died.
    pub deaths: u32,
    /// What its server has been asked and not answered.
    pub probe: Option<Probe>,
    /// When the device lost its server, until a successor serves.
    pub gone_since: Option<Instant>,
    pub passt: Option<Process>,
    /// `None`: passt has to be started first.
    pub(super) held: Option<Held>,
    pub(super) journal: OwnedFd,
    /// A description of the journal on which nobody else has a lock, opened before it is needed.
    pub(super) fence: Option<File>,
    pub(super) mtu: u16,
    /// Made with the first server that this supervisor starts.
    pub(super) lasting: Option<Arc<Lasting>>,
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
    /// It has ended, or given up its place as it was told to (`planned`); its I/O may not be over.
    Fencing {
        started: Instant,
        since: Instant,
        planned: bool,
        /// What follows a death; `None`: not decided on yet.
        decision: Option<Decision>,
    },
    /// A timer runs for its successor. Also before the first.
    Pausing,
    /// It gets no successor.
    Held,
}

/// What all servers of a VM are started with.
#[derive(Clone, Debug)]
pub struct ServerSettings {
    /// Where the programs that came with `bulkhead` are.
    pub programs: PathBuf,
    pub log: String,
    pub strictness: sandbox::Options,
}

/// The end of a server.
#[derive(Debug)]
pub struct Death {
    pub sentence: String,
    pub report: CrashReport,
}

/// Opens the rooms of a plan; passt is started later. `programs`: where those that came with `bulkhead` are.
pub fn open(plan: &Plan, spec: &VmSpec, programs: &Path) -> Result<Vec<RoomState>> {
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
            program: Program::named(programs.join(room.program.file_name())),
            before: None,
            gave_up: None,
            next: None,
            server: Server::Pausing,
            generation: 0,
            told_to_stop: None,
            successor: None,
            leaving: Vec::new(),
            swap: None,
            standby_ends: StandbyEnds::default(),
            newest: 0,
            history: History::new(spec.restart),
            deaths: 0,
            probe: None,
            gone_since: None,
            passt: None,
            held,
            journal,
            fence: None,
            mtu: 0,
            lasting: None,
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
    /// What is held for all of its servers, each by the last part of its name for the keeper.
    pub fn held(&self) -> Vec<(&'static str, BorrowedFd<'_>)> {
        let backend = self.held.as_ref().map(|held| ("backend", held.as_fd()));
        let programs = [
            ("program", Some(&self.program)),
            ("before", self.before.as_ref()),
            ("gave-up", self.gave_up.as_ref()),
            ("next", self.next.as_ref()),
        ];
        let programs = programs
            .into_iter()
            .filter_map(|(part, program)| Some((part, program?.file()?)));
        [("journal", self.journal.as_fd())]
            .into_iter()
            .chain(backend)
            .chain(programs)
            .collect()
    }

    /// `bulkhead-bus` knows the server of this generation.
    pub fn introduced(&mut self, generation: u32) {
        let server = match &mut self.server {
            Server::Running { process, .. } if self.generation == generation => Some(process),
            _ => None,
        };
        let successor = self.successor.as_mut();
        let successor = successor.filter(|successor| successor.generation == generation);
        for process in server
            .into_iter()
            .chain(successor.map(|successor| &mut successor.process))
        {
            process.introduced = true;
        }
    }

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
    pub fn start_server(&mut self, settings: &ServerSettings) -> Result<OwnedFd> {
        self.program.hold()?;
        let (process, to_bus) = self.launch(&self.program.clone(), settings)?;
        self.generation = self.newest;
        self.told_to_stop = None;
        self.server = Server::Running {
            process,
            ready: false,
            blame: None,
        };
        Ok(to_bus)
    }

    /// What all servers of the device are born into; without it each one makes its own.
    fn lasting(&mut self) -> Option<Arc<Lasting>> {
        if self.lasting.is_none() && rustix::process::geteuid().is_root() {
            self.lasting = Lasting::new().ok().map(Arc::new);
        }
        self.lasting.clone()
    }

    /// Starts a process of the next generation.
    pub(super) fn launch(
        &mut self,
        program: &Program,
        settings: &ServerSettings,
    ) -> Result<(Process, OwnedFd)> {
        let held = self.held.as_ref().context("the backend is not open")?;
        let backend = held.for_server()?;
        let (to_server, to_bus) = pair().context("cannot make a socket pair")?;
        let jail = (self.plan.program.profile(), settings.strictness);
        let index = self.plan.device.saturating_add(1);
        let namespaces = (Namespaces::all(), self.lasting());
        let mut process = Process::launch(program, &[], namespaces, jail, index)?;
        let generation = self.newest.saturating_add(1);
        let recorder =
            Recorder::new_memory().map_err(|error| anyhow!("cannot make a flight recorder: {error}"))?;
        let start = SupervisorToServer::Start {
            protocol: PROTOCOL,
            generation,
            name: self.plan.name.clone(),
            config: self.plan.config.clone(),
            log: settings.log.clone(),
            fds: vec![
                "bus".to_owned(),
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
            match control.send(&start, &fds) {
                // One that has ended already is found at its end, which says more.
                Ok(()) | Err(SendError::Disconnected) => {}
                Err(error) => bail!("cannot talk to {}: {error}", self.plan.name),
            }
        }
        process.recorder = Some(recorder);
        self.newest = generation;
        Ok((process, to_bus))
    }

    /// What the vCPU process is told of the device, together with the socket to its first server.
    pub fn introduction(&self) -> SupervisorToBus {
        SupervisorToBus::AddDevice {
            device: self.plan.device,
            name: self.plan.name.clone(),
            interface: self.plan.interface,
            instance: self.plan.instance,
            max_sub_channels: self.plan.max_sub_channels,
        }
    }

    /// The next message of the server; at the end of the socket none, and none any more.
    pub fn receive(&mut self) -> Result<Option<ServerToSupervisor>, PeerFault> {
        match &mut self.server {
            Server::Running { process, .. } => process.receive(),
            Server::Fencing { .. } | Server::Pausing | Server::Held => Ok(None),
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

    /// Whether the server has ended as an earlier supervisor told it to: that it let go before may have been said to that
    /// one, and how it ended is not known.
    pub fn has_obeyed(&mut self) -> bool {
        match &mut self.server {
            Server::Running {
                process, blame: None, ..
            } => self.told_to_stop.is_some() && process.ended() == Some(ExitCause::Unknown),
            _ => false,
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
        self.deaths = self.deaths.saturating_add(1);
        self.gone_since.get_or_insert_with(Instant::now);
        let report = CrashReport {
            name: self.plan.name.clone(),
            generation: self.generation,
            process: process.child.pid.as_raw(),
            cause,
            blame: blame.take(),
            uptime: started.elapsed(),
            deaths: self.deaths,
            oom: None,
            log: process.log.last_lines(),
            recorder: process.recorder.take(),
        };
        self.server = Server::Fencing {
            started,
            since: Instant::now(),
            planned: false,
            decision: None,
        };
        self.told_to_stop = None;
        Some(Death { sentence, report })
    }

    /// For `bulkhead device list`.
    pub fn line(&self) -> DeviceLine {
        let (state, process) = match &self.server {
            // It is being killed.
            Server::Running {
                blame: Some(_),
                process,
                ..
            } => ("stops", Some(process)),
            Server::Running {
                ready: false,
                process,
                ..
            } => ("starts", Some(process)),
            Server::Running { process, .. } if self.told_to_stop.is_some() => ("stops", Some(process)),
            Server::Running { process, .. } => ("serves", Some(process)),
            Server::Fencing { .. } | Server::Pausing => ("ended", None),
            Server::Held => ("held", None),
        };
        DeviceLine {
            name: self.plan.name.clone(),
            kind: self.plan.program.kind().to_owned(),
            program: self.program.path.display().to_string(),
            gave_up: self
                .gave_up
                .as_ref()
                .map(|program| program.path.display().to_string()),
            state: state.to_owned(),
            generation: self.generation,
            process: process.map(|process| process.child.pid.as_raw()),
            successor: self.successor.as_ref().map(|successor| {
                let state = successor.state().to_owned();
                (state, successor.generation, successor.process.child.pid.as_raw())
            }),
        }
    }

    /// Whether nothing that the dead server began is still under way: see the theory of [`super`].
    pub fn is_fenced(&mut self) -> bool {
        if let Some(held) = &self.held
            && !held.is_free(self.journal.as_fd())
        {
            return false;
        }
        self.prepare_fence();
        let Some(journal) = self.fence.take() else {
            return false;
        };
        let locked = Flock::lock(journal, FlockArg::LockExclusiveNonblock);
        let (is_free, journal) = match locked {
            Ok(lock) => (true, lock.unlock().ok()),
            Err((journal, _)) => (false, Some(journal)),
        };
        self.fence = journal;
        is_free
    }

    /// Opens what [`Self::is_fenced`] asks with, so that the guest need not wait for that. A lock belongs to a description,
    /// not to the file: so this one is opened anew, not duplicated.
    pub fn prepare_fence(&mut self) {
        if self.fence.is_none() {
            let path = format!("/proc/self/fd/{}", self.journal.as_raw_fd());
            self.fence = OpenOptions::new().read(true).write(true).open(path).ok();
        }
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

    /// Whether a signal has ended it, or is about to.
    pub fn is_killed(&mut self) -> bool {
        match self {
            Server::Running { process, .. } => process.is_killed(),
            _ => false,
        }
    }

    pub fn kill(&self) {
        if let Server::Running { process, .. } = self {
            process.kill();
        }
    }
}
