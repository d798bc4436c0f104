//! The server: one thread, one wait, and between two waits everything that is to be done.
//!
//! # The wait
//! All that can happen comes out of one io_uring: the end of disk I/O, kicks of the guest, messages of the supervisor
//! and of `bulkhead-bus`. An idle server is in one system call and has no timer.
//!
//! Kicks are polled by a multishot poll and never read: it reports wake-ups, not levels, so each kick is one
//! completion without a system call of its own.
//!
//! # A round
//! ```text
//!   wait ──▶ reap: kicks mark channels, I/O gives answers (staged), messages change channels
//!        ──▶ replay: requests of a predecessor, as far as there is room
//!        ──▶ read:   per marked channel: receive, take, start (queued in the io_uring)
//!        ──▶ settle: per marked channel: publish, unmask, look once more; then what waits for the end of I/O
//! ```
//! Answers that are at hand together are published together, and a publication is at most one interrupt. Whatever
//! is queued goes to the kernel with the next wait: a round costs one system call, and one for an interrupt.
//!
//! # Order of commits
//! A request may be started before its taking is committed: if we die in between, the successor takes it out of the
//! ring and executes it again, which is allowed as long as it is not answered; and `Endpoint::publish` commits
//! what was taken before any answer can be seen. Packets that change the session are the exception: their taking is
//! committed first, then the session is saved, then they are answered.
//!
//! # Ending things
//! A channel that closes, breaks, or is quiesced stays until its last I/O is over, because that I/O touches guest
//! memory; only then its endpoint is given back to the port.
//!
//! # Where what stands
//! Here: what a server is made of, and a round. `events`: what the io_uring reports, but for the end of disk I/O. `requests`:
//! from a packet, or a predecessor's journal, to the disks and back to an answer. `ending`: channels that end, and the
//! end of all.

mod ending;
mod events;
mod requests;

use crate::backend::engine::{MAX_ACTIVE, RequestId};
use crate::backend::fence::{Fence, FenceError};
use crate::controller::Controller;
use ending::Ending;
use std::collections::{BTreeMap, VecDeque};
use vmbus::channel::{Endpoint, MAX_CHANNELS, Port, RecoveredRequest, Token};
use vmbus::ipc::server_start::Control;
use vmbus::ipc::{PeerFault, SendError};
use vmbus::journal::{StateFault, Step};
use vmbus::mem::{HostError, OpId, Uring, UringError};
use vmbus::ring::PacketBuf;

/// Slots of the io_uring: I/O, a poll for each channel, polls for two sockets in two directions, and as many again
/// for channels that were closed and whose poll is being cancelled.
pub const URING_SLOTS: u32 = MAX_ACTIVE as u32 + 2 * MAX_CHANNELS as u32 + 8;

/// Numbers of operations on the io_uring: what kind in the top byte. The other kinds stand in `events`.
const KIND_SHIFT: u32 = 56;
const KIND_IO: u64 = 0;

/// First number of disk I/O.
pub const IO_NUMBER_BASE: u64 = KIND_IO << KIND_SHIFT;

