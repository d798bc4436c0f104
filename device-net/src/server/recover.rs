//! Channels that open, fresh or left by a predecessor, and channels that close.

use super::ServerError;
use super::channel::Channel;
use super::nic::Nic;
use super::saved::{Saved, State, parse_suballocations, slot};
use super::transmit::Hearing;
use crate::netvsp::receive::Credits;
use crate::netvsp::wire::{HostMessage, NvspStatus};
use vmbus::channel::{Endpoint, Port, Recovered, RecoveredHeld, RecoveredRequest};
use vmbus::journal::Step;
use vmbus::mem::GuestRam;

impl Nic {
    pub fn on_attached(&mut self, ram: Option<&GuestRam>) {
        self.ram = ram.cloned();
    }

    /// A channel is open. A sub-channel that comes before its primary waits for it.
    pub fn on_channel_opened(
        &mut self,
        port: &Port,
        endpoint: Box<Endpoint>,
        recovered: Recovered,
    ) -> Result<(), ServerError> {
        let index = endpoint.sub_index();
        if index != 0 && self.primary_epoch.is_none() {
            self.early.push((endpoint, recovered));
            return Ok(());
        }
        if index == 0
            && let Err(error) = self.on_primary_opened(port, &endpoint, recovered.fresh)
        {
            abandon_all(recovered);
            return Err(error);
        }
        let mut channel = Channel::new(endpoint);
        let held = self.restore_held(&mut channel, recovered.held);
        if let Err(why) = held {
            channel.broken = Some(why);
        }
        self.channels.insert(index, channel);
        self.awaited.remove(&index);
        if index != 0 && !self.state.open_sub_channels.contains(&index) {
            self.state.open_sub_channels.push(index);
            self.save(port)?;
        }
        for request in recovered.requests {
            self.replay(port, index, request)?;
        }
        if index == 0 {
            // Granted, but whether the offers went out nobody knows; asking again changes nothing.
            self.offer = self
                .state
                .session
                .agreement()
                .map(|agreement| agreement.sub_channels)
                .filter(|&count| count > 0);
            for (endpoint, recovered) in std::mem::take(&mut self.early) {
                self.on_channel_opened(port, endpoint, recovered)?;
            }
        }
        Ok(())
    }

    /// Begins the protocol anew, or goes on where the predecessor was.
    fn on_primary_opened(
        &mut self,
        port: &Port,
        endpoint: &Endpoint,
        fresh: bool,
    ) -> Result<(), ServerError> {
        let epoch = endpoint.open_epoch();
        self.primary_epoch = Some(epoch);
        let saved = if fresh {
            None
        } else {
            port.load_state::<Saved>(epoch)?
        };
        self.state = saved.map_or_else(State::default, |Saved(state)| state);
        // A predecessor wrote nonsense, or the guest has taken a buffer back since: nothing was lent.
        self.state
            .session
            .keep_only_lent(&|gpadl| port.gpadl(gpadl).map(|area| area.len()));
        if fresh {
            self.save(port)?;
        }
        self.awaited = self.state.open_sub_channels.iter().copied().collect();
        self.awaited.retain(|index| !self.channels.contains_key(index));
        self.receive_buffer = None;
        self.send_buffer = None;
        self.credits = Credits::default();
        if let Some(agreement) = self.state.session.agreement().cloned() {
            if let Some(buffer) = agreement.receive_buffer
                && let Some(area) = port.gpadl(buffer.gpadl)
            {
                self.credits = Credits::new(buffer.suballocation_count);
                self.receive_buffer = Some((buffer, area));
            }
            if let Some(buffer) = agreement.send_buffer {
                self.send_buffer = port.gpadl(buffer.gpadl).map(|area| (buffer, area));
            }
        }
        // Whether the guest heard of a change of the link is not known.
        if let Some(message) = self.state.adapter.on_link(self.traits.link_up) {
            self.responses
                .push_back(super::control::Response { token: None, message });
        }
        Ok(())
    }

    /// Every channel that is open has come: those that are still awaited the guest has closed while nobody served them,
    /// and what it held of the receive buffer through them it has given up.
    pub fn on_handed_over(&mut self, port: &Port) -> Result<(), ServerError> {
        self.awaited.clear();
        let before = self.state.open_sub_channels.len();
        let channels = &self.channels;
        self.state
            .open_sub_channels
            .retain(|index| channels.contains_key(index));
        if self.state.open_sub_channels.len() != before {
            self.save(port)?;
        }
        Ok(())
    }

