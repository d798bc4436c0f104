//! The protocol between a guest, a server and its successors, explored completely over small rings.
//!
//! A state is: the journal's words, both rings, what the guest knows, and what the server knows (nothing, while there is
//! none). A step is: one store of the server to shared memory; one decision of the server (read a packet, answer a request,
//! publish, commit); something of the guest's (send, receive, answer a held packet); or the server's death, before any store.
//! [`explore`] visits every state that can be reached, in both directions of both rings, and checks:
//! - each request is completed at most once, with its own number, and each held packet comes once;
//! - recovery never gives up: nobody has tampered with anything;
//! - where nothing can happen any more, every request is completed, and what the server believes to be held is what the
//!   guest holds.
//!
//! Recovery is the product's own [`recover`], and so is the reading of a slot. The order of the server's stores is written
//! down here once more ([`server`]); `order_tests` holds it against the product's, store by store. A [`Mutation`] is an
//! order, or a way to recover, that is wrong in one place: the tests expect each one to be found.
//!
//! Not in the model: several channels (they share nothing), the payload (it is written with the transaction id, and as
//! long as the slot is dead), wake-ups (`ring/loom.rs`), openings (`channel/crash_tests.rs`).
#![forbid(unsafe_code)]

mod order_tests;
mod server;
mod tests;

use super::recover::{ChannelImage, LiveSlot, Record, RingView, recover};
use super::slot::{Role, SlotWords};
use server::Server;
use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};

/// A ring holds so many packets, all of one length, less one: full and empty must differ.
const PLACES: u8 = 4;
/// An index counts bytes.
const PACKET_BYTES: u32 = 8;
const RING_BYTES: u32 = PLACES as u32 * PACKET_BYTES;

/// What one place of a ring says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Packet {
    /// To the server: wants a completion.
    Echo(u8),
    /// To the server: wants a held packet, then a completion.
    Push(u8),
    /// To the server: wants nothing.
    Note,
    /// To the server: answers a held packet.
    Thanks(u8),
    /// To the guest.
    Completion(u8),
    /// To the guest.
    Held(u8),
}

/// An order of stores, or a recovery, that is wrong in one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Mutation {
    /// The ring's write index is stored before the record that makes it a commit point.
    PublishBeforeRecord,
    /// The record's number, which makes it count, is stored before its indexes.
    RecordNumberFirst,
    /// Answers are published before the taking of their requests is committed.
    PublishBeforeTake,
    /// The guest gets its room back before the taking is committed.
    ReadIndexBeforeTake,
    /// One word for the read index instead of two in turns.
    OneTakeIndex,
    /// One record instead of two in turns.
    OneRecord,
    /// A slot's answer is noted after its publication.
    AnswerNotedLate,
    /// A slot that is used again loses its old end before its old beginning.
    OldEndFirst,
    /// A slot is used again before the publication that ends it.
    SlotFreedEarly,
    /// The end of a held packet is noted after the taking of the guest's answer.
    ReleaseNotedLate,
    /// Recovery does not look at the ring's write index.
    IndexIgnored,
    /// Recovery leaves numbers that were staged and never committed.
    StaleLeft,
    /// Recovery goes on at the read index in the guest's memory.
    ReadIndexBelieved,
    /// Recovery leaves the read index in the guest's memory as it is.
    WordsNotClaimed,
}

/// All words that outlive a server.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Shared {
    to_host: [Packet; PLACES as usize],
    to_guest: [Packet; PLACES as usize],
    /// Of the ring to the host: the guest's, ours.
    host_write: u8,
    host_read: u8,
    /// Of the ring to the guest: ours, the guest's.
    guest_write: u8,
    guest_read: u8,
    taken_seq: u64,
    take_index: [u64; 2],
    published_seq: u64,
    /// Number, indexes.
    records: [(u64, u64); 2],
    /// Head, take number, publish number, transaction.
    slots: Vec<[u64; 4]>,
    used_slots: u64,
}

/// One store of the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Store {
    TakenSeq(u64),
    TakeIndex(usize, u64),
    PublishedSeq(u64),
    RecordIndexes(usize, u64),
    RecordSeq(usize, u64),
    UsedSlots(u64),
    /// Slot, word.
    Slot(u8, usize, u64),
    HostRead(u8),
    GuestWrite(u8),
    GuestData(u8, Packet),
}

const HEAD: usize = 0;
const TAKE_SEQ: usize = 1;
const PUBLISH_SEQ: usize = 2;
const TRANSACTION: usize = 3;

