//! The real program in its sandbox, with everything around it played.

use super::Initiator;
use crate::config::ControllerConfig;
use rustix::fs::OFlags;
use sandbox::{Child, ExitCause, Identity, Namespaces, Spawn};
use std::ffi::OsString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};
use vmbus::vsc::{ChannelOptions, GuestOptions, PlayedSupervisor, StartOptions, SyntheticGuest, VscError};

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
    arguments: Vec<OsString>,
    start: StartOptions,
    disks: Vec<(String, OwnedFd)>,
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
    /// Starts `program` with these disks (names as in the configuration) and waits until it is ready and attached.
    pub fn new(
        program: PathBuf,
        config: &ControllerConfig,
        disks: Vec<(String, OwnedFd)>,
        guest: GuestOptions,
    ) -> Result<Self, RoomError> {
        Self::with_arguments(program, &[], config, disks, guest)
    }

    /// The same for a program that takes arguments, as the supervisor never gives any.
    pub fn with_arguments(
        program: PathBuf,
        arguments: &[&str],
        config: &ControllerConfig,
        disks: Vec<(String, OwnedFd)>,
        guest: GuestOptions,
    ) -> Result<Self, RoomError> {
        let arguments: Vec<OsString> = arguments.iter().map(OsString::from).collect();
        let mut start = StartOptions::new("disk0", &serde_json::to_string(config)?);
        if let Ok(log) = std::env::var("BULKHEAD_TEST_LOG") {
            start.log = log;
        }
        let journal = PlayedSupervisor::new_journal().map_err(VscError::from)?;
        let mut guest = SyntheticGuest::new(guest)?;
        let mut running = launch(&program, &arguments, &start, &disks, &journal)?;
        let report = running.supervisor.wait_ready(deadline())?;
        guest.attach(running.bus, deadline())?;
        Ok(Self {
            program,
            arguments,
            start,
            disks,
            journal,
            guest,
            supervisor: running.supervisor,
            child: running.child,
            report,
        })
    }

    /// Opens a channel. The primary, if it is not asked for otherwise.
    pub fn open(&mut self, options: ChannelOptions) -> Result<Initiator, RoomError> {
        Ok(Initiator::new(self.guest.open_channel(options)?))
    }

    /// Opens and initialises the primary and `sub_channels` sub-channels, as Linux does.
    pub fn open_all(&mut self, sub_channels: u16) -> Result<Vec<Initiator>, RoomError> {
        let mut primary = self.open(ChannelOptions::default())?;
        primary.initialize(deadline())?;
        if sub_channels == 0 {
            return Ok(vec![primary]);
        }
        primary.create_sub_channels(sub_channels, deadline())?;
        let offered = self.guest.wait_sub_channels(deadline())?;
        let mut initiators = vec![primary];
        for sub_index in 1..=offered {
            initiators.push(self.open(ChannelOptions {
                sub_index,
                ..ChannelOptions::default()
            })?);
        }
        Ok(initiators)
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
            &self.arguments,
            &self.start,
            &self.disks,
            &self.journal,
        )?;
        self.supervisor = running.supervisor;
        self.child = running.child;
        self.report = self.supervisor.wait_ready(deadline())?;
        self.guest.attach(running.bus, deadline())?;
        Ok(())
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
    program: &std::path::Path,
    arguments: &[OsString],
    start: &StartOptions,
    disks: &[(String, OwnedFd)],
    journal: &OwnedFd,
) -> Result<Running, RoomError> {
    let (control, child_control) = vmbus::ipc::pair().map_err(std::io::Error::from)?;
    let (bus, child_bus) = vmbus::ipc::pair().map_err(std::io::Error::from)?;
    let child = sandbox::spawn(Spawn {
        program: program.to_owned(),
        file: None,
        args: arguments.to_vec(),
        env: Vec::new(),
        fds: vec![(child_control, sandbox::sys::fds::CONTROL)],
        namespaces: Namespaces::all(),
        lasting: None,
        stderr: None,
        identity: Identity::own(0),
        jail: Some((sandbox::profile::block(), sandbox::Options::default())),
    })?;
    let mut supervisor = PlayedSupervisor::new(control);
    // As the supervisor does: a description for this server alone, which its I/O is known by.
    let disks = disks.iter().map(|(name, fd)| Ok((name.as_str(), open_anew(fd)?)));
    let disks = disks.collect::<std::io::Result<Vec<_>>>()?;
    let mut fds = vec![("bus", child_bus.as_fd()), ("journal", journal.as_fd())];
    fds.extend(disks.iter().map(|(name, fd)| (*name, fd.as_fd())));
    supervisor.start(start, &fds)?;
    Ok(Running {
        child,
        supervisor,
        bus,
    })
}

/// With the same rights.
fn open_anew(fd: &OwnedFd) -> std::io::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let rights = rustix::fs::fcntl_getfl(fd)? & OFlags::RWMODE;
    let file = rustix::fs::open(path, rights | OFlags::CLOEXEC, rustix::fs::Mode::empty())?;
    Ok(file)
}
