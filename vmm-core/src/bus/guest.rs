#![forbid(unsafe_code)]
//! What the guest's messages do. This file and its folder alone, of the control plane, handle values of the guest's choice.

mod gpadls;
mod offers;
mod openings;

use vmbus::wire::{ConnectionId, GpadlId, GuestToHost, HostToGuest, InitiateContact, VersionResponse};

use super::Bus;
use super::action::{Action, ChannelId, DeviceId, LogLevel, PostStatus};
use super::channels::ChannelState;
use super::connection::{
    AfterUnload, Answer, Connected, Connection, MESSAGE_CONNECTION_ID, OffersAsked, Verdict, judge,
};
use crate::hyperv::hypercall::MESSAGE_CONNECTIONS;

/// Type of a hypervisor message that holds a channel message: Linux 6.1 drivers/hv/connection.c vmbus_post_msg posts
/// with type 1 (TLFS 6.0b section 11.6 leaves types without bit 31 to the sender).
const CHANNEL_MESSAGE_TYPE: u32 = 1;

/// What a refused request gets: any number but 0 is an error to the guest. STATUS_UNSUCCESSFUL of MS-ERREF 2.3.1.
pub const STATUS_UNSUCCESSFUL: u32 = 0xC000_0001;

const STATUS_OK: u32 = 0;

impl Bus {
    /// HvPostMessage. `payload` is a private copy of at most 240 bytes; any bytes are allowed.
    ///
    /// `bulkhead-vcpu` refuses the call with status 0x13 (insufficient buffers) itself while its queue of messages to
    /// the guest is long.
    pub fn on_post_message(
        &mut self,
        connection: u32,
        message_type: u32,
        payload: &[u8],
    ) -> (PostStatus, Vec<Action>) {
        if !MESSAGE_CONNECTIONS.contains(&connection) {
            self.fault(
                "message to an unknown port",
                format_args!("connection id {connection:#x}"),
            );
            return (PostStatus::InvalidConnectionId, self.take_actions());
        }
        if message_type != CHANNEL_MESSAGE_TYPE {
            self.fault(
                "message of an unknown type",
                format_args!("type {message_type:#x}"),
            );
            return (PostStatus::Success, self.take_actions());
        }
        match GuestToHost::parse(payload) {
            Ok(message) => self.on_guest_message(message),
            Err(fault) => self.fault("malformed channel message", format_args!("{fault}")),
        }
        (PostStatus::Success, self.take_actions())
    }

    fn on_guest_message(&mut self, message: GuestToHost<'_>) {
        let connected = match (message, self.connection) {
            (GuestToHost::InitiateContact(contact), _) => return self.on_initiate_contact(contact),
            (GuestToHost::Unload, _) => return self.on_unload(),
            (GuestToHost::Unknown(number), _) => {
                return self.fault("unknown channel message", format_args!("type {number}"));
            }
            (_, Connection::Connected(connected)) => connected,
            (_, Connection::Disconnected | Connection::Unloading { .. }) => {
                return self.fault("message without contact", format_args!("{message:?}"));
            }
        };
        match message {
            GuestToHost::RequestOffers => self.on_request_offers(connected),
            GuestToHost::GpadlHeader(header) => self.on_gpadl_header(header),
            GuestToHost::GpadlBody(body) => self.on_gpadl_body(body),
            GuestToHost::GpadlTeardown { channel, gpadl } => self.on_gpadl_teardown(channel, gpadl),
            GuestToHost::OpenChannel(open) => self.on_open(open),
            GuestToHost::CloseChannel { channel } => self.on_close(channel),
            GuestToHost::ModifyChannel { channel, target_vp } => {
                self.on_modify(connected, channel, target_vp)
            }
            GuestToHost::RelidReleased { channel } => self.on_relid_released(channel),
            GuestToHost::TlConnectRequest(connect) => self.on_tl_connect(connected, connect),
            // Handled above.
            GuestToHost::InitiateContact(_) | GuestToHost::Unload | GuestToHost::Unknown(_) => {}
        }
    }
}

