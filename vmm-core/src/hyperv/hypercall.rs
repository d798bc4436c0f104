#![forbid(unsafe_code)]
//! The wall between a hypercall's registers and the rest of the program (TLFS 6.0b section 3).
//!
//! [`decode`] looks at the control word only and says what to fetch; [`PostMessage::parse`] and
//! [`SignalEvent::parse`] read the private copy of what was fetched. Whether the connection exists is not
//! known here.

use zerocopy::byteorder::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// A status in bits 15:0 of the result (TLFS 6.0b appendix B).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Status {
    Success = 0x00,
    InvalidHypercallCode = 0x02,
    InvalidHypercallInput = 0x03,
    InvalidAlignment = 0x04,
    InvalidParameter = 0x05,
    InvalidConnectionId = 0x12,
    /// Linux tries again later; the right answer to a guest that posts faster than it reads.
    InsufficientBuffers = 0x13,
}

/// HvPostMessage, TLFS 6.0b section 11.10.5.
const POST_MESSAGE: u16 = 0x5C;
/// HvSignalEvent, TLFS 6.0b section 11.10.7.
const SIGNAL_EVENT: u16 = 0x5D;
/// The fast bit of the control word: input in registers.
const FAST: u64 = 1 << 16;

/// Bytes of a message's payload at most (TLFS 6.0b section 11.10.1).
pub const MAX_PAYLOAD_BYTES: usize = 240;
/// Bytes of a guest page.
const PAGE_BYTES: u64 = 4096;

/// The ports that take messages for VMBus: where the offers say, and where a guest that knows version 5.0 first asks.
/// (Linux 6.1 include/linux/hyperv.h VMBUS_MESSAGE_CONNECTION_ID, _4.)
pub const MESSAGE_CONNECTIONS: [u32; 2] = [1, 4];

/// The connection id of a channel is this plus its relid: a range away from the message ports.
pub const SIGNAL_CONNECTION_BASE: u32 = 0x2000;

/// The connection id that the guest passes to HvSignalEvent for a channel (its relid).
pub fn signal_connection(channel: u32) -> u32 {
    SIGNAL_CONNECTION_BASE.saturating_add(channel)
}

/// What to do about a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// Copy [`PostMessage::BYTES`] from this guest-physical address, then [`PostMessage::parse`].
    PostMessageAt(u64),
    /// Copy [`SignalEvent::BYTES`] from this guest-physical address, then [`SignalEvent::parse`].
    SignalEventAt(u64),
    /// The input came in registers.
    SignalEvent(SignalEvent),
}

/// Decodes the control word (RCX) and the input word (RDX of the guest).
pub fn decode(control: u64, input: u64) -> Result<Call, Status> {
    let code = (control & 0xFFFF) as u16;
    if code != POST_MESSAGE && code != SIGNAL_EVENT {
        return Err(Status::InvalidHypercallCode);
    }
    // Variable header size, nested bit, rep count and start, reserved bits: neither call has any of them.
    if control & !(0xFFFF | FAST) != 0 {
        return Err(Status::InvalidHypercallInput);
    }
    match (code, control & FAST != 0) {
        (SIGNAL_EVENT, true) => SignalEvent::parse(input.to_le_bytes()).map(Call::SignalEvent),
        (SIGNAL_EVENT, false) => {
            check_block(input, SignalEvent::BYTES as u64)?;
            Ok(Call::SignalEventAt(input))
        }
        // 256 bytes do not fit into two registers.
        (_, true) => Err(Status::InvalidHypercallInput),
        (_, false) => {
            check_block(input, PostMessage::BYTES as u64)?;
            Ok(Call::PostMessageAt(input))
        }
    }
}

/// A parameter block begins on 8 bytes and does not cross a page.
fn check_block(gpa: u64, bytes: u64) -> Result<(), Status> {
    let in_page = gpa % PAGE_BYTES;
    if !gpa.is_multiple_of(8) || in_page + bytes > PAGE_BYTES {
        return Err(Status::InvalidAlignment);
    }
    Ok(())
}

/// Input of HvSignalEvent (TLFS 6.0b section 11.10.7), 8 bytes.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct SignalEventInput {
    connection_id: U32,
    flag_number: U16,
    reserved: U16,
}
const _: () = assert!(size_of::<SignalEventInput>() == SignalEvent::BYTES);

