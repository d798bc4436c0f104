//! Channel messages: what guest and host say to each other about channels, outside the rings.
//!
//! Guest to host by HvPostMessage, host to guest through a SIMP slot; each at most 240 bytes (TLFS 11.6). Every message begins
//! with u32 type and u32 padding. A message that is longer than its type needs is accepted (newer guests append
//! fields), a shorter one is a [`GuestFault`], an unknown type is `Unknown`.
//!
//! Sizes and offsets stand in `control_layout.rs`. Which message is allowed when is for the bus to decide.

use super::control_layout as layout;
use super::gpa_direct::RangeList;
use super::packet::le_u64;
use super::{GuestFault, Guid, Version};
use crate::mem::Gpn;
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

/// Type 5. The fields as in `struct vmbus_channel_open_channel`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpenChannel {
    /// Which channel.
    pub channel: ChannelId,
    /// To be echoed in the result.
    pub open_id: u32,
    /// The GPADL that holds both rings.
    pub ring_gpadl: GpadlId,
    /// Index of the VP that wants the channel's interrupts. 0xFFFF_FFFF: none.
    pub target_vp: u32,
    /// First page of the `to_guest` ring in the GPADL.
    pub downstream_page_offset: u32,
    /// Zero for all that we serve.
    pub user_data: [u8; 120],
}

/// Type 8: begins a GPADL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GpadlHeader<'a> {
    /// The channel it belongs to.
    pub channel: ChannelId,
    /// The guest's handle; bodies name only this.
    pub gpadl: GpadlId,
    /// Bytes of all ranges, those of later bodies included.
    pub range_bytes: u16,
    /// Number of ranges.
    pub range_count: u16,
    /// The first bytes of the ranges: what this message has of them, never more than `range_bytes`.
    pub ranges: &'a [u8],
}

/// Type 9: continues a GPADL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GpadlBody<'a> {
    /// Linux leaves it 0.
    pub message_number: u32,
    /// Which GPADL.
    pub gpadl: GpadlId,
    /// The next bytes of the ranges: whole page numbers. May be more than are still missing; the rest is to be ignored.
    pub ranges: &'a [u8],
}

impl GpadlHeader<'_> {
    /// The ranges of an assembled GPADL: `bytes` is `range_bytes` long and consists of the `ranges` of the header and of
    /// the bodies in order of arrival.
    pub fn assemble<'b>(&self, bytes: &'b [u8]) -> Result<RangeList<'b>, GuestFault> {
        RangeList::parse(u32::from(self.range_count), bytes)
    }
}

impl GpadlBody<'_> {
    /// The page numbers in this body.
    pub fn pages(&self) -> impl ExactSizeIterator<Item = Gpn> + '_ {
        self.ranges.chunks_exact(8).map(|pfn| Gpn(le_u64(pfn)))
    }
}

/// Type 14.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InitiateContact {
    /// The version asked for.
    pub version: Version,
    /// Index of the VP that shall get the host's messages.
    pub target_vp: u32,
    /// Below 5.0 the address of the interrupt page; from 5.0 on see [`InitiateContact::target_sint`].
    pub interrupt_page_or_target: u64,
    /// Address of monitor page 1. Not used by us.
    pub parent_to_child_monitor: u64,
    /// Address of monitor page 2. Not used by us.
    pub child_to_parent_monitor: u64,
}

impl InitiateContact {
    /// From 5.0 on the SINT and VTL for the host's messages; `None` below.
    pub fn target_sint(&self) -> Option<(u8, u8)> {
        let [sint, vtl, ..] = self.interrupt_page_or_target.to_le_bytes();
        self.version.has_message_connection_id().then_some((sint, vtl))
    }
}

/// Type 21: a guest program connects to a host service (hv_sock).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TlConnect {
    /// The guest's endpoint.
    pub endpoint: Guid,
    /// The host's service.
    pub service: Guid,
    /// From 5.2 on.
    pub silo: Option<Guid>,
}

