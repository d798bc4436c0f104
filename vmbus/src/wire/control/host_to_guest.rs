//! What the host says to a guest about channels.

use super::super::control_layout as layout;
use super::{
    ChannelId, ConnectionId, ControlMessage, GpadlId, body, header, number, one_channel, one_id, result3,
    two_ids,
};
use crate::wire::{GuestFault, Guid};

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