/// A checked HvSignalEvent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SignalEvent {
    pub connection_id: u32,
}

impl SignalEvent {
    /// Length of the input block.
    pub const BYTES: usize = 8;

    /// Parses the input block. VMBus connections have one flag: number 0. Ids have 24 bits (TLFS 6.0b section 11.2).
    pub fn parse(block: [u8; Self::BYTES]) -> Result<Self, Status> {
        let input: SignalEventInput = zerocopy::transmute!(block);
        if input.reserved.get() != 0 || input.flag_number.get() != 0 {
            return Err(Status::InvalidParameter);
        }
        let connection_id = input.connection_id.get();
        if connection_id >> 24 != 0 {
            return Err(Status::InvalidConnectionId);
        }
        Ok(Self { connection_id })
    }
}

/// Input of HvPostMessage (TLFS 6.0b section 11.10.5), 256 bytes.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct PostMessageInput {
    connection_id: U32,
    reserved: U32,
    message_type: U32,
    payload_size: U32,
    payload: [u8; MAX_PAYLOAD_BYTES],
}
const _: () = assert!(size_of::<PostMessageInput>() == PostMessage::BYTES);

/// A checked HvPostMessage, in private memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PostMessage {
    pub connection_id: u32,
    pub message_type: u32,
    payload: [u8; MAX_PAYLOAD_BYTES],
    payload_bytes: usize,
}

impl PostMessage {
    /// Length of the input block.
    pub const BYTES: usize = 256;

    /// Parses the private copy of the input block.
    pub fn parse(block: [u8; Self::BYTES]) -> Result<Self, Status> {
        let input: PostMessageInput = zerocopy::transmute!(block);
        let payload_bytes = input.payload_size.get() as usize;
        // Message types with bit 31 are the hypervisor's own, 0 means "no message".
        let message_type = input.message_type.get();
        if payload_bytes > MAX_PAYLOAD_BYTES || message_type == 0 || message_type >> 31 != 0 {
            return Err(Status::InvalidParameter);
        }
        if input.connection_id.get() >> 24 != 0 {
            return Err(Status::InvalidConnectionId);
        }
        if input.reserved.get() != 0 {
            return Err(Status::InvalidParameter);
        }
        Ok(Self {
            connection_id: input.connection_id.get(),
            message_type,
            payload: input.payload,
            payload_bytes,
        })
    }