/// Contact and its end.
impl Bus {
    fn on_initiate_contact(&mut self, contact: InitiateContact) {
        self.disconnect(AfterUnload::Contact(judge(&contact, self.vp_count)));
    }

    fn on_unload(&mut self) {
        let target_vp = match self.connection {
            Connection::Connected(Connected { target_vp, .. }) => target_vp,
            Connection::Unloading {
                then: AfterUnload::Unloaded { target_vp } | AfterUnload::Contact(Answer { target_vp, .. }),
            } => target_vp,
            Connection::Unloading {
                then: AfterUnload::Reset { .. },
            }
            | Connection::Disconnected => 0,
        };
        self.disconnect(AfterUnload::Unloaded { target_vp });
    }

    /// Drops every channel and GPADL, tells every server to let go, and does `then` when all have.
    pub(super) fn disconnect(&mut self, then: AfterUnload) {
        if let Connection::Unloading {
            then: AfterUnload::Reset { .. },
        } = self.connection
            && !matches!(then, AfterUnload::Reset { .. })
        {
            return self.fault("message during a reset", format_args!("{then:?}"));
        }
        let mut holding: Vec<DeviceId> = Vec::new();
        for (_, channel) in self.channels.iter() {
            if channel.state != ChannelState::Closed {
                holding.push(channel.device);
            }
        }
        for (_, gpadl) in self.gpadls.iter() {
            if let (false, Some(channel)) = (gpadl.is_incomplete(), self.channels.get(gpadl.channel)) {
                holding.push(channel.device);
            }
        }
        let open: Vec<ChannelId> = self
            .channels
            .iter()
            .filter(|(_, channel)| channel.opening().is_some())
            .map(|(id, _)| id)
            .collect();
        for channel in open {
            self.unbind(channel);
        }
        self.channels.clear();
        self.gpadls.clear();
        self.clear_all_but_quiesce();
        self.connection = Connection::Unloading { then };
        let devices: Vec<DeviceId> = self.devices.keys().copied().collect();
        for device in devices {
            if let Some(entry) = self.devices.get_mut(&device) {
                entry.wanted_sub_channels = 0;
            }
            self.quiesce(device, holding.contains(&device));
        }
        self.settle_unload();
    }

    /// Does what waited for the servers to let go.
    pub(super) fn finish_unload(&mut self, then: AfterUnload) {
        self.connection = Connection::Disconnected;
        match then {
            AfterUnload::Unloaded { target_vp } => {
                self.news("guest unloaded VMBus", format_args!(""));
                self.post_to(target_vp, HostToGuest::UnloadResponse);
            }
            AfterUnload::Contact(Answer { target_vp, verdict }) => {
                let supported = match verdict {
                    Verdict::Accepted(version) => {
                        self.news("guest speaks VMBus", format_args!(" {version}"));
                        self.connection = Connection::Connected(Connected {
                            version,
                            target_vp,
                            offers: OffersAsked::NotYet,
                        });
                        true
                    }
                    Verdict::Refused(version) => {
                        self.log(LogLevel::Debug, format_args!("VMBus {version} refused"));
                        false
                    }
                };
                let response = VersionResponse {
                    supported,
                    connection_state: 0,
                    message_connection: ConnectionId(MESSAGE_CONNECTION_ID),
                };
                self.post_to(target_vp, HostToGuest::VersionResponse(response));
            }
            AfterUnload::Reset { token } => self.out.push(Action::QuiesceDone { token }),
        }
    }

    fn post_to(&mut self, vp: u16, message: HostToGuest) {
        self.out.push(Action::PostToGuest { vp, message });
    }

    /// Posts to where the guest wants its messages; drops the message if it is not connected.
    fn post(&mut self, message: HostToGuest) {
        if let Connection::Connected(Connected { target_vp, .. }) = self.connection {
            self.post_to(target_vp, message);
        }
    }

    pub(super) fn post_torndown(&mut self, gpadl: u32) {
        let gpadl = GpadlId(gpadl);
        self.post(HostToGuest::GpadlTorndown { gpadl });
    }
}