/// Why a server ends other than by being told to.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The socket to `bulkhead-bus`.
    #[error("bulkhead-bus: {0}")]
    Bus(PeerFault),
    /// The socket to the supervisor.
    #[error("supervisor: {0}")]
    Supervisor(PeerFault),
    /// A message could not be sent.
    #[error("supervisor: {0}")]
    Send(#[from] SendError),
    /// The kernel refused what it must not refuse.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The io_uring has no slot where there must be one.
    #[error(transparent)]
    Uring(#[from] UringError),
    /// The predecessor's I/O could not be waited for.
    #[error(transparent)]
    Fence(#[from] FenceError),
    /// This server cannot go on from what the predecessor has saved.
    #[error(transparent)]
    SavedState(#[from] StateFault),
}

/// What a server is made of.
pub struct Parts {
    /// Before the lock-in made and with all files registered; of [`URING_SLOTS`] slots.
    pub io: Uring,
    /// The line to the supervisor.
    pub control: Control,
    /// The line to `bulkhead-bus`.
    pub port: Port,
    /// The controller that is served.
    pub controller: Controller,
    /// Not yet taken.
    pub fence: Fence,
}

/// The server of one controller.
pub struct Server {
    io: Uring,
    control: Control,
    port: Port,
    controller: Controller,
    fence: Fence,
    channels: BTreeMap<u16, Channel>,
    /// What each request at the disks owes to whom.
    owed: Vec<Option<(u16, Token)>>,
    replays: VecDeque<(u16, RecoveredRequest)>,
    /// Resets that wait for the end of everything.
    resets: Vec<(u16, Token)>,
    quiesce: Option<u64>,
    stopping: bool,
    /// Polls for room on the sockets are armed.
    control_waits: bool,
    port_waits: bool,
    buffer: PacketBuf,
    /// Packets that wanted no answer.
    ignored: u64,
}

struct Channel {
    endpoint: Endpoint,
    poll: Option<OpId>,
    /// Requests at the disks.
    active: u32,
    /// Something has happened: read and settle.
    marked: bool,
    /// There was no room to take a request.
    starved: bool,
    ending: Ending,
}

impl Server {
    /// A server that has not said anything yet.
    pub fn new(parts: Parts) -> Self {
        let Parts {
            io,
            control,
            port,
            controller,
            fence,
        } = parts;
        Self {
            io,
            control,
            port,
            controller,
            fence,
            channels: BTreeMap::new(),
            owed: (0..MAX_ACTIVE).map(|_| None).collect(),
            replays: VecDeque::new(),
            resets: Vec::new(),
            quiesce: None,
            stopping: false,
            control_waits: false,
            port_waits: false,
            buffer: PacketBuf::new(),
            ignored: 0,
        }
    }

    /// Serves until the supervisor says stop, or the VM is over.
    pub fn run(mut self) -> Result<(), ServerError> {
        match self.serve() {
            Ok(()) => {
                self.leave();
                self.release()
            }
            // A socket's end: the supervisor or bulkhead-bus is gone, and with it the VM.
            Err(ServerError::Supervisor(PeerFault::Eof) | ServerError::Bus(PeerFault::Eof)) => {
                self.leave();
                Ok(())
            }
            Err(error) => {
                self.leave();
                // If the supervisor does not hear it, the log still does.
                if let Err(unsent) = self.control.failed(error.to_string()) {
                    tracing::warn!(%unsent, "the supervisor does not listen");
                }
                Err(error)
            }
        }
    }

    fn serve(&mut self) -> Result<(), ServerError> {
        self.arm_control()?;
        self.arm_port()?;
        // What came before the polls were armed is reported by them: a poll looks once when it is armed.
        loop {
            let want = usize::from(!self.has_work());
            self.io.submit_and_wait(want, None)?;
            if self.controller.active_count() > 0 {
                self.port.journal().pass(Step::IoSubmitted);
            }
            self.reap()?;
            self.replay();
            self.read();
            self.settle()?;
            if self.stopping && self.controller.active_count() == 0 {
                return Ok(());
            }
        }
    }

    fn has_work(&self) -> bool {
        self.channels.values().any(|channel| channel.marked) || (!self.replays.is_empty() && self.can_start())
    }

    /// Whether a request can be started now.
    fn can_start(&self) -> bool {
        self.controller.has_room()
            && self.resets.is_empty()
            && !self.stopping
            && self.channels.contains_key(&0)
    }

    fn reap(&mut self) -> Result<(), ServerError> {
        let mut finished = false;
        while let Some(completion) = self.io.next_completion() {
            let number = completion.user_data;
            if number >> KIND_SHIFT != KIND_IO {
                self.on_event(number, completion.more)?;
                continue;
            }
            finished = true;
            let id = (number - IO_NUMBER_BASE) as RequestId;
            if let Some(answer) = self.controller.on_completion(&mut self.io, id, completion.result) {
                self.port.journal().pass(Step::IoDone);
                self.answer(id, &answer);
            }
        }
        if finished {
            let mut over = Vec::new();
            self.controller
                .resume(&mut self.io, |id, answer| over.push((id, answer)));
            for (id, answer) in over {
                self.answer(id, &answer);
            }
            self.unstarve();
        }
        Ok(())
    }

    /// There is room again for channels that found none.
    fn unstarve(&mut self) {
        for channel in self.channels.values_mut().filter(|channel| channel.starved) {
            channel.starved = false;
            channel.marked = true;
        }
    }

    /// Publishes answers, arranges for kicks, and ends what can be ended.
    fn settle(&mut self) -> Result<(), ServerError> {
        self.finish_resets();
        let mut broken = Vec::new();
        for (sub_index, channel) in self.channels.iter_mut().filter(|(_, channel)| channel.marked) {
            if !matches!(channel.ending, Ending::No) {
                continue;
            }
            match channel.endpoint.prepare_sleep() {
                Ok(awake) => channel.marked = awake,
                Err(fault) => broken.push((*sub_index, fault.to_string())),
            }
        }
        for (sub_index, why) in broken {
            self.break_channel(sub_index, why);
        }
        self.end_channels()?;
        if let Some(token) = self.quiesce
            && self.controller.active_count() == 0
        {
            self.quiesce = None;
            let endpoints: Vec<Endpoint> = self.take_all();
            self.port.quiesced(token, endpoints).map_err(ServerError::Bus)?;
            tracing::info!("quiesced");
        }
        self.poll_for_room()
    }

    fn inspect(&self) -> Vec<(String, String)> {
        let mut entries = self.controller.inspect();
        entries.push(("ignored_packets".to_owned(), self.ignored.to_string()));
        for channel in self.channels.values() {
            entries.extend(channel.endpoint.inspect());
        }
        entries
    }
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server")
            .field("controller", &self.controller)
            .finish_non_exhaustive()
    }
}
