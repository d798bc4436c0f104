//! The other side rewrites any shared word or byte between any two of our accesses.

use super::model::channel;
use super::{PacketBuf, RingArea, RingFault, RingReader, RingWriter, StageError};
use crate::mem::PAGE_BYTES;
use crate::wire::OutPacket;
use proptest::collection::vec;
use proptest::prelude::*;

/// One write of the other side. Values lean to what is nearly right.
#[derive(Debug, Clone)]
enum Blow {
    Nothing,
    Word { offset: u64, value: u32 },
    Descriptor { index8: u64, offset8: u16, length8: u16 },
    Bytes { offset: u64, bytes: Vec<u8> },
}

fn index_like() -> impl Strategy<Value = u32> {
    prop_oneof![
        4 => (0u32..512).prop_map(|unit| unit * 8),
        1 => (0u32..3).prop_map(|unit| 4096 + unit * 8),
        1 => any::<u32>(),
        1 => 0u32..4096,
    ]
}

fn blow() -> impl Strategy<Value = Blow> {
    prop_oneof![
        3 => Just(Blow::Nothing),
        4 => (0u64..4, index_like()).prop_map(|(word, value)| Blow::Word { offset: word * 4, value }),
        3 => (0u64..510, 0u16..6, 0u16..600)
            .prop_map(|(index8, offset8, length8)| Blow::Descriptor { index8, offset8, length8 }),
        1 => (0u64..510, any::<u16>(), any::<u16>())
            .prop_map(|(index8, offset8, length8)| Blow::Descriptor { index8, offset8, length8 }),
        1 => (0u64..8100, vec(any::<u8>(), 1..64)).prop_map(|(offset, bytes)| Blow::Bytes { offset, bytes }),
    ]
}

fn strike(ring: &RingArea, blow: &Blow) {
    let done = match blow {
        Blow::Nothing => Ok(()),
        Blow::Word { offset, value } => ring.area.write(*offset, &value.to_le_bytes()),
        Blow::Descriptor {
            index8,
            offset8,
            length8,
        } => {
            let mut bytes = [0; 6];
            bytes[..2].copy_from_slice(&6u16.to_le_bytes());
            bytes[2..4].copy_from_slice(&offset8.to_le_bytes());
            bytes[4..].copy_from_slice(&length8.to_le_bytes());
            ring.area.write(PAGE_BYTES + index8 * 8, &bytes)
        }
        Blow::Bytes { offset, bytes } => ring.area.write(*offset, bytes),
    };
    done.expect("blows hit the ring");
}

