#![forbid(unsafe_code)]
//! The servers: who is attached to which device, what it was told, and what it still owes.
//!
//! ```text
//!   None ──its socket came──▶ Connected ──Hello──▶ Attached ──breaks the protocol, socket lost──▶ Condemned
//!     ▲                           │                   │                                              │
//!     └───────────────────────────┴── ServerGone ─────┴──────────────────────────────────────────────┘
//! ```
//!
//! - An `Attached` server was told everything: at its Hello the whole truth, then every change. So whatever is
//!   open or mapped may be touched by it, and it must say when it has let go; each such debt has a deadline.
//! - A `Condemned` server is not heard any more and gets nothing, but may still touch what it knew. Only
//!   ServerGone (its process was reaped) ends that.
//! - Debts (`debts.rs`) are settled by the acknowledgement or by ServerGone, by nothing else. A deadline only reports.
//!
//! A second server may be there and wait: it is told of the guest's memory at its Hello and of nothing else, so it owes
//! nothing. ServerGone of the one before lets it serve; its own ServerGone forgets it.
//!
//! Each message carries the generation of its sender; one that is not the present one is dropped and counted.

use vmbus::ipc::hello::PROTOCOL;
use vmbus::ipc::messages::{BusToServer, ServerToBus};

use super::Bus;
use super::action::{Action, ChannelId, DeadlineId, DeviceId, LogLevel};
use super::channels::{ChannelState, Opening, Seen};
use super::debts::Wait;
use super::offers::Device;

/// The process that serves a device. See the drawing above.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Server {
    None,
    Connected { generation: u32 },
    Attached { generation: u32, work: Work },
    Condemned { generation: u32 },
}

/// What an attached server is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    Serving,
    /// It was told to let go of everything.
    Quiescing {
        token: u64,
        deadline: DeadlineId,
    },
}

impl Server {
    pub fn generation(&self) -> Option<u32> {
        match *self {
            Server::None => None,
            Server::Connected { generation }
            | Server::Attached { generation, .. }
            | Server::Condemned { generation } => Some(generation),
        }
    }
}

/// Entry points for the shell.
impl Bus {
    /// The socket to a server of this generation exists. It gets everything when it has said hello and its predecessor is
    /// gone ([`Self::server_gone`]).
    pub fn server_attached(&mut self, device: DeviceId, generation: u32) -> Vec<Action> {
        let places = self.devices.get_mut(&device).map(Device::places);
        let free = places.and_then(|places| places.into_iter().find(|server| **server == Server::None));
        match free {
            Some(server) => *server = Server::Connected { generation },
            None => self.fault(
                "no place for a server",
                format_args!("device {device}, generation {generation}"),
            ),
        }
        self.take_actions()
    }

    /// The process was reaped: nothing of it touches the guest's memory any more.
    pub fn server_gone(&mut self, device: DeviceId, generation: u32) -> Vec<Action> {
        let Some(entry) = self.devices.get_mut(&device) else {
            return Vec::new();
        };
        if entry.waiting.generation() == Some(generation) {
            entry.waiting = Server::None;
            return self.take_actions();
        }
        if entry.server.generation() != Some(generation) {
            self.fault(
                "a server is gone that is not the present one",
                format_args!("device {device}, generation {generation}"),
            );
            return self.take_actions();
        }
        let was = std::mem::replace(&mut entry.server, Server::None);
        if let Server::Attached {
            work: Work::Quiescing { deadline, .. },
            ..
        } = was
        {
            self.clear_deadline(deadline);
        }
        self.let_go_of_all(device);
        self.settle_unload();
        self.promote(device);
        self.take_actions()
    }

    /// The socket to the server failed or was closed from its side. The supervisor is asked to replace it.
    pub fn server_lost(&mut self, device: DeviceId, generation: u32, why: &str) -> Vec<Action> {
        let why = format!("its connection broke: {why}");
        self.drop_server(device, generation, "server lost", why);
        self.take_actions()
    }

    /// A message of the server of this generation.
    pub fn on_server_message(
        &mut self,
        device: DeviceId,
        generation: u32,
        message: ServerToBus,
    ) -> Vec<Action> {
        self.dispatch_server_message(device, generation, message);
        self.take_actions()
    }

    /// A deadline that was set has passed.
    pub fn on_deadline(&mut self, id: DeadlineId) -> Vec<Action> {
        if let Some(Wait { device, waiting_for }) = self.waits.remove(&id) {
            let server = self.devices.get(&device).map(|entry| entry.server);
            if let Some(Server::Attached { generation, .. }) = server {
                self.out.push(Action::ReportSlow {
                    device,
                    generation,
                    waiting_for: waiting_for.to_string(),
                });
            }
        }
        self.take_actions()
    }
}

