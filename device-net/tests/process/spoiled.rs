//! A predecessor may have been anybody's before it died: whatever is in the journal, its successor refuses it in a
//! sentence, or gives a channel up, or goes on; it does not crash, it hands the network no torn frame, and it writes to no
//! memory of the guest's that is not the NIC's.

use crate::network::{FILTER, Network, from_guest, room, to_guest};
use device_net::server::saved::{Saved, State};
use device_net::vsc::{Driver, DriverOptions, Form, Room};
use std::os::fd::BorrowedFd;
use vmbus::ipc::codec;
use vmbus::journal::Journal;
use vmbus::mem::Gpa;
use vmbus::vsc::{Random, spoil};

/// Of what the journal has, as much as is in use here.
const SLOTS: u16 = 24;

/// A state that no guest has agreed to, saved as a server saves it, so that its checksums hold.
fn lie(journal: BorrowedFd<'_>, epoch: u32, random: &mut Random) {
    let journal = Journal::map(journal).expect("a journal");
    let Saved(state) = journal
        .load_state(epoch)
        .expect("readable")
        .expect("it was saved");
    let honest = codec::encode(&state).expect("encodable");
    loop {
        let mut bytes = honest.clone();
        for _ in 0..=random.below(4) {
            let at = random.below(bytes.len() as u64) as usize;
            bytes[at] = match random.below(3) {
                0 => 0xFF,
                1 => bytes[at] ^ (1 << random.below(8)),
                _ => random.below(256) as u8,
            };
        }
        if let Ok(state) = codec::decode::<State>(&bytes)
            && bytes != honest
        {
            journal.save_state(epoch, &Saved(state)).expect("saved");
            return;
        }
    }
}

/// What became of a successor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fate {
    Refuses,
    GivesAChannelUp,
    GoesOn,
}

/// Starts the successor and has it work; the guest takes what it answers, right or wrong.
fn succeed(room: &mut Room, network: &mut Network, driver: &mut Driver, case: &str) -> Fate {
    let started = room.start_successor();
    let deadline = room.deadline();
    let mut gave_up = false;
    if started.is_ok() && room.supervisor.inspect(deadline).is_ok() {
        for number in 0..40 {
            network.put(&to_guest(number, 1000));
        }
        // Twice: what came with the first question is done before the second is answered.
        for _ in 0..2 {
            for index in 0..driver.channels.len() {
                driver.send(index, &from_guest(77, 500), Form::Section).ok();
                driver.send(index, &from_guest(77, 500), Form::Pages).ok();
                // What a journal of nonsense answers is nonsense.
                driver.poll_once(index).ok();
            }
            room.supervisor.inspect(deadline).ok();
        }
        while let Ok(Some(message)) = room.guest.next_message() {
            gave_up |= format!("{message:?}").starts_with("ChannelBroken");
        }
        if room.supervisor.inspect(deadline).is_ok() {
            let cause = room.stop().expect("it stops");
            assert!(cause.is_success(), "{case}: {cause:?}");
            return match gave_up {
                true => Fate::GivesAChannelUp,
                false => Fate::GoesOn,
            };
        }
    }
    let cause = room.wait_end().expect("it ends");
    assert!(
        matches!(cause, sandbox::ExitCause::Exited(1)),
        "{case}: the successor ended with {cause:?}, after {started:?}"
    );
    Fate::Refuses
}

const MOAT_PAGES: usize = 64;

/// Memory of the guest's that is none of the NIC's business.
fn moat(room: &mut Room) -> Gpa {
    let pages = room.guest.allocate(MOAT_PAGES).expect("memory");
    room.guest
        .ram()
        .write(pages, &[0xA5; MOAT_PAGES * 4096])
        .expect("in RAM");
    pages
}

fn is_whole(room: &Room, moat: Gpa) -> bool {
    let mut bytes = vec![0; MOAT_PAGES * 4096];
    room.guest.ram().read(moat, &mut bytes).expect("in RAM");
    bytes.iter().all(|byte| *byte == 0xA5)
}

fn survive(seed: u64, harm: impl Fn(BorrowedFd<'_>, u32, &mut Random)) -> Fate {
    let case = format!("seed {seed}");
    let mut random = Random::new(seed);
    let (mut room, mut network) = room();
    let before = moat(&mut room);
    let options = DriverOptions {
        queues: 2,
        receive_pages: 256,
        send_pages: 64,
        scattered: false,
        ..DriverOptions::default()
    };
    let mut driver = room.open(options).expect("the NIC opens");
    let after = moat(&mut room);
    driver.set_filter(FILTER, room.deadline()).expect("a filter");
    // Some packets are with the guest, and some wait for a server.
    driver.give_back = false;
    for number in 0..12 {
        network.put(&to_guest(number, 300));
    }
    while driver.frames.len() < 12 {
        driver.poll(0, room.deadline()).expect("well-behaved");
    }
    room.kill().expect("killed");
    for number in 0..6 {
        driver
            .send(number as usize % 2, &from_guest(number, 400), Form::Section)
            .expect("room in the ring");
    }
    harm(room.journal(), driver.channels[0].open_epoch(), &mut random);
    driver.give_back = true;
    let fate = succeed(&mut room, &mut network, &mut driver, &case);
    assert!(
        is_whole(&room, before) && is_whole(&room, after),
        "{case}: memory was written that is not the NIC's"
    );
    drop(room);
    let frames = network.rest();
    for frame in &frames {
        let number = crate::network::number_of(frame);
        assert_eq!(
            *frame,
            from_guest(number, frame.len()),
            "{case}: a torn frame reached the network"
        );
    }
    fate
}

fn show(fates: &[Fate]) -> impl Fn(Fate) -> usize {
    let count = |fate| fates.iter().filter(|found| **found == fate).count();
    let counts = [Fate::Refuses, Fate::GivesAChannelUp, Fate::GoesOn].map(|fate| (fate, count(fate)));
    println!("{counts:?}");
    move |fate| {
        let found = counts.iter().find(|(found, _)| *found == fate);
        found.map_or(0, |(_, count)| *count)
    }
}

#[test]
fn whatever_is_in_the_journal_its_successor_does_not_crash_and_writes_nowhere_else() {
    let fates: Vec<Fate> = (1..=60)
        .map(|seed| {
            survive(seed, |journal, _, random| {
                spoil(journal, 2, SLOTS, random).expect("the journal can be written");
            })
        })
        .collect();
    let count = show(&fates);
    for fate in [Fate::Refuses, Fate::GivesAChannelUp, Fate::GoesOn] {
        assert!(count(fate) > 0, "none of the journals led to {fate:?}");
    }
}

#[test]
fn a_state_that_was_never_agreed_upon_leads_nowhere() {
    let fates: Vec<Fate> = (1..=60).map(|seed| survive(seed, lie)).collect();
    let count = show(&fates);
    assert!(count(Fate::GoesOn) > 0, "some lies are harmless");
    assert!(count(Fate::Refuses) > 0, "some promise what no server can keep");
}
