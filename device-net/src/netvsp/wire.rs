//! NVSP messages: bytes to types and back, for both ends.
//!
//! Every message of ours is padded to [`MESSAGE_BYTES`].
//! Quirk(Linux 6.1 netvsc): the length checks of completions fall through from INIT_COMPLETE to the
//! receive-buffer check, so a shorter INIT_COMPLETE is refused and the guest waits for ever.

use thiserror::Error;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Length of each NVSP message on the wire (`struct nvsp_message`, Linux 6.1 drivers/net/hyperv/hyperv_net.h).
pub const MESSAGE_BYTES: usize = 40;
/// Section index that means "nothing in the send buffer" (`NETVSC_INVALID_INDEX`, hyperv_net.h).
pub const NO_SECTION: u32 = 0xFFFF_FFFF;
/// The receive buffer's id, which is also the transfer page-set id (`NETVSC_RECEIVE_BUFFER_ID`, hyperv_net.h).
pub const RECEIVE_BUFFER_ID: u16 = 0xCAFE;
/// Entries of a send indirection table (`VRSS_SEND_TAB_SIZE`, hyperv_net.h).
pub const INDIRECTION_ENTRIES: usize = 16;

/// A protocol version as INIT carries it (`NVSP_PROTOCOL_VERSION_*`, hyperv_net.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub struct NvspVersion(pub u32);

impl NvspVersion {
    pub const V1: Self = Self(0x0000_0002);
    pub const V2: Self = Self(0x0003_0002);
    pub const V4: Self = Self(0x0004_0000);
    pub const V5: Self = Self(0x0005_0000);
    pub const V6: Self = Self(0x0006_0000);
    pub const V6_1: Self = Self(0x0006_0001);
}

/// Message numbers (`NVSP_MSG_TYPE_*` and `NVSP_MSG*_TYPE_*`, hyperv_net.h).
pub mod number {
    pub const INIT: u32 = 1;
    pub const INIT_COMPLETE: u32 = 2;
    pub const SEND_NDIS_VER: u32 = 100;
    pub const SEND_RECV_BUF: u32 = 101;
    pub const SEND_RECV_BUF_COMPLETE: u32 = 102;
    pub const REVOKE_RECV_BUF: u32 = 103;
    pub const SEND_SEND_BUF: u32 = 104;
    pub const SEND_SEND_BUF_COMPLETE: u32 = 105;
    pub const REVOKE_SEND_BUF: u32 = 106;
    pub const SEND_RNDIS_PKT: u32 = 107;
    pub const SEND_RNDIS_PKT_COMPLETE: u32 = 108;
    pub const SEND_NDIS_CONFIG: u32 = 125;
    pub const SWITCH_DATA_PATH: u32 = 129;
    pub const OID_QUERY_EX: u32 = 131;
    pub const SUBCHANNEL: u32 = 133;
    pub const SEND_INDIRECTION_TABLE: u32 = 134;
}

/// Status of a completion (`NVSP_STAT_*`, hyperv_net.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NvspStatus(pub u32);

impl NvspStatus {
    pub const SUCCESS: Self = Self(1);
    pub const FAIL: Self = Self(2);
    pub const PROTOCOL_TOO_NEW: Self = Self(3);
    pub const PROTOCOL_TOO_OLD: Self = Self(4);
    pub const INVALID_RNDIS_PACKET: Self = Self(5);
}

/// SUBCHANNEL operation 1 (`NVSP_SUBCHANNEL_ALLOCATE`, hyperv_net.h).
pub const SUBCHANNEL_ALLOCATE: u32 = 1;
/// Capability bit 7 of NDIS_CONFIG: the guest can merge RSC fragments (`nvsp_2_vsc_capability`, hyperv_net.h).
pub const CAPABILITY_RSC: u64 = 1 << 7;

/// Whether a SEND_RNDIS_PKT holds frames or control messages (`channel_type`, hyperv_net.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RndisKind {
    Data,
    Control,
}

/// A part of the send buffer that a SEND_RNDIS_PKT claims.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SectionClaim {
    pub index: u32,
    pub used_bytes: u32,
}

