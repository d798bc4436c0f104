//! An oracle beside the real ring: a queue of packets and a count of bytes. Both sides are honest here.

use super::{PacketBuf, RingArea, RingReader, RingWriter, Signal, StageError, split_channel};
use crate::mem::{PAGE_BYTES, PagedArea, SharedMap};
use crate::wire::{OutPacket, PacketKind};
use proptest::collection::vec;
use proptest::prelude::*;
use std::collections::VecDeque;
use std::sync::Arc;

/// Both rings of a channel, `pages` data pages each, in file order or scattered over the map.
pub(super) fn channel(data_pages: u64, scattered: bool) -> (RingArea, RingArea) {
    let ring_pages = data_pages + 1;
    let count = 2 * ring_pages;
    let map = Arc::new(SharedMap::anonymous("ring-test", (count * PAGE_BYTES) as usize).expect("memory"));
    let mut pages: Vec<u64> = (0..count).map(|page| page * PAGE_BYTES).collect();
    if scattered {
        pages.reverse();
        pages.swap(0, 1);
    }
    let area = PagedArea::new(map, pages, 0, count * PAGE_BYTES).expect("pages of the map");
    split_channel(&area, ring_pages as u32).expect("two rings")
}

#[derive(Debug, Clone)]
enum Step {
    /// Stage a packet with that much extra header (in 8-byte units) and these payload lengths.
    Stage {
        extra8: usize,
        payload: Vec<usize>,
        completion: bool,
    },
    /// Stage the packet whose trailer ends exactly at the end of the data area, if there is one.
    StageToEnd,
    /// Stage the packet that leaves just this many units of 8 free bytes (0 must be refused).
    StageUntilFree(u32),
    CommitWriter,
    RevertWriter,
    Next,
    /// Put the last `n` staged packets back.
    PutBack(usize),
    CommitReader,
    Mask,
    Unmask,
    Wish(u32),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0usize..4, vec(0usize..600, 0..3), any::<bool>())
            .prop_map(|(extra8, payload, completion)| Step::Stage { extra8, payload, completion }),
        2 => Just(Step::StageToEnd),
        2 => (0u32..4).prop_map(Step::StageUntilFree),
        4 => Just(Step::CommitWriter),
        1 => Just(Step::RevertWriter),
        8 => Just(Step::Next),
        1 => (1usize..4).prop_map(Step::PutBack),
        4 => Just(Step::CommitReader),
        1 => Just(Step::Mask),
        2 => Just(Step::Unmask),
        1 => prop_oneof![Just(0u32), 24u32..4096].prop_map(Step::Wish),
    ]
}

#[derive(Debug, Clone, PartialEq)]
struct Sent {
    transaction_id: u64,
    completion: bool,
    extra: Vec<u8>,
    payload: Vec<u8>,
    /// Bytes of the ring.
    size: u64,
}

/// Numbers from the start of time, never wrapped: what indexes would be in an endless ring.
#[derive(Default)]
struct Oracle {
    staged: VecDeque<Sent>,
    published: VecDeque<Sent>,
    taken: Vec<Sent>,
    write_committed: u64,
    write_staged: u64,
    read_committed: u64,
    read_staged: u64,
    masked: bool,
    wish: u64,
}

struct Bench {
    size: u64,
    reader: RingReader,
    writer: RingWriter,
    buf: PacketBuf,
    oracle: Oracle,
    transaction_id: u64,
}

impl Bench {
    fn new(data_pages: u64, scattered: bool) -> Self {
        let (ring, _) = channel(data_pages, scattered);
        ring.initialize();
        Bench {
            size: u64::from(ring.data_bytes()),
            reader: RingReader::new(ring.clone(), 0).expect("0"),
            writer: RingWriter::new(ring, 0).expect("0"),
            buf: PacketBuf::new(),
            oracle: Oracle::default(),
            transaction_id: 0,
        }
    }

    fn stage(&mut self, extra8: usize, lengths: &[usize], completion: bool) {
        self.transaction_id += 1;
        let seed = self.transaction_id as u8;
        let extra: Vec<u8> = (0..extra8 * 8).map(|i| seed.wrapping_add(i as u8)).collect();
        let parts: Vec<Vec<u8>> = lengths
            .iter()
            .map(|len| (0..*len).map(|i| seed.wrapping_mul(31) ^ i as u8).collect())
            .collect();
        let slices: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
        let packet = OutPacket {
            kind: PacketKind::IN_BAND,
            transaction_id: self.transaction_id,
            completion_requested: completion,
            extra_header: &extra,
            payload: &slices,
        };
        let mut payload = parts.concat();
        payload.resize(payload.len().next_multiple_of(8), 0);
        let size = (16 + extra.len() + payload.len() + 8) as u64;
        assert_eq!(
            RingWriter::needed_bytes(extra.len(), lengths.iter().sum()) as u64,
            size
        );

        let free = self.size - (self.oracle.write_staged - self.oracle.read_committed);
        let expected = if size >= self.size {
            Err(StageError::TooBig {
                packet_bytes: (size - 8) as usize,
                data_bytes: self.size as u32,
            })
        } else if size >= free {
            Err(StageError::Full)
        } else {
            Ok(())
        };
        assert_eq!(self.writer.stage(&packet), expected);
        if expected.is_ok() {
            self.oracle.write_staged += size;
            let transaction_id = self.transaction_id;
            self.oracle.staged.push_back(Sent {
                transaction_id,
                completion,
                extra,
                payload,
                size,
            });
        }
    }