impl Shared {
    fn new(slots: u8) -> Self {
        Self {
            to_host: [Packet::Note; PLACES as usize],
            to_guest: [Packet::Note; PLACES as usize],
            host_write: 0,
            host_read: 0,
            guest_write: 0,
            guest_read: 0,
            taken_seq: 0,
            take_index: [0; 2],
            published_seq: 0,
            records: [(0, 0); 2],
            slots: vec![[0; 4]; usize::from(slots)],
            used_slots: 0,
        }
    }

    fn apply(&mut self, store: Store) {
        match store {
            Store::TakenSeq(seq) => self.taken_seq = seq,
            Store::TakeIndex(word, index) => self.take_index[word] = index,
            Store::PublishedSeq(seq) => self.published_seq = seq,
            Store::RecordIndexes(record, indexes) => self.records[record].1 = indexes,
            Store::RecordSeq(record, seq) => self.records[record].0 = seq,
            Store::UsedSlots(count) => self.used_slots = count,
            Store::Slot(slot, word, value) => self.slots[usize::from(slot)][word] = value,
            Store::HostRead(place) => self.host_read = place,
            Store::GuestWrite(place) => self.guest_write = place,
            Store::GuestData(place, packet) => self.to_guest[usize::from(place)] = packet,
        }
    }

    fn image(&self) -> ChannelImage {
        let used = self.slots.iter().take(self.used_slots as usize);
        ChannelImage {
            taken_seq: self.taken_seq,
            take_index: self.take_index,
            published_seq: self.published_seq,
            records: self.records.map(|(seq, indexes)| Record { seq, indexes }),
            slots: used
                .map(|words| SlotWords {
                    head: words[HEAD],
                    take_seq: words[TAKE_SEQ],
                    publish_seq: words[PUBLISH_SEQ],
                    transaction_id: words[TRANSACTION],
                })
                .collect(),
        }
    }
}

fn index(place: u8) -> u32 {
    u32::from(place) * PACKET_BYTES
}

fn after(place: u8) -> u8 {
    (place + 1) % PLACES
}

/// Packets between a read and a write index.
fn between(read: u8, write: u8) -> u8 {
    (write + PLACES - read) % PLACES
}

/// What the guest knows and wants.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Guest {
    /// Not sent yet, last one first.
    script: Vec<Packet>,
    /// Sent and not completed.
    waiting: Vec<u8>,
    /// Received and not answered.
    holds: Vec<u8>,
    /// Received ever.
    seen: Vec<u8>,
    /// How many more held packets it will answer.
    thanks_left: u8,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    shared: Shared,
    guest: Guest,
    server: Option<Server>,
    /// Numbers of held packets do not repeat over generations.
    next_held: u8,
    deaths_left: u8,
}

/// What is explored.
#[derive(Clone, Debug)]
struct Setup {
    script: Vec<Packet>,
    thanks: u8,
    deaths: u8,
    slots: u8,
    mutation: Option<Mutation>,
}

/// Visits every state. How many there are, or what is wrong and how one gets there.
fn explore(setup: &Setup) -> Result<usize, String> {
    let mut script = setup.script.clone();
    script.reverse();
    let first = State {
        shared: Shared::new(setup.slots),
        guest: Guest {
            script,
            waiting: Vec::new(),
            holds: Vec::new(),
            seen: Vec::new(),
            thanks_left: setup.thanks,
        },
        server: Some(Server::new(setup.slots)),
        next_held: 0,
        deaths_left: setup.deaths,
    };
    // A state is known by 128 bits of it: two different ones are taken for one in none of 10^26 runs.
    let mut seen = HashSet::new();
    let mut path: Vec<(std::vec::IntoIter<(String, State)>, String)> = Vec::new();
    let said = |path: &[(std::vec::IntoIter<(String, State)>, String)], step: &str, why: String| {
        let steps: Vec<&str> = path.iter().map(|(_, step)| step.as_str()).collect();
        format!("{why}, after: {}, {step}", steps.join(", "))
    };
    let begin = first.next(setup)?;
    seen.insert(digest(&first));
    path.push((begin.into_iter(), "start".to_owned()));
    while let Some((steps, _)) = path.last_mut() {
        let Some((step, state)) = steps.next() else {
            path.pop();
            continue;
        };
        if !seen.insert(digest(&state)) {
            continue;
        }
        match state.next(setup) {
            Ok(next) => path.push((next.into_iter(), step)),
            Err(why) => return Err(said(&path, &step, why)),
        }
    }
    Ok(seen.len())
}

fn digest(state: &State) -> u128 {
    let half = |salt: u64| {
        let mut hasher = DefaultHasher::new();
        salt.hash(&mut hasher);
        state.hash(&mut hasher);
        u128::from(hasher.finish())
    };
    half(1) << 64 | half(2)
}