/// What a guest may send. Numbers that are not ours stay visible, so that refusing is a choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestMessage {
    Init {
        min: NvspVersion,
        max: NvspVersion,
    },
    NdisVersion {
        major: u32,
        minor: u32,
    },
    /// `mtu_bytes` counts the 14 bytes of the Ethernet header, too.
    NdisConfig {
        mtu_bytes: u32,
        capabilities: u64,
    },
    ReceiveBuffer {
        gpadl: u32,
        id: u16,
    },
    RevokeReceiveBuffer {
        id: u16,
    },
    SendBuffer {
        gpadl: u32,
        id: u16,
    },
    RevokeSendBuffer {
        id: u16,
    },
    RndisPacket {
        kind: RndisKind,
        section: Option<SectionClaim>,
    },
    RndisPacketComplete {
        status: u32,
    },
    SwitchDataPath {
        active: u32,
    },
    Subchannel {
        operation: u32,
        count: u32,
    },
    Unknown(u32),
}

/// What the host may send. All but the two last are payloads of completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostMessage {
    InitComplete {
        version: NvspVersion,
        max_mdl_chain: u32,
        status: NvspStatus,
    },
    ReceiveBufferComplete {
        status: NvspStatus,
        suballocation_bytes: u32,
        suballocation_count: u32,
    },
    SendBufferComplete {
        status: NvspStatus,
        section_bytes: u32,
    },
    SubchannelComplete {
        status: NvspStatus,
        count: u32,
    },
    RndisPacketComplete {
        status: NvspStatus,
    },
    /// Payload of a transfer-page packet.
    RndisPacket {
        kind: RndisKind,
    },
}

/// Why a guest's NVSP message cannot be read.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum NvspFault {
    #[error("NVSP message of {bytes} bytes is too short for message {number}")]
    MessageTooShort { number: u32, bytes: usize },
    #[error("NVSP packet of {bytes} bytes has no message number")]
    NoMessageNumber { bytes: usize },
    #[error("SEND_RNDIS_PKT has channel type {0}")]
    UnknownChannelType(u32),
}