impl Bus {
    fn dispatch_server_message(&mut self, device: DeviceId, generation: u32, message: ServerToBus) {
        let Some(entry) = self.devices.get(&device) else {
            self.fault("message from an unknown device", format_args!("device {device}"));
            return;
        };
        if entry.waiting.generation() == Some(generation) {
            return match entry.waiting {
                Server::Connected { .. } => self.on_first_message(device, generation, message),
                Server::Attached { .. } => {
                    let why = "spoke while it had to wait".to_owned();
                    self.drop_server(device, generation, "server misbehaves", why);
                }
                Server::None | Server::Condemned { .. } => {}
            };
        }
        let server = entry.server;
        if server.generation() != Some(generation) {
            self.fault(
                "message of a stale generation",
                format_args!("device {device}, generation {generation}"),
            );
            return;
        }
        match server {
            Server::None | Server::Condemned { .. } => {}
            Server::Connected { .. } => self.on_first_message(device, generation, message),
            Server::Attached { work, .. } => self.on_message_at_work(device, generation, work, message),
        }
    }

    fn on_message_at_work(&mut self, device: DeviceId, generation: u32, work: Work, message: ServerToBus) {
        match (work, message) {
            (_, ServerToBus::Hello { .. }) => {
                self.condemn(device, "said Hello twice".to_owned());
            }
            (Work::Quiescing { token, deadline }, ServerToBus::Quiesced { token: said }) if said == token => {
                self.clear_deadline(deadline);
                self.set_server(
                    device,
                    Server::Attached {
                        generation,
                        work: Work::Serving,
                    },
                );
                self.settle_unload();
            }
            (_, ServerToBus::Quiesced { .. }) => {
                self.condemn(device, "said Quiesced unasked".to_owned());
            }
            // These crossed with the Quiesce: what they speak of is gone.
            (
                Work::Quiescing { .. },
                ServerToBus::OfferSubChannels { .. }
                | ServerToBus::ChannelClosed { .. }
                | ServerToBus::GpadlReleased { .. }
                | ServerToBus::ChannelBroken { .. },
            ) => {}
            (Work::Serving, ServerToBus::OfferSubChannels { count }) => {
                self.on_offer_sub_channels(device, count);
            }
            (Work::Serving, ServerToBus::ChannelClosed { channel, open_epoch }) => {
                self.on_channel_closed(device, ChannelId(channel), open_epoch)
            }
            (Work::Serving, ServerToBus::GpadlReleased { gpadl }) => {
                self.on_gpadl_released(device, gpadl);
            }
            (
                Work::Serving,
                ServerToBus::ChannelBroken {
                    channel,
                    open_epoch,
                    why,
                },
            ) => self.on_channel_broken(device, ChannelId(channel), open_epoch, &why),
        }
    }

    fn on_first_message(&mut self, device: DeviceId, generation: u32, message: ServerToBus) {
        let why = match message {
            ServerToBus::Hello { protocol, .. } if protocol != PROTOCOL => {
                format!("speaks protocol {protocol}, not {PROTOCOL}")
            }
            ServerToBus::Hello { generation: said, .. } if said != generation => {
                format!("says it is generation {said}")
            }
            ServerToBus::Hello { .. } => return self.attach(device, generation),
            _ => "did not say Hello first".to_owned(),
        };
        self.drop_server(device, generation, "server misbehaves", why);
    }

    /// Tells a server that said hello of the guest's memory, and lets it serve if it has no predecessor.
    fn attach(&mut self, device: DeviceId, generation: u32) {
        let Some(server) = self.place(device, generation) else {
            return;
        };
        *server = Server::Attached {
            generation,
            work: Work::Serving,
        };
        let attach = BusToServer::Attach {
            protocol: PROTOCOL,
            ram: self.ram.clone(),
            vp_count: self.vp_count,
        };
        self.out.push(Action::SendToServer {
            device,
            generation,
            message: attach,
        });
        self.log(
            LogLevel::Debug,
            format_args!("device {device}: server of generation {generation} attached"),
        );
        self.tell_all(device, generation);
    }

    /// The place of the server that is gone goes to the one that waits.
    fn promote(&mut self, device: DeviceId) {
        let Some(entry) = self.devices.get_mut(&device) else {
            return;
        };
        entry.server = std::mem::replace(&mut entry.waiting, Server::None);
        if let Server::Attached { generation, .. } = entry.server {
            self.tell_all(device, generation);
        }
    }

    /// Tells the server the whole truth about its device, if it is the one that is to serve.
    fn tell_all(&mut self, device: DeviceId, generation: u32) {
        let present = self.devices.get(&device).map(|entry| entry.server);
        if present.and_then(|server| server.generation()) != Some(generation) {
            return;
        }
        self.send(device, BusToServer::Serve);
        let channels = self.channels.of_device(device);
        let gpadls: Vec<u32> = self
            .gpadls
            .iter()
            .filter(|(_, gpadl)| gpadl.is_live() && channels.contains(&gpadl.channel))
            .map(|(handle, _)| handle)
            .collect();
        for gpadl in gpadls {
            self.tell_gpadl(device, gpadl);
        }
        for channel in channels {
            self.tell_open(device, channel);
        }
        self.send(device, BusToServer::HandedOver);
    }

    /// The server of this generation, present or waiting.
    fn place(&mut self, device: DeviceId, generation: u32) -> Option<&mut Server> {
        let mut places = self.devices.get_mut(&device)?.places().into_iter();
        places.find(|server| server.generation() == Some(generation))
    }

