//! Servers of different versions that follow each other, an older build's journal, and journals of others.
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;

use proptest::prelude::*;
use serde::{Deserialize, Serialize};

use super::layout::SAVED_STATE;
use super::recover::RingView;
use super::test_state::Plain;
use super::versions::LAYOUT;
use super::*;
use crate::ipc::codec::{self, EncodeError};
use crate::mem::sealed_memfd;
use crate::vsc::{state_for_version_1, thaw};

/// What the build before versions (layout 1, state version 1) left: see `vmbus/tests/golden/README.md`.
const OLDER: &str = include_str!("../../tests/golden/journal-1.txt");

fn memory() -> OwnedFd {
    sealed_memfd("journal", required_len()).expect("a memfd")
}

fn map(fd: &OwnedFd) -> Journal {
    Journal::map(fd.as_fd()).expect("a journal")
}

#[test]
fn what_an_older_build_left_is_gone_on_from() {
    let fd = memory();
    thaw(OLDER, &fd).expect("frozen memory");
    let journal = map(&fd);
    journal.check::<Plain<(String, u32)>>().expect("ours");
    let state = journal.load_state(7).expect("decodes");
    assert_eq!(state, Some(Plain(("state of an older build".to_owned(), 1u32))));
    let recovered = |to_guest_write_index| {
        let view = RingView {
            to_host_data_bytes: 4096,
            to_guest_data_bytes: 4096,
            to_guest_write_index,
        };
        // Recovery settles the journal: each on its own copy.
        let fd = memory();
        thaw(OLDER, &fd).expect("frozen memory");
        let (channel, recovery) = ChannelJournal::recover(&map(&fd), 3, 9, view)
            .expect("a good journal")
            .expect("the same opening");
        let list = |live: &[recover::LiveSlot]| -> Vec<(u8, u64, Vec<u8>)> {
            live.iter()
                .map(|live| channel.replay(live))
                .map(|replay| (replay.kind, replay.transaction_id, replay.payload))
                .collect()
        };
        assert_eq!(recovery.read_index, 0x140);
        (list(&recovery.requests), list(&recovery.held))
    };
    let third = (3, 103, [b"request".as_slice(), &[3; 5]].concat());
    let fourth = (4, 104, [b"request".as_slice(), &[4; 5]].concat());
    let held = vec![(0x40, 202, vec![2, 2])];
    assert_eq!(recovered(0xd0), (vec![third, fourth.clone()], held.clone()));
    assert_eq!(recovered(0x110), (vec![fourth], held));
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Base {
    number: u32,
}

/// As version 1 had it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct First(Base);

impl SavedState for First {
    const DEVICE: [u8; 8] = *b"test\0\0\0\0";
    const VERSION: u32 = 1;
    const OLDEST_READER: u32 = 1;
    const OLDEST_READABLE: u32 = 1;

    fn emit(&self) -> Result<Parts, EncodeError> {
        Parts::new(&self.0)
    }
    fn parse(parts: &Parts) -> Result<Self, StateFault> {
        Ok(Self(parts.base()?))
    }
}

/// Version 2 has added a text.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Second(Base, String);

impl SavedState for Second {
    const DEVICE: [u8; 8] = *b"test\0\0\0\0";
    const VERSION: u32 = 2;
    const OLDEST_READER: u32 = 1;
    const OLDEST_READABLE: u32 = 1;

    fn emit(&self) -> Result<Parts, EncodeError> {
        Parts::new(&self.0)?.add(2, &self.1)
    }
    fn parse(parts: &Parts) -> Result<Self, StateFault> {
        Ok(Self(parts.base()?, parts.addition(2)?))
    }
}

/// Version 3 has added a number; with `OLDEST` 3, one that matters.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Third<const OLDEST: u32>(Base, String, u64);

impl<const OLDEST: u32> SavedState for Third<OLDEST> {
    const DEVICE: [u8; 8] = *b"test\0\0\0\0";
    const VERSION: u32 = 3;
    const OLDEST_READER: u32 = OLDEST;
    const OLDEST_READABLE: u32 = 2;

    fn emit(&self) -> Result<Parts, EncodeError> {
        Parts::new(&self.0)?.add(2, &self.1)?.add(3, &self.2)
    }
    fn parse(parts: &Parts) -> Result<Self, StateFault> {
        Ok(Self(parts.base()?, parts.addition(2)?, parts.addition(3)?))
    }
}

fn second(number: u32, text: &str) -> Second {
    Second(Base { number }, text.to_owned())
}

#[test]
fn a_newer_server_reads_an_older_ones_state_and_the_other_way_round() {
    let journal = map(&memory());
    journal.save_state(1, &First(Base { number: 1 })).expect("saved");
    assert_eq!(journal.load_state(1), Ok(Some(second(1, ""))));
    journal.save_state(1, &second(2, "two")).expect("saved");
    assert_eq!(journal.load_state(1), Ok(Some(second(2, "two"))));
    assert_eq!(journal.load_state(1), Ok(Some(First(Base { number: 2 }))));
    // Its additions are left out by a server that does not know them.
    let third = Third::<1>(Base { number: 3 }, "three".to_owned(), 33);
    journal.save_state(1, &third).expect("saved");
    assert_eq!(journal.load_state(1), Ok(Some(third)));
    assert_eq!(journal.load_state(1), Ok(Some(second(3, "three"))));
}

#[test]
fn an_addition_does_not_outlive_an_older_server_in_between() {
    let journal = map(&memory());
    // Both copies have tails behind their bases.
    for number in 1..=4 {
        journal.save_state(1, &second(number, "newer")).expect("saved");
    }
    for number in 5..=8 {
        journal.save_state(1, &First(Base { number })).expect("saved");
        assert_eq!(journal.load_state(1), Ok(Some(second(number, ""))));
    }
}

#[test]
fn the_build_before_versions_reads_what_is_written_now() {
    let fd = memory();
    let journal = map(&fd);
    journal.claim::<Second>();
    let found = |epoch| state_for_version_1(&fd, epoch).expect("the layout of that build");
    for number in 1..=3 {
        journal
            .save_state(7, &second(number, "not known then"))
            .expect("saved");
        let bytes = found(7).expect("a state");
        assert_eq!(codec::decode(&bytes), Ok(Base { number }));
    }
    assert_eq!(found(8), None);
}

#[test]
fn versions_outside_of_the_window_are_refused_by_name() {
    let journal = map(&memory());
    let third = Third::<3>(Base { number: 3 }, "three".to_owned(), 33);
    journal.save_state(1, &third).expect("saved");
    let fault = journal.load_state::<Second>(1).expect_err("too new");
    let expected = StateFault::TooNew {
        version: 3,
        oldest_reader: 3,
        known: 2,
    };
    assert_eq!(fault, expected);
    assert_eq!(journal.check::<Second>(), Err(expected.into()));
    assert_eq!(journal.check::<Third<3>>(), Ok(()));
    journal.save_state(1, &First(Base { number: 1 })).expect("saved");
    assert_eq!(
        journal.check::<Third<3>>(),
        Err(StateFault::TooOld {
            version: 1,
            oldest: 2
        }
        .into())
    );
}

#[test]
fn a_successor_that_does_not_fit_knows_it_before_anything_was_saved() {
    let journal = map(&memory());
    assert_eq!(journal.check::<Second>(), Ok(()), "nobody has served yet");
    journal.claim::<Third<3>>();
    assert!(matches!(
        journal.check::<Second>(),
        Err(JournalError::State(StateFault::TooNew { .. }))
    ));
    journal.claim::<Second>();
    assert_eq!(journal.check::<Second>(), Ok(()));
    assert_eq!(journal.check::<First>(), Ok(()));
    let other = journal.check::<Plain<u32>>().expect_err("another device's");
    assert!(other.to_string().contains("\"test\""), "{other}");
}

#[test]
fn a_journal_that_asks_for_a_newer_layout_is_refused() {
    let fd = memory();
    let journal = map(&fd);
    let store = |word| {
        journal
            .map
            .store_u64(FIRST, word, Ordering::Relaxed)
            .expect("mapped")
    };
    store(MAGIC | LAYOUT << 32);
    assert!(Journal::map(fd.as_fd()).is_ok());
    store(MAGIC | (LAYOUT + 1) << 32);
    let newer = Journal::map(fd.as_fd()).expect_err("too new");
    assert_eq!(newer, JournalError::Layout { found: LAYOUT + 1 });
    store(u64::from_le_bytes(*b"GARBAGE!"));
    assert!(matches!(
        Journal::map(fd.as_fd()),
        Err(JournalError::NotAJournal(_))
    ));
}

proptest! {
    #[test]
    fn any_bytes_where_states_are_kept_are_a_state_or_a_refusal(
        words in prop::collection::vec((0..40u64, prop_oneof![0..80u64, any::<u64>()]), 0..30),
        first in prop_oneof![Just(None), any::<u64>().prop_map(Some)],
        saved in any::<bool>(),
    ) {
        let fd = memory();
        let journal = map(&fd);
        if saved {
            journal.save_state(1, &second(1, "first")).expect("saved");
            journal.save_state(1, &second(2, "second")).expect("saved");
        }
        let at = |word: u64| if word < 10 { word * 8 } else { SAVED_STATE + (word % 2) * 65536 + (word - 10) / 2 * 8 };
        for (word, value) in words {
            journal.map.store_u64(at(word), value, Ordering::Relaxed).expect("mapped");
        }
        if let Some(word) = first {
            journal.map.store_u64(FIRST, word, Ordering::Relaxed).expect("mapped");
        }
        // None of these panics.
        let _refused = Journal::map(fd.as_fd()).is_err();
        let _refused = journal.check::<Second>().is_err();
        let _refused = journal.load_state::<Second>(1).is_err();
        journal.save_state(1, &second(3, "third")).expect("saved");
        // A copy of the highest generation that is possible stays the newest; else what was saved is found.
        if let Ok(Some(state)) = journal.load_state::<Second>(1) {
            prop_assert!(!saved || state == second(3, "third") || state.0.number < 3);
        }
    }

    #[test]
    fn a_flipped_bit_never_makes_another_state(bit in 0..(2 * 8 * 96usize)) {
        let fd = memory();
        let journal = map(&fd);
        journal.save_state(1, &second(1, "first")).expect("saved");
        journal.save_state(1, &second(2, "second")).expect("saved");
        let at = SAVED_STATE + (bit % 2) as u64 * 65536 + (bit / 16) as u64;
        let mut byte = [0];
        journal.map.read(at, &mut byte).expect("mapped");
        journal.map.write(at, &[byte[0] ^ 1 << (bit / 2 % 8)]).expect("mapped");
        let found = journal.load_state::<Second>(1).expect("no damage looks like a state of another version");
        // A tail that says it is of another save is none.
        let possible = [second(1, "first"), second(2, "second"), second(2, "")];
        prop_assert!(found.as_ref().is_some_and(|state| possible.contains(state)), "{:?}", found);
    }
}
