//! Parsers over arbitrary bytes, `parse(emit(x)) == x`, and exact bytes where a guest would notice.

use super::*;
use crate::mem::{Gpa, Gpn, GuestRam, PAGE_BYTES, RamLayout, RamRegion, SharedMap};
use proptest::array::{uniform16, uniform32};
use proptest::collection::vec;
use proptest::prelude::*;
use std::sync::Arc;

fn guid() -> impl Strategy<Value = Guid> {
    uniform16(any::<u8>()).prop_map(Guid)
}

/// 120 bytes.
fn user_bytes() -> impl Strategy<Value = [u8; 120]> {
    (uniform32(any::<u8>()), any::<u8>()).prop_map(|(some, rest)| {
        let mut bytes = [rest; 120];
        bytes[..32].copy_from_slice(&some);
        bytes
    })
}

/// Every message of a guest, with variable parts taken from `ranges`.
fn guest_messages(
    ranges: &[u8],
    n: [u32; 5],
    user_data: [u8; 120],
    a: Guid,
    b: Guid,
) -> Vec<GuestToHost<'_>> {
    let channel = ChannelId(n[0]);
    let gpadl = GpadlId(n[1]);
    let header_ranges = &ranges[..ranges.len().min(220)];
    let body_ranges = &ranges[..ranges.len().min(224) / 8 * 8];
    vec![
        GuestToHost::RequestOffers,
        GuestToHost::OpenChannel(OpenChannel {
            channel,
            open_id: n[1],
            ring_gpadl: GpadlId(n[2]),
            target_vp: n[3],
            downstream_page_offset: n[4],
            user_data,
        }),
        GuestToHost::CloseChannel { channel },
        GuestToHost::GpadlHeader(GpadlHeader {
            channel,
            gpadl,
            range_bytes: (n[2] as u16).max(header_ranges.len() as u16),
            range_count: n[3] as u16,
            ranges: header_ranges,
        }),
        GuestToHost::GpadlBody(GpadlBody {
            message_number: n[4],
            gpadl,
            ranges: body_ranges,
        }),
        GuestToHost::GpadlTeardown { channel, gpadl },
        GuestToHost::RelidReleased { channel },
        GuestToHost::InitiateContact(InitiateContact {
            version: Version(n[2]),
            target_vp: n[3],
            interrupt_page_or_target: u64::from(n[0]) << 32 | u64::from(n[1]),
            parent_to_child_monitor: u64::from(n[4]) << 12,
            child_to_parent_monitor: u64::from(n[3]) << 12,
        }),
        GuestToHost::Unload,
        GuestToHost::TlConnectRequest(TlConnect {
            endpoint: a,
            service: b,
            silo: None,
        }),
        GuestToHost::TlConnectRequest(TlConnect {
            endpoint: a,
            service: b,
            silo: Some(a),
        }),
        GuestToHost::ModifyChannel {
            channel,
            target_vp: n[3],
        },
    ]
}

fn host_messages(n: [u32; 5], user_defined: [u8; 120], a: Guid, b: Guid) -> Vec<HostToGuest> {
    let channel = ChannelId(n[0]);
    let gpadl = GpadlId(n[1]);
    vec![
        HostToGuest::OfferChannel(Offer {
            interface: a,
            instance: b,
            flags: n[1] as u16,
            mmio_megabytes: n[2] as u16,
            user_defined,
            sub_channel_index: n[3] as u16,
            channel,
            monitor_allocated: n[3] & 1 != 0,
            dedicated_interrupt: n[3] & 2 != 0,
            connection: ConnectionId(n[4]),
        }),
        HostToGuest::RescindChannelOffer { channel },
        HostToGuest::AllOffersDelivered,
        HostToGuest::OpenChannelResult {
            channel,
            open_id: n[1],
            status: n[2],
        },
        HostToGuest::GpadlCreated {
            channel,
            gpadl,
            status: n[2],
        },
        HostToGuest::GpadlTorndown { gpadl },
        HostToGuest::VersionResponse(VersionResponse {
            supported: n[0] & 1 != 0,
            connection_state: n[1] as u8,
            message_connection: ConnectionId(n[2]),
        }),
        HostToGuest::UnloadResponse,
        HostToGuest::TlConnectResult {
            endpoint: a,
            service: b,
            status: n[0],
        },
        HostToGuest::ModifyChannelResponse {
            channel,
            status: n[1],
        },
    ]
}

