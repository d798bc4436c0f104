//! The server of the model: what it decides, and the stores that it makes of it, in the order of `journal/channel.rs` and
//! `channel/endpoint/mod.rs`.
#![forbid(unsafe_code)]

use super::super::recover::Recovery;
use super::super::slot::SlotHead;
use super::*;
use std::collections::VecDeque;

/// What dies with the process.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Server {
    /// Stores that are decided on and not done. Nothing else is decided before they are.
    stores: VecDeque<Store>,
    taken_seq: u64,
    staged_seq: u64,
    published_seq: u64,
    used_slots: u64,
    free: Vec<bool>,
    ending_by_take: Vec<u8>,
    ending_by_publication: Vec<u8>,
    /// Places: staged, committed.
    read: (u8, u8),
    write: (u8, u8),
    /// Slot, transaction, kind.
    work: Vec<(u8, u8, u8)>,
    /// Slot, number.
    held: Vec<(u8, u8)>,
    /// Of a wrong order: done after the publication, or after the take.
    late: Vec<Store>,
}

const ECHO: u8 = 1;
const PUSH: u8 = 2;

impl Server {
    /// Of a channel that was just opened.
    pub(super) fn new(slots: u8) -> Self {
        Self {
            stores: VecDeque::new(),
            taken_seq: 0,
            staged_seq: 0,
            published_seq: 0,
            used_slots: 0,
            free: vec![true; usize::from(slots)],
            ending_by_take: Vec::new(),
            ending_by_publication: Vec::new(),
            read: (0, 0),
            write: (0, 0),
            work: Vec::new(),
            held: Vec::new(),
            late: Vec::new(),
        }
    }

    /// Of a channel that a predecessor had: `ChannelJournal::recover` and `settle`.
    pub(super) fn recovered(recovery: &Recovery, shared: &Shared, setup: &Setup) -> Self {
        let place = |index: u32| (index / PACKET_BYTES) as u8;
        let mut this = Self::new(setup.slots);
        this.taken_seq = recovery.taken_seq;
        this.staged_seq = recovery.taken_seq;
        this.published_seq = recovery.published_seq;
        this.used_slots = shared.used_slots;
        this.read = (place(recovery.read_index), place(recovery.read_index));
        this.write = (place(recovery.write_index), place(recovery.write_index));
        this.push(Store::PublishedSeq(recovery.published_seq));
        let leave = setup.mutation == Some(Mutation::StaleLeft);
        for &(slot, role) in recovery.stale.iter().filter(|_| !leave) {
            let (begin, end) = words_of(role);
            this.push(Store::Slot(slot as u8, begin, 0));
            this.push(Store::Slot(slot as u8, end, 0));
        }
        let slot = |live: &LiveSlot| live.slot as u8;
        for live in recovery.requests.iter().chain(&recovery.held) {
            this.free[usize::from(live.slot)] = false;
            if live.has_stale_end && !leave {
                this.push(Store::Slot(slot(live), words_of(live.head.role).1, 0));
            }
        }
        // `RingReader::claim_words` and `RingWriter::claim_words`.
        if setup.mutation != Some(Mutation::WordsNotClaimed) {
            this.push(Store::HostRead(this.read.0));
            this.push(Store::GuestWrite(this.write.0));
        }
        let work = recovery.requests.iter();
        this.work = work
            .map(|live| (slot(live), live.transaction_id as u8, live.head.kind))
            .collect();
        let held = recovery.held.iter();
        this.held = held.map(|live| (slot(live), live.transaction_id as u8)).collect();
        this
    }

    pub(super) fn held_ids(&self) -> Vec<u8> {
        let mut ids: Vec<u8> = self.held.iter().map(|(_, id)| *id).collect();
        ids.sort_unstable();
        ids
    }

