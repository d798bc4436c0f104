#![forbid(unsafe_code)]
//! GPADLs, made and torn down.

use vmbus::ipc::messages::BusToServer;
use vmbus::wire::{GpadlBody, GpadlHeader, GpadlId, HostToGuest};

use super::{STATUS_OK, STATUS_UNSUCCESSFUL};
use crate::bus::Bus;
use crate::bus::action::{ChannelId, DeviceId};
use crate::bus::channels::Standing;
use crate::bus::debts::{Hold, WaitingFor};
use crate::bus::gpadls::{GpadlClaim, GpadlFault, GpadlState, MAX_GPADLS_PER_DEVICE, Progress};

impl Bus {
    pub(super) fn on_gpadl_header(&mut self, header: GpadlHeader<'_>) {
        let channel = header.channel;
        let gpadl = header.gpadl.0;
        let owner = self
            .channels
            .get(channel)
            .map(|entry| (entry.standing, entry.device));
        let begun = match owner {
            None | Some((Standing::Released, _)) => Err(GpadlFault::NoSuchChannel { gpadl, channel }),
            Some((_, device)) if self.gpadls_of_device(device) >= MAX_GPADLS_PER_DEVICE => {
                Err(GpadlFault::TooManyOfDevice(gpadl))
            }
            Some((Standing::Offered | Standing::Rescinded, _)) => GpadlClaim::parse(&header)
                .and_then(|(claim, pages)| self.gpadls.begin(claim, pages, &self.ram)),
        };
        self.after_gpadl_part(channel, gpadl, begun);
    }

    /// How many GPADLs the channels of a device have, those that its server has not let go of included.
    fn gpadls_of_device(&self, device: DeviceId) -> usize {
        self.gpadls
            .iter()
            .filter_map(|(_, gpadl)| self.channels.get(gpadl.channel))
            .filter(|channel| channel.device == device)
            .count()
    }

    pub(super) fn on_gpadl_body(&mut self, body: GpadlBody<'_>) {
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
    pub(super) fn on_gpadl_teardown(&mut self, channel: ChannelId, gpadl: GpadlId) {
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
    pub(super) fn release_gpadl(&mut self, channel: ChannelId, gpadl: u32, answer: bool) {
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