macro_rules! wire_struct {
    ($(#[$doc:meta])* $name:ident, $size:expr, { $($field:ident: $type:ty,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
        #[repr(C)]
        struct $name { message_type: U32, $($field: $type,)* }
        const _: () = assert!(size_of::<$name>() == $size);
    };
}

wire_struct!(
    /// `nvsp_message_init`
    Init, 12, { min_protocol_ver: U32, max_protocol_ver: U32, }
);
wire_struct!(
    /// `nvsp_message_init_complete`
    InitComplete, 16, { negotiated_protocol_ver: U32, max_mdl_chain_len: U32, status: U32, }
);
wire_struct!(
    /// `nvsp_1_message_send_ndis_version`
    SendNdisVersion, 12, { ndis_major_ver: U32, ndis_minor_ver: U32, }
);
wire_struct!(
    /// `nvsp_1_message_send_receive_buffer` and `nvsp_1_message_send_send_buffer`
    SendBuffer, 10, { gpadl_handle: U32, id: U16, }
);
wire_struct!(
    /// `nvsp_1_message_send_receive_buffer_complete` with its one `nvsp_1_receive_buffer_section`
    ReceiveBufferComplete, 28, {
        status: U32, num_sections: U32, offset: U32, sub_alloc_size: U32, num_sub_allocs: U32, end_offset: U32,
    }
);
wire_struct!(
    /// `nvsp_1_message_revoke_receive_buffer` and `nvsp_1_message_revoke_send_buffer`
    RevokeBuffer, 6, { id: U16, }
);
wire_struct!(
    /// `nvsp_1_message_send_send_buffer_complete` and `nvsp_5_subchannel_complete`
    StatusAndNumber, 12, { status: U32, number: U32, }
);
wire_struct!(
    /// `nvsp_1_message_send_rndis_packet`
    SendRndisPacket, 16, { channel_type: U32, send_buf_section_index: U32, send_buf_section_size: U32, }
);
wire_struct!(
    /// `nvsp_1_message_send_rndis_packet_complete` and `nvsp_4_sw_datapath`
    OneNumber, 8, { number: U32, }
);
wire_struct!(
    /// `nvsp_2_send_ndis_config`
    SendNdisConfig, 20, { mtu: U32, reserved: U32, capabilities: U64, }
);
wire_struct!(
    /// `nvsp_5_subchannel_request`
    SubchannelRequest, 12, { op: U32, num_subchannels: U32, }
);

fn read<T: FromBytes>(number: u32, payload: &[u8]) -> Result<T, NvspFault> {
    match T::read_from_prefix(payload) {
        Ok((value, _)) => Ok(value),
        Err(_) => Err(NvspFault::MessageTooShort {
            number,
            bytes: payload.len(),
        }),
    }
}

fn message_number(payload: &[u8]) -> Result<u32, NvspFault> {
    match U32::read_from_prefix(payload) {
        Ok((number, _)) => Ok(number.get()),
        Err(_) => Err(NvspFault::NoMessageNumber { bytes: payload.len() }),
    }
}

fn padded(message: &impl IntoBytesSized) -> [u8; MESSAGE_BYTES] {
    let mut bytes = [0u8; MESSAGE_BYTES];
    let body = message.body();
    bytes[..body.len()].copy_from_slice(body);
    bytes
}

/// Our own structs, all shorter than [`MESSAGE_BYTES`].
trait IntoBytesSized {
    fn body(&self) -> &[u8];
}
impl<T: IntoBytes + Immutable> IntoBytesSized for T {
    fn body(&self) -> &[u8] {
        const { assert!(size_of::<T>() <= MESSAGE_BYTES) };
        self.as_bytes()
    }
}

impl RndisKind {
    fn number(self) -> u32 {
        match self {
            Self::Data => 0,
            Self::Control => 1,
        }
    }
}

impl GuestMessage {
    /// Reads a private copy of a packet's payload. Bytes beyond the message are ignored: the wire pads.
    pub fn parse(payload: &[u8]) -> Result<Self, NvspFault> {
        let number = message_number(payload)?;
        Ok(match number {
            number::INIT => {
                let message: Init = read(number, payload)?;
                Self::Init {
                    min: NvspVersion(message.min_protocol_ver.get()),
                    max: NvspVersion(message.max_protocol_ver.get()),
                }
            }
            number::SEND_NDIS_VER => {
                let message: SendNdisVersion = read(number, payload)?;
                Self::NdisVersion {
                    major: message.ndis_major_ver.get(),
                    minor: message.ndis_minor_ver.get(),
                }
            }
            number::SEND_NDIS_CONFIG => {
                let message: SendNdisConfig = read(number, payload)?;
                Self::NdisConfig {
                    mtu_bytes: message.mtu.get(),
                    capabilities: message.capabilities.get(),
                }
            }
            number::SEND_RECV_BUF => {
                let message: SendBuffer = read(number, payload)?;
                Self::ReceiveBuffer {
                    gpadl: message.gpadl_handle.get(),
                    id: message.id.get(),
                }
            }
            number::SEND_SEND_BUF => {
                let message: SendBuffer = read(number, payload)?;
                Self::SendBuffer {
                    gpadl: message.gpadl_handle.get(),
                    id: message.id.get(),
                }
            }
            number::REVOKE_RECV_BUF => Self::RevokeReceiveBuffer {
                id: read::<RevokeBuffer>(number, payload)?.id.get(),
            },
            number::REVOKE_SEND_BUF => Self::RevokeSendBuffer {
                id: read::<RevokeBuffer>(number, payload)?.id.get(),
            },
            number::SEND_RNDIS_PKT => {
                let message: SendRndisPacket = read(number, payload)?;
                let kind = match message.channel_type.get() {
                    0 => RndisKind::Data,
                    1 => RndisKind::Control,
                    other => return Err(NvspFault::UnknownChannelType(other)),
                };
                let section = match message.send_buf_section_index.get() {
                    NO_SECTION => None,
                    index => Some(SectionClaim {
                        index,
                        used_bytes: message.send_buf_section_size.get(),
                    }),
                };
                Self::RndisPacket { kind, section }
            }
            number::SEND_RNDIS_PKT_COMPLETE => Self::RndisPacketComplete {
                status: read::<OneNumber>(number, payload)?.number.get(),
            },
            number::SWITCH_DATA_PATH => Self::SwitchDataPath {
                active: read::<OneNumber>(number, payload)?.number.get(),
            },
            number::SUBCHANNEL => {
                let message: SubchannelRequest = read(number, payload)?;
                Self::Subchannel {
                    operation: message.op.get(),
                    count: message.num_subchannels.get(),
                }
            }
            other => Self::Unknown(other),
        })
    }

    /// The bytes a guest puts into its packet: 40, and 8 for a receive completion, as Linux does.
    pub fn emit(&self) -> Vec<u8> {
        match *self {
            Self::Init { min, max } => padded(&Init {
                message_type: U32::new(number::INIT),
                min_protocol_ver: U32::new(min.0),
                max_protocol_ver: U32::new(max.0),
            })
            .to_vec(),
            Self::NdisVersion { major, minor } => padded(&SendNdisVersion {
                message_type: U32::new(number::SEND_NDIS_VER),
                ndis_major_ver: U32::new(major),
                ndis_minor_ver: U32::new(minor),
            })
            .to_vec(),
            Self::NdisConfig {
                mtu_bytes,
                capabilities,
            } => padded(&SendNdisConfig {
                message_type: U32::new(number::SEND_NDIS_CONFIG),
                mtu: U32::new(mtu_bytes),
                reserved: U32::ZERO,
                capabilities: U64::new(capabilities),
            })
            .to_vec(),
            Self::ReceiveBuffer { gpadl, id } => buffer(number::SEND_RECV_BUF, gpadl, id),
            Self::SendBuffer { gpadl, id } => buffer(number::SEND_SEND_BUF, gpadl, id),
            Self::RevokeReceiveBuffer { id } => revoke(number::REVOKE_RECV_BUF, id),
            Self::RevokeSendBuffer { id } => revoke(number::REVOKE_SEND_BUF, id),
            Self::RndisPacket { kind, section } => rndis_packet(kind, section).to_vec(),
            Self::RndisPacketComplete { status } => one_number(number::SEND_RNDIS_PKT_COMPLETE, status)
                .as_bytes()
                .to_vec(),
            Self::SwitchDataPath { active } => padded(&one_number(number::SWITCH_DATA_PATH, active)).to_vec(),
            Self::Subchannel { operation, count } => padded(&SubchannelRequest {
                message_type: U32::new(number::SUBCHANNEL),
                op: U32::new(operation),
                num_subchannels: U32::new(count),
            })
            .to_vec(),
            Self::Unknown(number) => padded(&one_number(number, 0)).to_vec(),
        }
    }
}

fn one_number(message_type: u32, number: u32) -> OneNumber {
    OneNumber {
        message_type: U32::new(message_type),
        number: U32::new(number),
    }
}

fn buffer(message_type: u32, gpadl: u32, id: u16) -> Vec<u8> {
    padded(&SendBuffer {
        message_type: U32::new(message_type),
        gpadl_handle: U32::new(gpadl),
        id: U16::new(id),
    })
    .to_vec()
}

fn revoke(message_type: u32, id: u16) -> Vec<u8> {
    padded(&RevokeBuffer {
        message_type: U32::new(message_type),
        id: U16::new(id),
    })
    .to_vec()
}

fn rndis_packet(kind: RndisKind, section: Option<SectionClaim>) -> [u8; MESSAGE_BYTES] {
    let section = section.unwrap_or(SectionClaim {
        index: NO_SECTION,
        used_bytes: 0,
    });
    padded(&SendRndisPacket {
        message_type: U32::new(number::SEND_RNDIS_PKT),
        channel_type: U32::new(kind.number()),
        send_buf_section_index: U32::new(section.index),
        send_buf_section_size: U32::new(section.used_bytes),
    })
}

impl HostMessage {
    /// The message, padded to [`MESSAGE_BYTES`].
    pub fn emit(&self) -> [u8; MESSAGE_BYTES] {
        match *self {
            Self::InitComplete {
                version,
                max_mdl_chain,
                status,
            } => padded(&InitComplete {
                message_type: U32::new(number::INIT_COMPLETE),
                negotiated_protocol_ver: U32::new(version.0),
                max_mdl_chain_len: U32::new(max_mdl_chain),
                status: U32::new(status.0),
            }),
            Self::ReceiveBufferComplete {
                status,
                suballocation_bytes,
                suballocation_count,
            } => padded(&ReceiveBufferComplete {
                message_type: U32::new(number::SEND_RECV_BUF_COMPLETE),
                status: U32::new(status.0),
                num_sections: U32::new(1),
                offset: U32::ZERO,
                sub_alloc_size: U32::new(suballocation_bytes),
                num_sub_allocs: U32::new(suballocation_count),
                end_offset: U32::new(suballocation_bytes.saturating_mul(suballocation_count)),
            }),
            Self::SendBufferComplete {
                status,
                section_bytes,
            } => padded(&status_and_number(
                number::SEND_SEND_BUF_COMPLETE,
                status,
                section_bytes,
            )),
            Self::SubchannelComplete { status, count } => {
                padded(&status_and_number(number::SUBCHANNEL, status, count))
            }
            Self::RndisPacketComplete { status } => {
                padded(&one_number(number::SEND_RNDIS_PKT_COMPLETE, status.0))
            }
            Self::RndisPacket { kind } => rndis_packet(kind, None),
        }
    }

    /// What a guest makes of a host's message; `None` for anything that only a confused host would send.
    pub fn parse(payload: &[u8]) -> Option<Self> {
        let number = message_number(payload).ok()?;
        Some(match number {
            number::INIT_COMPLETE => {
                let message: InitComplete = read(number, payload).ok()?;
                Self::InitComplete {
                    version: NvspVersion(message.negotiated_protocol_ver.get()),
                    max_mdl_chain: message.max_mdl_chain_len.get(),
                    status: NvspStatus(message.status.get()),
                }
            }
            number::SEND_RECV_BUF_COMPLETE => {
                let message: ReceiveBufferComplete = read(number, payload).ok()?;
                Self::ReceiveBufferComplete {
                    status: NvspStatus(message.status.get()),
                    suballocation_bytes: message.sub_alloc_size.get(),
                    suballocation_count: message.num_sub_allocs.get(),
                }
            }
            number::SEND_SEND_BUF_COMPLETE => {
                let message: StatusAndNumber = read(number, payload).ok()?;
                Self::SendBufferComplete {
                    status: NvspStatus(message.status.get()),
                    section_bytes: message.number.get(),
                }
            }
            number::SUBCHANNEL => {
                let message: StatusAndNumber = read(number, payload).ok()?;
                Self::SubchannelComplete {
                    status: NvspStatus(message.status.get()),
                    count: message.number.get(),
                }
            }
            number::SEND_RNDIS_PKT_COMPLETE => {
                let message: OneNumber = read(number, payload).ok()?;
                Self::RndisPacketComplete {
                    status: NvspStatus(message.number.get()),
                }
            }
            number::SEND_RNDIS_PKT => {
                let message: SendRndisPacket = read(number, payload).ok()?;
                let kind = match message.channel_type.get() {
                    0 => RndisKind::Data,
                    1 => RndisKind::Control,
                    _ => return None,
                };
                Self::RndisPacket { kind }
            }
            _ => return None,
        })
    }
}

fn status_and_number(message_type: u32, status: NvspStatus, number: u32) -> StatusAndNumber {
    StatusAndNumber {
        message_type: U32::new(message_type),
        status: U32::new(status.0),
        number: U32::new(number),
    }
}

/// SEND_INDIRECTION_TABLE: which channel the guest should transmit on, by hash.
///
/// Quirk(Linux 6.1 netvsc): below NVSP 6.1 the table is read at offset 40 whatever the message says, so it is there.
pub fn emit_indirection_table(queues: &[u32; INDIRECTION_ENTRIES]) -> [u8; MESSAGE_BYTES + 64] {
    let mut bytes = [0u8; MESSAGE_BYTES + 4 * INDIRECTION_ENTRIES];
    bytes[0..4].copy_from_slice(&number::SEND_INDIRECTION_TABLE.to_le_bytes());
    bytes[4..8].copy_from_slice(&(INDIRECTION_ENTRIES as u32).to_le_bytes());
    bytes[8..12].copy_from_slice(&(MESSAGE_BYTES as u32).to_le_bytes());
    for (entry, queue) in bytes[MESSAGE_BYTES..].chunks_exact_mut(4).zip(queues) {
        entry.copy_from_slice(&queue.to_le_bytes());
    }
    bytes
}

#[cfg(test)]
mod tests;