    /// Takes over the packets that the guest has not given back.
    fn restore_held(&mut self, channel: &mut Channel, held: Vec<RecoveredHeld>) -> Result<(), String> {
        for RecoveredHeld { token, payload } in held {
            let mut numbers = parse_suballocations(&payload)
                .filter(|_| token.kind() == slot::RECEIVED)
                .ok_or("the journal names packets to the guest that are none")?;
            if self.receive_buffer.is_some() {
                self.credits
                    .mark_held(&numbers)
                    .map_err(|fault| fault.to_string())?;
            } else {
                // Revoked while the guest held them.
                numbers.clear();
            }
            let transaction_id = token.transaction_id();
            channel
                .outstanding
                .restore(transaction_id, numbers, token)
                .map_err(|_| format!("the journal names a packet {transaction_id:#x} that cannot be"))?;
        }
        Ok(())
    }

    /// A request that was taken and not answered.
    fn replay(&mut self, port: &Port, index: u16, request: RecoveredRequest) -> Result<(), ServerError> {
        port.journal().pass(Step::ReplayBegun);
        let RecoveredRequest { token, payload } = request;
        match token.kind() {
            // Control messages are taken on the primary only.
            slot::NVSP if index == 0 => self.replay_nvsp(port, token, &payload),
            slot::RNDIS if index == 0 => self.on_rndis(port, index, Some(token), &payload),
            // Its frames may have been sent, or are lost, as frames may be.
            _ => {
                if let Some(channel) = self.channels.get_mut(&index) {
                    let answer = HostMessage::RndisPacketComplete {
                        status: NvspStatus::SUCCESS,
                    }
                    .emit();
                    let completed = channel.endpoint.complete(token, &answer);
                    channel.check(completed);
                }
                Ok(())
            }
        }
    }

    /// Ends serving a channel, whatever is in flight on it. `None`: it is not open.
    pub fn close_channel(&mut self, port: &Port, index: u16) -> Result<Option<Endpoint>, ServerError> {
        if let Some(place) = self
            .early
            .iter()
            .position(|(endpoint, _)| endpoint.sub_index() == index)
        {
            let (endpoint, recovered) = self.early.swap_remove(place);
            abandon_all(recovered);
            return Ok(Some(*endpoint));
        }
        let Some(mut channel) = self.channels.remove(&index) else {
            return Ok(None);
        };
        for work in std::mem::take(&mut self.batch) {
            abandon(work.into_token());
        }
        let (gone, left) = std::mem::take(&mut self.queued)
            .into_iter()
            .partition::<std::collections::VecDeque<_>, _>(|transmission| transmission.channel == index);
        self.queued = left;
        for transmission in gone {
            abandon(transmission.token);
            self.keep_spans(transmission.spans);
        }
        channel.discard_assembled(&mut self.credits);
        // Tokens of packets to the guest may simply be dropped with their channel. But a guest that has not closed a
        // broken channel may still read what it was given: that returns with the next receive buffer.
        if channel.broken.is_none() {
            drop(channel.outstanding.forget_all(&mut self.credits));
        }
        if index == 0 {
            for response in self.responses.drain(..) {
                abandon(response.token);
            }
            self.state = State::default();
            self.receive_buffer = None;
            self.send_buffer = None;
            self.primary_epoch = None;
            self.hearing = Hearing::Idle;
            self.offer = None;
            // Sub-channels are closed before their primary; should one be left, the buffer is not its any more.
            for channel in self.channels.values_mut() {
                channel.discard_assembled(&mut self.credits);
                channel.outstanding.orphan_all();
            }
            self.credits = Credits::default();
        } else {
            self.state.open_sub_channels.retain(|&open| open != index);
            self.save(port)?;
        }
        Ok(Some(*channel.endpoint))
    }

    /// The guest takes a buffer back, or a ring.
    pub fn on_gpadl_teardown(&mut self, port: &Port, gpadl: u32) -> Result<(), ServerError> {
        let effects = self.state.session.on_gpadl_teardown(gpadl);
        if effects.is_empty() {
            return Ok(());
        }
        self.save(port)?;
        for effect in effects {
            self.carry_out(port, effect);
        }
        Ok(())
    }

    /// Every channel is closed, and with it all that the guest had given.
    pub fn on_quiesced(&mut self) {
        self.credits = Credits::default();
    }
}

fn abandon(token: Option<vmbus::channel::Token>) {
    if let Some(token) = token {
        token.abandon();
    }
}

/// Forgets what a predecessor left of a channel that is not served.
pub(super) fn abandon_all(recovered: Recovered) {
    for request in recovered.requests {
        request.token.abandon();
    }
}
