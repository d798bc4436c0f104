//! Exact bytes where a guest would notice, and `parse(emit(x)) == x`.

use super::*;
use proptest::prelude::*;

#[test]
fn init_complete_is_forty_bytes_with_the_fields_where_linux_reads_them() {
    let bytes = HostMessage::InitComplete {
        version: NvspVersion::V6,
        max_mdl_chain: 34,
        status: NvspStatus::SUCCESS,
    }
    .emit();
    let mut expected = [0u8; 40];
    expected[0] = 2;
    expected[4..8].copy_from_slice(&0x0006_0000u32.to_le_bytes());
    expected[8] = 34;
    expected[12] = 1;
    assert_eq!(bytes, expected);
}

#[test]
fn receive_buffer_complete_names_one_section_that_ends_at_the_last_suballocation() {
    let bytes = HostMessage::ReceiveBufferComplete {
        status: NvspStatus::SUCCESS,
        suballocation_bytes: 0x740,
        suballocation_count: 3,
    }
    .emit();
    let words: Vec<u32> = bytes
        .chunks_exact(4)
        .map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]))
        .collect();
    assert_eq!(words, [102, 1, 1, 0, 0x740, 3, 0x740 * 3, 0, 0, 0]);
}

#[test]
fn a_receive_completion_of_linux_is_eight_bytes() {
    let message = GuestMessage::RndisPacketComplete { status: 1 };
    assert_eq!(message.emit(), [108, 0, 0, 0, 1, 0, 0, 0]);
    assert_eq!(GuestMessage::parse(&message.emit()), Ok(message));
}

#[test]
fn a_data_packet_without_section_reads_as_none() {
    let mut bytes = [0u8; 40];
    bytes[0] = 107;
    bytes[8..12].fill(0xFF);
    assert_eq!(
        GuestMessage::parse(&bytes),
        Ok(GuestMessage::RndisPacket {
            kind: RndisKind::Data,
            section: None
        })
    );
    bytes[4] = 2;
    assert_eq!(GuestMessage::parse(&bytes), Err(NvspFault::UnknownChannelType(2)));
}

#[test]
fn the_indirection_table_starts_at_offset_forty() {
    let mut queues = [0u32; INDIRECTION_ENTRIES];
    queues[1] = 3;
    let bytes = emit_indirection_table(&queues);
    assert_eq!(bytes.len(), 104);
    assert_eq!(bytes[0..12], [134, 0, 0, 0, 16, 0, 0, 0, 40, 0, 0, 0]);
    assert_eq!(bytes[40..48], [0, 0, 0, 0, 3, 0, 0, 0]);
}

#[test]
fn a_message_cut_short_is_refused() {
    assert_eq!(
        GuestMessage::parse(&[1, 0, 0]),
        Err(NvspFault::NoMessageNumber { bytes: 3 })
    );
    assert_eq!(
        GuestMessage::parse(&[1, 0, 0, 0, 2, 0, 0, 0]),
        Err(NvspFault::MessageTooShort { number: 1, bytes: 8 })
    );
}

proptest! {
    #[test]
    fn any_bytes_parse_without_panic_and_what_parses_survives_a_round_trip(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
        if let Ok(message) = GuestMessage::parse(&bytes) {
            prop_assert_eq!(GuestMessage::parse(&message.emit()), Ok(message));
        }
        if let Some(message) = HostMessage::parse(&bytes) {
            prop_assert!(HostMessage::parse(&message.emit()).is_some());
        }
    }

    #[test]
    fn known_numbers_with_any_body_round_trip(number in prop::sample::select(vec![1u32, 100, 101, 103, 104, 106, 107, 108, 125, 129, 133]),
                                               body in prop::array::uniform32(any::<u8>())) {
        let mut bytes = number.to_le_bytes().to_vec();
        bytes.extend_from_slice(&body);
        match GuestMessage::parse(&bytes) {
            Ok(message) => prop_assert_eq!(GuestMessage::parse(&message.emit()), Ok(message)),
            Err(fault) => prop_assert!(matches!(fault, NvspFault::UnknownChannelType(_))),
        }
    }
}