    /// The payload, at most [`MAX_PAYLOAD_BYTES`].
    pub fn payload(&self) -> &[u8] {
        self.payload.get(..self.payload_bytes).unwrap_or(&[])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn block(connection_id: u32, message_type: u32, payload_size: u32) -> [u8; 256] {
        let mut block = [0; 256];
        block[0..4].copy_from_slice(&connection_id.to_le_bytes());
        block[8..12].copy_from_slice(&message_type.to_le_bytes());
        block[12..16].copy_from_slice(&payload_size.to_le_bytes());
        block[16] = 0xAA;
        block
    }

    #[test]
    fn a_fast_signal_is_decoded_from_its_register() {
        assert_eq!(
            decode(0x1_005D, 0x2001),
            Ok(Call::SignalEvent(SignalEvent {
                connection_id: 0x2001
            }))
        );
    }

    #[test]
    fn a_signal_with_a_flag_number_or_reserved_bits_is_refused() {
        assert_eq!(decode(0x1_005D, 1 << 32), Err(Status::InvalidParameter));
        assert_eq!(decode(0x1_005D, 1 << 48), Err(Status::InvalidParameter));
    }

    #[test]
    fn slow_calls_name_an_aligned_block_within_a_page() {
        assert_eq!(decode(0x5C, 0x1000), Ok(Call::PostMessageAt(0x1000)));
        assert_eq!(decode(0x5C, 0x1F00), Ok(Call::PostMessageAt(0x1F00)));
        assert_eq!(decode(0x5C, 0x1F08), Err(Status::InvalidAlignment));
        assert_eq!(decode(0x5C, 0x1004), Err(Status::InvalidAlignment));
        assert_eq!(decode(0x5D, 0x1FF8), Ok(Call::SignalEventAt(0x1FF8)));
        assert_eq!(decode(0x5C, u64::MAX - 7), Err(Status::InvalidAlignment));
    }

    #[test]
    fn unknown_codes_reps_and_reserved_bits_are_told_apart() {
        assert_eq!(decode(0x46, 0), Err(Status::InvalidHypercallCode));
        assert_eq!(decode(0x5C | 1 << 32, 0x1000), Err(Status::InvalidHypercallInput));
        assert_eq!(decode(0x5C | 1 << 17, 0x1000), Err(Status::InvalidHypercallInput));
        assert_eq!(decode(0x5C | FAST, 0x1000), Err(Status::InvalidHypercallInput));
        assert_eq!(decode(0x5C | 1 << 63, 0x1000), Err(Status::InvalidHypercallInput));
    }

    #[test]
    fn a_message_is_parsed_with_exactly_its_payload() {
        let message = PostMessage::parse(block(4, 1, 1)).expect("valid");
        assert_eq!((message.connection_id, message.message_type), (4, 1));
        assert_eq!(message.payload(), [0xAA]);
        assert_eq!(
            PostMessage::parse(block(4, 1, 240))
                .expect("valid")
                .payload()
                .len(),
            240
        );
    }

    #[test]
    fn a_message_with_impossible_fields_is_refused() {
        assert_eq!(
            PostMessage::parse(block(4, 1, 241)),
            Err(Status::InvalidParameter)
        );
        assert_eq!(
            PostMessage::parse(block(4, 1, u32::MAX)),
            Err(Status::InvalidParameter)
        );
        assert_eq!(PostMessage::parse(block(4, 0, 8)), Err(Status::InvalidParameter));
        assert_eq!(
            PostMessage::parse(block(4, 0x8000_0010, 8)),
            Err(Status::InvalidParameter)
        );
        assert_eq!(
            PostMessage::parse(block(1 << 24, 1, 8)),
            Err(Status::InvalidConnectionId)
        );
        let mut reserved = block(4, 1, 8);
        reserved[4] = 1;
        assert_eq!(PostMessage::parse(reserved), Err(Status::InvalidParameter));
    }

    proptest! {
        #[test]
        fn any_registers_name_a_block_within_one_page_or_nothing(
            code in prop_oneof![Just(POST_MESSAGE), Just(SIGNAL_EVENT), any::<u16>()],
            rest in prop_oneof![Just(0), Just(FAST), any::<u64>()],
            // Often a block near the end of a page.
            input in prop_oneof![any::<u64>(), (0_u64..1 << 40, 0xE0_u64..0x100).prop_map(|(page, at)| page << 12 | at << 4)],
        ) {
            let within = |gpa: u64, bytes: usize| {
                gpa == input && gpa.is_multiple_of(8) && gpa / PAGE_BYTES == (gpa + (bytes as u64 - 1)) / PAGE_BYTES
            };
            match decode(rest & !0xFFFF | u64::from(code), input) {
                Ok(Call::PostMessageAt(gpa)) => prop_assert!(within(gpa, PostMessage::BYTES)),
                Ok(Call::SignalEventAt(gpa)) => prop_assert!(within(gpa, SignalEvent::BYTES)),
                Ok(Call::SignalEvent(signal)) => prop_assert!(signal.connection_id >> 24 == 0),
                Err(status) => prop_assert!(status != Status::Success),
            }
        }

        #[test]
        fn any_block_is_a_message_of_at_most_its_payload_or_none(
            mut block in prop::collection::vec(any::<u8>(), PostMessage::BYTES),
            bytes in prop_oneof![0_u32..=MAX_PAYLOAD_BYTES as u32 + 1, any::<u32>()],
        ) {
            block[4..8].fill(0);
            block[12..16].copy_from_slice(&bytes.to_le_bytes());
            let parsed = PostMessage::parse(block.as_slice().try_into().expect("as long as it was made"));
            match parsed {
                Ok(message) => {
                    prop_assert!(message.payload().len() == bytes as usize);
                    prop_assert_eq!(message.payload(), &block[16..16 + bytes as usize]);
                }
                Err(_) => prop_assert!(bytes as usize > MAX_PAYLOAD_BYTES || block[3] != 0 || block[11] & 0x80 != 0),
            }
        }
    }
}
