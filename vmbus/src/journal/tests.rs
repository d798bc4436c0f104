//! Recovery from any bytes, and saved states that were cut short.
#![forbid(unsafe_code)]

use std::os::fd::AsFd;
use std::sync::atomic::Ordering;

use proptest::prelude::*;

use super::layout::{SAVED_STATE, SAVED_STATE_BYTES};
use super::recover::{ChannelImage, Record, RecoverFault, RingView, recover};
use super::slot::{Role, SlotHead, SlotWords};
use super::test_state::Plain;
use super::*;
use crate::mem::crash_point::kill_after;
use crate::mem::sealed_memfd;

const VIEW: RingView = RingView {
    to_host_data_bytes: 4096,
    to_guest_data_bytes: 8192,
    to_guest_write_index: 0x100,
};

fn slot(role: Role, take_seq: u64, publish_seq: u64) -> SlotWords {
    let head = SlotHead {
        kind: 1,
        role,
        payload_bytes: 8,
    }
    .pack();
    SlotWords {
        head,
        take_seq,
        publish_seq,
        transaction_id: 5,
    }
}

/// Ten takes, of which the last one made 0x80 the read index; four publications, the last one up to 0x100.
fn image(slots: Vec<SlotWords>) -> ChannelImage {
    ChannelImage {
        taken_seq: 10,
        take_index: [0x80, 0x70],
        published_seq: 4,
        records: [
            Record {
                seq: 4,
                indexes: Record::pack(0xc0, 0x100),
            },
            Record {
                seq: 3,
                indexes: Record::pack(0x80, 0xc0),
            },
        ],
        slots,
    }
}

#[test]
fn a_request_is_live_from_its_take_to_the_publication_of_its_answer() {
    let slots = vec![
        slot(Role::Request, 3, 2),
        slot(Role::Request, 9, 0),
        slot(Role::Request, 8, 5),
        slot(Role::Request, 11, 0),
        SlotWords::default(),
    ];
    let recovery = recover(&image(slots), VIEW).expect("a good journal");
    assert_eq!((recovery.read_index, recovery.write_index), (0x80, 0x100));
    let live: Vec<(u16, bool)> = recovery
        .requests
        .iter()
        .map(|live| (live.slot, live.has_stale_end))
        .collect();
    assert_eq!(live, [(2, true), (1, false)], "in the order of the takes");
    assert_eq!(recovery.stale, [(0, Role::Request), (3, Role::Request)]);
    assert!(recovery.held.is_empty());
}

#[test]
fn a_held_packet_is_live_from_its_publication_to_the_take_of_the_guests_answer() {
    let slots = vec![
        slot(Role::Held, 0, 4),
        slot(Role::Held, 10, 3),
        slot(Role::Held, 11, 2),
        slot(Role::Held, 0, 5),
    ];
    let recovery = recover(&image(slots), VIEW).expect("a good journal");
    let live: Vec<(u16, bool)> = recovery
        .held
        .iter()
        .map(|live| (live.slot, live.has_stale_end))
        .collect();
    assert_eq!(live, [(2, true), (0, false)]);
    assert_eq!(recovery.stale, [(1, Role::Held), (3, Role::Held)]);
}

#[test]
fn the_rings_index_decides_about_the_publication_in_progress() {
    let mut image = image(vec![slot(Role::Request, 9, 5)]);
    image.records[1] = Record {
        seq: 5,
        indexes: Record::pack(0x100, 0x180),
    };
    let at = |index| {
        recover(
            &image,
            RingView {
                to_guest_write_index: index,
                ..VIEW
            },
        )
    };
    let reached = at(0x180).expect("a good journal");
    assert_eq!(
        (reached.published_seq, reached.write_index, reached.requests.len()),
        (5, 0x180, 0)
    );
    let not_reached = at(0x100).expect("a good journal");
    assert_eq!(
        (
            not_reached.published_seq,
            not_reached.write_index,
            not_reached.requests.len()
        ),
        (4, 0x100, 1)
    );
    let tampered = RecoverFault::WriteIndexTampered {
        found: 0x108,
        old: 0x100,
        new: 0x180,
    };
    assert_eq!(at(0x108), Err(tampered));
}