/// A message of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuestToHost<'a> {
    /// Type 3.
    RequestOffers,
    /// Type 5.
    OpenChannel(OpenChannel),
    /// Type 7.
    CloseChannel {
        /// Which channel.
        channel: ChannelId,
    },
    /// Type 8.
    GpadlHeader(GpadlHeader<'a>),
    /// Type 9.
    GpadlBody(GpadlBody<'a>),
    /// Type 11.
    GpadlTeardown {
        /// The channel it belongs to, as the guest says.
        channel: ChannelId,
        /// Which GPADL.
        gpadl: GpadlId,
    },
    /// Type 13.
    RelidReleased {
        /// Which channel.
        channel: ChannelId,
    },
    /// Type 14.
    InitiateContact(InitiateContact),
    /// Type 16.
    Unload,
    /// Type 21.
    TlConnectRequest(TlConnect),
    /// Type 22.
    ModifyChannel {
        /// Which channel.
        channel: ChannelId,
        /// Index of the VP that wants its interrupts from now on. 0xFFFF_FFFF: none.
        target_vp: u32,
    },
    /// Any other type number, host messages included: not to be acted upon.
    Unknown(u32),
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

impl<'a> GuestToHost<'a> {
    /// Parses a posted message. Any bytes are allowed in.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, GuestFault> {
        let (message_type, rest) = header(bytes)?;
        Ok(match message_type {
            number::REQUEST_OFFERS => Self::RequestOffers,
            number::OPEN_CHANNEL => {
                let (open, _) = body::<layout::Open>(message_type, rest)?;
                Self::OpenChannel(OpenChannel {
                    channel: ChannelId(open.relid.get()),
                    open_id: open.open_id.get(),
                    ring_gpadl: GpadlId(open.ring_gpadl.get()),
                    target_vp: open.target_vp.get(),
                    downstream_page_offset: open.downstream_page_offset.get(),
                    user_data: open.user_data,
                })
            }
            number::CLOSE_CHANNEL => Self::CloseChannel {
                channel: one_channel(message_type, rest)?,
            },
            number::GPADL_HEADER => {
                let (fixed, rest) = body::<layout::GpadlHeaderFixed>(message_type, rest)?;
                let range_bytes = fixed.range_bytes.get();
                Self::GpadlHeader(GpadlHeader {
                    channel: ChannelId(fixed.relid.get()),
                    gpadl: GpadlId(fixed.gpadl.get()),
                    range_bytes,
                    range_count: fixed.range_count.get(),
                    ranges: &rest[..rest.len().min(usize::from(range_bytes))],
                })
            }
            number::GPADL_BODY => {
                let (fixed, rest) = body::<layout::GpadlBodyFixed>(message_type, rest)?;
                Self::GpadlBody(GpadlBody {
                    message_number: fixed.message_number.get(),
                    gpadl: GpadlId(fixed.gpadl.get()),
                    ranges: &rest[..rest.len() / 8 * 8],
                })
            }
            number::GPADL_TEARDOWN => {
                let (ids, _) = body::<layout::TwoIds>(message_type, rest)?;
                Self::GpadlTeardown {
                    channel: ChannelId(ids.relid.get()),
                    gpadl: GpadlId(ids.id.get()),
                }
            }
            number::RELID_RELEASED => Self::RelidReleased {
                channel: one_channel(message_type, rest)?,
            },
            number::INITIATE_CONTACT => {
                let (contact, _) = body::<layout::Contact>(message_type, rest)?;
                Self::InitiateContact(InitiateContact {
                    version: Version(contact.version.get()),
                    target_vp: contact.target_vp.get(),
                    interrupt_page_or_target: contact.interrupt_page_or_target.get(),
                    parent_to_child_monitor: contact.parent_to_child_monitor.get(),
                    child_to_parent_monitor: contact.child_to_parent_monitor.get(),
                })
            }
            number::UNLOAD => Self::Unload,
            number::TL_CONNECT_REQUEST => {
                let (fixed, rest) = body::<layout::TlConnectFixed>(message_type, rest)?;
                Self::TlConnectRequest(TlConnect {
                    endpoint: Guid(fixed.endpoint),
                    service: Guid(fixed.service),
                    silo: rest.first_chunk::<16>().map(|silo| Guid(*silo)),
                })
            }
            number::MODIFY_CHANNEL => {
                let (ids, _) = body::<layout::TwoIds>(message_type, rest)?;
                Self::ModifyChannel {
                    channel: ChannelId(ids.relid.get()),
                    target_vp: ids.id.get(),
                }
            }
            other => Self::Unknown(other),
        })
    }

    /// Encodes a message: the guest's side, for the synthetic guest and for tests. Asserts that the variable parts of
    /// GPADL messages fit.
    pub fn emit(&self) -> ControlMessage {
        match *self {
            Self::RequestOffers => ControlMessage::new(number::REQUEST_OFFERS),
            Self::OpenChannel(open) => ControlMessage::with(
                number::OPEN_CHANNEL,
                &layout::Open {
                    relid: open.channel.0.into(),
                    open_id: open.open_id.into(),
                    ring_gpadl: open.ring_gpadl.0.into(),
                    target_vp: open.target_vp.into(),
                    downstream_page_offset: open.downstream_page_offset.into(),
                    user_data: open.user_data,
                },
            ),
            Self::CloseChannel { channel } => one_id(number::CLOSE_CHANNEL, channel.0),
            Self::GpadlHeader(gpadl) => {
                let mut message = ControlMessage::with(
                    number::GPADL_HEADER,
                    &layout::GpadlHeaderFixed {
                        relid: gpadl.channel.0.into(),
                        gpadl: gpadl.gpadl.0.into(),
                        range_bytes: gpadl.range_bytes.into(),
                        range_count: gpadl.range_count.into(),
                    },
                );
                message.push(gpadl.ranges);
                message
            }
            Self::GpadlBody(gpadl) => {
                let mut message = ControlMessage::with(
                    number::GPADL_BODY,
                    &layout::GpadlBodyFixed {
                        message_number: gpadl.message_number.into(),
                        gpadl: gpadl.gpadl.0.into(),
                    },
                );
                message.push(gpadl.ranges);
                message
            }
            Self::GpadlTeardown { channel, gpadl } => two_ids(number::GPADL_TEARDOWN, channel.0, gpadl.0),
            Self::RelidReleased { channel } => one_id(number::RELID_RELEASED, channel.0),
            Self::InitiateContact(contact) => ControlMessage::with(
                number::INITIATE_CONTACT,
                &layout::Contact {
                    version: contact.version.0.into(),
                    target_vp: contact.target_vp.into(),
                    interrupt_page_or_target: contact.interrupt_page_or_target.into(),
                    parent_to_child_monitor: contact.parent_to_child_monitor.into(),
                    child_to_parent_monitor: contact.child_to_parent_monitor.into(),
                },
            ),
            Self::Unload => ControlMessage::new(number::UNLOAD),
            Self::TlConnectRequest(connect) => {
                let mut message = ControlMessage::with(
                    number::TL_CONNECT_REQUEST,
                    &layout::TlConnectFixed {
                        endpoint: connect.endpoint.0,
                        service: connect.service.0,
                    },
                );
                if let Some(silo) = connect.silo {
                    message.push(&silo.0);
                }
                message
            }
            Self::ModifyChannel { channel, target_vp } => {
                two_ids(number::MODIFY_CHANNEL, channel.0, target_vp)
            }
            Self::Unknown(message_type) => ControlMessage::new(message_type),
        }
    }
}

/// Type 1. See the field notes of `struct vmbus_channel_offer_channel`; what is not here is sent as zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offer {
    /// Device class.
    pub interface: Guid,
    /// This device. Unique among live offers, stable across reboots.
    pub instance: Guid,
    /// 1 enumerate device interface, 0x10 named-pipe mode, 0x2000 TLNPI provider (hv_sock).
    pub flags: u16,
    /// 0 for all that we serve.
    pub mmio_megabytes: u16,
    /// Pipe mode and the like; zero for storage and network.
    pub user_defined: [u8; 120],
    /// 0: primary channel.
    pub sub_channel_index: u16,
    /// 1..=2047.
    pub channel: ChannelId,
    /// The guest signals through its monitor page instead of by hypercall. Nobody looks there: always false in our offers.
    pub monitor_allocated: bool,
    /// The host sets the channel's own event flag. Always true in our offers.
    pub dedicated_interrupt: bool,
    /// What the guest names in HvSignalEvent.
    pub connection: ConnectionId,
}

