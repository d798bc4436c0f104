//! The journal of one open channel: the stores that `journal/mod.rs` speaks of, in their order.
//!
//! The server keeps its own copy of every sequence number and of the free slots; nothing is read back from the
//! journal after recovery.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::layout::{self, MAX_HELD, MAX_PAYLOAD_BYTES, SLOT_COUNT};
use super::recover::{ChannelImage, LiveSlot, Record, RecoverFault, Recovery, RingView, recover};
use super::slot::{FreeSlots, Role, SlotHead, SlotWords};
use super::steps::{self, Step};
use super::{ENABLED, IN_RANGE, Journal};
use crate::mem::SharedMap;

/// A request or held packet that a predecessor left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Replay {
    pub slot: u16,
    pub kind: u8,
    pub transaction_id: u64,
    pub payload: Vec<u8>,
}

/// The journal of one open channel.
#[derive(Debug)]
pub(crate) struct ChannelJournal {
    map: Arc<SharedMap>,
    base: u64,
    free: FreeSlots,
    held_count: u16,
    used_slots: u16,
    /// Committed; and the highest number given to anything staged.
    taken_seq: u64,
    staged_seq: u64,
    published_seq: u64,
    /// Slots that end with the next take, and with the next publication.
    ending_by_take: Vec<u16>,
    ending_by_publication: Vec<u16>,
}

impl ChannelJournal {
    /// Begins an opening: forgets whatever an earlier one left.
    pub(crate) fn open_fresh(journal: &Journal, sub_index: u16, open_epoch: u32) -> Self {
        let base = layout::channel(sub_index);
        let this = Self {
            map: journal.map.clone(),
            base,
            free: FreeSlots::all(),
            held_count: 0,
            used_slots: 0,
            taken_seq: 0,
            staged_seq: 0,
            published_seq: 0,
            ending_by_take: Vec::new(),
            ending_by_publication: Vec::new(),
        };
        this.clear();
        // The last store of an opening: a successor that does not find this number begins the opening anew.
        this.store(layout::EPOCH, u64::from(open_epoch) + 1);
        this
    }

    /// Goes on with an opening. `Ok(None)`: the predecessor died before it began this one, so it is fresh.
    pub(crate) fn recover(
        journal: &Journal,
        sub_index: u16,
        open_epoch: u32,
        ring: RingView,
    ) -> Result<Option<(Self, Recovery)>, RecoverFault> {
        let base = layout::channel(sub_index);
        let map = journal.map.clone();
        let load = |offset: u64| map.load_u64(base + offset, Ordering::Acquire).expect(IN_RANGE);
        match load(layout::EPOCH) {
            epoch if epoch == u64::from(open_epoch) + 1 => {}
            epoch if epoch == (u64::from(open_epoch) + 1) | layout::GIVEN_UP => {
                return Err(RecoverFault::GivenUp);
            }
            _ => return Ok(None),
        }
        let used_slots = load(layout::USED_SLOTS).min(u64::from(SLOT_COUNT)) as u16;
        let image = ChannelImage {
            taken_seq: load(layout::TAKEN_SEQ),
            take_index: [load(layout::TAKE_INDEX), load(layout::TAKE_INDEX + 8)],
            published_seq: load(layout::PUBLISHED_SEQ),
            records: [0, 16].map(|at| Record {
                seq: load(layout::RECORDS + at),
                indexes: load(layout::RECORDS + at + 8),
            }),
            slots: (0..used_slots)
                .map(|slot| {
                    let at = layout::slot(slot);
                    SlotWords {
                        head: load(at + layout::SLOT_HEAD),
                        take_seq: load(at + layout::SLOT_TAKE_SEQ),
                        publish_seq: load(at + layout::SLOT_PUBLISH_SEQ),
                        transaction_id: load(at + layout::SLOT_TRANSACTION),
                    }
                })
                .collect(),
        };
        let recovery = recover(&image, ring)?;
        let mut this = Self {
            map,
            base,
            free: FreeSlots::all(),
            // At most SLOT_COUNT of them.
            held_count: recovery.held.len() as u16,
            used_slots,
            taken_seq: recovery.taken_seq,
            staged_seq: recovery.taken_seq,
            published_seq: recovery.published_seq,
            ending_by_take: Vec::new(),
            ending_by_publication: Vec::new(),
        };
        this.pass(Step::RecoveryJudged);
        this.settle(&recovery);
        this.pass(Step::RecoverySettled);
        Ok(Some((this, recovery)))
    }

