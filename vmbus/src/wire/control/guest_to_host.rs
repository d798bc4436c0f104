//! What a guest says about channels.

use super::super::control_layout as layout;
use super::super::gpa_direct::RangeList;
use super::super::packet::le_u64;
use super::{ChannelId, ControlMessage, GpadlId, body, header, number, one_channel, one_id, two_ids};
use crate::mem::Gpn;
use crate::wire::{GuestFault, Guid, Version};

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