/// Plays the blows in turn, one before each access to shared memory.
fn adversary(blows: Vec<Blow>) -> Box<dyn FnMut(&RingArea) + Send> {
    let mut turn = 0;
    Box::new(move |ring| {
        if let Some(blow) = blows.get(turn % blows.len().max(1)) {
            strike(ring, blow);
        }
        turn += 1;
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1024, ..ProptestConfig::default() })]

    #[test]
    fn a_reader_survives_a_writer_that_changes_everything_under_it(
        start in 0u32..512,
        scattered in any::<bool>(),
        blows in vec(blow(), 1..200),
        rounds in 1usize..60,
    ) {
        let (ring, _) = channel(1, scattered);
        let mut reader = RingReader::new(ring, start * 8).expect("an index of the ring");
        reader.memory().set_adversary(adversary(blows));
        let mut buf = PacketBuf::new();
        for _ in 0..rounds {
            let before = reader.staged_index();
            match reader.next(&mut buf) {
                Ok(Some(packet)) => {
                    // The parts are consistent with each other, whatever the ring says by now.
                    let bytes = 16 + packet.extra_header().len() + packet.payload.len();
                    prop_assert!(bytes + 8 < 4096);
                    let moved = (reader.staged_index() + 4096 - before) % 4096;
                    prop_assert_eq!(moved as usize, bytes + 8);
                    // The layers above parse any bytes, too.
                    // Whatever they say, they must not panic.
                    let _ = (packet.gpa_direct(), packet.transfer_pages());
                }
                Ok(None) => prop_assert_eq!(reader.staged_index(), before),
                Err(RingFault::RingSize { .. }) => prop_assert!(false, "no fault of the size"),
                Err(_) => prop_assert_eq!(reader.staged_index(), before),
            }
            // Nobody waits for the signal.
            let _ = reader.commit();
            prop_assert_eq!(reader.committed_index(), reader.staged_index());
            prop_assert!(reader.committed_index() < 4096 && reader.committed_index().is_multiple_of(8));
            if reader.unmask_and_check().is_err() {
                reader.mask_interrupts();
            }
        }
    }

    #[test]
    fn a_writer_survives_a_reader_that_changes_everything_under_it(
        start in 0u32..512,
        scattered in any::<bool>(),
        blows in vec(blow(), 1..200),
        lengths in vec(0usize..5000, 1..60),
    ) {
        let (ring, _) = channel(1, scattered);
        let mut writer = RingWriter::new(ring, start * 8).expect("an index of the ring");
        writer.memory().set_adversary(adversary(blows));
        let payload = vec![0xA5; 5000];
        for len in lengths {
            let before = writer.staged_index();
            let needed = RingWriter::needed_bytes(0, len) as u32;
            match writer.stage(&OutPacket::in_band(7, true, &[&payload[..len]])) {
                Ok(()) => prop_assert_eq!((writer.staged_index() + 4096 - before) % 4096, needed),
                Err(StageError::TooBig { .. }) => prop_assert!(needed >= 4096),
                Err(_) => prop_assert_eq!(writer.staged_index(), before),
            }
            // A fault is as good an answer as any here.
            let _ = writer.commit();
            prop_assert_eq!(writer.committed_index(), writer.staged_index());
            // Likewise.
            let _ = writer.request_space(needed);
            prop_assert!(writer.committed_index() < 4096 && writer.committed_index().is_multiple_of(8));
        }
    }

    #[test]
    fn indexes_from_a_journal_are_checked_like_any_other(index in any::<u32>()) {
        let (ring, _) = channel(1, false);
        let good = index < 4096 && index % 8 == 0;
        prop_assert_eq!(RingReader::new(ring.clone(), index).is_ok(), good);
        prop_assert_eq!(RingWriter::new(ring, index).is_ok(), good);
    }
}

/// Puts `words` at the start of the data and publishes up to `write_index`.
fn reader_over(words: &[u16], write_index: u32) -> RingReader {
    let (ring, _) = channel(1, false);
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    ring.area.write(PAGE_BYTES, &bytes).expect("in range");
    ring.area.write(0, &write_index.to_le_bytes()).expect("in range");
    RingReader::new(ring, 0).expect("0")
}

#[test]
fn each_broken_length_is_named() {
    let mut buf = PacketBuf::new();
    let cases: [(&[u16], u32, RingFault); 6] = [
        (
            &[6, 1, 2, 0],
            24,
            RingFault::PacketHeaderLength {
                offset8: 1,
                length8: 2,
            },
        ),
        (
            &[6, 3, 2, 0],
            24,
            RingFault::PacketHeaderLength {
                offset8: 3,
                length8: 2,
            },
        ),
        (
            &[6, 2, 3, 0],
            24,
            RingFault::PacketBeyondWriteIndex {
                packet_bytes: 24,
                available_bytes: 24,
            },
        ),
        (
            &[6, 2, 0xFFFF, 0],
            4088,
            RingFault::PacketBeyondWriteIndex {
                packet_bytes: 524_280,
                available_bytes: 4088,
            },
        ),
        (
            &[6, 2, 2, 0],
            16,
            RingFault::PacketBeyondWriteIndex {
                packet_bytes: 16,
                available_bytes: 16,
            },
        ),
        (
            &[6, 2, 2, 0],
            4096,
            RingFault::IndexOutsideRing {
                index: 4096,
                data_bytes: 4096,
            },
        ),
    ];
    for (words, write_index, fault) in cases {
        let mut reader = reader_over(words, write_index);
        assert_eq!(
            reader.next(&mut buf).map(|_| ()),
            Err(fault),
            "{words:?} up to {write_index}"
        );
        assert_eq!(reader.staged_index(), 0);
    }
    assert!(
        reader_over(&[6, 2, 2, 0], 24)
            .next(&mut buf)
            .expect("well-formed")
            .is_some()
    );
    let unaligned = RingFault::IndexOutsideRing {
        index: 20,
        data_bytes: 4096,
    };
    assert_eq!(
        reader_over(&[6, 2, 2, 0], 20).next(&mut buf).map(|_| ()),
        Err(unaligned)
    );
}
