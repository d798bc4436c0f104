//! Channel messages: what guest and host say to each other about channels, outside the rings.
//!
//! Guest to host by HvPostMessage, host to guest through a SIMP slot; each at most 240 bytes (TLFS 11.6). Every message begins
//! with u32 type and u32 padding. A message that is longer than its type needs is accepted (newer guests append
//! fields), a shorter one is a [`GuestFault`], an unknown type is `Unknown`.
//!
//! Sizes and offsets stand in `control_layout.rs`. Which message is allowed when is for the bus to decide.

mod guest_to_host;
mod host_to_guest;

pub use guest_to_host::{GpadlBody, GpadlHeader, GuestToHost, InitiateContact, OpenChannel, TlConnect};
pub use host_to_guest::{HostToGuest, Offer, VersionResponse};

use super::GuestFault;
use super::control_layout as layout;
use serde::{Deserialize, Serialize};
use std::fmt;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Longest channel message in bytes (TLFS 11.6, `HV_MESSAGE_PAYLOAD_BYTE_COUNT`).
pub const MAX_CONTROL_BYTES: usize = 240;

/// Names a channel for the life of a connection (relid). 1..=2047 when we choose it; any number when a guest says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ChannelId(pub u32);

/// Names the target of a signal or message (TLFS 11.4). 24 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ConnectionId(pub u32);

/// The guest's handle for a list of its pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct GpadlId(pub u32);

impl fmt::Display for ChannelId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for ConnectionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Display for GpadlId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// Type numbers: `enum vmbus_channel_message_type`, Linux 6.1 include/linux/hyperv.h.
mod number {
    pub(super) const OFFER_CHANNEL: u32 = 1;
    pub(super) const RESCIND_CHANNEL_OFFER: u32 = 2;
    pub(super) const REQUEST_OFFERS: u32 = 3;
    pub(super) const ALL_OFFERS_DELIVERED: u32 = 4;
    pub(super) const OPEN_CHANNEL: u32 = 5;
    pub(super) const OPEN_CHANNEL_RESULT: u32 = 6;
    pub(super) const CLOSE_CHANNEL: u32 = 7;
    pub(super) const GPADL_HEADER: u32 = 8;
    pub(super) const GPADL_BODY: u32 = 9;
    pub(super) const GPADL_CREATED: u32 = 10;
    pub(super) const GPADL_TEARDOWN: u32 = 11;
    pub(super) const GPADL_TORNDOWN: u32 = 12;
    pub(super) const RELID_RELEASED: u32 = 13;
    pub(super) const INITIATE_CONTACT: u32 = 14;
    pub(super) const VERSION_RESPONSE: u32 = 15;
    pub(super) const UNLOAD: u32 = 16;
    pub(super) const UNLOAD_RESPONSE: u32 = 17;
    pub(super) const TL_CONNECT_REQUEST: u32 = 21;
    pub(super) const MODIFY_CHANNEL: u32 = 22;
    pub(super) const TL_CONNECT_RESULT: u32 = 23;
    pub(super) const MODIFY_CHANNEL_RESPONSE: u32 = 24;
}

/// One encoded message.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct ControlMessage {
    bytes: [u8; MAX_CONTROL_BYTES],
    len: usize,
}

impl ControlMessage {
    /// The bytes to be sent.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    fn new(message_type: u32) -> Self {
        let mut message = Self {
            bytes: [0; MAX_CONTROL_BYTES],
            len: 0,
        };
        message.push(
            layout::Header {
                message_type: message_type.into(),
                padding: 0.into(),
            }
            .as_bytes(),
        );
        message
    }

    fn with(message_type: u32, body: &(impl IntoBytes + Immutable)) -> Self {
        let mut message = Self::new(message_type);
        message.push(body.as_bytes());
        message
    }

    /// Appends. Our own bytes only: what does not fit is a mistake of ours.
    fn push(&mut self, bytes: &[u8]) {
        let end = self.len + bytes.len();
        assert!(end <= MAX_CONTROL_BYTES, "channel message of {end} bytes");
        self.bytes[self.len..end].copy_from_slice(bytes);
        self.len = end;
    }
}

impl std::ops::Deref for ControlMessage {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.as_bytes()
    }
}

impl fmt::Debug for ControlMessage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ControlMessage(type {}, {} bytes)", self.bytes[0], self.len)
    }
}

/// The body of a message of type `message_type`, and what follows it.
fn body<T: FromBytes + KnownLayout + Immutable + Unaligned>(
    message_type: u32,
    bytes: &[u8],
) -> Result<(T, &[u8]), GuestFault> {
    T::read_from_prefix(bytes).map_err(|_| GuestFault::MessageTooShort {
        message_type,
        len: bytes.len() + size_of::<layout::Header>(),
        needed: size_of::<T>() + size_of::<layout::Header>(),
    })
}

fn header(bytes: &[u8]) -> Result<(u32, &[u8]), GuestFault> {
    let (header, rest) =
        layout::Header::read_from_prefix(bytes).map_err(|_| GuestFault::MessageTooShort {
            message_type: 0,
            len: bytes.len(),
            needed: size_of::<layout::Header>(),
        })?;
    Ok((header.message_type.get(), rest))
}

fn one_channel(message_type: u32, rest: &[u8]) -> Result<ChannelId, GuestFault> {
    Ok(ChannelId(body::<layout::OneId>(message_type, rest)?.0.id.get()))
}

fn one_id(message_type: u32, id: u32) -> ControlMessage {
    ControlMessage::with(message_type, &layout::OneId { id: id.into() })
}

fn two_ids(message_type: u32, relid: u32, id: u32) -> ControlMessage {
    ControlMessage::with(
        message_type,
        &layout::TwoIds {
            relid: relid.into(),
            id: id.into(),
        },
    )
}

fn result3(message_type: u32, relid: u32, id: u32, status: u32) -> ControlMessage {
    ControlMessage::with(
        message_type,
        &layout::Result3 {
            relid: relid.into(),
            id: id.into(),
            status: status.into(),
        },
    )
}