/// Type 15.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VersionResponse {
    /// Whether the version asked for is spoken.
    pub supported: bool,
    /// 0: the connection stands.
    pub connection_state: u8,
    /// From 5.0 on: where the guest posts all further messages. Ignored below.
    pub message_connection: ConnectionId,
}

/// A message of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostToGuest {
    /// Type 1.
    OfferChannel(Offer),
    /// Type 2.
    RescindChannelOffer {
        /// Which channel.
        channel: ChannelId,
    },
    /// Type 4.
    AllOffersDelivered,
    /// Type 6.
    OpenChannelResult {
        /// Which channel.
        channel: ChannelId,
        /// As in the request.
        open_id: u32,
        /// 0: open.
        status: u32,
    },
    /// Type 10.
    GpadlCreated {
        /// Which channel.
        channel: ChannelId,
        /// Which GPADL.
        gpadl: GpadlId,
        /// 0: it stands.
        status: u32,
    },
    /// Type 12.
    GpadlTorndown {
        /// Which GPADL.
        gpadl: GpadlId,
    },
    /// Type 15.
    VersionResponse(VersionResponse),
    /// Type 17.
    UnloadResponse,
    /// Type 23.
    TlConnectResult {
        /// As in the request.
        endpoint: Guid,
        /// As in the request.
        service: Guid,
        /// NTSTATUS; 0: an offer follows.
        status: u32,
    },
    /// Type 24.
    ModifyChannelResponse {
        /// Which channel.
        channel: ChannelId,
        /// 0: done.
        status: u32,
    },
    /// Any other type number, guest messages included.
    Unknown(u32),
}