#[test]
fn an_index_that_changed_without_a_publication_is_tampering() {
    let found = RingView {
        to_guest_write_index: 0xc0,
        ..VIEW
    };
    let fault = recover(&image(Vec::new()), found).expect_err("not ours");
    assert_eq!(
        fault,
        RecoverFault::WriteIndexTampered {
            found: 0xc0,
            old: 0x100,
            new: 0x100
        }
    );
}

fn any_slot() -> impl Strategy<Value = SlotWords> {
    let small = prop_oneof![0..20u64, any::<u64>()];
    let head = prop_oneof![
        any::<u64>(),
        (0..2u64, 0..64u64).prop_map(|(role, length)| role << 8 | length << 32)
    ];
    (head, small.clone(), small, any::<u64>()).prop_map(|(head, take_seq, publish_seq, transaction_id)| {
        SlotWords {
            head,
            take_seq,
            publish_seq,
            transaction_id,
        }
    })
}

proptest! {
    #[test]
    fn any_image_gives_an_error_or_indexes_within_the_rings_and_each_slot_once(
        seqs in prop::array::uniform4(prop_oneof![0..20u64, any::<u64>()]),
        words in prop::array::uniform4(prop_oneof![(0..1024u64).prop_map(|n| (n * 8) | (n << 35)), any::<u64>()]),
        write_index in prop_oneof![(0..1024u32).prop_map(|n| n * 8), any::<u32>()],
        slots in prop::collection::vec(any_slot(), 0..40),
    ) {
        let image = ChannelImage {
            taken_seq: seqs[0],
            take_index: [words[0], words[1]],
            published_seq: seqs[1],
            records: [Record { seq: seqs[2], indexes: words[2] }, Record { seq: seqs[3], indexes: words[3] }],
            slots: slots.clone(),
        };
        let view = RingView { to_guest_write_index: write_index, ..VIEW };
        if let Ok(recovery) = recover(&image, view) {
            prop_assert!(recovery.read_index < 4096 && recovery.read_index % 8 == 0);
            prop_assert!(recovery.write_index < 8192 && recovery.write_index % 8 == 0);
            prop_assert_eq!(recovery.write_index, write_index);
            let mut seen: Vec<u16> = recovery.requests.iter().chain(&recovery.held).map(|live| live.slot).collect();
            seen.extend(recovery.stale.iter().map(|(slot, _)| *slot));
            let count = seen.len();
            seen.sort_unstable();
            seen.dedup();
            prop_assert_eq!(count, seen.len());
            prop_assert!(seen.iter().all(|slot| usize::from(*slot) < slots.len()));
        }
    }

    #[test]
    fn a_journal_full_of_any_bytes_is_refused_or_used_without_a_panic(
        header in prop::collection::vec(prop_oneof![0..16u64, any::<u64>()], 10),
        slots in prop::collection::vec(any_slot(), 8),
        index in (0..1024u32).prop_map(|n| n * 8),
    ) {
        let fd = sealed_memfd("journal", required_len()).expect("a memfd");
        let journal = Journal::map(fd.as_fd()).expect("a journal");
        let base = layout::channel(0);
        for (word, value) in header.iter().enumerate().skip(1) {
            journal.map.store_u64(base + word as u64 * 8, *value, Ordering::Relaxed).expect("mapped");
        }
        journal.map.store_u64(base + layout::EPOCH, 8, Ordering::Relaxed).expect("mapped");
        for (slot, words) in (0u16..).zip(&slots) {
            let words = [words.head, words.take_seq, words.publish_seq, words.transaction_id];
            for (at, value) in (layout::slot(slot)..).step_by(8).zip(words) {
                journal.map.store_u64(base + at, value, Ordering::Relaxed).expect("mapped");
            }
        }
        let view = RingView { to_guest_write_index: index, ..VIEW };
        if let Ok(Some((mut channel, recovery))) = ChannelJournal::recover(&journal, 0, 7, view) {
            for live in recovery.requests.iter().chain(&recovery.held) {
                prop_assert_eq!(channel.replay(live).payload.len(), live.head.payload_bytes as usize);
            }
            // What follows must work, and a successor must find it.
            let slot = channel.stage_request(3, 77, &[b"payload"]);
            channel.commit_take(0x18);
            let (_, again) = ChannelJournal::recover(&journal, 0, 7, RingView { to_guest_write_index: recovery.write_index, ..view })
                .expect("a good journal")
                .expect("the same opening");
            prop_assert_eq!(again.read_index, 0x18);
            prop_assert_eq!(again.requests.len(), recovery.requests.len() + usize::from(slot.is_some()));
            prop_assert_eq!(again.held.len(), recovery.held.len());
        }
    }
}

