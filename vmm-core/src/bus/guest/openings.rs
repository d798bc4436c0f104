#![forbid(unsafe_code)]
//! Channels, opened, moved to another processor, and closed.

use vmbus::ipc::messages::BusToServer;
use vmbus::wire::{HostToGuest, OpenChannel};

use super::{STATUS_OK, STATUS_UNSUCCESSFUL};
use crate::bus::action::{Action, ChannelId};
use crate::bus::channels::{ChannelState, OpenClaim, OpenFault, Opening, Seen, Standing, check_open};
use crate::bus::connection::Connected;
use crate::bus::debts::{Hold, WaitingFor};
use crate::bus::gpadls::GpadlState;
use crate::bus::{Bus, FIRST_OPEN_EPOCH};

impl Bus {
    pub(super) fn on_open(&mut self, open: OpenChannel) {
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
        let open_count = self
            .channels
            .iter()
            .filter(|(_, entry)| entry.opening().is_some())
            .count();
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
        if open_count >= self.max_open && entry.opening().is_none() {
            return Err(OpenFault::TooMany(self.max_open));
        }
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

    pub(super) fn on_close(&mut self, channel: ChannelId) {
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
    pub(super) fn close(&mut self, channel: ChannelId) {
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

    pub(super) fn unbind(&mut self, channel: ChannelId) {
        self.out.push(Action::UnbindSignal { channel });
        self.out.push(Action::UnbindInterrupt { channel });
    }

    pub(super) fn on_modify(&mut self, connected: Connected, channel: ChannelId, target_vp: u32) {
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