impl HostToGuest {
    /// Encodes a message for a SIMP slot.
    pub fn emit(&self) -> ControlMessage {
        match *self {
            Self::OfferChannel(offer) => ControlMessage::with(
                number::OFFER_CHANNEL,
                &layout::OfferChannel {
                    interface: offer.interface.0,
                    instance: offer.instance.0,
                    reserved1: [0; 16],
                    flags: offer.flags.into(),
                    mmio_megabytes: offer.mmio_megabytes.into(),
                    user_defined: offer.user_defined,
                    sub_channel_index: offer.sub_channel_index.into(),
                    reserved2: 0.into(),
                    relid: offer.channel.0.into(),
                    monitor_id: 0,
                    monitor_allocated: offer.monitor_allocated.into(),
                    is_dedicated_interrupt: u16::from(offer.dedicated_interrupt).into(),
                    connection_id: offer.connection.0.into(),
                },
            ),
            Self::RescindChannelOffer { channel } => one_id(number::RESCIND_CHANNEL_OFFER, channel.0),
            Self::AllOffersDelivered => ControlMessage::new(number::ALL_OFFERS_DELIVERED),
            Self::OpenChannelResult {
                channel,
                open_id,
                status,
            } => result3(number::OPEN_CHANNEL_RESULT, channel.0, open_id, status),
            Self::GpadlCreated {
                channel,
                gpadl,
                status,
            } => result3(number::GPADL_CREATED, channel.0, gpadl.0, status),
            Self::GpadlTorndown { gpadl } => one_id(number::GPADL_TORNDOWN, gpadl.0),
            Self::VersionResponse(response) => ControlMessage::with(
                number::VERSION_RESPONSE,
                &layout::VersionResponseLayout {
                    version_supported: response.supported.into(),
                    connection_state: response.connection_state,
                    padding: 0.into(),
                    message_connection_id: response.message_connection.0.into(),
                },
            ),
            Self::UnloadResponse => ControlMessage::new(number::UNLOAD_RESPONSE),
            Self::TlConnectResult {
                endpoint,
                service,
                status,
            } => ControlMessage::with(
                number::TL_CONNECT_RESULT,
                &layout::TlConnectResultLayout {
                    endpoint: endpoint.0,
                    service: service.0,
                    status: status.into(),
                },
            ),
            Self::ModifyChannelResponse { channel, status } => {
                two_ids(number::MODIFY_CHANNEL_RESPONSE, channel.0, status)
            }
            Self::Unknown(message_type) => ControlMessage::new(message_type),
        }
    }