impl State {
    /// All states that may follow, each with the step's name; an error if something is wrong in this one.
    fn next(&self, setup: &Setup) -> Result<Vec<(String, Self)>, String> {
        let mut next = Vec::new();
        self.guest_steps(&mut next)?;
        match &self.server {
            None => next.push(("a successor".to_owned(), self.succeed(setup)?)),
            Some(server) => server.steps(self, setup, &mut next)?,
        }
        if next.is_empty() {
            self.check_books()?;
        }
        if self.deaths_left > 0 && self.server.is_some() {
            let mut dead = self.clone();
            dead.server = None;
            dead.deaths_left -= 1;
            next.push(("death".to_owned(), dead));
        }
        Ok(next)
    }

    fn guest_steps(&self, next: &mut Vec<(String, Self)>) -> Result<(), String> {
        let shared = &self.shared;
        let room = between(shared.host_read, shared.host_write) < PLACES - 1;
        if room && !self.guest.script.is_empty() {
            let mut after = self.clone();
            if let Some(packet) = after.guest.script.pop() {
                if let Packet::Echo(id) | Packet::Push(id) = packet {
                    after.guest.waiting.push(id);
                }
                after.send(packet);
                next.push((format!("guest sends {packet:?}"), after));
            }
        }
        if room && self.guest.thanks_left > 0 && !self.guest.holds.is_empty() {
            let mut after = self.clone();
            let held = after.guest.holds.remove(0);
            after.guest.thanks_left -= 1;
            after.send(Packet::Thanks(held));
            next.push((format!("guest answers held {held}"), after));
        }
        if shared.guest_read != shared.guest_write {
            let mut state = self.clone();
            let packet = shared.to_guest[usize::from(shared.guest_read)];
            state.shared.guest_read = after(shared.guest_read);
            match packet {
                Packet::Completion(id) => {
                    let position = state.guest.waiting.iter().position(|waiting| *waiting == id);
                    let position = position
                        .ok_or_else(|| format!("request {id} is completed, and nobody waits for it"))?;
                    state.guest.waiting.remove(position);
                }
                Packet::Held(id) => {
                    if state.guest.seen.contains(&id) {
                        return Err(format!("held packet {id} comes twice"));
                    }
                    state.guest.seen.push(id);
                    state.guest.holds.push(id);
                }
                other => return Err(format!("the guest receives {other:?}")),
            }
            next.push((format!("guest receives {packet:?}"), state));
        }
        Ok(())
    }

    fn send(&mut self, packet: Packet) {
        let place = self.shared.host_write;
        self.shared.to_host[usize::from(place)] = packet;
        self.shared.host_write = after(place);
    }

    /// A new server, which has recovered but not yet made the journal say so.
    fn succeed(&self, setup: &Setup) -> Result<Self, String> {
        let mut shared = self.shared.clone();
        if setup.mutation == Some(Mutation::IndexIgnored) {
            // As if the last publication known to be finished were the last one.
            shared.records[usize::from(shared.published_seq.is_multiple_of(2))] = (0, 0);
        }
        let view = RingView {
            to_host_data_bytes: RING_BYTES,
            to_guest_data_bytes: RING_BYTES,
            to_guest_write_index: match setup.mutation {
                Some(Mutation::IndexIgnored) => {
                    (shared.records[usize::from(!shared.published_seq.is_multiple_of(2))].1 >> 32) as u32
                }
                _ => index(shared.guest_write),
            },
        };
        let mut recovery =
            recover(&shared.image(), view).map_err(|fault| format!("recovery gives up: {fault}"))?;
        if setup.mutation == Some(Mutation::ReadIndexBelieved) {
            recovery.read_index = index(shared.host_read);
        }
        let mut state = self.clone();
        state.server = Some(Server::recovered(&recovery, &shared, setup));
        Ok(state)
    }

    fn check_books(&self) -> Result<(), String> {
        let Some(server) = &self.server else {
            return Err("nobody serves".to_owned());
        };
        if !self.guest.waiting.is_empty() || !self.guest.script.is_empty() {
            return Err(format!(
                "nothing happens any more; {:?} wait and {:?} were never sent",
                self.guest.waiting, self.guest.script
            ));
        }
        let mut holds = self.guest.holds.clone();
        holds.sort_unstable();
        if server.held_ids() != holds {
            return Err(format!(
                "the guest holds {holds:?}, and the server believes {:?}",
                server.held_ids()
            ));
        }
        Ok(())
    }
}
