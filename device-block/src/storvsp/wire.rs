//! The bytes of storvsp packets.
//!
//! Sources: Linux 6.1 `drivers/scsi/storvsc_drv.c` (`struct vstor_packet`, `struct vmscsi_request`,
//! `struct vmstorage_channel_properties`, `struct vmstorage_protocol_version`). Everything is little-endian;
//! CDB, sense and SCSI data are big-endian and stay opaque bytes here.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of a packet of protocol version 5.1 and later; each answer has exactly this payload.
///
/// Quirk(Linux 6.1 storvsc): a completion with a shorter payload is dropped and its request hangs for ever; a
/// longer one desynchronises the ring, since the driver copies packets into an 80-byte buffer and advances
/// by what it copied.
pub const PACKET_BYTES: usize = 64;
/// Shortest request accepted: the packet of versions before 5.1, whose SRB is 16 bytes shorter
/// (Linux 5.4 `vmscsi_size_delta`). A guest may ask for a version in packets of that size.
pub const SHORTEST_PACKET_BYTES: usize = 48;
/// Bytes of payload that follow the packet's header.
pub const BODY_BYTES: usize = PACKET_BYTES - size_of::<PacketHeader>();
/// Longest CDB that fits the SRB.
pub const CDB_BYTES: usize = 16;
/// Room for sense data in a completion (Linux `STORVSC_SENSE_BUFFER_SIZE`).
pub const SENSE_BYTES: usize = 20;

/// First 12 bytes of each packet (Linux `struct vstor_packet`).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, PartialEq, Eq)]
#[repr(C)]
pub struct PacketHeader {
    /// `enum vstor_packet_operation`; see [`Operation`].
    pub operation: U32,
    /// Bit 0: completion wanted. The VMBus packet's own flag is what counts.
    pub flags: U32,
    /// NTSTATUS, in completions.
    pub status: U32,
}

/// Payload of EXECUTE_SRB and of its completion (Linux `struct vmscsi_request`).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, PartialEq, Eq)]
#[repr(C)]
pub struct ScsiRequest {
    /// Bytes of this structure as the sender sees it. Never trusted.
    pub length: U16,
    /// In completions, see [`SrbStatus`].
    pub srb_status: u8,
    /// In completions: SAM status byte.
    pub scsi_status: u8,
    /// Host number as the guest counts; ignored.
    pub port_number: u8,
    /// SCSI bus ("channel" in Linux).
    pub path_id: u8,
    /// SCSI target.
    pub target_id: u8,
    /// Logical unit.
    pub lun: u8,
    /// Bytes of `payload` that are the CDB.
    pub cdb_length: u8,
    /// Request: room for sense. Completion: bytes of sense in `payload`.
    pub sense_info_length: u8,
    /// 0 guest to device, 1 device to guest, 2 none; see [`DataDirection`].
    pub data_in: u8,
    /// Reserved.
    pub reserved: u8,
    /// Request: bytes to move. Completion: bytes moved.
    pub data_transfer_length: U32,
    /// Request: the CDB, in the first 16 bytes. Completion: sense data.
    pub payload: [u8; SENSE_BYTES],
    /// Reserved (from here on: 5.1 and later).
    pub reserved2: U16,
    /// SCSI queue tag; ignored.
    pub queue_tag: u8,
    /// SCSI queue action; ignored, all tasks are simple ones.
    pub queue_action: u8,
    /// `SRB_FLAGS_*`; ignored.
    pub srb_flags: U32,
    /// Seconds. Quirk(Linux 6.1 storvsc): always 60, enforced by nobody.
    pub timeout_seconds: U32,
    /// Windows's elevator key; ignored.
    pub queue_sort_key: U32,
}

/// Payload of the answer to QUERY_PROPERTIES (Linux `struct vmstorage_channel_properties`).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, PartialEq, Eq)]
#[repr(C)]
pub struct ChannelProperties {
    /// Reserved.
    pub reserved: U32,
    /// How many sub-channels the guest may ask for.
    pub max_channel_count: U16,
    /// Reserved.
    pub reserved1: U16,
    /// Bit 0: [`CHANNEL_SUPPORTS_MULTI_CHANNEL`].
    pub flags: U32,
    /// Most bytes that one request may move. Quirk(Linux 6.1 storvsc): 0 makes the controller unusable.
    pub max_transfer_bytes: U32,
    /// Reserved.
    pub reserved2: U64,
}

