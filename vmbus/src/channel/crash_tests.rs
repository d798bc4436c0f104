//! Kills a server before every single store to shared memory, lets a successor take over, and checks what the guest sees.
//!
//! The guest's requests, with a byte each:
//! - `ECHO`: wants a completion with the same payload;
//! - `NOTE`: wants no answer;
//! - `PUSH`: wants a held packet from the server, then a completion.
//!
//! What must hold, wherever the server dies: each request is completed exactly once and with its own payload; the
//! server's held packets are those which the guest has received and not answered.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use crate::channel::{Endpoint, HeldToken, NotTaken, Port, PortEvent, Token};
use crate::mem::crash_point::kill_after;
use crate::ring::PacketBuf;
use crate::vsc::{ChannelOptions, GuestChannel, GuestOptions, PlayedSupervisor, SyntheticGuest};
use crate::wire::{OutPacket, PacketKind};

const ECHO: u8 = 1;
const NOTE: u8 = 2;
const PUSH: u8 = 3;

/// Longer than any test takes; nothing here waits in earnest, since all runs in one thread.
fn deadline() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

/// A device that echoes. Dies with everything it knows.
struct Server {
    port: Port,
    generation: u32,
    endpoint: Option<Box<Endpoint>>,
    work: Vec<(Token, Vec<u8>)>,
    held: BTreeMap<u64, HeldToken>,
    next_push: u64,
    buf: PacketBuf,
}

impl Server {
    fn new(socket: OwnedFd, journal: OwnedFd, generation: u32) -> Self {
        let port = Port::new(socket, journal, generation).expect("a port");
        // Numbers of pushes do not repeat over generations.
        let next_push = u64::from(generation) * 1000;
        Self {
            port,
            generation,
            endpoint: None,
            work: Vec::new(),
            held: BTreeMap::new(),
            next_push,
            buf: PacketBuf::new(),
        }
    }

    fn run_until_idle(&mut self) {
        for event in self.port.on_readable().expect("bus behaves") {
            match event {
                PortEvent::ChannelOpened(endpoint, recovered) => {
                    self.endpoint = Some(endpoint);
                    for request in recovered.requests {
                        assert_eq!(request.token.kind(), request.payload[0]);
                        self.work.push((request.token, request.payload));
                    }
                    for held in recovered.held {
                        self.held.insert(held.token.transaction_id(), held.token);
                    }
                }
                PortEvent::Attached
                | PortEvent::Serve
                | PortEvent::HandedOver
                | PortEvent::GpadlAdded { .. } => {}
                other => panic!("unexpected {other:?}"),
            }
        }
        let Some(endpoint) = &mut self.endpoint else {
            return;
        };
        loop {
            while endpoint.can_answer(64)
                && let Some(packet) = endpoint.receive(&mut self.buf).expect("the guest behaves")
            {
                if packet.kind == PacketKind::COMPLETION {
                    let held = self
                        .held
                        .remove(&packet.transaction_id)
                        .expect("the guest answers what it got");
                    endpoint.release(held).expect("the guest behaves");
                } else if packet.payload[0] == NOTE {
                    endpoint.consume();
                } else {
                    match endpoint.take(packet.payload[0], packet.transaction_id, &[packet.payload]) {
                        Ok(token) => self.work.push((token, packet.payload.to_vec())),
                        Err(NotTaken::NoFreeSlot) => {
                            endpoint.put_back();
                            break;
                        }
                        Err(error) => panic!("{error}"),
                    }
                }
            }
            // Two at a time, so that there are several publications; in an order that differs from the predecessor's.
            for _ in 0..2.min(self.work.len()) {
                let next = if self.generation.is_multiple_of(2) {
                    0
                } else {
                    self.work.len() - 1
                };
                let (token, payload) = self.work.remove(next);
                if payload[0] == PUSH {
                    self.next_push += 1;
                    let id = self.next_push;
                    let packet = OutPacket::in_band(id, true, &[b"push"]);
                    let held = endpoint
                        .send_held(&packet, PUSH, &[&id.to_le_bytes()])
                        .expect("room");
                    self.held.insert(id, held);
                }
                endpoint.complete(token, &payload).expect("the guest behaves");
            }
            if !endpoint.prepare_sleep().expect("the guest behaves") && self.work.is_empty() {
                break;
            }
        }
        endpoint.drain_kick().expect("a kick");
    }
}

/// The guest, its books, and the present server.
struct Scene {
    guest: SyntheticGuest,
    channel: GuestChannel,
    journal: OwnedFd,
    server: Option<Server>,
    generation: u32,
    /// Payloads of requests that wait for a completion.
    waiting: BTreeMap<u64, Vec<u8>>,
    /// Held packets that were received and not answered.
    received_held: BTreeSet<u64>,
}

