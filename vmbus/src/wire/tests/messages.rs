//! Channel messages.

use crate::mem::PAGE_BYTES;
use crate::wire::*;
use proptest::array::{uniform16, uniform32};
use proptest::collection::vec;
use proptest::prelude::*;

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
fn versions_compare_and_print_as_people_write_them() {
    assert!(Version::V5_3.is_supported() && Version::V4_0.is_supported());
    assert!(!Version(0x0006_0000).is_supported() && !Version(0x0003_0000).is_supported());
    assert!(Version::V5_3.has_modify_channel_response() && !Version::V5_2.has_modify_channel_response());
    assert!(Version::V5_0.has_message_connection_id() && !Version::V4_1.has_message_connection_id());
    assert_eq!(Version::V5_3.to_string(), "5.3");
}