/// Payload of QUERY_PROTOCOL_VERSION (Linux `struct vmstorage_protocol_version`).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, PartialEq, Eq)]
#[repr(C)]
pub struct ProtocolVersionQuery {
    /// Major number in the high byte, minor in the low one.
    pub major_minor: U16,
    /// Only informative: Linux sends 0.
    pub revision: U16,
}

/// One whole packet.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, PartialEq, Eq)]
#[repr(C)]
pub struct VstorPacket {
    /// Operation, flags, status.
    pub header: PacketHeader,
    /// Meaning by operation.
    pub body: [u8; BODY_BYTES],
}

const _: () = assert!(size_of::<PacketHeader>() == 12);
const _: () = assert!(size_of::<ScsiRequest>() == 52);
const _: () = assert!(size_of::<ChannelProperties>() == 24);
const _: () = assert!(size_of::<ProtocolVersionQuery>() == 4);
const _: () = assert!(size_of::<VstorPacket>() == PACKET_BYTES);

/// `ChannelProperties::flags` bit 0: the controller has sub-channels
/// (Linux `STORAGE_CHANNEL_SUPPORTS_MULTI_CHANNEL`).
pub const CHANNEL_SUPPORTS_MULTI_CHANNEL: u32 = 1;

/// What a packet asks for or tells (Linux `enum vstor_packet_operation`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// 1, to guest: the answer to anything.
    CompleteIo,
    /// 2, to guest: a device went away.
    RemoveDevice,
    /// 3: run a SCSI command.
    ExecuteSrb,
    /// 4: reset one logical unit.
    ResetLun,
    /// 5: reset the controller.
    ResetAdapter,
    /// 6: reset a bus (what Linux sends).
    ResetBus,
    /// 7
    BeginInitialization,
    /// 8
    EndInitialization,
    /// 9
    QueryProtocolVersion,
    /// 10
    QueryProperties,
    /// 11, to guest: look at the bus again.
    EnumerateBus,
    /// 12: Fibre Channel only.
    FchbaData,
    /// 13
    CreateSubChannels,
    /// Anything else.
    Unknown(u32),
}

impl From<u32> for Operation {
    fn from(number: u32) -> Self {
        match number {
            1 => Self::CompleteIo,
            2 => Self::RemoveDevice,
            3 => Self::ExecuteSrb,
            4 => Self::ResetLun,
            5 => Self::ResetAdapter,
            6 => Self::ResetBus,
            7 => Self::BeginInitialization,
            8 => Self::EndInitialization,
            9 => Self::QueryProtocolVersion,
            10 => Self::QueryProperties,
            11 => Self::EnumerateBus,
            12 => Self::FchbaData,
            13 => Self::CreateSubChannels,
            other => Self::Unknown(other),
        }
    }
}

impl From<Operation> for u32 {
    fn from(operation: Operation) -> Self {
        match operation {
            Operation::CompleteIo => 1,
            Operation::RemoveDevice => 2,
            Operation::ExecuteSrb => 3,
            Operation::ResetLun => 4,
            Operation::ResetAdapter => 5,
            Operation::ResetBus => 6,
            Operation::BeginInitialization => 7,
            Operation::EndInitialization => 8,
            Operation::QueryProtocolVersion => 9,
            Operation::QueryProperties => 10,
            Operation::EnumerateBus => 11,
            Operation::FchbaData => 12,
            Operation::CreateSubChannels => 13,
            Operation::Unknown(other) => other,
        }
    }
}

/// `PacketHeader::status` of completions: NTSTATUS values (MS-ERREF section 2.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum PacketStatus {
    /// STATUS_SUCCESS
    Success = 0,
    /// STATUS_INVALID_PARAMETER
    InvalidParameter = 0xC000_000D,
    /// STATUS_INVALID_DEVICE_REQUEST: an operation that we do not know.
    InvalidDeviceRequest = 0xC000_0010,
    /// STATUS_REVISION_MISMATCH: a protocol version that we do not speak.
    RevisionMismatch = 0xC000_0059,
    /// STATUS_INVALID_DEVICE_STATE: a known operation at the wrong time.
    InvalidDeviceState = 0xC000_0184,
}

