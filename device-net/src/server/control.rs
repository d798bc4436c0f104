//! Control messages: NVSP's, which the session answers, and RNDIS's, which the adapter answers.

use super::ServerError;
use super::nic::Nic;
use crate::netvsp::receive::Credits;
use crate::netvsp::session::{Answer, Effect, Origin, Surroundings};
use crate::netvsp::wire::{GuestMessage, HostMessage, NvspStatus};
use vmbus::channel::{Port, Token};

/// Limit: responses that wait for the guest to make room. Linux has one request at a time.
const RESPONSES_MAX: usize = 64;

/// A message of ours to the guest's RNDIS driver, and the request that it answers.
pub struct Response {
    pub token: Option<Token>,
    pub message: Vec<u8>,
}

impl Nic {
    /// Handles an NVSP message whose sender waits for a completion.
    pub(super) fn on_nvsp(
        &mut self,
        port: &Port,
        index: u16,
        token: Token,
        message: GuestMessage,
    ) -> Result<(), ServerError> {
        let answer = self.apply(port, message, Origin::Fresh)?;
        self.answer(index, token, answer);
        Ok(())
    }

    /// The same, taken by a predecessor.
    pub(super) fn replay_nvsp(&mut self, port: &Port, token: Token, bytes: &[u8]) -> Result<(), ServerError> {
        let answer = match GuestMessage::parse(bytes) {
            Ok(message) => self.apply(port, message, Origin::Replayed)?,
            Err(_) => Answer::Message(HostMessage::RndisPacketComplete {
                status: NvspStatus::FAIL,
            }),
        };
        self.answer(0, token, answer);
        Ok(())
    }

    fn answer(&mut self, index: u16, token: Token, answer: Answer) {
        let Some(channel) = self.channels.get_mut(&index) else {
            token.abandon();
            return;
        };
        // Quirk(Linux netvsc): an empty completion is understood only for SWITCH_DATA_PATH; whoever wants a completion
        // for a message that has none gets a harmless one.
        let completed = match answer {
            Answer::Empty => channel.endpoint.complete(token, &[]),
            Answer::Message(message) => channel.endpoint.complete(token, &message.emit()),
            Answer::None => {
                let message = HostMessage::RndisPacketComplete {
                    status: NvspStatus::SUCCESS,
                };
                channel.endpoint.complete(token, &message.emit())
            }
        };
        channel.check(completed);
    }

    /// Handles an NVSP message that nobody waits for.
    pub(super) fn apply_quiet(&mut self, port: &Port, message: GuestMessage) -> Result<(), ServerError> {
        let silent = matches!(
            message,
            GuestMessage::NdisVersion { .. }
                | GuestMessage::NdisConfig { .. }
                | GuestMessage::RevokeReceiveBuffer { .. }
                | GuestMessage::RevokeSendBuffer { .. }
        );
        if !silent {
            self.faults.note(
                0,
                &"a message that must be answered, from a guest that wants no answer",
            );
            return Ok(());
        }
        self.apply(port, message, Origin::Fresh)?;
        Ok(())
    }

    /// Lets the session decide, saves what it decided, and carries it out.
    fn apply(&mut self, port: &Port, message: GuestMessage, origin: Origin) -> Result<Answer, ServerError> {
        let gpadl_bytes = |gpadl| {
            port.gpadl(gpadl)
                .map(|area| u32::try_from(area.len()).unwrap_or(u32::MAX))
        };
        let around = Surroundings {
            max_sub_channels: self.traits.queues - 1,
            gpadl_bytes: &gpadl_bytes,
        };
        match self.state.session.on_message(message, origin, &around) {
            Ok(outcome) => {
                self.save(port)?;
                if let Some(effect) = outcome.effect {
                    self.carry_out(port, effect);
                }
                Ok(outcome.answer)
            }
            Err(refusal) => {
                self.faults.note(0, &refusal.fault);
                Ok(Answer::Message(refusal.answer))
            }
        }
    }