    /// Makes the journal say what recovery found. May itself be cut short at any store: what it finds then is the same.
    fn settle(&mut self, recovery: &Recovery) {
        self.store(layout::PUBLISHED_SEQ, recovery.published_seq);
        self.pass(Step::RecoveredPublicationNoted);
        for &(slot, role) in &recovery.stale {
            // The number that makes it live goes first; without it the slot is dead whatever the other says.
            let (begin, end) = words_of(role);
            self.store(layout::slot(slot) + begin, 0);
            self.pass(Step::StaleSlotHalfCleared);
            self.store(layout::slot(slot) + end, 0);
        }
        for live in recovery.requests.iter().chain(&recovery.held) {
            self.free.remove(live.slot);
            if live.has_stale_end {
                let (_, end) = words_of(live.head.role);
                self.store(layout::slot(live.slot) + end, 0);
            }
        }
    }

    /// Copies the payload of a slot that recovery found live.
    pub(crate) fn replay(&self, live: &LiveSlot) -> Replay {
        let mut payload = vec![0; live.head.payload_bytes as usize];
        self.map
            .read(self.base + layout::payload(live.slot), &mut payload)
            .expect(IN_RANGE);
        Replay {
            slot: live.slot,
            kind: live.head.kind,
            transaction_id: live.transaction_id,
            payload,
        }
    }

    /// Ends an opening: nothing of it is ever replayed.
    pub(crate) fn close(self) {
        self.clear();
    }

    /// Notes that this opening is broken: a successor must not take it for one that nobody has begun yet.
    pub(crate) fn give_up(journal: &Journal, sub_index: u16, open_epoch: u32) {
        if ENABLED {
            let at = layout::channel(sub_index) + layout::EPOCH;
            let word = (u64::from(open_epoch) + 1) | layout::GIVEN_UP;
            // Ordering: as in `store`.
            journal
                .map
                .store_u64(at, word, Ordering::Release)
                .expect(IN_RANGE);
        }
    }

    /// Forgets everything, in an order in which a half-done clearing means "no opening".
    fn clear(&self) {
        self.store(layout::EPOCH, 0);
        let used = self
            .map
            .load_u64(self.base + layout::USED_SLOTS, Ordering::Acquire)
            .expect(IN_RANGE);
        let used = used.min(u64::from(SLOT_COUNT)) * layout::SLOT_BYTES;
        if used != 0 && ENABLED {
            // At most 32 KiB.
            self.map
                .fill(self.base + layout::slot(0), used as usize, 0)
                .expect(IN_RANGE);
        }
        for word in (layout::TAKEN_SEQ..=layout::USED_SLOTS).step_by(8) {
            // An idle channel's page is not touched for nothing.
            if self
                .map
                .load_u64(self.base + word, Ordering::Relaxed)
                .expect(IN_RANGE)
                != 0
            {
                self.store(word, 0);
            }
        }
    }

    /// Slots free for requests.
    pub(crate) fn free_slots(&self) -> u16 {
        self.free.count()
    }

    /// Held packets that the guest has not answered.
    pub(crate) fn held_count(&self) -> u16 {
        self.held_count
    }

    /// The number of the publication that everything staged now belongs to.
    pub(crate) fn next_publication(&self) -> u64 {
        self.published_seq + 1
    }

    /// Whether that publication is done.
    pub(crate) fn is_published(&self, publish_seq: u64) -> bool {
        publish_seq <= self.published_seq
    }

    /// Writes a request of the guest into a slot. It is taken with the next [`Self::commit_take`].
    ///
    /// `None`: no slot is free. The payload's parts must not be longer than [`MAX_PAYLOAD_BYTES`] in all.
    pub(crate) fn stage_request(&mut self, kind: u8, transaction_id: u64, payload: &[&[u8]]) -> Option<u16> {
        let slot = self.allocate()?;
        self.staged_seq += 1;
        let seq = self.staged_seq;
        self.write_slot(slot, Role::Request, kind, seq, transaction_id, payload);
        self.pass(Step::RequestStaged);
        Some(slot)
    }

    /// Writes a packet of ours into a slot. It is held from the next publication on.
    pub(crate) fn stage_held(&mut self, kind: u8, transaction_id: u64, payload: &[&[u8]]) -> Option<u16> {
        if self.held_count >= MAX_HELD {
            return None;
        }
        let slot = self.allocate()?;
        self.held_count += 1;
        let seq = self.published_seq + 1;
        self.write_slot(slot, Role::Held, kind, seq, transaction_id, payload);
        self.pass(Step::HeldStaged);
        Some(slot)
    }

    /// Notes that the packet just staged answers a request.
    pub(crate) fn stage_answer(&mut self, slot: u16) {
        self.store(
            layout::slot(slot) + layout::SLOT_PUBLISH_SEQ,
            self.published_seq + 1,
        );
        self.pass(Step::AnswerNoted);
        self.ending_by_publication.push(slot);
    }