/// `ScsiRequest::srb_status`, low six bits (Linux 6.1 `drivers/scsi/storvsc_drv.c` `SRB_STATUS_*`).
///
/// Quirk(Linux 6.1 storvsc): 0x09, 0x0A, 0x0E and 0x30 make a failed command look like a successful one that
/// moved no data, so they are not here on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum SrbStatus {
    /// SRB_STATUS_SUCCESS: the SCSI status decides.
    Success = 0x01,
    /// SRB_STATUS_ERROR: the partner of CHECK CONDITION.
    Error = 0x04,
    /// SRB_STATUS_INVALID_REQUEST: the SRB itself makes no sense.
    InvalidRequest = 0x06,
    /// SRB_STATUS_INVALID_LUN: Linux removes the logical unit when it sees it.
    InvalidLun = 0x20,
}

/// Added to `srb_status` when the payload holds sense data (Linux `SRB_STATUS_AUTOSENSE_VALID`).
pub const SRB_STATUS_AUTOSENSE_VALID: u8 = 0x80;
/// SAM-5 5.3.1: GOOD.
pub const SCSI_STATUS_GOOD: u8 = 0x00;
/// SAM-5 5.3.1: CHECK CONDITION.
pub const SCSI_STATUS_CHECK_CONDITION: u8 = 0x02;

/// Which way an SRB's data goes, seen from the guest's memory (`data_in`: WRITE_TYPE 0, READ_TYPE 1,
/// UNKNOWN_TYPE 2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DataDirection {
    /// The device reads guest memory: a SCSI data-out command, such as WRITE.
    FromGuest,
    /// The device writes guest memory: a SCSI data-in command, such as READ.
    ToGuest,
    /// No data.
    None,
}

/// Why a payload is no storvsp packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireFault {
    /// Shorter than the packet of any protocol version.
    #[error("a storvsp packet of {0} bytes is shorter than any version's")]
    PacketTooShort(usize),
}

impl VstorPacket {
    /// Copies a packet out of a VMBus packet's payload. Longer payloads are cut, those of older protocol
    /// versions are extended by zeroes.
    ///
    /// Quirk(Linux 6.1 storvsc): sends 64 bytes also before a version is agreed on.
    pub fn parse(payload: &[u8]) -> Result<Self, WireFault> {
        if payload.len() < SHORTEST_PACKET_BYTES {
            return Err(WireFault::PacketTooShort(payload.len()));
        }
        let mut packet = Self::new_zeroed();
        for (to, from) in packet.as_mut_bytes().iter_mut().zip(payload) {
            *to = *from;
        }
        Ok(packet)
    }

    /// An answer with an empty body.
    pub fn completion(status: PacketStatus) -> Self {
        let mut packet = Self::new_zeroed();
        packet.header.operation = U32::new(Operation::CompleteIo.into());
        packet.header.status = U32::new(status as u32);
        packet
    }

    /// A packet of `operation` whose body begins with `body` and is zero after it. `body` is at most
    /// [`BODY_BYTES`] long; what is longer is cut.
    pub fn with_body(operation: Operation, body: &[u8]) -> Self {
        let mut packet = Self::new_zeroed();
        packet.header.operation = U32::new(operation.into());
        for (to, from) in packet.body.iter_mut().zip(body) {
            *to = *from;
        }
        packet
    }

    /// What the packet asks for.
    pub fn operation(&self) -> Operation {
        Operation::from(self.header.operation.get())
    }

    /// The body as an SRB.
    pub fn scsi_request(&self) -> ScsiRequest {
        zerocopy::transmute!(self.body)
    }

    /// The body as the query of a protocol version.
    pub fn protocol_version(&self) -> ProtocolVersionQuery {
        let (query, _) = ProtocolVersionQuery::read_from_prefix(&self.body)
            .expect("a packet's body is longer than the version query");
        query
    }

    /// The body as the answer to QUERY_PROPERTIES.
    pub fn channel_properties(&self) -> ChannelProperties {
        let (properties, _) = ChannelProperties::read_from_prefix(&self.body)
            .expect("a packet's body is longer than the channel properties");
        properties
    }

    /// The body as CREATE_SUB_CHANNELS's count.
    pub fn sub_channel_count(&self) -> u16 {
        u16::from_le_bytes([self.body[0], self.body[1]])
    }
}

impl ScsiRequest {
    /// The CDB, if its length is possible.
    pub fn cdb(&self) -> Option<&[u8]> {
        match usize::from(self.cdb_length) {
            length @ 1..=CDB_BYTES => self.payload.get(..length),
            _ => None,
        }
    }

