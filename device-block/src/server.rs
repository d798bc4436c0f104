//! The server: one thread, one wait, and between two waits everything that is to be done.
//!
//! # The wait
//! All that can happen comes out of one io_uring: the end of disk I/O, kicks of the guest, messages of the supervisor
//! and of `bulkhead-vcpu`. An idle server is in one system call and has no timer.
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
//! what was taken before any answer can be seen.
//!
//! # Ending things
//! A channel that closes, breaks, or is quiesced stays until its last I/O is over, because that I/O touches guest
//! memory; only then its endpoint is given back to the port.

use crate::backend::engine::{MAX_ACTIVE, RequestId};
use crate::backend::fence::{self, FenceError, Lease};
use crate::controller::{Controller, Verdict};
use crate::storvsp::request::{JOURNAL_KIND, Request, SrbResult};
use crate::storvsp::session::Session;
use crate::storvsp::wire::{PACKET_BYTES, VstorPacket};
use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsFd, OwnedFd};
use vmbus::channel::{Endpoint, MAX_CHANNELS, NotTaken, Port, PortEvent, RecoveredRequest, Token};
use vmbus::ipc::server_start::{Control, ControlRequest};
use vmbus::ipc::{PeerFault, SendError};
use vmbus::mem::{File, HostError, OpId, Uring, UringError};
use vmbus::ring::PacketBuf;
use zerocopy::IntoBytes;

/// Limit: requests read from one channel in a round, so that others get their turn and answers are not held up.
const ROUND_REQUESTS: usize = 64;

/// Slots of the io_uring: I/O, a poll for each channel, polls for two sockets in two directions, and as many again
/// for channels that were closed and whose poll is being cancelled.
pub const URING_SLOTS: u32 = MAX_ACTIVE as u32 + 2 * MAX_CHANNELS as u32 + 8;

/// Numbers of operations on the io_uring: what kind in the top byte.
const KIND_SHIFT: u32 = 56;
const KIND_IO: u64 = 0;
const KIND_KICK: u64 = 1;
const KIND_CONTROL: u64 = 2;
const KIND_PORT: u64 = 3;
/// In the number of a socket's poll: it is for room to write.
const FOR_ROOM: u64 = 1;

/// First number of disk I/O.
pub const IO_NUMBER_BASE: u64 = KIND_IO << KIND_SHIFT;

/// Why a server ends other than by being told to.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The socket to `bulkhead-vcpu`.
    #[error("bulkhead-vcpu: {0}")]
    Vcpu(PeerFault),
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
    /// What the predecessor has saved makes no sense.
    #[error("the saved state: {0}")]
    SavedState(String),
}

/// What a server is made of.
pub struct Parts {
    /// Before the lock-in made and with all files registered; of [`URING_SLOTS`] slots.
    pub io: Uring,
    /// The line to the supervisor.
    pub control: Control,
    /// The line to `bulkhead-vcpu`.
    pub port: Port,
    /// The controller that is served.
    pub controller: Controller,
    /// Registered with `io`, not yet taken.
    pub lease: Lease,
    /// Disks that are still to be locked against other VMs, and whether they are only read.
    pub disks: Vec<(OwnedFd, bool)>,
}