    pub(super) fn carry_out(&mut self, port: &Port, effect: Effect) {
        match effect {
            Effect::ReceiveBufferGiven(buffer) => {
                if self
                    .receive_buffer
                    .as_ref()
                    .is_none_or(|(known, _)| *known != buffer)
                {
                    // A journal that names packets of another buffer is no server's.
                    for channel in self.channels.values_mut() {
                        channel.outstanding.orphan_all();
                    }
                    self.receive_buffer = port.gpadl(buffer.gpadl).map(|area| (buffer, area));
                    self.credits = Credits::new(buffer.suballocation_count);
                }
            }
            Effect::ReceiveBufferRevoked => {
                self.discard_assembled();
                for channel in self.channels.values_mut() {
                    channel.outstanding.orphan_all();
                }
                self.receive_buffer = None;
                self.credits = Credits::default();
            }
            Effect::SendBufferGiven(buffer) => {
                self.send_buffer = port.gpadl(buffer.gpadl).map(|area| (buffer, area));
            }
            Effect::SendBufferRevoked => {
                self.send_buffer = None;
                for transmission in std::mem::take(&mut self.queued) {
                    self.counters.sent_overflow += 1;
                    self.finish(transmission);
                }
            }
            Effect::OfferSubChannels(count) => self.offer = Some(count),
        }
    }

    /// Handles an RNDIS control message, fresh or replayed.
    pub(super) fn on_rndis(
        &mut self,
        port: &Port,
        index: u16,
        token: Option<Token>,
        request: &[u8],
    ) -> Result<(), ServerError> {
        let negotiated_mtu = self
            .state
            .session
            .agreement()
            .map_or(self.traits.mtu_bytes, |agreement| agreement.mtu_bytes());
        let before = self.state.adapter.clone();
        let response = self
            .state
            .adapter
            .on_request(request, &self.traits, negotiated_mtu);
        if self.state.adapter != before {
            self.save(port)?;
            self.on_filter_changed(before.filter.is_closed());
        }
        match response {
            Ok(Some(message)) if self.receive_buffer.is_some() && self.responses.len() < RESPONSES_MAX => {
                self.responses.push_back(Response { token, message });
                self.send_responses();
            }
            Ok(Some(_)) => {
                self.faults
                    .note(index, &"an RNDIS request whose response has nowhere to go");
                self.complete_request(token, NvspStatus::FAIL);
            }
            Ok(None) => self.complete_request(token, NvspStatus::SUCCESS),
            Err(fault) => {
                self.faults.note(index, &fault);
                self.complete_request(token, NvspStatus::INVALID_RNDIS_PACKET);
            }
        }
        Ok(())
    }

    fn on_filter_changed(&mut self, was_closed: bool) {
        let is_closed = self.state.adapter.filter.is_closed();
        if is_closed {
            self.discard_assembled();
        } else if was_closed {
            self.backlog_stale = true;
            self.backend_readable = true;
        }
    }

    fn complete_request(&mut self, token: Option<Token>, status: NvspStatus) {
        let Some(token) = token else { return };
        match self.channels.get_mut(&0) {
            Some(channel) => {
                let completed = channel
                    .endpoint
                    .complete(token, &HostMessage::RndisPacketComplete { status }.emit());
                channel.check(completed);
            }
            None => token.abandon(),
        }
    }

    /// Stages responses, each together with the completion of its request, as far as there is room.
    pub(super) fn send_responses(&mut self) {
        while let Some(Response { token, message }) = self.responses.pop_front() {
            if !self.send_response(&message) {
                if self.receive_buffer.is_some() {
                    self.responses.push_front(Response { token, message });
                    break;
                }
                self.complete_request(token, NvspStatus::FAIL);
                continue;
            }
            self.complete_request(token, NvspStatus::SUCCESS);
        }
    }

    /// Stages one response. False: no sub-allocation, or no room.
    fn send_response(&mut self, message: &[u8]) -> bool {
        if !self.awaited.is_empty() {
            return false;
        }
        let Some((buffer, area)) = &self.receive_buffer else {
            return false;
        };
        let Some(channel) = self.channels.get_mut(&0) else {
            return false;
        };
        let Some(suballocation) = self.credits.draw_for_control() else {
            return false;
        };
        let fits = message.len() <= buffer.suballocation_bytes as usize
            && area
                .write(u64::from(buffer.offset_of(suballocation)), message)
                .is_ok();
        let sent = fits && channel.send_control(buffer, suballocation, message.len() as u32);
        if !sent {
            self.credits.put_back(suballocation);
        }
        sent
    }
}