impl Scene {
    fn new(ring_pages: u32) -> Self {
        let mut guest = SyntheticGuest::new(GuestOptions {
            ram_bytes: 1 << 20,
            vp_count: 1,
        })
        .expect("a guest");
        let channel = guest.open_channel(ChannelOptions {
            ring_pages,
            ..ChannelOptions::default()
        });
        Self {
            guest,
            channel: channel.expect("a channel"),
            journal: PlayedSupervisor::new_journal().expect("a journal"),
            server: None,
            generation: 0,
            waiting: BTreeMap::new(),
            received_held: BTreeSet::new(),
        }
    }

    /// Lets the server, or a new one, run until it would sleep, or until it has done `stores` stores.
    fn run_server(&mut self, stores: u64) -> bool {
        if self.server.is_none() {
            self.generation += 1;
            let (ours, theirs) = crate::ipc::pair().expect("a socket pair");
            let journal = self.journal.try_clone().expect("a journal");
            let generation = self.generation;
            let Some(server) = kill_after(stores, move || Server::new(theirs, journal, generation)) else {
                return false;
            };
            self.server = Some(server);
            assert_eq!(
                self.guest.attach(ours, deadline()).expect("attach"),
                self.generation
            );
        }
        let mut server = self.server.take().expect("a server");
        self.server = kill_after(stores, move || {
            server.run_until_idle();
            server
        });
        if self.server.is_none() {
            self.guest.server_gone();
        }
        self.server.is_some()
    }

    fn request(&mut self, operation: u8, length: usize) {
        let id = self.channel.new_transaction_id();
        let mut payload = vec![id as u8; length];
        payload[0] = operation;
        let sent = self.channel.send_in_band(id, operation != NOTE, &[&payload]);
        if operation != NOTE && sent.is_ok() {
            self.waiting.insert(id, payload);
        }
    }

    fn collect(&mut self) {
        let mut buf = PacketBuf::new();
        while let Some(packet) = self.channel.receive(&mut buf).expect("the server behaves") {
            if packet.kind == PacketKind::COMPLETION {
                let payload = self.waiting.remove(&packet.transaction_id);
                let payload = payload.expect("a request is completed once");
                assert_eq!(packet.payload, payload, "transaction {}", packet.transaction_id);
            } else {
                assert!(
                    self.received_held.insert(packet.transaction_id),
                    "a held packet comes once"
                );
            }
        }
        self.channel.give_back().expect("the server behaves");
    }

    /// Answers the oldest held packet.
    fn answer_one(&mut self) {
        if let Some(&id) = self.received_held.first()
            && self.channel.complete(id, &[b"thanks!!"]).is_ok()
        {
            self.received_held.remove(&id);
        }
    }

    /// The script. The server runs in between; `kills` says after how many stores each of its processes dies.
    fn play(&mut self, kills: &[u64]) -> usize {
        let mut kills = kills.iter().copied();
        let mut budget = kills.next();
        let mut killed = 0;
        let mut run = |scene: &mut Scene, budget: &mut Option<u64>| {
            // A budget is of one process; what it does in this run is not counted against later runs.
            while !scene.run_server(budget.unwrap_or(u64::MAX)) {
                killed += 1;
                *budget = kills.next();
                // The guest goes on: it reads what is visible, answers, and writes wherever the ring has room.
                scene.collect();
                if killed % 2 == 0 {
                    scene.answer_one();
                }
                while scene.channel.send_in_band(0, false, &[&[NOTE; 240]]).is_ok() {}
                scene.channel.flush().expect("the server behaves");
            }
        };
        for round in 0..2 {
            self.request(ECHO, 24);
            self.request(PUSH, 16);
            self.request(NOTE, 8);
            self.request(ECHO, 200);
            self.channel.flush().expect("the server behaves");
            run(self, &mut budget);
            self.collect();
            self.answer_one();
            self.request(ECHO, 8 + 8 * round);
            self.request(PUSH, 32);
            self.channel.flush().expect("the server behaves");
            run(self, &mut budget);
            self.collect();
            self.request(ECHO, 40);
            self.request(ECHO, 48);
            self.channel.flush().expect("the server behaves");
            run(self, &mut budget);
            self.collect();
        }
        self.check_books();
        killed
    }

