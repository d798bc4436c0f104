//! The part of `main` that all device servers share: the conversation with the supervisor, and logging.
//!
//! ```text
//!   supervisor                     device server
//!     │ ── Start + descriptors ──▶  Start::receive(fd 3)           nothing opened, nothing mapped before
//!     │                             Start::init_logging()
//!     │                             open what the configuration needs, lock itself in
//!     │ ◀──────────────── Ready ──  Start::ready(report)            or Start::fail(message), exit
//!     │                             Port::new(...)                  hello to bulkhead-bus
//!     │ ── Ping, Inspect, Stop ──▶  Control::on_readable()          in the server's loop
//! ```
//!
//! Receiving `Start` is the one place where a server may wait: it has nothing else to do yet. It waits for its
//! parent, which is trusted more than itself.
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use super::hello::check_protocol;
use super::messages::{ServerToSupervisor, SupervisorToServer};
pub use super::named_fds::{DescriptorFault, NamedFds};
use super::{PeerFault, SendError, Socket};
use crate::mem::HostError;
use crate::record::{EventKind, Recorder};

/// From the word that a server has let go to its end; a successor has answered the first requests by then.
const LEAVE_IN: Duration = Duration::from_millis(5);

/// Why a server cannot start. One sentence each, for the operator.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StartError {
    /// The supervisor's end is gone or says something else than `Start`.
    #[error("control socket: {0}")]
    Control(#[from] PeerFault),
    /// The descriptors are not those that the configuration needs.
    #[error(transparent)]
    Descriptors(#[from] DescriptorFault),
    /// The log filter does not parse.
    #[error("log filter \"{filter}\": {why}")]
    LogFilter { filter: String, why: String },
    /// The supervisor does not take our messages.
    #[error("control socket: {0}")]
    Send(#[from] SendError),
}

/// What the supervisor wants this process to be.
#[derive(Debug)]
pub struct Start {
    /// Number of this process among those that served the device; from 1.
    pub generation: u32,
    /// Name of the device in logs.
    pub name: String,
    /// The device's own configuration, JSON.
    pub config: String,
    /// Log filter, for example `info` or `info,storvsp=debug`.
    pub log: String,
    /// `bus`, `journal` and the device's own.
    pub fds: NamedFds,
    socket: Socket,
}

impl Start {
    /// Waits for the supervisor's `Start` on `control` (fd 3 of the process).
    pub fn receive(control: OwnedFd) -> Result<Self, StartError> {
        let mut socket = Socket::new(control);
        loop {
            let Some((message, fds)) = socket.recv::<SupervisorToServer>()? else {
                wait_readable(socket.as_fd())
                    .map_err(|errno| StartError::Control(PeerFault::Receive(errno)))?;
                continue;
            };
            let SupervisorToServer::Start {
                protocol,
                generation,
                name,
                config,
                log,
                fds: names,
            } = message
            else {
                let why = "Start comes first";
                return Err(PeerFault::OutOfTurn {
                    message: super::Message::name(&message),
                    why,
                }
                .into());
            };
            check_protocol(protocol)?;
            let fds = NamedFds::new(names, fds)?;
            return Ok(Self {
                generation,
                name,
                config,
                log,
                fds,
                socket,
            });
        }
    }

    /// Starts logging: one text line for each event, to descriptor 2, with the level and the event's fields.
    ///
    /// The supervisor adds time and process when it reads the line. Without effect if logging was started
    /// before (tests that run several servers in one process).
    pub fn init_logging(&self) -> Result<(), StartError> {
        let targets: Targets =
            self.log
                .parse()
                .map_err(
                    |error: tracing_subscriber::filter::ParseError| StartError::LogFilter {
                        filter: self.log.clone(),
                        why: error.to_string(),
                    },
                )?;
        let lines = tracing_subscriber::fmt::layer()
            .with_writer(std::io::stderr)
            .with_ansi(false)
            .without_time()
            .with_target(true);
        // A second subscriber is refused, and the first one goes on: see above.
        tracing_subscriber::registry()
            .with(lines)
            .with(targets)
            .try_init()
            .ok();
        Ok(())
    }

    /// Maps the flight recorder, if one was handed over, and records the start in it.
    pub fn recorder(&mut self) -> Result<Option<Arc<Recorder>>, HostError> {
        let Some(fd) = self.fds.take_optional("recorder") else {
            return Ok(None);
        };
        let recorder = Recorder::new(fd.as_fd())?;
        recorder.record(EventKind::Start, 0, u64::from(self.generation));
        Ok(Some(Arc::new(recorder)))
    }

    /// Reports that the sandbox is complete; `report` is its JSON. From here on the server serves.
    pub fn ready(mut self, report: String) -> Result<Control, StartError> {
        self.socket.send(&ServerToSupervisor::Ready { report }, &[])?;
        Ok(Control { socket: self.socket })
    }

    /// Reports in one sentence that the server cannot serve. Exit afterwards.
    pub fn fail(mut self, message: String) -> Result<(), StartError> {
        self.socket.send(&ServerToSupervisor::Failed { message }, &[])?;
        Ok(())
    }
}

/// What the supervisor wants of a running server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ControlRequest {
    /// Stop at a packet boundary, call [`Control::released`], and exit with status 0.
    Stop,
    /// Call [`Control::inspect`].
    Inspect,
}

/// A running server's line to the supervisor.
#[derive(Debug)]
pub struct Control {
    socket: Socket,
}

impl Control {
    /// Reads what the supervisor said; answers pings itself. Call when readable (or writable, while
    /// [`Self::wants_write`]).
    ///
    /// [`PeerFault::Eof`] means that the supervisor is gone: exit.
    pub fn on_readable(&mut self) -> Result<Vec<ControlRequest>, PeerFault> {
        self.socket.flush()?;
        let mut requests = Vec::new();
        while let Some((message, _)) = self.socket.recv::<SupervisorToServer>()? {
            match message {
                SupervisorToServer::Start { .. } => {
                    return Err(PeerFault::OutOfTurn {
                        message: "Start",
                        why: "the server has started",
                    });
                }
                SupervisorToServer::Stop => requests.push(ControlRequest::Stop),
                SupervisorToServer::Ping { token } => {
                    self.socket.send(&ServerToSupervisor::Pong { token }, &[])?;
                }
                SupervisorToServer::Inspect => requests.push(ControlRequest::Inspect),
            }
        }
        Ok(requests)
    }

    /// Answers an [`ControlRequest::Inspect`] with `path = value` pairs.
    pub fn inspect(&mut self, entries: Vec<(String, String)>) -> Result<(), SendError> {
        self.socket.send(&ServerToSupervisor::Inspect { entries }, &[])
    }

    /// Tells the operator something in one sentence.
    pub fn event(&mut self, text: String) -> Result<(), SendError> {
        self.socket.send(&ServerToSupervisor::Event { text }, &[])
    }

    /// Reports in one sentence that the server cannot go on. Exit afterwards.
    pub fn failed(&mut self, message: String) -> Result<(), SendError> {
        self.socket.send(&ServerToSupervisor::Failed { message }, &[])
    }

    /// Tells that this server can take over at any moment.
    pub fn warm(&mut self) -> Result<(), SendError> {
        self.socket.send(&ServerToSupervisor::Warm, &[])
    }

    /// Answers a [`ControlRequest::Stop`]: nothing of the guest and of the back end is touched from here on. Then
    /// [`Self::linger`], and exit.
    pub fn released(&mut self) -> Result<(), SendError> {
        self.socket.send(&ServerToSupervisor::Released, &[])
    }

    /// Returns after a while in which the successor begins. The end of a process, its memory, namespaces and io_uring, takes
    /// a processor for the better part of a millisecond, and a guest that waits for the successor would wait for that.
    pub fn linger() {
        std::thread::sleep(LEAVE_IN);
    }

    /// Whether to poll for writability, too.
    pub fn wants_write(&self) -> bool {
        self.socket.has_queued()
    }
}

impl AsFd for Control {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Waits until a socket has something to read, or its peer is gone.
pub(crate) fn wait_readable(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    loop {
        match poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], PollTimeout::NONE) {
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => continue,
            Err(errno) => return Err(errno),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ipc::hello::PROTOCOL;
    use crate::vsc::{PlayedSupervisor, StartOptions};
    use std::time::{Duration, Instant};

    fn deadline() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    fn connected() -> (PlayedSupervisor, OwnedFd) {
        let (ours, theirs) = crate::ipc::pair().expect("a socket pair");
        (PlayedSupervisor::new(ours), theirs)
    }

    #[test]
    fn a_server_starts_answers_and_stops() {
        let (mut supervisor, control) = connected();
        let journal = PlayedSupervisor::new_journal().expect("a journal");
        let options = StartOptions::new("disk0", "{}");
        supervisor
            .start(&options, &[("journal", journal.as_fd())])
            .expect("sent");
        let mut start = Start::receive(control).expect("a start");
        assert_eq!(
            (start.generation, &start.name[..], &start.config[..]),
            (1, "disk0", "{}")
        );
        assert!(start.fds.take("journal").is_ok());
        assert_eq!(
            start.fds.take("bus").map(drop),
            Err(DescriptorFault::Missing("bus".to_owned()))
        );
        let mut control = start.ready("{}".to_owned()).expect("sent");
        assert_eq!(supervisor.wait_ready(deadline()), Ok("{}".to_owned()));
        let server = std::thread::spawn(move || {
            let mut stopped = false;
            while !stopped {
                wait_readable(control.as_fd()).expect("poll");
                for request in control.on_readable().expect("the supervisor behaves") {
                    match request {
                        ControlRequest::Stop => stopped = true,
                        ControlRequest::Inspect => {
                            control
                                .inspect(vec![("a".to_owned(), "b".to_owned())])
                                .expect("sent");
                        }
                    }
                }
            }
        });
        supervisor.ping(7, deadline()).expect("a pong");
        assert_eq!(
            supervisor.inspect(deadline()),
            Ok(vec![("a".to_owned(), "b".to_owned())])
        );
        supervisor.stop().expect("sent");
        server.join().expect("no panic");
    }

    #[test]
    fn a_server_that_cannot_start_says_why() {
        let (mut supervisor, control) = connected();
        supervisor
            .start(&StartOptions::new("disk0", "{}"), &[])
            .expect("sent");
        Start::receive(control)
            .expect("a start")
            .fail("no disk".to_owned())
            .expect("sent");
        assert_eq!(
            supervisor.wait_ready(deadline()),
            Err(crate::vsc::VscError::Failed("no disk".to_owned()))
        );
    }

    #[test]
    fn anything_but_a_start_in_our_protocol_is_refused() {
        let start = |protocol, names: &[&str]| SupervisorToServer::Start {
            protocol,
            generation: 1,
            name: String::new(),
            config: String::new(),
            log: String::new(),
            fds: names.iter().map(|name| (*name).to_owned()).collect(),
        };
        let receive = |message: &SupervisorToServer, fds: &[BorrowedFd<'_>]| {
            let (ours, theirs) = crate::ipc::pair().expect("a socket pair");
            Socket::new(ours).send(message, fds).expect("sent");
            Start::receive(theirs).map(drop)
        };
        let protocol = PeerFault::Protocol { theirs: PROTOCOL + 1 };
        assert_eq!(
            receive(&start(PROTOCOL + 1, &[]), &[]),
            Err(StartError::Control(protocol))
        );
        assert!(matches!(
            receive(&SupervisorToServer::Stop, &[]),
            Err(StartError::Control(PeerFault::OutOfTurn { .. }))
        ));
        let journal = PlayedSupervisor::new_journal().expect("a journal");
        let twice = receive(
            &start(PROTOCOL, &["disk", "disk"]),
            &[journal.as_fd(), journal.as_fd()],
        );
        assert_eq!(twice, Err(DescriptorFault::Duplicate("disk".to_owned()).into()));
        let (ours, theirs) = crate::ipc::pair().expect("a socket pair");
        drop(ours);
        assert_eq!(
            Start::receive(theirs).map(drop),
            Err(StartError::Control(PeerFault::Eof))
        );
    }

    #[test]
    fn a_descriptor_that_nobody_wants_is_an_error() {
        let journal = PlayedSupervisor::new_journal().expect("a journal");
        let fds = NamedFds::new(vec!["extra".to_owned()], vec![journal]).expect("one name");
        assert_eq!(fds.finish(), Err(DescriptorFault::Unused("extra".to_owned())));
        assert_eq!(NamedFds::default().finish(), Ok(()));
    }
}