    /// Notes that the packet just read ends a held one.
    pub(crate) fn stage_release(&mut self, slot: u16) {
        self.staged_seq += 1;
        self.store(layout::slot(slot) + layout::SLOT_TAKE_SEQ, self.staged_seq);
        self.pass(Step::ReleaseNoted);
        self.ending_by_take.push(slot);
    }

    /// Forgets a request, whether committed or not, without an answer.
    pub(crate) fn cancel_request(&mut self, slot: u16) {
        self.store(layout::slot(slot) + layout::SLOT_TAKE_SEQ, 0);
        self.free.insert(slot);
    }

    /// Forgets a held packet, whether published or not, without the guest's answer.
    pub(crate) fn cancel_held(&mut self, slot: u16) {
        self.store(layout::slot(slot) + layout::SLOT_PUBLISH_SEQ, 0);
        self.held_count -= 1;
        self.free.insert(slot);
    }

    /// The commit point of everything staged from the ring to the host. Store the ring's read index afterwards.
    pub(crate) fn commit_take(&mut self, read_index: u32) {
        // The other one of the two index words than that of the last commit.
        let mut seq = self.staged_seq.max(self.taken_seq + 1);
        if seq % 2 == self.taken_seq % 2 {
            seq += 1;
        }
        self.store(layout::TAKE_INDEX + 8 * (seq % 2), u64::from(read_index));
        self.pass(Step::TakeIndexWritten);
        self.store(layout::TAKEN_SEQ, seq);
        self.pass(Step::TakeCommitted);
        self.taken_seq = seq;
        self.staged_seq = seq;
        while let Some(slot) = self.ending_by_take.pop() {
            self.held_count -= 1;
            self.free.insert(slot);
        }
    }

    /// What must be known before the ring's write index is stored, which is the commit point.
    pub(crate) fn before_publication(&self, old_write_index: u32, new_write_index: u32) {
        let seq = self.published_seq + 1;
        let record = layout::RECORDS + 16 * (seq % 2);
        self.store(record + 8, Record::pack(old_write_index, new_write_index));
        self.pass(Step::RecordIndexesWritten);
        // After the indexes: the number makes the record count.
        self.store(record, seq);
        self.pass(Step::RecordNumbered);
    }

    /// The ring's write index was stored.
    pub(crate) fn after_publication(&mut self) {
        self.published_seq += 1;
        self.store(layout::PUBLISHED_SEQ, self.published_seq);
        self.pass(Step::PublicationNoted);
        while let Some(slot) = self.ending_by_publication.pop() {
            self.free.insert(slot);
        }
    }

    fn allocate(&mut self) -> Option<u16> {
        let slot = self.free.take_lowest()?;
        if slot >= self.used_slots {
            self.used_slots = slot + 1;
            self.store(layout::USED_SLOTS, u64::from(self.used_slots));
        }
        Some(slot)
    }

    /// Fills a free slot. Free means that it is dead in either role, so the head can change first; then the number
    /// that will make it live (not committed yet: still dead), then all the rest.
    fn write_slot(&self, slot: u16, role: Role, kind: u8, seq: u64, transaction_id: u64, payload: &[&[u8]]) {
        if !ENABLED {
            return;
        }
        let length: usize = payload.iter().map(|part| part.len()).sum();
        assert!(
            length <= MAX_PAYLOAD_BYTES,
            "a payload of {length} bytes for a slot"
        );
        let at = layout::slot(slot);
        let (begin, end) = words_of(role);
        self.store(
            at + layout::SLOT_HEAD,
            SlotHead {
                kind,
                role,
                payload_bytes: length as u32,
            }
            .pack(),
        );
        self.store(at + begin, seq);
        self.pass(match role {
            Role::Request => Step::RequestSlotBegun,
            Role::Held => Step::HeldSlotBegun,
        });
        self.store(at + end, 0);
        self.store(at + layout::SLOT_TRANSACTION, transaction_id);
        let mut to = self.base + layout::payload(slot);
        for part in payload {
            self.map.write(to, part).expect(IN_RANGE);
            to += part.len() as u64;
        }
    }

    /// See [`Step`].
    #[inline]
    pub(crate) fn pass(&self, step: Step) {
        steps::pass(&self.map, step);
    }

    #[inline]
    fn store(&self, offset: u64, value: u64) {
        if ENABLED {
            // Ordering: release keeps the program order of all stores before it; the reader is a successor that
            // starts after this process was reaped.
            self.map
                .store_u64(self.base + offset, value, Ordering::Release)
                .expect(IN_RANGE);
        }
    }
}

/// The words whose commit begins and ends a slot's life.
fn words_of(role: Role) -> (u64, u64) {
    match role {
        Role::Request => (layout::SLOT_TAKE_SEQ, layout::SLOT_PUBLISH_SEQ),
        Role::Held => (layout::SLOT_PUBLISH_SEQ, layout::SLOT_TAKE_SEQ),
    }
}