    /// The next store, or everything that may be decided.
    pub(super) fn steps(
        &self,
        state: &State,
        setup: &Setup,
        next: &mut Vec<(String, State)>,
    ) -> Result<(), String> {
        let with = |server: Self| State {
            server: Some(server),
            ..state.clone()
        };
        if !self.stores.is_empty() {
            let mut server = self.clone();
            if let Some(store) = server.stores.pop_front() {
                let mut after = with(server);
                after.shared.apply(store);
                next.push((format!("{store:?}"), after));
            }
            return Ok(());
        }
        let shared = &state.shared;
        let mutation = setup.mutation;
        let outstanding = self.work.len() as u8;
        // Room for what each request may need, as `Endpoint::can_answer` asks for.
        let room = PLACES - 1 - between(shared.guest_read, self.write.0);
        if self.read.0 != shared.host_write && room > outstanding {
            let packet = shared.to_host[usize::from(self.read.0)];
            let mut server = self.clone();
            if server.receive(packet, mutation)? {
                next.push((format!("server reads {packet:?}"), with(server)));
            }
        }
        for position in 0..self.work.len() {
            let (_, id, kind) = self.work[position];
            let places = if kind == PUSH { 2 } else { 1 };
            let has_slot = kind != PUSH || self.free.contains(&true);
            if room >= places && has_slot {
                let mut server = self.clone();
                let mut after = state.clone();
                server.answer(position, &mut after.next_held, mutation);
                after.server = Some(server);
                next.push((format!("server answers {id}"), after));
            }
        }
        if self.read.0 != self.read.1 {
            let mut server = self.clone();
            server.commit_taken(mutation);
            next.push(("server commits".to_owned(), with(server)));
        }
        if self.write.0 != self.write.1 {
            let mut server = self.clone();
            server.publish(mutation);
            next.push(("server publishes".to_owned(), with(server)));
        }
        Ok(())
    }

    fn push(&mut self, store: Store) {
        self.stores.push_back(store);
    }

    /// `Endpoint::receive`, then `take`, `consume` or `release`. `false`: no slot is free, so it stays in the ring.
    pub(super) fn receive(&mut self, packet: Packet, mutation: Option<Mutation>) -> Result<bool, String> {
        match packet {
            Packet::Echo(id) | Packet::Push(id) => {
                let kind = if packet == Packet::Echo(id) { ECHO } else { PUSH };
                let Some(slot) = self.allocate() else {
                    return Ok(false);
                };
                self.staged_seq += 1;
                self.write_slot(slot, Role::Request, kind, self.staged_seq, id, mutation);
                self.work.push((slot, id, kind));
            }
            Packet::Note => {}
            Packet::Thanks(id) => {
                let position = self.held.iter().position(|(_, held)| *held == id);
                let position =
                    position.ok_or_else(|| format!("the guest answers held {id}, which is unknown"))?;
                let (slot, _) = self.held.remove(position);
                self.staged_seq += 1;
                let end = Store::Slot(slot, TAKE_SEQ, self.staged_seq);
                match mutation {
                    Some(Mutation::ReleaseNotedLate) => self.late.push(end),
                    _ => self.push(end),
                }
                self.ending_by_take.push(slot);
            }
            Packet::Completion(_) | Packet::Held(_) => return Err(format!("the server receives {packet:?}")),
        }
        self.read.0 = after(self.read.0);
        Ok(true)
    }

    /// `Endpoint::complete`, for a push after `send_held`.
    pub(super) fn answer(&mut self, position: usize, next_held: &mut u8, mutation: Option<Mutation>) {
        let (slot, id, kind) = self.work.remove(position);
        if kind == PUSH
            && let Some(held_slot) = self.allocate()
        {
            let held = *next_held;
            *next_held += 1;
            self.write_slot(held_slot, Role::Held, 0, self.published_seq + 1, held, mutation);
            self.write_packet(Packet::Held(held));
            self.held.push((held_slot, held));
        }
        self.write_packet(Packet::Completion(id));
        let end = Store::Slot(slot, PUBLISH_SEQ, self.published_seq + 1);
        match mutation {
            Some(Mutation::AnswerNotedLate) => self.late.push(end),
            _ => self.push(end),
        }
        match mutation {
            Some(Mutation::SlotFreedEarly) => self.free[usize::from(slot)] = true,
            _ => self.ending_by_publication.push(slot),
        }
    }

