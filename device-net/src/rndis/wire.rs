//! Layouts and numbers of RNDIS messages (MS-RNDIS 2.2; `struct rndis_*`, Linux 6.1 include/linux/rndis.h and
//! drivers/net/hyperv/hyperv_net.h).

use thiserror::Error;
use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Type and length, before every body.
pub const HEADER_BYTES: usize = 8;

/// Message types (MS-RNDIS 2.2.1 ff.). A completion has bit 31 set.
pub mod number {
    pub const PACKET: u32 = 1;
    pub const INITIALIZE: u32 = 2;
    pub const HALT: u32 = 3;
    pub const QUERY: u32 = 4;
    pub const SET: u32 = 5;
    pub const RESET: u32 = 6;
    pub const INDICATE_STATUS: u32 = 7;
    pub const KEEPALIVE: u32 = 8;
    pub const COMPLETION: u32 = 0x8000_0000;
}

/// Status of a completion (`RNDIS_STATUS_*`, include/linux/rndis.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RndisStatus(pub u32);

impl RndisStatus {
    pub const SUCCESS: Self = Self(0);
    pub const FAILURE: Self = Self(0xC000_0001);
    pub const NOT_SUPPORTED: Self = Self(0xC000_00BB);
    pub const INVALID_DATA: Self = Self(0xC001_0015);
    pub const MEDIA_CONNECT: Self = Self(0x4001_000B);
    pub const MEDIA_DISCONNECT: Self = Self(0x4001_000C);
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct MessageHeader {
    pub message_type: U32,
    pub message_length: U32,
}
const _: () = assert!(size_of::<MessageHeader>() == HEADER_BYTES);

/// Body of PACKET (`rndis_packet`).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct PacketBody {
    pub data_offset: U32,
    pub data_length: U32,
    pub oob_data_offset: U32,
    pub oob_data_length: U32,
    pub num_oob_data_elements: U32,
    pub per_packet_info_offset: U32,
    pub per_packet_info_length: U32,
    pub vc_handle: U32,
    pub reserved: U32,
}
const _: () = assert!(size_of::<PacketBody>() == 36);

/// Body of INITIALIZE (`rndis_initialize_request`).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct InitializeRequest {
    pub request_id: U32,
    pub major_version: U32,
    pub minor_version: U32,
    pub max_transfer_size: U32,
}
const _: () = assert!(size_of::<InitializeRequest>() == 16);

/// Body of the answer to INITIALIZE (`rndis_initialize_complete`).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct InitializeComplete {
    pub request_id: U32,
    pub status: U32,
    pub major_version: U32,
    pub minor_version: U32,
    pub device_flags: U32,
    pub medium: U32,
    pub max_packets_per_message: U32,
    pub max_transfer_size: U32,
    pub packet_alignment_factor: U32,
    pub af_list_offset: U32,
    pub af_list_size: U32,
}
const _: () = assert!(size_of::<InitializeComplete>() == 44);

/// Body of QUERY and SET (`rndis_query_request`, `rndis_set_request`).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct OidRequest {
    pub request_id: U32,
    pub oid: U32,
    pub info_length: U32,
    pub info_offset: U32,
    pub vc_handle: U32,
}
const _: () = assert!(size_of::<OidRequest>() == 20);

/// Body of the answer to QUERY (`rndis_query_complete`).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct QueryComplete {
    pub request_id: U32,
    pub status: U32,
    pub info_length: U32,
    pub info_offset: U32,
}
const _: () = assert!(size_of::<QueryComplete>() == 16);

/// Body of the answers to SET and KEEPALIVE (`rndis_set_complete`, `rndis_keepalive_complete`).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct StatusComplete {
    pub request_id: U32,
    pub status: U32,
}
const _: () = assert!(size_of::<StatusComplete>() == 8);

/// Body of INDICATE_STATUS without a buffer (`rndis_indicate_status`).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct IndicateStatus {
    pub status: U32,
    pub status_buffer_length: U32,
    pub status_buffer_offset: U32,
}
const _: () = assert!(size_of::<IndicateStatus>() == 12);

/// Per-packet information element (`rndis_per_packet_info`); data follow at `offset`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct PerPacketInfo {
    pub size: U32,
    pub kind: U32,
    pub offset: U32,
}
const _: () = assert!(size_of::<PerPacketInfo>() == 12);

/// What is wrong with a guest's RNDIS message.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum RndisFault {
    #[error("RNDIS message with {bytes} bytes where {wanted} are needed")]
    MessageTooShort { bytes: usize, wanted: usize },
    #[error("RNDIS message claims {claimed} bytes of {bytes}")]
    MessageOverrun { claimed: u32, bytes: usize },
    #[error("RNDIS information of {length} bytes at {offset} lies outside its message")]
    InformationOutside { offset: u32, length: u32 },
    #[error("RNDIS frame of {length} bytes at {offset} lies outside its message")]
    FrameOutside { offset: u32, length: u32 },
    #[error("RNDIS frame of {0} bytes")]
    FrameSize(u32),
    #[error(
        "per-packet information of {length} bytes at {offset} lies outside its message or beyond its start"
    )]
    PacketInfoOutside { offset: u32, length: u32 },
    #[error("per-packet information element of {size} bytes with data at {offset}")]
    PacketInfoMalformed { size: u32, offset: u32 },
    #[error("RNDIS message type {0:#x} has no business here")]
    UnexpectedType(u32),
    #[error("more than {0} RNDIS messages in one packet")]
    TooManyMessages(usize),
    #[error("RNDIS message before INITIALIZE")]
    NotInitialized,
}

/// Splits a private copy into its type and its body; the length in the header decides where the body ends.
pub fn split_message(bytes: &[u8]) -> Result<(u32, &[u8]), RndisFault> {
    let short = RndisFault::MessageTooShort {
        bytes: bytes.len(),
        wanted: HEADER_BYTES,
    };
    let (header, _) = MessageHeader::read_from_prefix(bytes).map_err(|_| short)?;
    let claimed = header.message_length.get();
    let length = claimed as usize;
    if length < HEADER_BYTES {
        return Err(RndisFault::MessageTooShort {
            bytes: length,
            wanted: HEADER_BYTES,
        });
    }
    match bytes.get(HEADER_BYTES..length) {
        Some(body) => Ok((header.message_type.get(), body)),
        None => Err(RndisFault::MessageOverrun {
            claimed,
            bytes: bytes.len(),
        }),
    }
}

/// A message of `body` and what follows it.
pub fn emit_message(message_type: u32, body: &[u8], rest: &[u8]) -> Vec<u8> {
    let length = HEADER_BYTES + body.len() + rest.len();
    let mut bytes = Vec::with_capacity(length);
    bytes.extend_from_slice(
        MessageHeader {
            message_type: U32::new(message_type),
            message_length: U32::new(length as u32),
        }
        .as_bytes(),
    );
    bytes.extend_from_slice(body);
    bytes.extend_from_slice(rest);
    bytes
}

/// The part of a body that an offset and a length from the guest name.
pub fn information(body: &[u8], offset: u32, length: u32) -> Result<&[u8], RndisFault> {
    let fault = RndisFault::InformationOutside { offset, length };
    let end = (offset as usize).checked_add(length as usize).ok_or(fault)?;
    body.get(offset as usize..end).ok_or(fault)
}