    /// A packet of `size` ring bytes in all, if there can be one.
    fn stage_sized(&mut self, size: u64) {
        if size >= 24 && size.is_multiple_of(8) && size <= 500_000 {
            self.stage(0, &[size as usize - 24], false);
        }
    }

    fn apply(&mut self, step: &Step) {
        let oracle = &mut self.oracle;
        match step {
            Step::Stage {
                extra8,
                payload,
                completion,
            } => self.stage(*extra8, payload, *completion),
            Step::StageToEnd => self.stage_sized(self.size - self.oracle.write_staged % self.size),
            Step::StageUntilFree(left8) => {
                let free = self.size - (oracle.write_staged - oracle.read_committed);
                self.stage_sized(free.saturating_sub(u64::from(*left8) * 8));
            }
            Step::CommitWriter => {
                let was_empty = oracle.read_committed == oracle.write_committed;
                let expected = oracle.write_staged != oracle.write_committed && was_empty && !oracle.masked;
                let signal = self.writer.commit().expect("an honest reader");
                assert_eq!(signal.is_needed(), expected, "signal to the reader");
                oracle.write_committed = oracle.write_staged;
                oracle.published.append(&mut oracle.staged);
            }
            Step::RevertWriter => {
                self.writer.revert();
                oracle.write_staged = oracle.write_committed;
                oracle.staged.clear();
            }
            Step::Next => {
                let found = self.reader.next(&mut self.buf).expect("an honest writer");
                let expected = oracle.published.pop_front();
                assert_eq!(found.is_some(), expected.is_some(), "packet there or not");
                if let (Some(found), Some(expected)) = (found, expected) {
                    assert_eq!(found.kind, PacketKind::IN_BAND);
                    assert_eq!(found.transaction_id, expected.transaction_id);
                    assert_eq!(found.completion_requested, expected.completion);
                    assert_eq!(found.extra_header(), expected.extra);
                    assert_eq!(found.payload, expected.payload);
                    oracle.read_staged += expected.size;
                    oracle.taken.push(expected);
                }
            }
            Step::PutBack(count) => {
                for _ in 0..*count {
                    if let Some(sent) = oracle.taken.pop() {
                        oracle.read_staged -= sent.size;
                        oracle.published.push_front(sent);
                    }
                }
                self.reader.revert_to((oracle.read_staged % self.size) as u32);
            }
            Step::CommitReader => {
                let (old, new) = (oracle.read_committed, oracle.read_staged);
                let (before, now) = (
                    self.size - (oracle.write_committed - old),
                    self.size - (oracle.write_committed - new),
                );
                let wish = oracle.wish;
                let signal = self.reader.commit();
                if new == old || wish == 0 {
                    assert_eq!(signal, Signal::NotNeeded);
                } else if before < wish && now > wish {
                    assert_eq!(signal, Signal::Needed, "room for {wish}: {before} -> {now}");
                } else if now + 8 <= wish || before > wish {
                    assert_eq!(signal, Signal::NotNeeded, "room for {wish}: {before} -> {now}");
                }
                oracle.read_committed = new;
                oracle.taken.clear();
            }
            Step::Mask => {
                self.reader.mask_interrupts();
                oracle.masked = true;
            }
            Step::Unmask => {
                if oracle.read_staged == oracle.read_committed {
                    let more = self.reader.unmask_and_check().expect("an honest writer");
                    assert_eq!(more, !oracle.published.is_empty());
                    oracle.masked = false;
                }
            }
            Step::Wish(bytes) => {
                self.writer.set_pending_send_bytes(*bytes);
                oracle.wish = u64::from(*bytes);
                let free = self.size - (oracle.write_staged - oracle.read_committed);
                assert_eq!(
                    u64::from(self.writer.free_bytes().expect("an honest reader")),
                    free
                );
            }
        }
        let oracle = &self.oracle;
        let index = |position: u64| (position % self.size) as u32;
        assert_eq!(self.writer.staged_index(), index(oracle.write_staged));
        assert_eq!(self.writer.committed_index(), index(oracle.write_committed));
        assert_eq!(self.reader.staged_index(), index(oracle.read_staged));
        assert_eq!(self.reader.committed_index(), index(oracle.read_committed));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn the_ring_does_what_an_endless_queue_of_packets_would_do(
        data_pages in 1u64..4,
        scattered in any::<bool>(),
        steps in vec(step(), 1..400),
    ) {
        let mut bench = Bench::new(data_pages, scattered);
        for step in &steps {
            bench.apply(step);
        }
    }
}

#[test]
fn a_packet_may_end_exactly_at_the_end_and_the_next_begins_at_zero() {
    for scattered in [false, true] {
        let mut bench = Bench::new(1, scattered);
        for step in [
            Step::Stage {
                extra8: 0,
                payload: vec![1000],
                completion: true,
            },
            Step::CommitWriter,
            Step::Next,
            Step::CommitReader,
            Step::StageToEnd,
            Step::CommitWriter,
        ] {
            bench.apply(&step);
        }
        assert_eq!(bench.writer.committed_index(), 0);
        for step in [
            Step::Stage {
                extra8: 1,
                payload: vec![8],
                completion: false,
            },
            Step::CommitWriter,
            Step::Next,
            Step::Next,
        ] {
            bench.apply(&step);
        }
        assert_eq!(bench.reader.staged_index(), 40);
    }
}

#[test]
fn every_alignment_of_header_payload_and_trailer_to_the_end_wraps() {
    // 64-byte packets in a ring whose size they do not divide: over time every 8-byte boundary lands on the end.
    let mut bench = Bench::new(1, true);
    for _ in 0..2000 {
        for step in [
            Step::Stage {
                extra8: 1,
                payload: vec![24],
                completion: false,
            },
            Step::CommitWriter,
            Step::Next,
            Step::CommitReader,
        ] {
            bench.apply(&step);
        }
    }
}

#[test]
fn a_full_ring_is_never_filled_to_the_last_byte() {
    let mut bench = Bench::new(1, false);
    bench.apply(&Step::StageUntilFree(0));
    assert_eq!(
        bench.writer.staged_index(),
        0,
        "a packet of the whole ring was taken"
    );
    bench.apply(&Step::StageUntilFree(1));
    assert_eq!(bench.writer.free_bytes(), Ok(8));
}

#[test]
fn the_trailer_has_the_packets_start_in_its_upper_half() {
    let (ring, _) = channel(1, false);
    let mut writer = RingWriter::new(ring.clone(), 64).expect("64");
    // An honest reader stands at the same place.
    let mut reader = RingReader::new(ring.clone(), 64).expect("64");
    reader.claim_words();
    writer.claim_words();
    writer
        .stage(&OutPacket::in_band(1, false, &[b"abc"]))
        .expect("room");
    let mut bytes = [0; 32];
    ring.area.read(PAGE_BYTES + 64, &mut bytes).expect("in range");
    assert_eq!(&bytes[..16], &[6, 0, 2, 0, 3, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(&bytes[16..24], b"abc\0\0\0\0\0");
    assert_eq!(&bytes[24..], &[0, 0, 0, 0, 64, 0, 0, 0]);
}

#[test]
fn taking_over_clears_the_mask_and_the_wish_of_a_dead_predecessor() {
    let (ring, _) = channel(1, false);
    ring.initialize();
    let mut dead = RingReader::new(ring.clone(), 0).expect("0");
    dead.mask_interrupts();
    let mut writer = RingWriter::new(ring.clone(), 0).expect("0");
    writer.stage(&OutPacket::in_band(1, true, &[])).expect("room");
    assert_eq!(writer.commit(), Ok(Signal::NotNeeded));
    drop(dead);

    let mut successor = RingReader::new(ring.clone(), 0).expect("0");
    successor.claim_words();
    let mut buf = PacketBuf::new();
    assert!(successor.next(&mut buf).expect("honest").is_some());
    assert_eq!(successor.commit(), Signal::NotNeeded);
    writer.stage(&OutPacket::in_band(2, true, &[])).expect("room");
    assert_eq!(writer.commit(), Ok(Signal::Needed));

    writer.set_pending_send_bytes(4000);
    let mut heir = RingWriter::new(ring, writer.committed_index()).expect("an index of the ring");
    heir.claim_words();
    assert!(successor.next(&mut buf).expect("honest").is_some());
    assert_eq!(
        successor.commit(),
        Signal::NotNeeded,
        "a wish that nobody has any more"
    );
}

#[test]
fn a_writer_waiting_for_space_is_woken_once_the_edge_is_crossed() {
    let mut bench = Bench::new(1, false);
    for _ in 0..3 {
        bench.apply(&Step::Stage {
            extra8: 0,
            payload: vec![1000],
            completion: false,
        });
    }
    bench.apply(&Step::CommitWriter);
    // 3 * 1024 of 4096 bytes used: 1024 free is not *more* than 1024.
    assert_eq!(bench.writer.request_space(1024), Ok(false));
    bench.oracle.wish = 1024;
    bench.apply(&Step::Next);
    bench.apply(&Step::CommitReader);
    assert_eq!(bench.writer.request_space(1024), Ok(true));
}

#[test]
fn a_channel_is_cut_only_where_both_rings_have_a_data_page() {
    let map = Arc::new(SharedMap::anonymous("ring-test", 8 * 4096).expect("memory"));
    let area = PagedArea::contiguous(map, 0, 8 * 4096).expect("in range");
    for cut in [0, 1, 7, 8, 9, u32::MAX] {
        assert!(split_channel(&area, cut).is_err(), "cut at {cut}");
    }
    let (to_host, to_guest) = split_channel(&area, 2).expect("2 and 6 pages");
    assert_eq!((to_host.data_bytes(), to_guest.data_bytes()), (4096, 5 * 4096));
}
