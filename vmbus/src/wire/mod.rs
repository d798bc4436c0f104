//! VMBus bytes and what they mean. Pure: no memory of others, no clock, no descriptor.
//!
//! Everything here works on private copies. Parsers take any bytes and return a type or a
//! [`GuestFault`](crate::fault::GuestFault); they never panic, and what they accept they emit again bit for bit
//! where the format has no don't-care bytes. Numbers that we do not know stay representable (`Unknown`), so that
//! refusing them is a decision of the caller.
//!
//! Direction is in the type: [`GuestToHost`] and [`HostToGuest`] are two enums, and a parser of one cannot produce a
//! message of the other.
//!
//! | file | what |
//! | --- | --- |
//! | `guid.rs` | [`Guid`] in wire order |
//! | `version.rs` | [`Version`] of the channel protocol |
//! | `control.rs` | channel messages (offers, open, GPADL, ...), at most 240 bytes each |
//! | `control_layout.rs` | their fixed layouts |
//! | `packet.rs` | ring packets: descriptor, kinds, transfer pages |
//! | `gpa_direct.rs` | lists of guest memory ranges, in packets and in GPADLs; claims become spans |

#![forbid(unsafe_code)]

mod control;
mod control_layout;
mod gpa_direct;
mod guid;
mod packet;
#[cfg(test)]
mod tests;
mod version;

pub use crate::fault::GuestFault;
pub use control::{
    ChannelId, ConnectionId, ControlMessage, GpadlBody, GpadlHeader, GpadlId, GuestToHost, HostToGuest,
    InitiateContact, MAX_CONTROL_BYTES, Offer, OpenChannel, TlConnect, VersionResponse,
};
pub use gpa_direct::{GpaDirect, GpaRange, RangeList, gpa_direct_header};
pub use guid::{Guid, GuidTextError};
pub use packet::{
    DESCRIPTOR_BYTES, OutPacket, Packet, PacketDescriptor, PacketKind, TRAILER_BYTES, TransferPages,
    TransferRange, transfer_pages_header,
};
pub use version::Version;
