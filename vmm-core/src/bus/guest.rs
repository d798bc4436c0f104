#![forbid(unsafe_code)]
//! What the guest's messages do. The one file of the control plane that handles values of the guest's choice.

use vmbus::ipc::messages::BusToServer;
use vmbus::wire::{
    ConnectionId, GpadlBody, GpadlHeader, GpadlId, GuestToHost, HostToGuest, InitiateContact, Offer,
    OpenChannel, TlConnect, VersionResponse,
};

use super::action::{Action, ChannelId, DeviceId, LogLevel, PostStatus};
use super::channels::{ChannelState, OpenClaim, OpenFault, Opening, Seen, Standing, check_open};
use super::connection::{
    AfterUnload, Answer, Connected, Connection, MESSAGE_CONNECTION_ID, OffersAsked, Verdict, judge,
};
use super::gpadls::{GpadlClaim, GpadlFault, GpadlState, Progress};
use super::servers::{Hold, WaitingFor};
use super::{Bus, FIRST_OPEN_EPOCH};
use crate::hyperv::hypercall::{MESSAGE_CONNECTIONS, signal_connection};

/// Type of a hypervisor message that holds a channel message: Linux 6.1 drivers/hv/connection.c vmbus_post_msg posts
/// with type 1 (TLFS 6.0b section 11.6 leaves types without bit 31 to the sender).
const CHANNEL_MESSAGE_TYPE: u32 = 1;

/// What a refused request gets: any number but 0 is an error to the guest. STATUS_UNSUCCESSFUL of MS-ERREF 2.3.1.
pub const STATUS_UNSUCCESSFUL: u32 = 0xC000_0001;