    fn write_packet(&mut self, packet: Packet) {
        self.push(Store::GuestData(self.write.0, packet));
        self.write.0 = after(self.write.0);
    }

    /// `Endpoint::commit_taken`.
    pub(super) fn commit_taken(&mut self, mutation: Option<Mutation>) {
        if self.read.0 == self.read.1 {
            return;
        }
        self.read.1 = self.read.0;
        let read = Store::HostRead(self.read.1);
        if mutation == Some(Mutation::ReadIndexBeforeTake) {
            self.push(read);
        }
        let mut seq = self.staged_seq.max(self.taken_seq + 1);
        if seq % 2 == self.taken_seq % 2 && mutation != Some(Mutation::OneTakeIndex) {
            seq += 1;
        }
        self.push(Store::TakeIndex(
            (seq % 2) as usize,
            u64::from(index(self.read.1)),
        ));
        self.push(Store::TakenSeq(seq));
        self.taken_seq = seq;
        self.staged_seq = seq;
        for slot in std::mem::take(&mut self.ending_by_take) {
            self.free[usize::from(slot)] = true;
        }
        if mutation != Some(Mutation::ReadIndexBeforeTake) {
            self.push(read);
        }
        if mutation == Some(Mutation::ReleaseNotedLate) {
            self.stores.extend(std::mem::take(&mut self.late));
        }
    }

    /// `Endpoint::publish`.
    pub(super) fn publish(&mut self, mutation: Option<Mutation>) {
        if mutation != Some(Mutation::PublishBeforeTake) {
            self.commit_taken(mutation);
        }
        let seq = self.published_seq + 1;
        let record = match mutation {
            Some(Mutation::OneRecord) => 0,
            _ => (seq % 2) as usize,
        };
        let indexes = Record::pack(index(self.write.1), index(self.write.0));
        self.write.1 = self.write.0;
        let mut stores = [
            Store::RecordIndexes(record, indexes),
            Store::RecordSeq(record, seq),
            Store::GuestWrite(self.write.1),
        ];
        match mutation {
            Some(Mutation::PublishBeforeRecord) => stores.rotate_right(1),
            Some(Mutation::RecordNumberFirst) => stores.swap(0, 1),
            _ => {}
        }
        self.stores.extend(stores);
        if mutation == Some(Mutation::AnswerNotedLate) {
            self.stores.extend(std::mem::take(&mut self.late));
        }
        self.published_seq = seq;
        self.push(Store::PublishedSeq(seq));
        for slot in std::mem::take(&mut self.ending_by_publication) {
            self.free[usize::from(slot)] = true;
        }
        if mutation == Some(Mutation::PublishBeforeTake) {
            self.commit_taken(mutation);
        }
    }

    /// Stores that are still to be done.
    pub(super) fn drain(&mut self) -> Vec<Store> {
        self.stores.drain(..).collect()
    }

    fn allocate(&mut self) -> Option<u8> {
        let slot = self.free.iter().position(|free| *free)?;
        self.free[slot] = false;
        if slot as u64 >= self.used_slots {
            self.used_slots = slot as u64 + 1;
            self.push(Store::UsedSlots(self.used_slots));
        }
        Some(slot as u8)
    }

    fn write_slot(&mut self, slot: u8, role: Role, kind: u8, seq: u64, id: u8, mutation: Option<Mutation>) {
        let (begin, end) = words_of(role);
        let head = SlotHead {
            kind,
            role,
            payload_bytes: 0,
        };
        self.push(Store::Slot(slot, HEAD, head.pack()));
        let mut numbers = [Store::Slot(slot, begin, seq), Store::Slot(slot, end, 0)];
        if mutation == Some(Mutation::OldEndFirst) {
            numbers.swap(0, 1);
        }
        self.stores.extend(numbers);
        self.push(Store::Slot(slot, TRANSACTION, u64::from(id)));
    }
}

fn words_of(role: Role) -> (usize, usize) {
    match role {
        Role::Request => (TAKE_SEQ, PUBLISH_SEQ),
        Role::Held => (PUBLISH_SEQ, TAKE_SEQ),
    }
}
