//! One open channel, as a VSP holds it. The module's text has the loop that uses it.
#![forbid(unsafe_code)]

mod open;
mod sleep;

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use nix::errno::Errno;

use super::interrupt::{Interrupt, set_nonblocking};
use super::token::{HeldToken, NotTaken, Token};
use crate::fault::GuestFault;
use crate::journal::{ChannelJournal, Journal, MAX_PAYLOAD_BYTES, Step};
use crate::mem::HostError;
use crate::record::{EventKind, Recorder};
use crate::ring::{PacketBuf, RingFault, RingReader, RingWriter, StageError};
use crate::wire::{OutPacket, Packet};

pub(super) use open::{ChannelName, ChannelParts, OpenFault};

/// What an endpoint has done since it was opened or taken over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct EndpointCounters {
    /// Packets read from the guest.
    pub received: u64,
    /// Completions written.
    pub completed: u64,
    /// Other packets written.
    pub sent: u64,
    /// Times that written packets were made visible.
    pub publications: u64,
    /// Interrupts raised.
    pub interrupts: u64,
}

/// Why reading has stopped although packets may be there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stall {
    No,
    /// Reading makes no sense before something else has happened.
    Yes,
    /// Something has happened since.
    Over,
}

/// One open channel: two rings, journal, kick and interrupt.
#[derive(Debug)]
pub struct Endpoint {
    name: ChannelName,
    reader: RingReader,
    writer: RingWriter,
    journal: ChannelJournal,
    kick: OwnedFd,
    kick_is_nonblocking: bool,
    interrupt: Interrupt,
    /// Where the packet begins that was received last, while it can be put back.
    last_received: Option<u32>,
    masked: bool,
    /// Packets received since the kick was last waited for.
    burst: u32,
    stall: Stall,
    /// Requests taken and not answered, those in `deferred` included.
    outstanding: u32,
    /// Ring bytes of the longest answer that was asked for with `can_answer`.
    answer_bytes: u32,
    /// At least so many bytes of the ring to the guest are free.
    free_floor: u32,
    /// Ring bytes that were asked for and not there; 0: none.
    wanted_bytes: u32,
    wish_is_set: bool,
    /// Answers that did not fit in the ring. Bounded by the slots of the journal.
    deferred: VecDeque<(u16, u64, Vec<u8>)>,
    broken: Option<GuestFault>,
    counters: EndpointCounters,
    recorder: Option<Arc<Recorder>>,
}

impl Endpoint {
    fn token(&mut self, slot: u16, kind: u8, transaction_id: u64) -> Token {
        self.outstanding += 1;
        Token::new(
            slot,
            kind,
            transaction_id,
            self.name.channel,
            self.name.open_epoch,
        )
    }

    fn held_token(&self, slot: u16, kind: u8, transaction_id: u64, publish_seq: u64) -> HeldToken {
        let ChannelName {
            channel, open_epoch, ..
        } = self.name;
        HeldToken {
            slot,
            kind,
            transaction_id,
            channel,
            open_epoch,
            publish_seq,
        }
    }

    /// 0: the primary.
    pub fn sub_index(&self) -> u16 {
        self.name.sub_index
    }

    /// relid.
    pub fn channel_id(&self) -> u32 {
        self.name.channel
    }

    /// Names this opening; never repeats within a VM's life.
    pub fn open_epoch(&self) -> u32 {
        self.name.open_epoch
    }