    /// Nothing is in flight: what guest, server and the next server believe must be the same.
    fn check_books(&mut self) {
        assert_eq!(self.waiting, BTreeMap::new(), "every request is completed");
        // One more life: whatever it recovers is what the guest holds.
        self.guest.server_gone();
        let last = self.server.take().expect("a server");
        let known: BTreeSet<u64> = last.held.keys().copied().collect();
        drop(last);
        assert_eq!(known, self.received_held);
        assert!(self.run_server(u64::MAX));
        let last = self.server.as_ref().expect("a server");
        assert_eq!(
            last.held.keys().copied().collect::<BTreeSet<_>>(),
            self.received_held
        );
        assert!(last.work.is_empty());
        self.collect();
    }
}

#[test]
fn without_a_crash_every_request_is_completed_once() {
    assert_eq!(Scene::new(2).play(&[]), 0);
}

#[test]
fn a_kill_before_any_store_loses_and_repeats_nothing() {
    let mut points = 0;
    for stores in 0.. {
        if Scene::new(2).play(&[stores]) == 0 {
            points = stores;
            break;
        }
    }
    // Attach, open and the longest of the four runs.
    assert!(points > 60, "only {points} stores were seen");
}

#[test]
fn a_successor_may_be_killed_before_any_store_of_its_recovery() {
    // Every third point of the first life (the test above has them all), every point of a recovery in the second.
    for first in (0..).step_by(3) {
        for second in 0..60 {
            if Scene::new(2).play(&[first, second]) == 0 {
                return;
            }
        }
    }
}

#[test]
fn random_lives_and_deaths_lose_and_repeat_nothing() {
    for seed in 1..=200u64 {
        let mut scene = Scene::new(2);
        let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut below = move |limit: u64| {
            // Xorshift; the seed is in the message of whatever fails.
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % limit
        };
        println!("seed {seed}");
        for _ in 0..60 {
            match below(8) {
                0..3 => {
                    let operation = [ECHO, PUSH, NOTE][below(3) as usize];
                    scene.request(operation, 8 + 8 * below(20) as usize);
                }
                3 => scene.answer_one(),
                4 => scene.collect(),
                _ => {
                    scene.channel.flush().expect("the server behaves");
                    scene.run_server(if below(3) == 0 { u64::MAX } else { below(90) });
                }
            }
        }
        scene.channel.flush().expect("the server behaves");
        while !scene.run_server(u64::MAX) {}
        scene.collect();
        scene.check_books();
    }
}

#[test]
fn an_opening_in_the_absence_of_a_server_inherits_nothing_from_the_last_one() {
    for stores in 0.. {
        let mut scene = Scene::new(2);
        for _ in 0..3 {
            scene.request(PUSH, 16);
        }
        scene.channel.flush().expect("flush");
        // Dies with requests taken and held packets published.
        assert!(!scene.run_server(70));
        scene.channel = scene.guest.reopen_channel(&scene.channel).expect("open");
        (scene.waiting, scene.received_held) = (BTreeMap::new(), BTreeSet::new());
        let survived = scene.run_server(stores);
        assert!(scene.run_server(u64::MAX));
        let server = scene.server.as_ref().expect("a server");
        assert!(
            server.work.is_empty() && server.held.is_empty(),
            "after {stores} stores"
        );
        scene.request(ECHO, 24);
        scene.channel.flush().expect("flush");
        assert!(scene.run_server(u64::MAX));
        scene.collect();
        assert!(scene.waiting.is_empty() && scene.received_held.is_empty());
        if survived {
            assert!(stores > 10, "only {stores} stores were seen");
            return;
        }
    }
}

#[test]
fn a_guest_that_moves_our_write_index_loses_its_channel() {
    let mut scene = Scene::new(2);
    scene.request(ECHO, 24);
    scene.channel.flush().expect("flush");
    assert!(scene.run_server(u64::MAX));
    scene.server = None;
    scene.guest.server_gone();
    // 0x18: a plausible index that was never ours. The GPADL's second half begins with the control page.
    let gpadl_area = scene.channel.to_guest().clone();
    let area = crate::ring::RingWriter::new(gpadl_area, 0x18).map(|mut writer| writer.claim_words());
    assert_eq!(area, Ok(()));
    assert!(scene.run_server(u64::MAX));
    let why = scene
        .guest
        .wait_broken(&scene.channel, deadline())
        .expect("the server reports it");
    assert!(why.contains("write index"), "{why}");
    assert!(
        scene
            .server
            .as_ref()
            .is_some_and(|server| server.endpoint.is_none())
    );
    // It stays given up, even if the guest puts the index back and a third server comes.
    scene.server = None;
    scene.guest.server_gone();
    assert!(scene.run_server(u64::MAX));
    let why = scene
        .guest
        .wait_broken(&scene.channel, deadline())
        .expect("the server reports it");
    assert!(why.contains("given up"), "{why}");
}