/// Bytes that begin with a known type number more often than chance would have it.
fn message_like() -> impl Strategy<Value = Vec<u8>> {
    (
        prop_oneof![4 => 0u32..30, 1 => any::<u32>()],
        vec(any::<u8>(), 0..240),
    )
        .prop_map(|(number, mut bytes)| {
            for (byte, of_number) in bytes.iter_mut().zip(number.to_le_bytes()) {
                *byte = of_number;
            }
            bytes
        })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1024, ..ProptestConfig::default() })]

    #[test]
    fn guest_messages_survive_the_wire(
        ranges in vec(any::<u8>(), 0..240), n in proptest::array::uniform5(any::<u32>()),
        user in user_bytes(), a in guid(), b in guid(),
    ) {
        for message in guest_messages(&ranges, n, user, a, b) {
            let emitted = message.emit();
            prop_assert!(emitted.len() <= MAX_CONTROL_BYTES);
            prop_assert_eq!(GuestToHost::parse(&emitted), Ok(message));
        }
    }

    #[test]
    fn host_messages_survive_the_wire(
        n in proptest::array::uniform5(any::<u32>()), user in user_bytes(), a in guid(), b in guid(),
    ) {
        for message in host_messages(n, user, a, b) {
            prop_assert_eq!(HostToGuest::parse(&message.emit()), Ok(message));
        }
    }

    #[test]
    fn a_message_cut_short_is_refused_and_a_longer_one_accepted(
        n in proptest::array::uniform5(any::<u32>()), user in user_bytes(), a in guid(), b in guid(),
        extra in vec(any::<u8>(), 0..15),
    ) {
        for message in guest_messages(&[], n, user, a, b) {
            let emitted = message.emit();
            if matches!(message, GuestToHost::TlConnectRequest(TlConnect { silo: Some(_), .. })) {
                continue; // Without its last bytes it is the shorter form.
            }
            let cut = GuestToHost::parse(&emitted[..emitted.len() - 1]);
            prop_assert!(matches!(cut, Err(GuestFault::MessageTooShort { .. })), "{cut:?}");
            let longer = [&emitted[..], &extra].concat();
            let parsed = GuestToHost::parse(&longer).expect("longer messages are accepted");
            prop_assert_eq!(std::mem::discriminant(&parsed), std::mem::discriminant(&message));
        }
    }

    #[test]
    fn any_bytes_make_a_message_or_a_fault(bytes in message_like()) {
        if let Ok(message) = GuestToHost::parse(&bytes) {
            // What was understood can be said again, and means the same.
            let emitted = message.emit();
            prop_assert_eq!(GuestToHost::parse(&emitted), Ok(message));
            if let GuestToHost::GpadlHeader(header) = message {
                let list = header.assemble(header.ranges);
                prop_assert!(list.is_err() || list.expect("ok").total_bytes() <= 28 * PAGE_BYTES);
            }
            if let GuestToHost::GpadlBody(body) = message {
                prop_assert_eq!(body.pages().count() * 8, body.ranges.len());
            }
        }
        if let Ok(message) = HostToGuest::parse(&bytes) {
            prop_assert_eq!(HostToGuest::parse(&message.emit()), Ok(message));
        }
    }

    #[test]
    fn neither_parser_makes_a_message_of_the_other_side(
        n in proptest::array::uniform5(any::<u32>()), user in user_bytes(), a in guid(), b in guid(),
    ) {
        for message in host_messages(n, user, a, b) {
            prop_assert!(matches!(GuestToHost::parse(&message.emit()), Ok(GuestToHost::Unknown(_))));
        }
        for message in guest_messages(&[], n, user, a, b) {
            prop_assert!(matches!(HostToGuest::parse(&message.emit()), Ok(HostToGuest::Unknown(_))));
        }
    }

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
        let out = OutPacket {
            kind: PacketKind::TRANSFER_PAGES,
            transaction_id: 1,
            completion_requested: true,
            extra_header: &header,
            payload: &[],
        };
        let bytes = flat(&out);
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
        let out = OutPacket {
            kind: PacketKind::GPA_DIRECT,
            transaction_id: 0,
            completion_requested: true,
            extra_header: &header,
            payload: &[b"payload."],
        };
        let bytes = flat(&out);
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
    let out = OutPacket {
        kind: PacketKind::GPA_DIRECT,
        transaction_id: 1,
        completion_requested: true,
        extra_header: &header,
        payload: &[&[0; 64]],
    };
    let bytes = flat(&out);
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

