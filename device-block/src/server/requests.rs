//! From a packet of the guest, or a predecessor's journal, to the disks and back to an answer.

use super::Server;
use super::ending::Ending;
use crate::backend::engine::RequestId;
use crate::controller::Verdict;
use crate::storvsp::request::{JOURNAL_KIND, Request, SrbResult};
use crate::storvsp::wire::{PACKET_BYTES, VstorPacket};
use vmbus::channel::{NotTaken, RecoveredRequest, Token};
use vmbus::journal::Step;
use vmbus::ring::PacketBuf;
use zerocopy::IntoBytes;

/// Limit: requests read from one channel in a round, so that others get their turn and answers are not held up.
const ROUND_REQUESTS: usize = 64;

impl Server {
    /// Executes what a predecessor had taken and not answered.
    pub(super) fn replay(&mut self) {
        while self.can_start() {
            let Some((sub_index, request)) = self.replays.pop_front() else {
                break;
            };
            self.port.journal().pass(Step::ReplayBegun);
            let RecoveredRequest { token, payload } = request;
            match Request::from_kept(&payload) {
                Ok(request) => self.execute(sub_index, token, &request, true),
                // The predecessor wrote nonsense. The guest waits for an answer all the same.
                Err(fault) => {
                    tracing::warn!(%fault, "a request in the journal makes no sense");
                    self.send(sub_index, token, &SrbResult::Invalid.completion());
                }
            }
        }
    }

    /// Reads requests from all marked channels.
    pub(super) fn read(&mut self) {
        let marked: Vec<u16> = self
            .channels
            .iter()
            .filter(|(_, channel)| channel.marked)
            .map(|(index, _)| *index)
            .collect();
        let mut buffer = std::mem::take(&mut self.buffer);
        for sub_index in marked {
            if let Err(why) = self.read_channel(sub_index, &mut buffer) {
                self.break_channel(sub_index, why);
            }
        }
        self.buffer = buffer;
    }

    fn read_channel(&mut self, sub_index: u16, buffer: &mut PacketBuf) -> Result<(), String> {
        for _ in 0..ROUND_REQUESTS {
            let can_start = self.can_start() && self.replays.is_empty();
            let Some(channel) = self.channels.get_mut(&sub_index) else {
                return Ok(());
            };
            if !matches!(channel.ending, Ending::No) || !channel.endpoint.can_answer(PACKET_BYTES) {
                return Ok(());
            }
            let Some(packet) = channel
                .endpoint
                .receive(buffer)
                .map_err(|fault| fault.to_string())?
            else {
                return Ok(());
            };
            if !packet.completion_requested {
                // Nobody waits for it, and nothing that storvsp defines is sent that way.
                channel.endpoint.consume();
                self.ignored += 1;
                continue;
            }
            if !can_start {
                channel.endpoint.put_back();
                channel.starved = true;
                return Ok(());
            }
            let request = Request::from_packet(&packet).map_err(|fault| fault.to_string())?;
            let id = packet.transaction_id;
            match channel.endpoint.take(JOURNAL_KIND, id, &request.kept()) {
                Ok(token) => self.execute(sub_index, token, &request, false),
                Err(NotTaken::NoFreeSlot) => {
                    channel.endpoint.put_back();
                    return Ok(());
                }
                // More page numbers than the largest transfer has. Refused, with what fits as a memory of it.
                Err(NotTaken::TooLong { .. }) => {
                    let [packet, _] = request.kept();
                    match channel.endpoint.take(JOURNAL_KIND, id, &[packet]) {
                        Ok(token) => self.send(sub_index, token, &SrbResult::Invalid.completion()),
                        Err(_) => {
                            channel.endpoint.put_back();
                            return Ok(());
                        }
                    }
                }
            }
        }
        // Perhaps there is more: another round.
        Ok(())
    }

    fn execute(&mut self, sub_index: u16, token: Token, request: &Request<'_>, replay: bool) {
        let Some(ram) = self.port.ram() else {
            // Channels are opened after Attached only.
            token.abandon();
            return;
        };
        let id = token.transaction_id();
        match self
            .controller
            .on_request(&mut self.io, ram, sub_index, id, request, replay)
        {
            Verdict::Answer(answer) => self.send(sub_index, token, &answer),
            Verdict::Control { reply, offer } => self.on_session_step(sub_index, token, &reply, offer),
            Verdict::Reset => self.resets.push((sub_index, token)),
            Verdict::Active(id) => {
                if let Some(channel) = self.channels.get_mut(&sub_index) {
                    channel.active += 1;
                }
                if let Some(owed) = self.owed.get_mut(id as usize) {
                    debug_assert!(owed.is_none(), "a number of the engine was used twice");
                    *owed = Some((sub_index, token));
                }
                self.port.journal().pass(Step::RequestQueued);
            }
        }
    }

    /// The session has gone on: a successor must know before the guest does, and it must not find the packet in the ring
    /// again. Out of the journal it is known as answered; out of the ring it would come at the wrong time.
    fn on_session_step(&mut self, sub_index: u16, token: Token, reply: &VstorPacket, offer: Option<u16>) {
        if let Some(channel) = self.channels.get_mut(&sub_index)
            && let Err(fault) = channel.endpoint.commit_taken()
        {
            token.abandon();
            self.break_channel(sub_index, fault.to_string());
            return;
        }
        let Some(primary) = self.channels.get(&0) else {
            token.abandon();
            return;
        };
        if let Err(error) = self
            .port
            .save_state(primary.endpoint.open_epoch(), self.controller.session())
        {
            token.abandon();
            self.break_channel(sub_index, format!("the session cannot be saved: {error}"));
            return;
        }
        self.send(sub_index, token, reply);
        let Some(count) = offer else { return };
        // The guest counts on its answer being there before the offers.
        if let Some(channel) = self.channels.get_mut(&sub_index)
            && let Err(fault) = channel.endpoint.publish()
        {
            self.break_channel(sub_index, fault.to_string());
            return;
        }
        if let Err(fault) = self.port.offer_sub_channels(count) {
            tracing::warn!(%fault, "cannot ask for sub-channels");
        }
    }

    /// The request with this number at the disks is over.
    pub(super) fn answer(&mut self, id: RequestId, answer: &VstorPacket) {
        let Some((sub_index, token)) = self.owed.get_mut(id as usize).and_then(Option::take) else {
            return;
        };
        if let Some(channel) = self.channels.get_mut(&sub_index) {
            channel.active -= 1;
        }
        self.send(sub_index, token, answer);
    }

    /// Stages an answer on the channel on which the request came.
    pub(super) fn send(&mut self, sub_index: u16, token: Token, answer: &VstorPacket) {
        let Some(channel) = self.channels.get_mut(&sub_index) else {
            token.abandon();
            return;
        };
        channel.marked = true;
        if !matches!(channel.ending, Ending::No) {
            // Nobody looks at the ring any more.
            token.abandon();
            return;
        }
        if let Err(fault) = channel.endpoint.complete(token, answer.as_bytes()) {
            self.break_channel(sub_index, fault.to_string());
        }
    }

    pub(super) fn break_channel(&mut self, sub_index: u16, why: String) {
        if let Some(channel) = self.channels.get_mut(&sub_index) {
            channel.marked = true;
            if matches!(channel.ending, Ending::No) {
                channel.ending = Ending::Broken(why);
            }
        }
    }
}