    /// Becomes readable when the guest has something for us.
    pub fn kick(&self) -> BorrowedFd<'_> {
        self.kick.as_fd()
    }

    /// Resets the kick. For servers that poll it; do not mix with `Uring::read_eventfd`, which needs it blocking.
    pub fn drain_kick(&mut self) -> Result<(), HostError> {
        self.record(EventKind::Kick, 0);
        if !self.kick_is_nonblocking {
            set_nonblocking(&self.kick)?;
            self.kick_is_nonblocking = true;
        }
        match nix::unistd::read(&self.kick, &mut [0; 8]) {
            Ok(_) | Err(Errno::EAGAIN) => Ok(()),
            Err(errno) => Err(HostError::new("read a kick", errno)),
        }
    }

    /// The fault that broke the endpoint, if one did.
    pub fn broken(&self) -> Option<GuestFault> {
        self.broken
    }

    /// What was done so far.
    pub fn counters(&self) -> EndpointCounters {
        EndpointCounters {
            interrupts: self.interrupt.count(),
            ..self.counters
        }
    }

    /// Requests taken and not answered.
    pub fn outstanding(&self) -> u32 {
        self.outstanding
    }

    /// How many more requests can be taken now.
    pub fn free_slots(&self) -> u16 {
        self.journal.free_slots()
    }

    /// Packets sent with [`Self::send_held`] and not released.
    pub fn held(&self) -> u16 {
        self.journal.held_count()
    }

    /// `path = value` pairs for inspection.
    pub fn inspect(&self) -> Vec<(String, String)> {
        let counters = self.counters();
        let path = |leaf: &str| format!("channel/{}/{leaf}", self.name.sub_index);
        vec![
            (path("relid"), self.name.channel.to_string()),
            (path("outstanding"), self.outstanding.to_string()),
            (path("held"), self.held().to_string()),
            (path("received"), counters.received.to_string()),
            (path("completed"), counters.completed.to_string()),
            (path("sent"), counters.sent.to_string()),
            (path("publications"), counters.publications.to_string()),
            (path("interrupts"), counters.interrupts.to_string()),
            (
                path("broken"),
                self.broken.map_or("no".to_owned(), |fault| fault.to_string()),
            ),
        ]
    }

    /// Copies the next packet into `buf` and stages past it; nothing is given back to the guest before
    /// [`Self::commit_taken`]. `None`: the ring is empty.
    ///
    /// Each packet is then either taken ([`Self::take`]), consumed ([`Self::consume`]) or put back
    /// ([`Self::put_back`]).
    pub fn receive<'b>(&mut self, buf: &'b mut PacketBuf) -> Result<Option<Packet<'b>>, GuestFault> {
        self.check()?;
        if !self.masked {
            // We look again before we sleep; until then kicks are of no use.
            self.reader.mask_interrupts();
            self.masked = true;
        }
        self.stall = Stall::No;
        let start = self.reader.staged_index();
        match self.reader.next(buf) {
            Ok(None) => Ok(None),
            Ok(Some(packet)) => {
                self.last_received = Some(start);
                self.counters.received += 1;
                self.burst = self.burst.saturating_add(1);
                Ok(Some(packet))
            }
            Err(fault) => Err(self.fail(fault.into())),
        }
    }

    /// Takes the packet just received: what a successor needs to execute it again goes into the journal.
    ///
    /// `kind` is the device's own; it comes back with [`Recovered`], as do the payload's parts, in one piece.
    pub fn take(&mut self, kind: u8, transaction_id: u64, payload: &[&[u8]]) -> Result<Token, NotTaken> {
        assert!(self.last_received.is_some(), "take without a packet");
        let bytes = payload
            .iter()
            .fold(0usize, |sum, part| sum.saturating_add(part.len()));
        if bytes > MAX_PAYLOAD_BYTES {
            return Err(NotTaken::TooLong { bytes });
        }
        let slot = self
            .journal
            .stage_request(kind, transaction_id, payload)
            .ok_or(NotTaken::NoFreeSlot)?;
        self.last_received = None;
        self.record(EventKind::Take, transaction_id);
        Ok(self.token(slot, kind, transaction_id))
    }

    /// Puts the packet just received back. Reading makes sense again after a request was answered, or after whatever
    /// else the server waits for.
    ///
    /// # Panics
    /// Without a packet that was received and neither taken nor consumed.
    pub fn put_back(&mut self) {
        let index = self.last_received.take().expect("put_back follows receive");
        self.reader.revert_to(index);
        self.counters.received -= 1;
        self.stall = Stall::Yes;
    }

    /// The packet just received needs no answer. If the server dies before the next [`Self::commit_taken`], its
    /// successor receives the packet again; afterwards nobody does.
    pub fn consume(&mut self) {
        self.last_received = None;
    }

    /// The guest's answer to a held packet was received: it is released together with the packet that said so. That
    /// packet counts as consumed.
    pub fn release(&mut self, held: HeldToken) -> Result<(), GuestFault> {
        assert!(
            (held.channel, held.open_epoch) == (self.name.channel, self.name.open_epoch),
            "a stranger's token"
        );
        self.last_received = None;
        if !self.journal.is_published(held.publish_seq) {
            // An answer to what the guest cannot have seen. Harmless, once the packet is out.
            self.publish()?;
        }
        self.journal.stage_release(held.slot);
        self.progress();
        Ok(())
    }

    /// Commits everything taken and consumed so far, and gives the ring space back to the guest.
    pub fn commit_taken(&mut self) -> Result<(), GuestFault> {
        self.check()?;
        self.last_received = None;
        if self.reader.staged_index() == self.reader.committed_index() {
            return Ok(());
        }
        self.journal.commit_take(self.reader.staged_index());
        let signal = self.reader.commit();
        self.journal.pass(Step::TakeShownToGuest);
        if signal.is_needed() {
            self.raise();
        }
        Ok(())
    }

    /// Whether the ring to the guest has room for an answer of `payload_bytes` to each request outstanding and one more.
    ///
    /// If not, do not receive: the kick comes when there is room ([`Self::prepare_sleep`] asks for it).
    pub fn can_answer(&mut self, payload_bytes: usize) -> bool {
        if self.broken.is_some() {
            return false;
        }
        let needed = RingWriter::needed_bytes(0, payload_bytes);
        self.answer_bytes = self.answer_bytes.max(u32::try_from(needed).unwrap_or(u32::MAX));
        let room = self.deferred.is_empty() && self.has_room(self.reserve(1));
        if !room {
            self.stall = Stall::Yes;
        }
        room
    }

    /// Ring bytes for the answers to all requests outstanding and `more`.
    fn reserve(&self, more: u32) -> u32 {
        self.outstanding
            .saturating_add(more)
            .saturating_mul(self.answer_bytes)
    }

    /// Whether more than `bytes` are free; if not, remembers the wish.
    fn has_room(&mut self, bytes: u32) -> bool {
        if self.free_floor <= bytes {
            match self.writer.free_bytes() {
                Ok(free) => self.free_floor = free,
                Err(fault) => {
                    self.fail(fault.into());
                    return false;
                }
            }
        }
        let room = self.free_floor > bytes;
        if !room {
            self.wanted_bytes = bytes;
        } else if self.wanted_bytes != 0 && bytes >= self.wanted_bytes {
            self.withdraw_wish();
        }
        room
    }

    fn withdraw_wish(&mut self) {
        self.wanted_bytes = 0;
        if self.wish_is_set {
            self.writer.set_pending_send_bytes(0);
            self.wish_is_set = false;
        }
    }

    /// Answers a request: stages its completion packet. The guest sees it after [`Self::publish`].
    ///
    /// An answer that does not fit in the ring (the guest does not read) is kept and staged later.
    pub fn complete(&mut self, token: Token, payload: &[u8]) -> Result<(), GuestFault> {
        assert!(
            token.is_of(self.name.channel, self.name.open_epoch),
            "a stranger's token: {token:?}"
        );
        let transaction_id = token.transaction_id();
        let slot = token.into_slot();
        self.check()?;
        self.progress();
        if !self.deferred.is_empty() || !self.stage_completion(slot, transaction_id, payload)? {
            self.deferred.push_back((slot, transaction_id, payload.to_vec()));
        }
        Ok(())
    }

    /// Stages a completion; `false`: no room.
    fn stage_completion(
        &mut self,
        slot: u16,
        transaction_id: u64,
        payload: &[u8],
    ) -> Result<bool, GuestFault> {
        match self.stage(&OutPacket::completion(transaction_id, &[payload])) {
            Ok(()) => {
                self.record(EventKind::Complete, transaction_id);
                self.journal.pass(Step::AnswerInRing);
                self.journal.stage_answer(slot);
                self.outstanding -= 1;
                self.counters.completed += 1;
                Ok(true)
            }
            Err(StageError::Full) => {
                self.wanted_bytes =
                    u32::try_from(RingWriter::needed_bytes(0, payload.len())).unwrap_or(u32::MAX);
                Ok(false)
            }
            Err(StageError::Fault(fault)) => Err(self.fail(fault.into())),
            // The guest has made a ring that is too small for the protocol it speaks.
            Err(StageError::TooBig { data_bytes, .. }) => {
                let area_bytes = u64::from(data_bytes);
                Err(self.fail(
                    RingFault::RingSize {
                        area_bytes,
                        downstream_page_offset: 0,
                    }
                    .into(),
                ))
            }
        }
    }

    fn stage(&mut self, packet: &OutPacket<'_>) -> Result<(), StageError> {
        self.writer.stage(packet)?;
        let needed = RingWriter::needed_bytes(packet.extra_header.len(), packet.payload_bytes().unwrap_or(0));
        self.free_floor = self
            .free_floor
            .saturating_sub(u32::try_from(needed).unwrap_or(u32::MAX));
        Ok(())
    }

    /// Stages answers that found no room before.
    fn stage_deferred(&mut self) -> Result<(), GuestFault> {
        while let Some((slot, transaction_id, payload)) = self.deferred.pop_front() {
            if !self.stage_completion(slot, transaction_id, &payload)? {
                self.deferred.push_front((slot, transaction_id, payload));
                break;
            }
        }
        Ok(())
    }

    /// Forgets a request without an answer: it was a packet that wants none, after all. Nothing of it is replayed.
    pub fn cancel(&mut self, token: Token) {
        assert!(
            token.is_of(self.name.channel, self.name.open_epoch),
            "a stranger's token: {token:?}"
        );
        self.journal.cancel_request(token.into_slot());
        self.outstanding -= 1;
        self.progress();
    }

    /// Stages a packet of ours that is not the answer to a request.
    ///
    /// [`StageError::Full`] while the room is needed for the answers to the requests outstanding; a kick comes when
    /// there is more.
    pub fn send(&mut self, packet: &OutPacket<'_>) -> Result<(), StageError> {
        if let Some(GuestFault::Ring(fault)) = self.broken {
            return Err(fault.into());
        }
        let needed = RingWriter::needed_bytes(packet.extra_header.len(), packet.payload_bytes().unwrap_or(0));
        let needed = u32::try_from(needed).unwrap_or(u32::MAX);
        if !self.has_room(needed.saturating_add(self.reserve(1))) {
            return match self.broken {
                Some(GuestFault::Ring(fault)) => Err(fault.into()),
                _ => Err(StageError::Full),
            };
        }
        self.stage(packet)?;
        self.counters.sent += 1;
        Ok(())
    }

    /// Stages a packet of ours whose answer must be accounted for even if this server dies in between.
    ///
    /// `kind` and `payload` (at most [`MAX_PAYLOAD_BYTES`]) come back with [`Recovered`]. [`StageError::Full`] as with
    /// [`Self::send`], and while [`crate::journal::MAX_HELD`] packets are held.
    pub fn send_held(
        &mut self,
        packet: &OutPacket<'_>,
        kind: u8,
        payload: &[&[u8]],
    ) -> Result<HeldToken, StageError> {
        let Some(slot) = self.journal.stage_held(kind, packet.transaction_id, payload) else {
            return Err(StageError::Full);
        };
        if let Err(error) = self.send(packet) {
            self.journal.cancel_held(slot);
            return Err(error);
        }
        self.journal.pass(Step::HeldInRing);
        Ok(self.held_token(slot, kind, packet.transaction_id, self.journal.next_publication()))
    }

    /// Makes everything staged visible to the guest, and interrupts it if the ring's rules ask for it. Commits what
    /// was taken before.
    pub fn publish(&mut self) -> Result<(), GuestFault> {
        self.check()?;
        if !self.deferred.is_empty() {
            self.stage_deferred()?;
        }
        // A request must be known as taken before its answer can be seen: else a successor would take it again.
        self.commit_taken()?;
        if self.writer.staged_index() == self.writer.committed_index() {
            return Ok(());
        }
        self.journal
            .before_publication(self.writer.committed_index(), self.writer.staged_index());
        let committed = self.writer.commit();
        self.journal.pass(Step::Published);
        self.journal.after_publication();
        self.counters.publications += 1;
        self.record(EventKind::Publish, u64::from(self.writer.committed_index()));
        match committed {
            Ok(signal) => {
                if signal.is_needed() {
                    self.raise();
                    self.journal.pass(Step::GuestInterrupted);
                }
                Ok(())
            }
            Err(fault) => Err(self.fail(fault.into())),
        }
    }

    /// Interrupts the guest whether or not it needs it.
    pub fn signal_now(&mut self) {
        self.raise();
    }

    /// From now on another VP is interrupted. Interrupts it once: what was signalled to the old one may be lost.
    pub fn retarget(&mut self, target_vp: u16) {
        self.interrupt.retarget(target_vp);
        self.raise();
    }

    /// Ends this opening: nothing of it is ever replayed, and its rings are not touched any more.
    pub(super) fn close(self) -> ChannelName {
        self.record(EventKind::ChannelClosed, u64::from(self.name.open_epoch));
        self.journal.close();
        self.name
    }

    /// Ends this opening because the guest broke it: no successor serves it either.
    pub(super) fn give_up(self, journal: &Journal) -> ChannelName {
        ChannelJournal::give_up(journal, self.name.sub_index, self.name.open_epoch);
        self.name
    }

    fn raise(&mut self) {
        self.interrupt.raise();
        self.record(EventKind::Interrupt, u64::from(self.interrupt.target_vp()));
    }

    fn record(&self, kind: EventKind, value: u64) {
        if let Some(recorder) = &self.recorder {
            recorder.record(kind, self.name.sub_index, value);
        }
    }

    fn progress(&mut self) {
        if self.stall == Stall::Yes {
            self.stall = Stall::Over;
        }
    }

    fn check(&self) -> Result<(), GuestFault> {
        self.broken.map_or(Ok(()), Err)
    }

    fn fail(&mut self, fault: GuestFault) -> GuestFault {
        *self.broken.get_or_insert(fault)
    }
}