/// The server of one controller.
pub struct Server {
    io: Uring,
    control: Control,
    port: Port,
    controller: Controller,
    lease: Lease,
    disks: Vec<(OwnedFd, bool)>,
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

enum Ending {
    No,
    /// The guest closes it.
    Closing,
    /// The guest has broken it.
    Broken(String),
}

impl Server {
    /// A server that has not said anything yet.
    pub fn new(parts: Parts) -> Self {
        let Parts {
            io,
            control,
            port,
            controller,
            lease,
            disks,
        } = parts;
        Self {
            io,
            control,
            port,
            controller,
            lease,
            disks,
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
            // A socket's end: the supervisor or bulkhead-vcpu is gone, and with it the VM.
            Ok(()) | Err(ServerError::Supervisor(PeerFault::Eof) | ServerError::Vcpu(PeerFault::Eof)) => {
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
            match number >> KIND_SHIFT {
                KIND_IO => {
                    finished = true;
                    let id = (number - IO_NUMBER_BASE) as RequestId;
                    if let Some(answer) = self.controller.on_completion(&mut self.io, id, completion.result) {
                        self.answer(id, &answer);
                    }
                }
                KIND_KICK => self.on_kick(number, completion.more)?,
                KIND_CONTROL => self.on_control(number & FOR_ROOM != 0, completion.more)?,
                _ => self.on_port(number & FOR_ROOM != 0, completion.more)?,
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

    fn on_kick(&mut self, number: u64, more: bool) -> Result<(), ServerError> {
        let sub_index = (number >> 32) as u16;
        let Some(channel) = self.channels.get_mut(&sub_index) else {
            return Ok(());
        };
        // A late event of an earlier opening.
        if channel.endpoint.open_epoch() != number as u32 {
            return Ok(());
        }
        channel.marked = true;
        if !more {
            channel.poll = Some(arm_kick(&mut self.io, &channel.endpoint)?);
        }
        Ok(())
    }

    fn on_control(&mut self, for_room: bool, more: bool) -> Result<(), ServerError> {
        for request in self.control.on_readable().map_err(ServerError::Supervisor)? {
            match request {
                ControlRequest::Stop => self.stopping = true,
                ControlRequest::Inspect => self.control.inspect(self.inspect())?,
            }
        }
        if for_room {
            self.control_waits = false;
        } else if !more {
            self.arm_control()?;
        }
        Ok(())
    }

    fn on_port(&mut self, for_room: bool, more: bool) -> Result<(), ServerError> {
        for event in self.port.on_readable().map_err(ServerError::Vcpu)? {
            self.on_port_event(event)?;
        }
        if for_room {
            self.port_waits = false;
        } else if !more {
            self.arm_port()?;
        }
        Ok(())
    }

    fn on_port_event(&mut self, event: PortEvent) -> Result<(), ServerError> {
        match event {
            PortEvent::Attached => {
                // Before anything of the predecessor's is looked at.
                self.lease.wait()?;
                for (disk, read_only) in &self.disks {
                    fence::lock_disk(disk.as_fd(), *read_only, true)?;
                }
                tracing::info!("attached");
            }
            PortEvent::ChannelOpened(endpoint, recovered) => {
                let sub_index = endpoint.sub_index();
                self.on_opened(*endpoint, recovered.fresh)?;
                self.replays
                    .extend(recovered.requests.into_iter().map(|request| (sub_index, request)));
            }
            PortEvent::ChannelClosing { sub_index, .. } => {
                if let Some(channel) = self.channels.get_mut(&sub_index) {
                    channel.ending = Ending::Closing;
                    channel.marked = true;
                }
            }
            PortEvent::Retargeted {
                sub_index, target_vp, ..
            } => {
                if let Some(channel) = self.channels.get_mut(&sub_index) {
                    channel.endpoint.retarget(target_vp);
                }
            }
            // Only rings live in GPADLs here; the port waits for the channel that has its rings there.
            PortEvent::GpadlAdded { .. } => {}
            PortEvent::GpadlTeardown { gpadl } => {
                self.port.gpadl_released(gpadl).map_err(ServerError::Vcpu)?
            }
            PortEvent::Quiesce { token } => {
                self.quiesce = Some(token);
                for channel in self.channels.values_mut() {
                    channel.ending = Ending::Closing;
                }
            }
        }
        Ok(())
    }

    fn on_opened(&mut self, endpoint: Endpoint, fresh: bool) -> Result<(), ServerError> {
        let sub_index = endpoint.sub_index();
        tracing::info!(
            channel = endpoint.channel_id(),
            sub_index,
            fresh,
            "channel opened"
        );
        if sub_index == 0 {
            let saved: Option<Session> = match fresh {
                true => None,
                false => self
                    .port
                    .load_state(endpoint.open_epoch())
                    .map_err(|error| ServerError::SavedState(error.to_string()))?,
            };
            self.controller.on_primary_opened(saved);
            // The predecessor may have died between its answer and the offer.
            if let Some(count) = self.controller.session().sub_channels() {
                self.port.offer_sub_channels(count).map_err(ServerError::Vcpu)?;
            }
            // Sub-channels wait for the session.
            for channel in self.channels.values_mut() {
                channel.marked = true;
            }
        }
        let poll = arm_kick(&mut self.io, &endpoint)?;
        self.channels.insert(
            sub_index,
            Channel {
                endpoint,
                poll: Some(poll),
                active: 0,
                marked: true,
                starved: false,
                ending: Ending::No,
            },
        );
        Ok(())
    }

    /// Executes what a predecessor had taken and not answered.
    fn replay(&mut self) {
        while self.can_start() {
            let Some((sub_index, request)) = self.replays.pop_front() else {
                break;
            };
            let RecoveredRequest { token, payload } = request;
            match Request::from_kept(&payload) {
                Ok(request) => self.execute(sub_index, token, &request, true),
                // The predecessor wrote nonsense. The guest waits for an answer all the same.
                Err(fault) => {
                    tracing::warn!(%fault, "a request in the journal makes no sense");
                    self.send(sub_index, token, &SrbResult::Invalid.completion());
                }
            }
        }
    }

    /// Reads requests from all marked channels.
    fn read(&mut self) {
        let marked: Vec<u16> = self
            .channels
            .iter()
            .filter(|(_, channel)| channel.marked)
            .map(|(index, _)| *index)
            .collect();
        let mut buffer = std::mem::take(&mut self.buffer);
        for sub_index in marked {
            if let Err(why) = self.read_channel(sub_index, &mut buffer) {
                self.break_channel(sub_index, why);
            }
        }
        self.buffer = buffer;
    }

    fn read_channel(&mut self, sub_index: u16, buffer: &mut PacketBuf) -> Result<(), String> {
        for _ in 0..ROUND_REQUESTS {
            let can_start = self.can_start() && self.replays.is_empty();
            let Some(channel) = self.channels.get_mut(&sub_index) else {
                return Ok(());
            };
            if !matches!(channel.ending, Ending::No) || !channel.endpoint.can_answer(PACKET_BYTES) {
                return Ok(());
            }
            let Some(packet) = channel
                .endpoint
                .receive(buffer)
                .map_err(|fault| fault.to_string())?
            else {
                return Ok(());
            };
            if !packet.completion_requested {
                // Nobody waits for it, and nothing that storvsp defines is sent that way.
                channel.endpoint.consume();
                self.ignored += 1;
                continue;
            }
            if !can_start {
                channel.endpoint.put_back();
                channel.starved = true;
                return Ok(());
            }
            let request = Request::from_packet(&packet).map_err(|fault| fault.to_string())?;
            let id = packet.transaction_id;
            match channel.endpoint.take(JOURNAL_KIND, id, &request.kept()) {
                Ok(token) => self.execute(sub_index, token, &request, false),
                Err(NotTaken::NoFreeSlot) => {
                    channel.endpoint.put_back();
                    return Ok(());
                }
                // More page numbers than the largest transfer has. Refused, with what fits as a memory of it.
                Err(NotTaken::TooLong { .. }) => {
                    let [packet, _] = request.kept();
                    match channel.endpoint.take(JOURNAL_KIND, id, &[packet]) {
                        Ok(token) => self.send(sub_index, token, &SrbResult::Invalid.completion()),
                        Err(_) => {
                            channel.endpoint.put_back();
                            return Ok(());
                        }
                    }
                }
            }
        }
        // Perhaps there is more: another round.
        Ok(())
    }

    fn execute(&mut self, sub_index: u16, token: Token, request: &Request<'_>, replay: bool) {
        let Some(ram) = self.port.ram() else {
            // Channels are opened after Attached only.
            token.abandon();
            return;
        };
        let id = token.transaction_id();
        match self
            .controller
            .on_request(&mut self.io, ram, sub_index, id, request, replay)
        {
            Verdict::Answer(answer) => self.send(sub_index, token, &answer),
            Verdict::Control { reply, offer } => self.on_session_step(sub_index, token, &reply, offer),
            Verdict::Reset => self.resets.push((sub_index, token)),
            Verdict::Active(id) => {
                if let Some(channel) = self.channels.get_mut(&sub_index) {
                    channel.active += 1;
                }
                if let Some(owed) = self.owed.get_mut(id as usize) {
                    debug_assert!(owed.is_none(), "a number of the engine was used twice");
                    *owed = Some((sub_index, token));
                }
            }
        }
    }

    /// The session has gone on: a successor must know before the guest does.
    fn on_session_step(&mut self, sub_index: u16, token: Token, reply: &VstorPacket, offer: Option<u16>) {
        let Some(primary) = self.channels.get(&0) else {
            token.abandon();
            return;
        };
        if let Err(error) = self
            .port
            .save_state(primary.endpoint.open_epoch(), self.controller.session())
        {
            token.abandon();
            self.break_channel(sub_index, format!("the session cannot be saved: {error}"));
            return;
        }
        self.send(sub_index, token, reply);
        let Some(count) = offer else { return };
        // The guest counts on its answer being there before the offers.
        if let Some(channel) = self.channels.get_mut(&sub_index)
            && let Err(fault) = channel.endpoint.publish()
        {
            self.break_channel(sub_index, fault.to_string());
            return;
        }
        if let Err(fault) = self.port.offer_sub_channels(count) {
            tracing::warn!(%fault, "cannot ask for sub-channels");
        }
    }

    /// The request with this number at the disks is over.
    fn answer(&mut self, id: RequestId, answer: &VstorPacket) {
        let Some((sub_index, token)) = self.owed.get_mut(id as usize).and_then(Option::take) else {
            return;
        };
        if let Some(channel) = self.channels.get_mut(&sub_index) {
            channel.active -= 1;
        }
        self.send(sub_index, token, answer);
    }

    /// Stages an answer on the channel on which the request came.
    fn send(&mut self, sub_index: u16, token: Token, answer: &VstorPacket) {
        let Some(channel) = self.channels.get_mut(&sub_index) else {
            token.abandon();
            return;
        };
        channel.marked = true;
        if !matches!(channel.ending, Ending::No) {
            // Nobody looks at the ring any more.
            token.abandon();
            return;
        }
        if let Err(fault) = channel.endpoint.complete(token, answer.as_bytes()) {
            self.break_channel(sub_index, fault.to_string());
        }
    }

    fn break_channel(&mut self, sub_index: u16, why: String) {
        if let Some(channel) = self.channels.get_mut(&sub_index) {
            channel.marked = true;
            if matches!(channel.ending, Ending::No) {
                channel.ending = Ending::Broken(why);
            }
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
            self.port.quiesced(token, endpoints).map_err(ServerError::Vcpu)?;
            tracing::info!("quiesced");
        }
        self.poll_for_room()
    }

    /// A reset is answered when nothing is at the disks and nothing waits to be replayed.
    fn finish_resets(&mut self) {
        if self.resets.is_empty() || self.controller.active_count() > 0 {
            return;
        }
        for (sub_index, token) in std::mem::take(&mut self.resets) {
            self.send(sub_index, token, &Controller::reset_done());
        }
        self.unstarve();
    }

    /// Gives back the endpoints of channels that are over.
    fn end_channels(&mut self) -> Result<(), ServerError> {
        // The mark of a channel that ends has done its work; what is left waits for I/O.
        for channel in self
            .channels
            .values_mut()
            .filter(|channel| !matches!(channel.ending, Ending::No))
        {
            channel.marked = false;
        }
        if self.quiesce.is_some() {
            return Ok(());
        }
        let over: Vec<u16> = self
            .channels
            .iter()
            .filter(|(_, channel)| channel.active == 0 && !matches!(channel.ending, Ending::No))
            .map(|(sub_index, _)| *sub_index)
            .collect();
        for sub_index in over {
            let Some(channel) = self.take_channel(sub_index) else {
                continue;
            };
            let ended = match channel.ending {
                Ending::Broken(why) => self.port.channel_broken(channel.endpoint, why),
                Ending::Closing | Ending::No => self.port.channel_closed(channel.endpoint),
            };
            ended.map_err(ServerError::Vcpu)?;
        }
        Ok(())
    }

    /// Removes a channel without I/O, and everything that was to be done on it.
    fn take_channel(&mut self, sub_index: u16) -> Option<Channel> {
        let channel = self.channels.remove(&sub_index)?;
        if let Some(poll) = channel.poll
            && let Err(error) = self.io.cancel(poll)
        {
            tracing::warn!(%error, "cannot cancel a poll");
        }
        for (index, request) in std::mem::take(&mut self.replays) {
            match index == sub_index {
                true => request.token.abandon(),
                false => self.replays.push_back((index, request)),
            }
        }
        for (index, token) in std::mem::take(&mut self.resets) {
            match index == sub_index {
                true => token.abandon(),
                false => self.resets.push((index, token)),
            }
        }
        Some(channel)
    }

    fn take_all(&mut self) -> Vec<Endpoint> {
        let indexes: Vec<u16> = self.channels.keys().copied().collect();
        indexes
            .into_iter()
            .filter_map(|index| self.take_channel(index))
            .map(|channel| channel.endpoint)
            .collect()
    }

    /// Stop at a packet boundary: what is answered is published, the rest is the successor's.
    fn leave(&mut self) {
        for channel in self.channels.values_mut() {
            if let Err(fault) = channel.endpoint.publish() {
                tracing::warn!(%fault, "a channel is broken at the end");
            }
        }
        for (_, request) in self.replays.drain(..) {
            request.token.abandon();
        }
        for (_, token) in self.resets.drain(..) {
            token.abandon();
        }
        for (_, token) in self.owed.iter_mut().filter_map(Option::take) {
            token.abandon();
        }
    }

    fn arm_control(&mut self) -> Result<(), ServerError> {
        self.io.poll_add(
            File::Fd(self.control.as_fd()),
            libc::POLLIN,
            true,
            KIND_CONTROL << KIND_SHIFT,
        )?;
        Ok(())
    }

    fn arm_port(&mut self) -> Result<(), ServerError> {
        self.io.poll_add(
            File::Fd(self.port.as_fd()),
            libc::POLLIN,
            true,
            KIND_PORT << KIND_SHIFT,
        )?;
        Ok(())
    }

    /// Messages that the other side had no room for go out when it has: one poll each, once.
    fn poll_for_room(&mut self) -> Result<(), ServerError> {
        if self.control.wants_write() && !std::mem::replace(&mut self.control_waits, true) {
            let number = (KIND_CONTROL << KIND_SHIFT) | FOR_ROOM;
            self.io
                .poll_add(File::Fd(self.control.as_fd()), libc::POLLOUT, false, number)?;
        }
        if self.port.wants_write() && !std::mem::replace(&mut self.port_waits, true) {
            let number = (KIND_PORT << KIND_SHIFT) | FOR_ROOM;
            self.io
                .poll_add(File::Fd(self.port.as_fd()), libc::POLLOUT, false, number)?;
        }
        Ok(())
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

/// Polls a channel's kick. The number names the channel and its opening.
fn arm_kick(io: &mut Uring, endpoint: &Endpoint) -> Result<OpId, UringError> {
    let number = (KIND_KICK << KIND_SHIFT)
        | (u64::from(endpoint.sub_index()) << 32)
        | u64::from(endpoint.open_epoch());
    io.poll_add(File::Fd(endpoint.kick()), libc::POLLIN, true, number)
}
