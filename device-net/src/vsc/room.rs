//! The real program in its sandbox, with everything around it played.

use super::{Driver, DriverOptions};
use crate::config::NicConfig;
use sandbox::{Child, ExitCause, Identity, Namespaces, Spawn};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use vmbus::vsc::{GuestOptions, PlayedSupervisor, StartOptions, SyntheticGuest, VscError};

/// Limit: how long anything in a room may take. Generous, because test machines are busy; nothing waits for it to pass
/// unless something is broken.
const PATIENCE: Duration = Duration::from_secs(30);

/// What can go wrong in a room.
#[derive(Debug, thiserror::Error)]
pub enum RoomError {
    /// The program cannot be started.
    #[error(transparent)]
    Spawn(#[from] sandbox::SpawnError),
    /// The guest or the played supervisor.
    #[error(transparent)]
    Vsc(#[from] VscError),
    /// The kernel.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// The configuration cannot be written down.
    #[error(transparent)]
    Json(#[from] serde_json::Error),
    /// The process did not end.
    #[error("the server did not end in time")]
    StillRunning,
}

/// A server process, its played supervisor, and its guest.
#[derive(Debug)]
pub struct Room {
    program: PathBuf,
    start: StartOptions,
    /// The backend's descriptor, kept for successors.
    net: OwnedFd,
    fd_name: String,
    journal: OwnedFd,
    /// The guest: its memory, and what is open.
    pub guest: SyntheticGuest,
    /// The other end of the server's control socket.
    pub supervisor: PlayedSupervisor,
    /// The process.
    pub child: Child,
    /// The sandbox's report, JSON.
    pub report: String,
}

impl Room {
    /// Starts `program` with that descriptor as its backend and waits until it is ready and attached.
    pub fn new(
        program: PathBuf,
        config: &NicConfig,
        net: OwnedFd,
        guest: GuestOptions,
    ) -> Result<Self, RoomError> {
        let mut start = StartOptions::new("net0", &serde_json::to_string(config)?);
        if let Ok(log) = std::env::var("BULKHEAD_TEST_LOG") {
            start.log = log;
        }
        let journal = PlayedSupervisor::new_journal().map_err(VscError::from)?;
        let mut guest = SyntheticGuest::new(guest)?;
        let fd_name = config.fd.clone();
        let mut running = launch(&program, &start, (&fd_name, &net), &journal)?;
        let report = running.supervisor.wait_ready(deadline())?;
        guest.attach(running.bus, deadline())?;
        Ok(Self {
            program,
            start,
            net,
            fd_name,
            journal,
            guest,
            supervisor: running.supervisor,
            child: running.child,
            report,
        })
    }

    /// Opens the primary channel and initialises the NIC up to, not including, the packet filter.
    pub fn open(&mut self, options: DriverOptions) -> Result<Driver, RoomError> {
        Ok(Driver::open(&mut self.guest, options, deadline())?)
    }

    /// Kills the server at once, and waits for its end.
    pub fn kill(&mut self) -> Result<(), RoomError> {
        self.child.kill()?;
        self.wait_end()?;
        self.guest.server_gone();
        Ok(())
    }

    /// Tells the server to stop, and waits for its end.
    pub fn stop(&mut self) -> Result<ExitCause, RoomError> {
        self.supervisor.stop()?;
        let cause = self.wait_end()?;
        self.guest.server_gone();
        Ok(cause)
    }

    /// Waits for the process's end.
    pub fn wait_end(&mut self) -> Result<ExitCause, RoomError> {
        self.child.wait_at_most(PATIENCE)?.ok_or(RoomError::StillRunning)
    }

    /// Starts the next server after [`Room::kill`] or [`Room::stop`], and attaches it. One that fails can be waited for.
    pub fn start_successor(&mut self) -> Result<(), RoomError> {
        self.start = self.start.successor();
        let running = launch(
            &self.program,
            &self.start,
            (&self.fd_name, &self.net),
            &self.journal,
        )?;
        self.supervisor = running.supervisor;
        self.child = running.child;
        self.report = self.supervisor.wait_ready(deadline())?;
        self.guest.attach(running.bus, deadline())?;
        Ok(())
    }

    /// One value of what the server says of itself, after it has seen all that was in the rings before the question.
    pub fn inspect(&mut self, path: &str) -> Result<String, RoomError> {
        // A server that has answered looks at every ring before it reads the next question.
        self.supervisor.ping(0, deadline())?;
        let entries = self.supervisor.inspect(deadline())?;
        let found = entries.into_iter().find(|(name, _)| name == path);
        Ok(found.ok_or(VscError::Missing("entry of that path"))?.1)
    }

    /// Asks until the answer is `expected`, because the guest's last completions may still be in the ring when the
    /// server answers; at the deadline the last answer is returned.
    pub fn inspect_until(&mut self, path: &str, expected: &str) -> Result<String, RoomError> {
        let end = deadline();
        loop {
            let found = self.inspect(path)?;
            if found == expected || Instant::now() > end {
                return Ok(found);
            }
        }
    }

    /// The device's journal, for tests that look into it or spoil it.
    pub fn journal(&self) -> BorrowedFd<'_> {
        self.journal.as_fd()
    }

    /// A deadline for one step, from now.
    pub fn deadline(&self) -> Instant {
        deadline()
    }
}

fn deadline() -> Instant {
    Instant::now() + PATIENCE
}

struct Running {
    child: Child,
    supervisor: PlayedSupervisor,
    bus: OwnedFd,
}

fn launch(
    program: &Path,
    start: &StartOptions,
    net: (&str, &OwnedFd),
    journal: &OwnedFd,
) -> Result<Running, RoomError> {
    let (control, child_control) = vmbus::ipc::pair().map_err(std::io::Error::from)?;
    let (bus, child_bus) = vmbus::ipc::pair().map_err(std::io::Error::from)?;
    let child = sandbox::spawn(Spawn {
        program: program.to_owned(),
        file: None,
        args: Vec::new(),
        env: Vec::new(),
        fds: vec![(child_control, sandbox::sys::fds::CONTROL)],
        namespaces: Namespaces::all(),
        lasting: None,
        stderr: None,
        identity: Identity::own(0),
        jail: Some((sandbox::profile::net(), sandbox::Options::default())),
    })?;
    let mut supervisor = PlayedSupervisor::new(control);
    let fds = [
        ("bus", child_bus.as_fd()),
        ("journal", journal.as_fd()),
        (net.0, net.1.as_fd()),
    ];
    supervisor.start(start, &fds)?;
    Ok(Running {
        child,
        supervisor,
        bus,
    })
}