    /// Which way the data goes. Numbers that the protocol does not define count as "none": such a request can
    /// then move nothing.
    pub fn direction(&self) -> DataDirection {
        match self.data_in {
            0 => DataDirection::FromGuest,
            1 => DataDirection::ToGuest,
            _ => DataDirection::None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::mem::offset_of;

    #[test]
    fn fields_stand_where_linux_has_them() {
        assert_eq!(offset_of!(VstorPacket, body), 0x0C);
        assert_eq!(offset_of!(ScsiRequest, srb_status), 0x02);
        assert_eq!(offset_of!(ScsiRequest, path_id), 0x05);
        assert_eq!(offset_of!(ScsiRequest, lun), 0x07);
        assert_eq!(offset_of!(ScsiRequest, cdb_length), 0x08);
        assert_eq!(offset_of!(ScsiRequest, sense_info_length), 0x09);
        assert_eq!(offset_of!(ScsiRequest, data_in), 0x0A);
        assert_eq!(offset_of!(ScsiRequest, data_transfer_length), 0x0C);
        assert_eq!(offset_of!(ScsiRequest, payload), 0x10);
        assert_eq!(offset_of!(ScsiRequest, queue_tag), 0x26);
        assert_eq!(offset_of!(ScsiRequest, srb_flags), 0x28);
        assert_eq!(offset_of!(ScsiRequest, queue_sort_key), 0x30);
        assert_eq!(offset_of!(ChannelProperties, max_channel_count), 4);
        assert_eq!(offset_of!(ChannelProperties, flags), 8);
        assert_eq!(offset_of!(ChannelProperties, max_transfer_bytes), 0x0C);
    }

    #[test]
    fn a_read_of_linux_parses() {
        let mut bytes = [0u8; 64];
        bytes[0] = 3;
        bytes[4] = 1;
        bytes[0x0C] = 0x34;
        bytes[0x0C + 7] = 2;
        bytes[0x0C + 8] = 10;
        bytes[0x0C + 0x0A] = 1;
        bytes[0x0C + 0x0C..0x0C + 0x10].copy_from_slice(&4096u32.to_le_bytes());
        bytes[0x0C + 0x10..0x0C + 0x1A].copy_from_slice(&[0x28, 0, 0, 0, 0, 8, 0, 0, 8, 0]);
        let packet = VstorPacket::parse(&bytes).unwrap();
        assert_eq!(packet.operation(), Operation::ExecuteSrb);
        let srb = packet.scsi_request();
        assert_eq!(srb.lun, 2);
        assert_eq!(srb.direction(), DataDirection::ToGuest);
        assert_eq!(srb.data_transfer_length.get(), 4096);
        assert_eq!(srb.cdb(), Some(&[0x28, 0, 0, 0, 0, 8, 0, 0, 8, 0][..]));
    }

    #[test]
    fn a_refusal_has_exactly_the_bytes_that_a_guest_checks() {
        let packet = VstorPacket::completion(PacketStatus::RevisionMismatch);
        let mut expected = [0u8; 64];
        expected[0] = 1;
        expected[8..12].copy_from_slice(&[0x59, 0, 0, 0xC0]);
        assert_eq!(packet.as_bytes(), expected);
    }

    #[test]
    fn a_cdb_length_outside_1_to_16_is_no_cdb() {
        let mut srb = ScsiRequest::new_zeroed();
        for length in [0u8, 17, 20, 255] {
            srb.cdb_length = length;
            assert_eq!(srb.cdb(), None);
        }
        srb.cdb_length = 16;
        assert_eq!(srb.cdb().map(<[u8]>::len), Some(16));
    }

    #[test]
    fn packets_of_older_versions_are_extended_and_longer_ones_cut() {
        assert_eq!(
            VstorPacket::parse(&[0xFF; 47]),
            Err(WireFault::PacketTooShort(47))
        );
        assert_eq!(VstorPacket::parse(&[0xFF; 48]).unwrap().as_bytes()[48..], [0; 16]);
        assert_eq!(VstorPacket::parse(&[0xFF; 200]).unwrap().as_bytes(), [0xFF; 64]);
    }

    proptest! {
        #[test]
        fn any_bytes_parse_without_panic(payload in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(packet) = VstorPacket::parse(&payload) {
                let operation = packet.operation();
                prop_assert_eq!(u32::from(operation), packet.header.operation.get());
                let srb = packet.scsi_request();
                prop_assert!(srb.cdb().is_none_or(|cdb| (1..=16).contains(&cdb.len())));
                let version = packet.protocol_version().major_minor.get();
                prop_assert_eq!(version, packet.sub_channel_count(), "both are the first two bytes");
                let properties = packet.channel_properties();
                prop_assert_eq!(properties.as_bytes(), &packet.body[..24]);
            }
        }
    }
}