    /// Tells the attached server of a complete GPADL.
    pub(super) fn tell_gpadl(&mut self, device: DeviceId, gpadl: u32) {
        if let Some(entry) = self.gpadls.get(gpadl) {
            let message = BusToServer::Gpadl {
                channel: entry.channel.0,
                gpadl,
                pages: entry.pages.clone(),
                byte_count: entry.byte_count,
                byte_offset: entry.byte_offset,
            };
            self.send(device, message);
        }
    }

    /// Tells the attached server of a channel, if that is open. Without a server, the next one hears of it.
    pub(super) fn tell_open(&mut self, device: DeviceId, channel: ChannelId) {
        if !self.is_serving(device) {
            return;
        }
        let Some(entry) = self.channels.get_mut(channel) else {
            return;
        };
        let ChannelState::Open(Opening {
            open_epoch,
            ring_gpadl,
            downstream_page_offset,
            target_vp,
            ref mut seen,
        }) = entry.state
        else {
            return;
        };
        let fresh = match *seen {
            Seen::ByNone => {
                *seen = Seen::ByServer;
                true
            }
            Seen::ByServer | Seen::Broken => false,
        };
        let message = BusToServer::OpenChannel {
            channel: channel.0,
            sub_index: entry.sub_index,
            open_epoch,
            ring_gpadl,
            downstream_page_offset,
            target_vp,
            fresh,
        };
        self.send(device, message);
    }

    pub(super) fn is_serving(&self, device: DeviceId) -> bool {
        let server = self.devices.get(&device).map(|entry| entry.server);
        matches!(
            server,
            Some(Server::Attached {
                work: Work::Serving,
                ..
            })
        )
    }

    /// Sends, if a server is attached.
    pub(super) fn send(&mut self, device: DeviceId, message: BusToServer) {
        let server = self.devices.get(&device).map(|entry| entry.server);
        if let Some(Server::Attached { generation, .. }) = server {
            self.out.push(Action::SendToServer {
                device,
                generation,
                message,
            });
        }
    }

    pub(super) fn set_server(&mut self, device: DeviceId, server: Server) {
        if let Some(entry) = self.devices.get_mut(&device) {
            entry.server = server;
        }
    }

    /// A server broke the protocol.
    pub(super) fn condemn(&mut self, device: DeviceId, why: String) {
        let present = self.devices.get(&device).map(|entry| entry.server);
        if let Some(generation) = present.and_then(|server| server.generation()) {
            self.drop_server(device, generation, "server misbehaves", why);
        }
    }

    /// Stops listening to a server and asks for its end. What it may touch stays held until it is gone.
    fn drop_server(&mut self, device: DeviceId, generation: u32, what: &'static str, why: String) {
        let Some(server) = self.place(device, generation) else {
            return;
        };
        if matches!(server, Server::Condemned { .. }) {
            return;
        }
        *server = Server::Condemned { generation };
        // Debts are the present server's. A Quiesced that is owed is among them.
        let present = self.devices.get(&device).map(|entry| entry.server);
        let is_present = present.and_then(|server| server.generation()) == Some(generation);
        let overdue: Vec<DeadlineId> = self
            .waits
            .iter()
            .filter(|(_, wait)| is_present && wait.device == device)
            .map(|(&id, _)| id)
            .collect();
        for id in overdue {
            self.clear_deadline(id);
        }
        self.fault(
            what,
            format_args!("device {device}, generation {generation}: {why}"),
        );
        self.out.push(Action::Misbehaves {
            device,
            generation,
            why,
        });
    }

    fn on_offer_sub_channels(&mut self, device: DeviceId, count: u16) {
        let Some(entry) = self.devices.get_mut(&device) else {
            return;
        };
        let most = entry.offer.max_sub_channels;
        if count > most {
            self.condemn(
                device,
                format!("wants {count} sub-channels, and {most} are allowed"),
            );
            return;
        }
        // Repeated, it costs next to nothing: a server may say so as often as it likes.
        if count <= entry.wanted_sub_channels {
            return;
        }
        // Else it crossed with the closing of the primary.
        let primary = self.channels.find(device, 0).map(|(_, channel)| channel.state);
        if let Some(ChannelState::Open(_)) = primary {
            entry.wanted_sub_channels = count;
            self.offer_sub_channels(device);
        }
    }

    fn on_channel_broken(&mut self, device: DeviceId, channel: ChannelId, open_epoch: u32, why: &str) {
        let Some(entry) = self
            .channels
            .get_mut(channel)
            .filter(|entry| entry.device == device)
        else {
            return;
        };
        // A report about an earlier opening crossed with the guest's CLOSE.
        if let ChannelState::Open(opening) = &mut entry.state
            && opening.open_epoch == open_epoch
        {
            opening.seen = Seen::Broken;
            let why: String = why.chars().filter(|c| !c.is_control()).take(200).collect();
            self.fault(
                "guest broke a channel",
                format_args!("device {device}, channel {channel}: {why}"),
            );
        }
    }
}