    /// Parses a message of the host: the guest's side, for the synthetic guest and for tests.
    pub fn parse(bytes: &[u8]) -> Result<Self, GuestFault> {
        let (message_type, rest) = header(bytes)?;
        Ok(match message_type {
            number::OFFER_CHANNEL => {
                let (offer, _) = body::<layout::OfferChannel>(message_type, rest)?;
                Self::OfferChannel(Offer {
                    interface: Guid(offer.interface),
                    instance: Guid(offer.instance),
                    flags: offer.flags.get(),
                    mmio_megabytes: offer.mmio_megabytes.get(),
                    user_defined: offer.user_defined,
                    sub_channel_index: offer.sub_channel_index.get(),
                    channel: ChannelId(offer.relid.get()),
                    monitor_allocated: offer.monitor_allocated & 1 != 0,
                    dedicated_interrupt: offer.is_dedicated_interrupt.get() & 1 != 0,
                    connection: ConnectionId(offer.connection_id.get()),
                })
            }
            number::RESCIND_CHANNEL_OFFER => Self::RescindChannelOffer {
                channel: one_channel(message_type, rest)?,
            },
            number::ALL_OFFERS_DELIVERED => Self::AllOffersDelivered,
            number::OPEN_CHANNEL_RESULT => {
                let (result, _) = body::<layout::Result3>(message_type, rest)?;
                Self::OpenChannelResult {
                    channel: ChannelId(result.relid.get()),
                    open_id: result.id.get(),
                    status: result.status.get(),
                }
            }
            number::GPADL_CREATED => {
                let (result, _) = body::<layout::Result3>(message_type, rest)?;
                Self::GpadlCreated {
                    channel: ChannelId(result.relid.get()),
                    gpadl: GpadlId(result.id.get()),
                    status: result.status.get(),
                }
            }
            number::GPADL_TORNDOWN => Self::GpadlTorndown {
                gpadl: GpadlId(body::<layout::OneId>(message_type, rest)?.0.id.get()),
            },
            number::VERSION_RESPONSE => {
                let (response, _) = body::<layout::VersionResponseLayout>(message_type, rest)?;
                Self::VersionResponse(VersionResponse {
                    supported: response.version_supported != 0,
                    connection_state: response.connection_state,
                    message_connection: ConnectionId(response.message_connection_id.get()),
                })
            }
            number::UNLOAD_RESPONSE => Self::UnloadResponse,
            number::TL_CONNECT_RESULT => {
                let (result, _) = body::<layout::TlConnectResultLayout>(message_type, rest)?;
                Self::TlConnectResult {
                    endpoint: Guid(result.endpoint),
                    service: Guid(result.service),
                    status: result.status.get(),
                }
            }
            number::MODIFY_CHANNEL_RESPONSE => {
                let (ids, _) = body::<layout::TwoIds>(message_type, rest)?;
                Self::ModifyChannelResponse {
                    channel: ChannelId(ids.relid.get()),
                    status: ids.id.get(),
                }
            }
            other => Self::Unknown(other),
        })
    }
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
