//! The order of stores in the model is that of the product: both do the same, and after every store the words that have
//! changed are compared; then both recover from every one of these moments, and that is compared likewise.
//!
//! Ring indexes are compared by when they change: the model's packets are shorter. Numbers are compared by value.
#![forbid(unsafe_code)]

use super::super::layout;
use super::*;
use crate::channel::{Endpoint, HeldToken, Port, PortEvent};
use crate::journal::Journal;
use crate::mem::crash_point::kill_after;
use crate::ring::PacketBuf;
use crate::vsc::{ChannelOptions, GuestChannel, GuestOptions, PlayedSupervisor, SyntheticGuest};
use crate::wire::OutPacket;
use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

const SLOTS: u8 = 3;
const ECHO: u8 = 1;
const PUSH: u8 = 2;
/// Number of the one held packet.
const HELD: u8 = 7;

/// Words by name.
type Words = BTreeMap<String, u64>;

/// What has changed from each moment to the next: the name, and the value of what is no index.
fn changes(moments: &[Words]) -> Vec<String> {
    let mut list = Vec::new();
    for pair in moments.windows(2) {
        for (name, value) in pair[1].iter().filter(|(name, value)| pair[0][*name] != **value) {
            let is_number = name.ends_with("seq") || name.ends_with("transaction") || name == "used_slots";
            list.push(match is_number {
                true => format!("{name} = {value}"),
                false => name.clone(),
            });
        }
    }
    list
}

impl Shared {
    fn words(&self) -> Words {
        let mut words = BTreeMap::from([
            ("taken_seq".to_owned(), self.taken_seq),
            ("published_seq".to_owned(), self.published_seq),
            ("used_slots".to_owned(), self.used_slots),
            ("ring to host, read index".to_owned(), u64::from(self.host_read)),
            (
                "ring to guest, write index".to_owned(),
                u64::from(self.guest_write),
            ),
        ]);
        for word in 0..2 {
            words.insert(format!("take_index {word}"), self.take_index[word]);
            words.insert(format!("record {word} seq"), self.records[word].0);
            words.insert(format!("record {word} indexes"), self.records[word].1);
        }
        for (slot, [head, take, publish, transaction]) in self.slots.iter().enumerate() {
            words.insert(format!("slot {slot} head"), *head);
            words.insert(format!("slot {slot} take_seq"), *take);
            words.insert(format!("slot {slot} publish_seq"), *publish);
            words.insert(format!("slot {slot} transaction"), *transaction);
        }
        words
    }
}

/// The model does it: the moments, and what there was at each of them.
fn modelled() -> (Vec<Words>, Vec<Shared>) {
    let mut shared = Shared::new(SLOTS);
    let mut server = Server::new(SLOTS);
    let (mut moments, mut states) = (vec![shared.words()], vec![shared.clone()]);
    let mut run = |server: &mut Server, shared: &mut Shared| {
        for store in server.drain() {
            shared.apply(store);
            if moments.last() != Some(&shared.words()) {
                moments.push(shared.words());
                states.push(shared.clone());
            }
        }
    };
    for packet in [Packet::Echo(1), Packet::Push(2)] {
        assert_eq!(server.receive(packet, None), Ok(true));
        run(&mut server, &mut shared);
    }
    let mut next_held = HELD;
    for _ in 0..2 {
        server.answer(0, &mut next_held, None);
        run(&mut server, &mut shared);
    }
    server.publish(None);
    run(&mut server, &mut shared);
    assert_eq!(server.receive(Packet::Thanks(HELD), None), Ok(true));
    run(&mut server, &mut shared);
    server.commit_taken(None);
    run(&mut server, &mut shared);
    (moments, states)
}

/// The product, with a guest and a journal of its own.
struct World {
    guest: SyntheticGuest,
    channel: GuestChannel,
    journal: OwnedFd,
}

impl World {
    fn new() -> Self {
        let options = GuestOptions {
            ram_bytes: 1 << 20,
            vp_count: 1,
        };
        let mut guest = SyntheticGuest::new(options).expect("a guest");
        let channel = guest.open_channel(ChannelOptions {
            ring_pages: 2,
            ..ChannelOptions::default()
        });
        let journal = PlayedSupervisor::new_journal().expect("a journal");
        let mut world = Self {
            guest,
            channel: channel.expect("a channel"),
            journal,
        };
        for (id, kind) in [(1, ECHO), (2, PUSH)] {
            let sent = world.channel.send_in_band(id, true, &[&[kind; 8]]);
            sent.expect("room in the ring");
        }
        world.channel.flush().expect("an honest server");
        world
    }

    fn port(&mut self, generation: u32) -> Port {
        let (ours, theirs) = crate::ipc::pair().expect("a socket pair");
        let journal = self.journal.try_clone().expect("a journal");
        let port = Port::new(theirs, journal, generation).expect("a port");
        let deadline = Instant::now() + Duration::from_secs(20);
        assert_eq!(self.guest.attach(ours, deadline).expect("attached"), generation);
        port
    }

    fn words(&self) -> Words {
        let journal = Journal::map(self.journal.as_fd()).expect("a journal");
        let load = |at: u64| {
            let at = layout::channel(0) + at;
            journal.map.load_u64(at, Ordering::Acquire).expect("within")
        };
        let mut shared = Shared::new(SLOTS);
        shared.taken_seq = load(layout::TAKEN_SEQ);
        shared.take_index = [load(layout::TAKE_INDEX), load(layout::TAKE_INDEX + 8)];
        shared.published_seq = load(layout::PUBLISHED_SEQ);
        shared.records = [0, 16].map(|at| (load(layout::RECORDS + at), load(layout::RECORDS + at + 8)));
        shared.used_slots = load(layout::USED_SLOTS);
        for (slot, words) in (0..).zip(&mut shared.slots) {
            *words = [0, 8, 16, 24].map(|word| load(layout::slot(slot) + word));
        }
        let mut words = shared.words();
        let indexes = [
            (
                "ring to host, read index",
                self.channel.to_host().shared_read_index(),
            ),
            (
                "ring to guest, write index",
                self.channel.to_guest().shared_write_index(),
            ),
        ];
        for (name, index) in indexes {
            words.insert(name.to_owned(), u64::from(index));
        }
        words
    }

