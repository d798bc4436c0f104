//! Packets, and lists of guest memory, in packets and GPADLs.

use crate::mem::{Gpa, Gpn, GuestRam, PAGE_BYTES, RamLayout, RamRegion, SharedMap};
use crate::wire::*;
use proptest::collection::vec;
use proptest::prelude::*;
use std::sync::Arc;

proptest! {
    #![proptest_config(ProptestConfig { cases: 1024, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes_make_a_packet_or_nothing(mut bytes in vec(any::<u8>(), 0..400), kind in 5u16..13, offset8 in 0u16..30, length8 in 0u16..60) {
        if bytes.len() >= 6 && kind != 12 {
            bytes[..2].copy_from_slice(&kind.to_le_bytes());
            bytes[2..4].copy_from_slice(&offset8.to_le_bytes());
            bytes[4..6].copy_from_slice(&length8.to_le_bytes());
        }
        if let Some(packet) = Packet::parse(&bytes) {
            prop_assert_eq!(16 + packet.extra_header().len() + packet.payload.len(), usize::from(length8_of(&bytes)) * 8);
            if let Ok(direct) = packet.gpa_direct() {
                prop_assert_eq!(packet.kind, PacketKind::GPA_DIRECT);
                prop_assert_eq!(direct.ranges.iter().count(), direct.ranges.len());
            }
            if let Ok(pages) = packet.transfer_pages() {
                prop_assert_eq!(packet.kind, PacketKind::TRANSFER_PAGES);
                prop_assert!(pages.ranges().len() * 8 <= packet.extra_header().len());
            }
        }
    }

    #[test]
    fn packets_survive_the_wire(
        transaction_id in any::<u64>(), wants in any::<bool>(), extra8 in 0usize..10, payload in vec(any::<u8>(), 0..200),
        kind in any::<u16>(),
    ) {
        let extra = vec![0x5A; extra8 * 8];
        let out = OutPacket {
            kind: PacketKind(kind),
            transaction_id,
            completion_requested: wants,
            extra_header: &extra,
            payload: &[&payload],
        };
        let bytes = flat(&out);
        let packet = Packet::parse(&bytes).expect("well-formed");
        prop_assert_eq!(packet.kind, out.kind);
        prop_assert_eq!(packet.transaction_id, transaction_id);
        prop_assert_eq!(packet.completion_requested, wants);
        prop_assert_eq!(packet.extra_header(), &extra[..]);
        prop_assert_eq!(&packet.payload[..payload.len()], &payload[..]);
        prop_assert!(packet.payload[payload.len()..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn transfer_pages_survive_the_wire(set in any::<u16>(), ranges in vec((any::<u32>(), any::<u32>()), 0..40), spare in 0usize..3) {
        let ranges: Vec<_> =
            ranges.into_iter().map(|(byte_count, byte_offset)| TransferRange { byte_count, byte_offset }).collect();
        let mut header = vec![1, 2, 3];
        transfer_pages_header(set, &ranges, &mut header);
        header.resize(header.len() + spare * 8, 0xEE);
        let bytes = with_header(PacketKind::TRANSFER_PAGES, &header, &[]);
        let pages = Packet::parse(&bytes).expect("well-formed").transfer_pages().expect("well-formed");
        prop_assert_eq!(pages.page_set_id, set);
        prop_assert_eq!(pages.ranges().collect::<Vec<_>>(), ranges);
    }
}

fn length8_of(bytes: &[u8]) -> u16 {
    u16::from_le_bytes([bytes[4], bytes[5]])
}

/// The packet as one byte string, padded, without its trailer.
fn flat(out: &OutPacket<'_>) -> Vec<u8> {
    use zerocopy::IntoBytes;
    let mut bytes = out.descriptor().expect("fits").as_bytes().to_vec();
    bytes.extend_from_slice(out.extra_header);
    out.payload.iter().for_each(|part| bytes.extend_from_slice(part));
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    bytes
}

/// A packet with a header of its kind, as one byte string.
fn with_header(kind: PacketKind, extra_header: &[u8], payload: &[u8]) -> Vec<u8> {
    flat(&OutPacket {
        kind,
        transaction_id: 1,
        completion_requested: true,
        extra_header,
        payload: &[payload],
    })
}

/// Two regions with a hole, the second one first in the file.
fn ram() -> GuestRam {
    let layout = RamLayout {
        regions: vec![
            RamRegion {
                gpa: 0,
                len: 8 * PAGE_BYTES,
                file_offset: 4 * PAGE_BYTES,
            },
            RamRegion {
                gpa: 16 * PAGE_BYTES,
                len: 4 * PAGE_BYTES,
                file_offset: 0,
            },
        ],
    };
    let map = Arc::new(SharedMap::anonymous("ram-test", 12 * 4096).expect("memory"));
    GuestRam::new(map, layout).expect("a valid layout")
}

/// Where one byte of RAM lies in the file: said once more, differently.
fn file_offset(gpa: u64) -> Option<u64> {
    match gpa / PAGE_BYTES {
        0..8 => Some(4 * PAGE_BYTES + gpa),
        16..20 => Some(gpa - 16 * PAGE_BYTES),
        _ => None,
    }
}

#[derive(Debug, Clone)]
struct Claim {
    byte_count: u32,
    byte_offset: u32,
    pages: Vec<u64>,
}

fn claim() -> impl Strategy<Value = Claim> {
    let page = prop_oneof![12 => 0u64..8, 6 => 16u64..20, 1 => 0u64..32, 1 => any::<u64>()];
    (
        prop_oneof![0u32..20000, Just(4096), Just(0)],
        prop_oneof![0u32..4096, 0u32..9000, Just(0)],
        vec(page, 8),
    )
        .prop_map(|(byte_count, byte_offset, mut pages)| {
            pages.truncate((u64::from(byte_count) + u64::from(byte_offset)).div_ceil(PAGE_BYTES) as usize);
            Claim {
                byte_count,
                byte_offset,
                pages,
            }
        })
}

fn emit_claims(claims: &[Claim]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for claim in claims {
        bytes.extend(claim.byte_count.to_le_bytes());
        bytes.extend(claim.byte_offset.to_le_bytes());
        claim
            .pages
            .iter()
            .for_each(|page| bytes.extend(page.to_le_bytes()));
    }
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn every_claimed_byte_is_found_where_it_is_or_the_claim_is_refused(
        claims in vec(claim(), 0..5), spare8 in 0usize..4,
    ) {
        let mut header = vec![0; 4];
        header.extend((claims.len() as u32).to_le_bytes());
        header.extend(emit_claims(&claims));
        // Quirk(Linux storvsc before 6.1): more header than the ranges use.
        header.resize(header.len() + spare8 * 8, 0xFF);
        let bytes = with_header(PacketKind::GPA_DIRECT, &header, b"payload.");
        let direct = Packet::parse(&bytes).expect("well-formed").gpa_direct().expect("complete ranges");

        // Byte by byte.
        let expected: Option<Vec<u64>> = claims.iter().flat_map(|claim| {
            (u64::from(claim.byte_offset)..u64::from(claim.byte_offset) + u64::from(claim.byte_count)).map(|at| {
                let page = claim.pages[(at / PAGE_BYTES) as usize];
                file_offset(page.checked_mul(PAGE_BYTES)? + at % PAGE_BYTES)
            })
        }).collect();
        let ram = ram();
        let mut spans = ram.spans();
        let result = direct.resolve(&ram, &mut spans);
        match expected {
            Some(offsets) => {
                prop_assert_eq!(result, Ok(()));
                prop_assert_eq!(spans.len(), offsets.len());
                prop_assert_eq!(spans.len() as u64, direct.total_bytes());
                let found: Vec<u64> =
                    spans.iter().flat_map(|(offset, len)| offset..offset + u64::from(len)).collect();
                prop_assert_eq!(found, offsets);
                let pieces: Vec<_> = spans.iter().collect();
                for pair in pieces.windows(2) {
                    prop_assert!(pair[0].0 + u64::from(pair[0].1) != pair[1].0, "neighbours not merged: {pieces:?}");
                }
            }
            None => prop_assert!(matches!(result, Err(GuestFault::NotRam { .. })), "{result:?}"),
        }
    }

    #[test]
    fn any_bytes_make_a_range_list_or_a_fault(count in prop_oneof![0u32..5, any::<u32>()], small in any::<bool>(), mut bytes in vec(any::<u8>(), 0..600)) {
        if small {
            // Upper halves of counts and offsets zero: more lists that hold.
            bytes.chunks_mut(4).for_each(|word| word.iter_mut().skip(1).for_each(|byte| *byte = 0));
        }
        if let Ok(list) = RangeList::parse(count, &bytes) {
            prop_assert_eq!(list.iter().count(), count as usize);
            let ram = ram();
            for range in list.iter() {
                let reach = u64::from(range.byte_count) + u64::from(range.byte_offset);
                prop_assert_eq!(range.page_count() as u64, reach.div_ceil(PAGE_BYTES));
                let mut spans = ram.spans();
                if range.resolve(&ram, &mut spans).is_ok() {
                    prop_assert_eq!(spans.len(), range.byte_count as usize);
                }
                let pages: Vec<Gpn> = range.pages().collect();
                if let Ok(area) = ram.paged_area(&pages, range.byte_offset, range.byte_count) {
                    prop_assert_eq!(area.len(), u64::from(range.byte_count));
                }
            }
        }
    }
}

#[test]
fn a_header_without_all_its_ranges_is_refused() {
    let complete = emit_claims(&[Claim {
        byte_count: 8192,
        byte_offset: 1,
        pages: vec![1, 2, 3],
    }]);
    assert!(RangeList::parse(1, &complete).is_ok());
    for len in 0..complete.len() {
        let fault = GuestFault::RangeListTooShort { range_count: 1, len };
        assert_eq!(RangeList::parse(1, &complete[..len]), Err(fault));
    }
    assert!(RangeList::parse(2, &complete).is_err());
    assert!(RangeList::parse(u32::MAX, &complete).is_err());
    assert!(RangeList::parse(0, &complete).expect("no range").is_empty());
}

#[test]
fn ranges_beyond_the_last_pfn_are_not_looked_for_in_the_spare_header() {
    // One range of one page in a header sized for four.
    let mut header = gpa_direct_header(&[(Gpa(0x3000), 512)]);
    header.resize(header.len() + 24, 0);
    let bytes = with_header(PacketKind::GPA_DIRECT, &header, &[0; 64]);
    let direct = Packet::parse(&bytes)
        .expect("well-formed")
        .gpa_direct()
        .expect("one range");
    assert_eq!(direct.ranges.len(), 1);
    assert_eq!(direct.total_bytes(), 512);
}

#[test]
fn a_range_across_the_end_of_ram_or_of_the_address_space_is_refused() {
    let ram = ram();
    for (page, len) in [
        (7u64, 4097u32),
        (u64::MAX, 1),
        (u64::MAX / 4096, 1),
        (1 << 52, 4096),
        (20, 1),
        (8, 1),
    ] {
        let pages = (0..u64::from(len).div_ceil(PAGE_BYTES))
            .map(|i| page.wrapping_add(i))
            .collect();
        let bytes = emit_claims(&[Claim {
            byte_count: len,
            byte_offset: 0,
            pages,
        }]);
        let list = RangeList::parse(1, &bytes).expect("complete");
        let result = list
            .iter()
            .try_for_each(|range| range.resolve(&ram, &mut ram.spans()));
        assert!(
            matches!(result, Err(GuestFault::NotRam { .. })),
            "page {page:#x}: {result:?}"
        );
    }
}

#[test]
fn packets_of_another_kind_have_no_ranges() {
    let bytes = flat(&OutPacket::in_band(1, false, &[&[0; 32]]));
    let packet = Packet::parse(&bytes).expect("well-formed");
    assert_eq!(
        packet.gpa_direct(),
        Err(GuestFault::PacketType { packet_type: 6 })
    );
    assert_eq!(
        packet.transfer_pages(),
        Err(GuestFault::PacketType { packet_type: 6 })
    );
}

#[test]
fn a_payload_too_long_for_sixteen_bits_of_length_has_no_descriptor() {
    let bytes = vec![0; 524_264];
    assert!(OutPacket::in_band(1, false, &[&bytes]).descriptor().is_some());
    assert!(
        OutPacket::in_band(1, false, &[&bytes, &[1]])
            .descriptor()
            .is_none()
    );
}

#[test]
fn a_gpadl_in_three_messages_assembles_to_its_pages() {
    let pages: Vec<u64> = (100..160).collect();
    let bytes = emit_claims(&[Claim {
        byte_count: 60 * 4096,
        byte_offset: 0,
        pages: pages.clone(),
    }]);
    let (first, rest) = bytes.split_at(8 + 26 * 8);
    let header = GpadlHeader {
        channel: ChannelId(1),
        gpadl: GpadlId(0xE1E10),
        range_bytes: bytes.len() as u16,
        range_count: 1,
        ranges: first,
    };
    let messages = [
        GuestToHost::GpadlHeader(header).emit(),
        GuestToHost::GpadlBody(GpadlBody {
            message_number: 0,
            gpadl: header.gpadl,
            ranges: &rest[..28 * 8],
        })
        .emit(),
        GuestToHost::GpadlBody(GpadlBody {
            message_number: 0,
            gpadl: header.gpadl,
            ranges: &rest[28 * 8..],
        })
        .emit(),
    ];
    let mut assembled = Vec::new();
    for message in &messages {
        match GuestToHost::parse(message).expect("well-formed") {
            GuestToHost::GpadlHeader(header) => assembled.extend_from_slice(header.ranges),
            GuestToHost::GpadlBody(body) => assembled.extend_from_slice(body.ranges),
            other => panic!("{other:?}"),
        }
    }
    let list = header.assemble(&assembled).expect("complete");
    let range = list.iter().next().expect("one range");
    assert_eq!(range.byte_count, 60 * 4096);
    assert_eq!(range.pages().map(|page| page.0).collect::<Vec<_>>(), pages);
}

proptest! {
    #[test]
    fn both_ways_to_build_a_descriptor_agree(
        kind in any::<u16>(), transaction_id in any::<u64>(), wants in any::<bool>(), extra8 in 0usize..9, len in 0usize..99,
    ) {
        use zerocopy::IntoBytes;
        let bytes = [0; 99];
        let out = OutPacket {
            kind: PacketKind(kind),
            transaction_id,
            completion_requested: wants,
            extra_header: &bytes[..extra8 * 8],
            payload: &[&bytes[..len]],
        };
        let descriptor = out.descriptor().expect("short");
        let (words, lengths) = out.encoded().expect("short");
        let words = words.map(u64::to_le_bytes).concat();
        prop_assert_eq!(descriptor.as_bytes(), &words[..]);
        prop_assert_eq!(u32::from(descriptor.length8.get()) * 8, lengths.packet_bytes());
        prop_assert_eq!(lengths.packet_bytes() as usize, 16 + extra8 * 8 + len + lengths.padding_bytes);
    }
}
