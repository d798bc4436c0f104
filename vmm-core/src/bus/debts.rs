#![forbid(unsafe_code)]
//! What servers owe: a channel, a GPADL or everything is to be let go of, and the guest waits for that.
//!
//! A debt is settled by the acknowledgement or by the end of the server, by nothing else. A deadline only reports.

use vmbus::ipc::messages::BusToServer;

use super::Bus;
use super::action::{Action, ChannelId, DeadlineId, DeviceId};
use super::channels::{ChannelState, Standing};
use super::connection::Connection;
use super::gpadls::GpadlState;
use super::servers::{Server, Work};

/// How long a server may take to let go before it is reported. The guest waits for it, holding locks.
pub const ACKNOWLEDGE_MS: u32 = 1000;

/// What a deadline stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WaitingFor {
    ChannelClosed(ChannelId),
    GpadlReleased(u32),
    Quiesced,
}

/// A debt of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wait {
    pub device: DeviceId,
    pub waiting_for: WaitingFor,
}

/// Whether, and until when, a server has to let go of something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hold {
    /// Nobody touches it.
    Free,
    /// A server must acknowledge, with this deadline; `None`: a condemned server must be gone.
    Held(Option<DeadlineId>),
}

impl std::fmt::Display for WaitingFor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            WaitingFor::ChannelClosed(channel) => write!(f, "ChannelClosed for channel {channel}"),
            WaitingFor::GpadlReleased(gpadl) => write!(f, "GpadlReleased for GPADL {gpadl:#x}"),
            WaitingFor::Quiesced => write!(f, "Quiesced"),
        }
    }
}

impl Bus {
    /// Asks the server to let go of something, if one may touch it.
    pub(super) fn ask_to_let_go(
        &mut self,
        device: DeviceId,
        waiting_for: WaitingFor,
        message: BusToServer,
    ) -> Hold {
        match self.devices.get(&device).map(|entry| entry.server) {
            None | Some(Server::None | Server::Connected { .. }) => Hold::Free,
            Some(Server::Condemned { .. }) => Hold::Held(None),
            Some(Server::Attached { .. }) => {
                self.send(device, message);
                Hold::Held(Some(self.set_deadline(device, waiting_for)))
            }
        }
    }

    fn set_deadline(&mut self, device: DeviceId, waiting_for: WaitingFor) -> DeadlineId {
        let id = DeadlineId(self.next_deadline);
        self.next_deadline = self.next_deadline.wrapping_add(1);
        self.waits.insert(id, Wait { device, waiting_for });
        self.out.push(Action::SetDeadline {
            id,
            ms: ACKNOWLEDGE_MS,
        });
        id
    }

    /// Forgets all debts but those of servers that are told to let go of everything.
    pub(super) fn clear_all_but_quiesce(&mut self) {
        let settled: Vec<DeadlineId> = self
            .waits
            .iter()
            .filter(|(_, wait)| wait.waiting_for != WaitingFor::Quiesced)
            .map(|(&id, _)| id)
            .collect();
        for id in settled {
            self.clear_deadline(id);
        }
    }

    pub(super) fn clear_deadline(&mut self, id: DeadlineId) {
        if self.waits.remove(&id).is_some() {
            self.out.push(Action::ClearDeadline { id });
        }
    }

    /// Tells the server to drop everything, if it may touch anything. `holds`: it was told of something.
    pub(super) fn quiesce(&mut self, device: DeviceId, holds: bool) {
        let Some(Server::Attached {
            generation,
            work: Work::Serving,
        }) = self.devices.get(&device).map(|entry| entry.server)
        else {
            return;
        };
        if !holds {
            return;
        }
        let token = self.next_token;
        self.next_token = self.next_token.wrapping_add(1);
        self.send(device, BusToServer::Quiesce { token });
        let deadline = self.set_deadline(device, WaitingFor::Quiesced);
        self.set_server(
            device,
            Server::Attached {
                generation,
                work: Work::Quiescing { token, deadline },
            },
        );
    }