/// No such service: STATUS_CONNECTION_REFUSED of MS-ERREF 2.3.1.
const STATUS_CONNECTION_REFUSED: u32 = 0xC000_0236;

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
                self.log(LogLevel::Info, format_args!("guest unloaded VMBus"));
                self.post_to(target_vp, HostToGuest::UnloadResponse);
            }
            AfterUnload::Contact(Answer { target_vp, verdict }) => {
                let supported = match verdict {
                    Verdict::Accepted(version) => {
                        self.log(LogLevel::Info, format_args!("guest speaks VMBus {version}"));
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

/// Offers.
impl Bus {
    fn on_request_offers(&mut self, connected: Connected) {
        if connected.offers == OffersAsked::Asked {
            return self.fault("offers asked for twice", format_args!(""));
        }
        self.connection = Connection::Connected(Connected {
            offers: OffersAsked::Asked,
            ..connected
        });
        let devices: Vec<DeviceId> = self.devices.keys().copied().collect();
        for device in devices {
            self.offer_primary(device);
        }
        self.post(HostToGuest::AllOffersDelivered);
    }

    /// Offers the primary channel of a device, if the guest asked for offers.
    pub(super) fn offer_primary(&mut self, device: DeviceId) {
        if let Connection::Connected(Connected {
            offers: OffersAsked::Asked,
            ..
        }) = self.connection
        {
            self.offer(device, 0);
        }
    }

    /// Offers the sub-channels that the server wants, as far as their earlier lives are over.
    pub(super) fn offer_sub_channels(&mut self, device: DeviceId) {
        let wanted = self
            .devices
            .get(&device)
            .map_or(0, |entry| entry.wanted_sub_channels);
        for sub_index in 1..=wanted {
            if self.channels.find(device, sub_index).is_none() {
                self.offer(device, sub_index);
            }
        }
    }

    fn offer(&mut self, device: DeviceId, sub_index: u16) {
        let Some(offer) = self.devices.get(&device).map(|entry| entry.offer) else {
            return;
        };
        let Some(channel) = self.channels.offer(device, sub_index) else {
            return self.fault(
                "no relid left",
                format_args!("device {device}, index {sub_index}"),
            );
        };
        self.post(HostToGuest::OfferChannel(Offer {
            interface: offer.interface,
            instance: offer.instance,
            flags: 0,
            mmio_megabytes: 0,
            user_defined: [0; 120],
            sub_channel_index: sub_index,
            channel,
            monitor_allocated: false,
            dedicated_interrupt: true,
            connection: ConnectionId(signal_connection(channel.0)),
        }));
    }

    /// Takes back the offers of a device's sub-channels: their primary is closed, or about to be.
    fn rescind_sub_channels(&mut self, device: DeviceId) {
        if let Some(entry) = self.devices.get_mut(&device) {
            entry.wanted_sub_channels = 0;
        }
        for channel in self.channels.of_device(device) {
            let Some(entry) = self.channels.get_mut(channel) else {
                continue;
            };
            if entry.sub_index == 0 || entry.standing != Standing::Offered {
                continue;
            }
            entry.standing = Standing::Rescinded;
            self.close(channel);
            self.post(HostToGuest::RescindChannelOffer { channel });
        }
    }

    fn on_relid_released(&mut self, channel: ChannelId) {
        match self.channels.get_mut(channel) {
            Some(entry) if entry.standing == Standing::Rescinded => entry.standing = Standing::Released,
            Some(_) | None => {
                return self.fault(
                    "release of a channel that was not rescinded",
                    format_args!("{channel}"),
                );
            }
        }
        self.close(channel);
        for gpadl in self.gpadls.of_channel(channel) {
            self.release_gpadl(channel, gpadl, false);
        }
        self.forget_if_released(channel);
    }

    fn on_tl_connect(&mut self, connected: Connected, connect: TlConnect) {
        // Quirk(Linux 6.1 hv_sock): ignores the answer, and gives up after two seconds by itself.
        if connected.version.has_modify_channel() {
            self.post(HostToGuest::TlConnectResult {
                endpoint: connect.endpoint,
                service: connect.service,
                status: STATUS_CONNECTION_REFUSED,
            });
        }
    }
}

/// GPADLs.
impl Bus {
    fn on_gpadl_header(&mut self, header: GpadlHeader<'_>) {
        let channel = header.channel;
        let gpadl = header.gpadl.0;
        let begun = match self.channels.get(channel).map(|entry| entry.standing) {
            None | Some(Standing::Released) => Err(GpadlFault::NoSuchChannel { gpadl, channel }),
            Some(Standing::Offered | Standing::Rescinded) => GpadlClaim::parse(&header)
                .and_then(|(claim, pages)| self.gpadls.begin(claim, pages, &self.ram)),
        };
        self.after_gpadl_part(channel, gpadl, begun);
    }

    fn on_gpadl_body(&mut self, body: GpadlBody<'_>) {
        let gpadl = body.gpadl.0;
        let Some(channel) = self.gpadls.get(gpadl).map(|entry| entry.channel) else {
            return self.fault("pages for an unknown GPADL", format_args!("{}", body.gpadl));
        };
        let pages = body.pages().map(|page| page.0);
        match self.gpadls.extend(gpadl, pages, &self.ram) {
            // Nobody waits for an answer to these: the GPADL has its answer.
            Err(fault @ GpadlFault::NotAssembling(_)) => {
                self.fault("pages for a complete GPADL", format_args!("{fault}"))
            }
            extended => self.after_gpadl_part(channel, gpadl, extended),
        }
    }

    fn after_gpadl_part(&mut self, channel: ChannelId, gpadl: u32, part: Result<Progress, GpadlFault>) {
        let status = match part {
            Ok(Progress::Incomplete) => return,
            Ok(Progress::Complete) => {
                if let Some(device) = self.channels.get(channel).map(|entry| entry.device) {
                    self.tell_gpadl(device, gpadl);
                }
                STATUS_OK
            }
            Err(fault) => {
                self.fault("GPADL refused", format_args!("channel {channel}: {fault}"));
                STATUS_UNSUCCESSFUL
            }
        };
        self.post(HostToGuest::GpadlCreated {
            channel,
            gpadl: GpadlId(gpadl),
            status,
        });
    }

    /// The guest waits for TORNDOWN, holding locks: also for a channel that was rescinded, and for a GPADL that we do not
    /// know (its channel was released, say), of which nobody touches a page.
    fn on_gpadl_teardown(&mut self, channel: ChannelId, gpadl: GpadlId) {
        let Some(entry) = self.gpadls.get(gpadl.0) else {
            self.fault("teardown of an unknown GPADL", format_args!("{gpadl}"));
            return self.post_torndown(gpadl.0);
        };
        let owner = entry.channel;
        if owner != channel {
            return self.fault(
                "teardown for the wrong channel",
                format_args!("{gpadl} is of channel {owner}, not {channel}"),
            );
        }
        match entry.state {
            // It is being released with its channel; now the guest waits for it after all.
            GpadlState::Releasing {
                deadline,
                answer: false,
            } => {
                if let Some(entry) = self.gpadls.get_mut(gpadl.0) {
                    entry.state = GpadlState::Releasing {
                        deadline,
                        answer: true,
                    };
                }
            }
            GpadlState::Doomed | GpadlState::Releasing { answer: true, .. } => {
                self.fault("second teardown of a GPADL", format_args!("{gpadl}"));
            }
            GpadlState::Assembling { .. } => {
                self.gpadls.remove(gpadl.0);
                self.post_torndown(gpadl.0);
            }
            GpadlState::Ready => self.tear_down(channel, gpadl.0),
        }
    }

    fn tear_down(&mut self, channel: ChannelId, gpadl: u32) {
        let Some(entry) = self.channels.get(channel) else {
            return;
        };
        let is_ring = entry.opening().is_some_and(|opening| opening.ring_gpadl == gpadl);
        if is_ring && entry.standing == Standing::Offered {
            self.fault(
                "teardown of an open channel's ring",
                format_args!("channel {channel}"),
            );
            if let Some(entry) = self.gpadls.get_mut(gpadl) {
                entry.state = GpadlState::Doomed;
            }
            return;
        }
        // Of a rescinded channel the guest need not close anything.
        if is_ring {
            self.close(channel);
        }
        self.release_gpadl(channel, gpadl, true);
    }

    /// Has the server let go of a GPADL, then forgets it; with `answer`, the guest is told then.
    fn release_gpadl(&mut self, channel: ChannelId, gpadl: u32, answer: bool) {
        let Some(entry) = self.gpadls.get_mut(gpadl) else {
            return;
        };
        match &mut entry.state {
            GpadlState::Assembling { .. } => {
                self.gpadls.remove(gpadl);
                return;
            }
            GpadlState::Releasing { .. } => return,
            GpadlState::Ready | GpadlState::Doomed => {}
        }
        let Some(device) = self.channels.get(channel).map(|entry| entry.device) else {
            return;
        };
        let message = BusToServer::TeardownGpadl { gpadl };
        let hold = self.ask_to_let_go(device, WaitingFor::GpadlReleased(gpadl), message);
        let deadline = match hold {
            Hold::Free => None,
            Hold::Held(deadline) => deadline,
        };
        if let Some(entry) = self.gpadls.get_mut(gpadl) {
            entry.state = GpadlState::Releasing { deadline, answer };
        }
        if hold == Hold::Free {
            self.gpadl_released(gpadl);
        }
    }
}

/// Channels.
impl Bus {
    fn on_open(&mut self, open: OpenChannel) {
        let channel = open.channel;
        let opened = self.open(open);
        let status = match opened {
            Ok(()) => STATUS_OK,
            Err(fault) => {
                self.fault("open refused", format_args!("{fault}"));
                STATUS_UNSUCCESSFUL
            }
        };
        self.post(HostToGuest::OpenChannelResult {
            channel,
            open_id: open.open_id,
            status,
        });
        // The guest knows before its server does: either order is right, and this one is the quicker.
        if let (Ok(()), Some(device)) = (opened, self.channels.get(channel).map(|entry| entry.device)) {
            self.tell_open(device, channel);
        }
    }

    fn open(&mut self, open: OpenChannel) -> Result<(), OpenFault> {
        let channel = open.channel;
        let claim = OpenClaim {
            ring_gpadl: open.ring_gpadl.0,
            downstream_page_offset: open.downstream_page_offset,
            target_vp: open.target_vp,
        };
        let entry = self
            .channels
            .get_mut(channel)
            .filter(|entry| entry.standing == Standing::Offered)
            .ok_or(OpenFault::NotOffered(channel))?;
        let target_vp = check_open(channel, claim, self.gpadls.get(claim.ring_gpadl), self.vp_count)?;
        let opening = Opening {
            open_epoch: self.next_epoch,
            ring_gpadl: claim.ring_gpadl,
            downstream_page_offset: claim.downstream_page_offset,
            target_vp,
            seen: Seen::ByNone,
        };
        match &mut entry.state {
            ChannelState::Closed => entry.state = ChannelState::Open(opening),
            ChannelState::Closing {
                reopen: reopen @ None,
                ..
            } => *reopen = Some(opening),
            ChannelState::Open(_) | ChannelState::Closing { reopen: Some(_), .. } => {
                return Err(OpenFault::AlreadyOpen(channel));
            }
        }
        self.next_epoch = self.next_epoch.checked_add(1).unwrap_or(FIRST_OPEN_EPOCH);
        self.out.push(Action::BindSignal { channel });
        self.out.push(Action::BindInterrupt {
            channel,
            vp: target_vp,
        });
        Ok(())
    }

    fn on_close(&mut self, channel: ChannelId) {
        let Some(entry) = self.channels.get(channel) else {
            return self.fault("close of an unknown channel", format_args!("channel {channel}"));
        };
        if entry.opening().is_none() {
            // A rescinded sub-channel was closed with its primary; the guest may say so once more.
            if entry.standing == Standing::Offered {
                self.fault("close of a closed channel", format_args!("channel {channel}"));
            }
            return;
        }
        if entry.sub_index == 0 {
            let device = entry.device;
            self.rescind_sub_channels(device);
        }
        self.close(channel);
    }

    /// Closes a channel if it is open: nothing rings any more, and the server lets go.
    fn close(&mut self, channel: ChannelId) {
        let Some(entry) = self.channels.get(channel) else {
            return;
        };
        let (device, state) = (entry.device, entry.state);
        let closed = match state {
            ChannelState::Closed | ChannelState::Closing { reopen: None, .. } => return,
            ChannelState::Open(Opening { open_epoch, .. }) => {
                self.unbind(channel);
                let message = BusToServer::CloseChannel {
                    channel: channel.0,
                    open_epoch,
                };
                match self.ask_to_let_go(device, WaitingFor::ChannelClosed(channel), message) {
                    Hold::Free => ChannelState::Closed,
                    Hold::Held(deadline) => ChannelState::Closing {
                        open_epoch,
                        deadline,
                        reopen: None,
                    },
                }
            }
            // No server has heard of the second opening.
            ChannelState::Closing {
                open_epoch,
                deadline,
                reopen: Some(_),
            } => {
                self.unbind(channel);
                ChannelState::Closing {
                    open_epoch,
                    deadline,
                    reopen: None,
                }
            }
        };
        if let Some(entry) = self.channels.get_mut(channel) {
            entry.state = closed;
        }
        for gpadl in self.gpadls.of_channel(channel) {
            let doomed = self.gpadls.get(gpadl).map(|entry| entry.state) == Some(GpadlState::Doomed);
            if doomed {
                self.release_gpadl(channel, gpadl, true);
            }
        }
    }

    fn unbind(&mut self, channel: ChannelId) {
        self.out.push(Action::UnbindSignal { channel });
        self.out.push(Action::UnbindInterrupt { channel });
    }

    fn on_modify(&mut self, connected: Connected, channel: ChannelId, target_vp: u32) {
        if !connected.version.has_modify_channel() {
            return self.fault("modify before version 4.1", format_args!("channel {channel}"));
        }
        let moved = self.move_interrupt(channel, target_vp);
        if moved.is_none() {
            self.fault(
                "modify refused",
                format_args!("channel {channel} is not open, or there is no VP {target_vp}"),
            );
        }
        if connected.version.has_modify_channel_response() {
            let status = moved.map_or(STATUS_UNSUCCESSFUL, |_| STATUS_OK);
            self.post(HostToGuest::ModifyChannelResponse { channel, status });
        }
        // An event that went to the old VP's flags is looked for there by the guest; this is for one that got lost in
        // between.
        if let Some(vp) = moved {
            self.out.push(Action::RaiseInterrupt { channel, vp });
        }
    }

    fn move_interrupt(&mut self, channel: ChannelId, target_vp: u32) -> Option<u16> {
        let vp = u16::try_from(target_vp).ok().filter(|&vp| vp < self.vp_count)?;
        let entry = self.channels.get_mut(channel)?;
        let device = entry.device;
        let opening = entry.opening_mut()?;
        opening.target_vp = vp;
        let (open_epoch, seen) = (opening.open_epoch, opening.seen);
        self.out.push(Action::RebindInterrupt { channel, vp });
        if seen != Seen::ByNone {
            self.send(
                device,
                BusToServer::Retarget {
                    channel: channel.0,
                    open_epoch,
                    target_vp: vp,
                },
            );
        }
        Some(vp)
    }
}