    /// The same as in [`modelled`]: the first half until so many stores are done, and if those are all, as many of the
    /// second half. `true`: all of it was done.
    fn run(&mut self, first: u64, second: u64) -> bool {
        let mut port = self.port(1);
        let mut endpoint = opened(&mut port);
        let Some(held) = kill_after(first, || first_half(&mut endpoint)) else {
            return false;
        };
        let mut buf = PacketBuf::new();
        while self
            .channel
            .receive(&mut buf)
            .expect("an honest server")
            .is_some()
        {}
        self.channel.give_back().expect("an honest server");
        let thanks = self.channel.complete(u64::from(HELD), &[b"thanks!!"]);
        thanks.expect("room in the ring");
        self.channel.flush().expect("an honest server");
        let done = kill_after(second, || {
            let packet = endpoint.receive(&mut buf).expect("the guest behaves");
            assert!(packet.is_some());
            endpoint.release(held).expect("the guest behaves");
            endpoint.commit_taken().expect("the guest behaves");
        });
        done.is_some()
    }

    /// A successor recovers until so many stores are done. `true`: all were.
    fn recover(&mut self, stores: u64) -> bool {
        self.guest.server_gone();
        let mut port = self.port(2);
        let recovered = kill_after(stores, || {
            for event in port.on_readable().expect("bulkhead-bus behaves") {
                let PortEvent::ChannelOpened(_, recovered) = event else {
                    continue;
                };
                recovered
                    .requests
                    .into_iter()
                    .for_each(|request| request.token.abandon());
            }
        });
        recovered.is_some()
    }
}

fn opened(port: &mut Port) -> Endpoint {
    let events = port.on_readable().expect("bulkhead-bus behaves");
    let opened = events.into_iter().find_map(|event| match event {
        PortEvent::ChannelOpened(endpoint, _) => Some(*endpoint),
        _ => None,
    });
    opened.expect("the channel is open")
}

fn first_half(endpoint: &mut Endpoint) -> HeldToken {
    let mut buf = PacketBuf::new();
    let mut take = |endpoint: &mut Endpoint, kind: u8| {
        let packet = endpoint.receive(&mut buf).expect("the guest behaves");
        let packet = packet.expect("a packet is there");
        let token = endpoint.take(kind, packet.transaction_id, &[packet.payload]);
        token.expect("a slot is free")
    };
    let (echo, push) = (take(endpoint, ECHO), take(endpoint, PUSH));
    endpoint.complete(echo, &[0; 8]).expect("the guest behaves");
    let packet = OutPacket::in_band(u64::from(HELD), true, &[b"push"]);
    let held = endpoint.send_held(&packet, PUSH, &[b"push"]);
    let held = held.expect("room in the ring");
    endpoint.complete(push, &[0; 8]).expect("the guest behaves");
    endpoint.publish().expect("the guest behaves");
    held
}

/// Every moment of the product, as in [`modelled`].
fn done() -> Vec<(Words, (u64, u64))> {
    let mut moments: Vec<(Words, (u64, u64))> = Vec::new();
    let mut note = |words: Words, when: (u64, u64)| {
        if moments.last().is_none_or(|(last, _)| *last != words) {
            moments.push((words, when));
        }
    };
    for first in 0.. {
        let mut world = World::new();
        world.run(first, 0);
        note(world.words(), (first, 0));
        if world.channel.counters().received > 0 {
            for second in 1.. {
                let mut world = World::new();
                let all = world.run(first, second);
                note(world.words(), (first, second));
                if all {
                    return moments;
                }
            }
        }
    }
    moments
}

#[test]
fn the_product_makes_the_stores_of_the_model_in_its_order() {
    let (expected, _) = modelled();
    let found: Vec<Words> = done().into_iter().map(|(words, _)| words).collect();
    assert_eq!(changes(&found), changes(&expected));
    assert!(expected.len() > 20, "only {} moments", expected.len());
}

#[test]
fn the_product_recovers_as_the_model_does_from_every_moment() {
    let (_, states) = modelled();
    let setup = Setup {
        script: Vec::new(),
        thanks: 0,
        deaths: 0,
        slots: SLOTS,
        mutation: None,
    };
    for ((_, (first, second)), mut shared) in done().into_iter().zip(states) {
        let view = RingView {
            to_host_data_bytes: RING_BYTES,
            to_guest_data_bytes: RING_BYTES,
            to_guest_write_index: index(shared.guest_write),
        };
        let recovery = recover(&shared.image(), view).expect("nobody has tampered with it");
        let mut expected = vec![shared.words()];
        for store in Server::recovered(&recovery, &shared, &setup).drain() {
            shared.apply(store);
            expected.push(shared.words());
        }
        let mut found = Vec::new();
        for stores in 0.. {
            let mut world = World::new();
            world.run(first, second);
            let all = world.recover(stores);
            found.push(world.words());
            if all {
                break;
            }
        }
        assert_eq!(
            changes(&found),
            changes(&expected),
            "after {first} stores, and {second}"
        );
    }
}