    /// Whether the end of a connection has to wait for this server.
    pub(super) fn holds_up_unload(server: &Server) -> bool {
        match server {
            Server::None
            | Server::Connected { .. }
            | Server::Attached {
                work: Work::Serving, ..
            } => false,
            Server::Attached {
                work: Work::Quiescing { .. },
                ..
            }
            | Server::Condemned { .. } => true,
        }
    }

    pub(super) fn on_channel_closed(&mut self, device: DeviceId, channel: ChannelId, open_epoch: u32) {
        let state = self
            .channels
            .get(channel)
            .filter(|entry| entry.device == device)
            .map(|entry| entry.state);
        match state {
            Some(ChannelState::Closing {
                open_epoch: closing, ..
            }) if closing == open_epoch => self.server_closed(channel),
            _ => self.condemn(
                device,
                format!("said ChannelClosed for channel {channel} unasked"),
            ),
        }
    }

    pub(super) fn on_gpadl_released(&mut self, device: DeviceId, gpadl: u32) {
        let entry = self.gpadls.get(gpadl);
        let owner = entry.and_then(|entry| self.channels.get(entry.channel));
        let releasing = entry.is_some_and(|entry| matches!(entry.state, GpadlState::Releasing { .. }));
        if releasing && owner.is_some_and(|channel| channel.device == device) {
            self.gpadl_released(gpadl);
        } else {
            self.condemn(device, format!("said GpadlReleased for GPADL {gpadl:#x} unasked"));
        }
    }

    /// Settles every debt of a device whose server is gone.
    pub(super) fn let_go_of_all(&mut self, device: DeviceId) {
        let channels = self.channels.of_device(device);
        let releasing: Vec<u32> = self
            .gpadls
            .iter()
            .filter(|(_, gpadl)| matches!(gpadl.state, GpadlState::Releasing { .. }))
            .filter(|(_, gpadl)| channels.contains(&gpadl.channel))
            .map(|(handle, _)| handle)
            .collect();
        // Channels first: a ring that waits for its channel is released after it.
        for channel in channels {
            let state = self.channels.get(channel).map(|entry| entry.state);
            if let Some(ChannelState::Closing { .. }) = state {
                self.server_closed(channel);
            }
        }
        for gpadl in releasing {
            self.gpadl_released(gpadl);
        }
    }

    /// The server touches the rings of the closing channel no more.
    fn server_closed(&mut self, channel: ChannelId) {
        let Some(entry) = self.channels.get_mut(channel) else {
            return;
        };
        let ChannelState::Closing { deadline, reopen, .. } = entry.state else {
            return;
        };
        let device = entry.device;
        entry.state = reopen.map_or(ChannelState::Closed, ChannelState::Open);
        if let Some(deadline) = deadline {
            self.clear_deadline(deadline);
        }
        self.tell_open(device, channel);
        self.forget_if_released(channel);
    }

    /// The server touches these pages no more.
    pub(super) fn gpadl_released(&mut self, gpadl: u32) {
        let Some(entry) = self.gpadls.remove(gpadl) else {
            return;
        };
        if let GpadlState::Releasing { deadline, answer } = entry.state {
            if let Some(deadline) = deadline {
                self.clear_deadline(deadline);
            }
            if answer {
                self.post_torndown(gpadl);
            }
        }
        self.forget_if_released(entry.channel);
    }

    /// Forgets a channel that the guest gave back, once nobody touches anything of it.
    pub(super) fn forget_if_released(&mut self, channel: ChannelId) {
        let Some(entry) = self.channels.get(channel) else {
            return;
        };
        let over = entry.standing == Standing::Released && entry.state == ChannelState::Closed;
        if over && self.gpadls.of_channel(channel).is_empty() {
            let device = entry.device;
            self.channels.remove(channel);
            self.offer_sub_channels(device);
        }
    }

    /// Answers what ended the connection, when the last server has let go.
    pub(super) fn settle_unload(&mut self) {
        let Connection::Unloading { then } = self.connection else {
            return;
        };
        if self
            .devices
            .values()
            .any(|entry| Self::holds_up_unload(&entry.server))
        {
            return;
        }
        self.finish_unload(then);
    }
}