/// Sizes of vmbus-protocol.md section 2, which were compiled from Linux 6.1's structures.
#[test]
fn messages_have_the_sizes_that_linux_expects() {
    let n = [1, 2, 3, 4, 5];
    let sizes: Vec<_> = host_messages(n, [0; 120], Guid::ZERO, Guid::ZERO)
        .iter()
        .map(|m| (m.emit()[0], m.emit().len()))
        .collect();
    assert_eq!(
        sizes,
        [
            (1, 0xC4),
            (2, 0xC),
            (4, 8),
            (6, 0x14),
            (10, 0x14),
            (12, 0xC),
            (15, 0x10),
            (17, 8),
            (23, 0x2C),
            (24, 0x10)
        ]
    );
    let sizes: Vec<_> = guest_messages(&[], n, [0; 120], Guid::ZERO, Guid::ZERO)
        .iter()
        .map(|m| (m.emit()[0], m.emit().len()))
        .collect();
    assert_eq!(
        sizes,
        [
            (3, 8),
            (5, 0x94),
            (7, 0xC),
            (8, 0x14),
            (9, 0x10),
            (11, 0x10),
            (13, 0xC),
            (14, 0x28),
            (16, 8),
            (21, 0x28),
            (21, 0x38),
            (22, 0x10)
        ]
    );
}

#[test]
fn an_offer_has_its_fields_where_linux_reads_them() {
    let offer = HostToGuest::OfferChannel(Offer {
        interface: Guid([0x11; 16]),
        instance: Guid([0x22; 16]),
        flags: 0x2010,
        mmio_megabytes: 0,
        user_defined: [0x33; 120],
        sub_channel_index: 7,
        channel: ChannelId(0x0102),
        monitor_allocated: false,
        dedicated_interrupt: true,
        connection: ConnectionId(0x2102),
    })
    .emit();
    assert_eq!(&offer[..8], &[1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(&offer[0x08..0x18], &[0x11; 16]);
    assert_eq!(&offer[0x18..0x28], &[0x22; 16]);
    assert_eq!(&offer[0x38..0x3A], &[0x10, 0x20]);
    assert_eq!(&offer[0x3C..0xB4], &[0x33; 120]);
    assert_eq!(&offer[0xB4..0xB8], &[7, 0, 0, 0]);
    assert_eq!(&offer[0xB8..0xBC], &[2, 1, 0, 0]);
    assert_eq!(&offer[0xBC..0xC0], &[0, 0, 1, 0]);
    assert_eq!(&offer[0xC0..0xC4], &[2, 0x21, 0, 0]);
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

#[test]
fn versions_compare_and_print_as_people_write_them() {
    assert!(Version::V5_3.is_supported() && Version::V4_0.is_supported());
    assert!(!Version(0x0006_0000).is_supported() && !Version(0x0003_0000).is_supported());
    assert!(Version::V5_3.has_modify_channel_response() && !Version::V5_2.has_modify_channel_response());
    assert!(Version::V5_0.has_message_connection_id() && !Version::V4_1.has_message_connection_id());
    assert_eq!(Version::V5_3.to_string(), "5.3");
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