fn empty() -> Journal {
    let fd = sealed_memfd("journal", required_len()).expect("a memfd");
    Journal::map(fd.as_fd()).expect("a journal")
}

/// A text as a state.
fn text(text: &str) -> Plain<String> {
    Plain(text.to_owned())
}

#[test]
fn a_save_cut_short_at_any_store_leaves_the_last_state_or_the_new_one() {
    for stores in 0.. {
        let journal = empty();
        journal.save_state(1, &text("old")).expect("saved");
        let done = kill_after(stores, || journal.save_state(1, &text("a new and longer one"))).is_some();
        let found = journal
            .load_state::<Plain<String>>(1)
            .expect("decodes")
            .expect("there");
        assert!(
            found == text("old") || found == text("a new and longer one"),
            "{found:?}"
        );
        journal.save_state(1, &text("the next")).expect("saved");
        assert_eq!(journal.load_state(1), Ok(Some(text("the next"))));
        if done {
            assert_eq!(found, text("a new and longer one"));
            assert!(stores >= 5);
            return;
        }
    }
}

#[test]
fn a_damaged_copy_does_not_count() {
    let journal = empty();
    assert_eq!(journal.load_state::<Plain<u64>>(1), Ok(None));
    journal.save_state(1, &Plain(1u64)).expect("saved");
    journal.save_state(1, &Plain(2u64)).expect("saved");
    // The first save went to the first copy, the second to the second.
    journal
        .map
        .write(SAVED_STATE + SAVED_STATE_BYTES + 24, &[0xff])
        .expect("mapped");
    assert_eq!(journal.load_state(1), Ok(Some(Plain(1u64))));
    journal.map.write(SAVED_STATE + 8, &[0xff; 8]).expect("mapped");
    assert_eq!(journal.load_state::<Plain<u64>>(1), Ok(None));
}

#[test]
fn a_journal_that_is_too_short_is_refused() {
    let short = sealed_memfd("journal", required_len() - 4096).expect("a memfd");
    assert!(matches!(Journal::map(short.as_fd()), Err(JournalError::Map(_))));
}

#[test]
fn an_idle_channel_costs_a_few_pages() {
    let fd = sealed_memfd("journal", required_len()).expect("a memfd");
    let journal = Journal::map(fd.as_fd()).expect("a journal");
    let mut channel = ChannelJournal::open_fresh(&journal, 0, 1);
    for _ in 0..10_000 {
        let slot = channel.stage_request(1, 1, &[&[0; 100]]).expect("a slot");
        channel.commit_take(8);
        channel.stage_answer(slot);
        channel.before_publication(0, 8);
        channel.after_publication();
    }
    let blocks = nix::sys::stat::fstat(&fd).expect("a file").st_blocks;
    // 512-byte blocks: the journal's page, the channel's page, one page of slots, one of payloads.
    assert!(blocks * 512 <= 4 * 4096, "{blocks} blocks");
}
