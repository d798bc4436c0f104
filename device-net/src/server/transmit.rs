//! From the guest to the backend.

use super::ServerError;
use super::nic::Nic;
use super::saved::slot;
use crate::backend::{Gone, OutgoingFrame, Sent};
use crate::frame::outgoing;
use crate::netvsp::session::failing_answer;
use crate::netvsp::wire::{GuestMessage, HostMessage, MESSAGE_BYTES, NvspStatus, RndisKind, SectionClaim};
use crate::rndis::control::{PACKETS_PER_MESSAGE, REQUEST_BYTES_MAX};
use crate::rndis::packet::{OutgoingPacket, PACKET_HEADER_BYTES, WINDOW_BYTES};
use crate::rndis::wire::RndisFault;
use std::fmt::Display;
use vmbus::channel::{Port, Token};
use vmbus::fault::GuestFault;
use vmbus::journal::Step;
use vmbus::mem::GuestSpans;
use vmbus::wire::{Packet, PacketKind};

/// Limit: packets taken from one channel before their frames are sent and completed, so that other channels and received
/// frames get their turn. With 64 the guest waited longer for the first completions, and frames per second were the same;
/// with 24 the last of what had gathered while nobody served came a whole round later.
const BATCH_PACKETS: usize = 32;
/// Limit: packets that wait for the backend. About a megabyte of TCP segments, which is what a fast peer may have in
/// flight; more waiting only makes senders believe in a longer line.
const QUEUED_PACKETS_MAX: usize = 256;

/// A packet that was taken.
pub enum Work {
    Frames(Transmission),
    Nvsp { token: Token, message: GuestMessage },
    Rndis { token: Token, request: Vec<u8> },
}

impl Work {
    pub fn into_token(self) -> Option<Token> {
        match self {
            Self::Frames(transmission) => transmission.token,
            Self::Nvsp { token, .. } | Self::Rndis { token, .. } => Some(token),
        }
    }
}

/// A packet of frames on its way out.
pub struct Transmission {
    pub channel: u16,
    /// None for a packet whose sender wants no completion.
    pub token: Option<Token>,
    /// The section's part and the ranges, in order: RNDIS messages back to back.
    pub spans: GuestSpans,
    /// Where the next message begins.
    pub offset: usize,
    pub messages: u32,
    pub status: NvspStatus,
}

/// Whether the socket to `bulkhead-bus` must be read before a packet makes sense.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Hearing {
    #[default]
    Idle,
    /// A packet was left in the ring for it.
    Wanted,
    /// It was read since.
    Heard,
}

/// What reading one packet led to.
enum Read {
    /// It is in the batch, or needed nothing more.
    Next,
    /// It is in the ring still, and must be the first of the next round: it changes the session and needs no completion,
    /// or something must be heard before it.
    Alone,
    /// The journal has no slot.
    Stop,
}

impl Nic {
    /// Reads a batch of packets from one channel and does what they ask for. True if there may be more.
    pub(super) fn serve_channel(&mut self, port: &Port, index: u16) -> Result<bool, ServerError> {
        let mut read = 0;
        let mut again = false;
        while self.batch.len() < BATCH_PACKETS {
            match self.read_packet(port, index)? {
                None => break,
                Some(Read::Next) => read += 1,
                Some(Read::Alone) => {
                    again = true;
                    break;
                }
                Some(Read::Stop) => break,
            }
        }
        if let Some(channel) = self.channels.get_mut(&index)
            && read > 0
        {
            let committed = channel.endpoint.commit_taken();
            if channel.check(committed).is_some() {
                self.credits.commit_returns();
            }
        }
        while let Some(work) = self.batch.pop_front() {
            match work {
                Work::Frames(transmission) => self.transmit(port, transmission),
                Work::Nvsp { token, message } => self.on_nvsp(port, index, token, message)?,
                Work::Rndis { token, request } => self.on_rndis(port, index, Some(token), &request)?,
            }
        }
        Ok(again || read > 0)
    }

    /// Reads one packet. `None`: there is none, or it could not be answered now.
    fn read_packet(&mut self, port: &Port, index: u16) -> Result<Option<Read>, ServerError> {
        let mut packet_buf = std::mem::take(&mut self.packet_buf);
        let received = match self.channels.get_mut(&index) {
            Some(channel) if channel.broken.is_none() => {
                if channel.endpoint.can_answer(MESSAGE_BYTES) {
                    let received = channel.endpoint.receive(&mut packet_buf);
                    channel.check(received).flatten()
                } else {
                    let broken = channel.endpoint.broken().map_or(Ok(()), Err);
                    channel.check(broken);
                    None
                }
            }
            _ => None,
        };
        let read = match received {
            Some(packet) => Some(self.on_packet(port, index, &packet)?),
            None => None,
        };
        self.packet_buf = packet_buf;
        Ok(read)
    }

    fn on_packet(&mut self, port: &Port, index: u16, packet: &Packet<'_>) -> Result<Read, ServerError> {
        let message = match GuestMessage::parse(packet.payload) {
            Ok(message) => message,
            Err(fault) => return Ok(self.refuse(index, packet, &fault, GuestMessage::Unknown(0))),
        };
        match (packet.kind, message) {
            (PacketKind::COMPLETION, GuestMessage::RndisPacketComplete { .. }) => {
                self.on_received_completion(index, packet.transaction_id);
                Ok(Read::Next)
            }
            (PacketKind::IN_BAND | PacketKind::GPA_DIRECT, GuestMessage::RndisPacket { kind, section }) => {
                Ok(self.on_rndis_packet(index, packet, message, kind, section))
            }
            (PacketKind::IN_BAND, message) if index == 0 => {
                if self.awaits_gpadl(port, message) {
                    return Ok(self.leave_in_ring());
                }
                if !packet.completion_requested {
                    return self.on_quiet_message(port, message);
                }
                let bytes = packet.payload.get(..MESSAGE_BYTES).unwrap_or(packet.payload);
                Ok(
                    self.take(index, packet.transaction_id, slot::NVSP, bytes, |token| {
                        Work::Nvsp { token, message }
                    }),
                )
            }
            _ => Ok(self.refuse(
                index,
                packet,
                &"packet of a kind that has no business here",
                message,
            )),
        }
    }

    /// Whether a message names a GPADL that we have not heard of and have not asked for.
    ///
    /// `bulkhead-bus` tells us of a GPADL before it lets the guest go on, but on a socket: by the time that the packet is
    /// in the ring the news is in the socket, and we may have read the socket before that. So the packet stays in the
    /// ring until the socket was read once more ([`Nic::heard`]); if the GPADL is unknown then, there is none.
    fn awaits_gpadl(&mut self, port: &Port, message: GuestMessage) -> bool {
        let (GuestMessage::ReceiveBuffer { gpadl, .. } | GuestMessage::SendBuffer { gpadl, .. }) = message
        else {
            return false;
        };
        if self.hearing == Hearing::Heard || port.gpadl(gpadl).is_some() {
            self.hearing = Hearing::Idle;
            return false;
        }
        self.hearing = Hearing::Wanted;
        true
    }

    fn leave_in_ring(&mut self) -> Read {
        match self.channels.get_mut(&0) {
            Some(channel) => {
                channel.endpoint.put_back();
                Read::Alone
            }
            None => Read::Stop,
        }
    }

    pub fn wants_to_hear(&self) -> bool {
        self.hearing == Hearing::Wanted
    }

    /// Everything that `bulkhead-bus` had said before this call has been carried out.
    pub fn heard(&mut self) {
        if self.hearing == Hearing::Wanted {
            self.hearing = Hearing::Heard;
        }
    }

    /// A control message that nobody waits for. Its effect must be saved before it leaves the ring, and what came before
    /// it must have had its effect.
    fn on_quiet_message(&mut self, port: &Port, message: GuestMessage) -> Result<Read, ServerError> {
        let Some(channel) = self.channels.get_mut(&0) else {
            return Ok(Read::Stop);
        };
        if !self.batch.is_empty() {
            channel.endpoint.put_back();
            return Ok(Read::Alone);
        }
        channel.endpoint.consume();
        self.apply_quiet(port, message)?;
        Ok(Read::Next)
    }

    fn take(
        &mut self,
        index: u16,
        transaction_id: u64,
        kind: u8,
        bytes: &[u8],
        work: impl FnOnce(Token) -> Work,
    ) -> Read {
        let Some(channel) = self.channels.get_mut(&index) else {
            return Read::Stop;
        };
        match channel.endpoint.take(kind, transaction_id, &[bytes]) {
            Ok(token) => {
                self.batch.push_back(work(token));
                Read::Next
            }
            Err(_) => {
                channel.endpoint.put_back();
                Read::Stop
            }
        }
    }

    /// Counts a fault and answers it, if an answer is wanted.
    fn refuse(
        &mut self,
        index: u16,
        packet: &Packet<'_>,
        fault: &dyn Display,
        message: GuestMessage,
    ) -> Read {
        self.faults.note(index, fault);
        let Some(channel) = self.channels.get_mut(&index) else {
            return Read::Stop;
        };
        if !packet.completion_requested || packet.kind == PacketKind::COMPLETION {
            channel.endpoint.consume();
            return Read::Next;
        }
        match channel.endpoint.take(slot::FRAMES, packet.transaction_id, &[]) {
            Ok(token) => {
                let completed = channel.endpoint.complete(token, &failing_answer(message).emit());
                channel.check(completed);
                Read::Next
            }
            Err(_) => {
                channel.endpoint.put_back();
                Read::Stop
            }
        }
    }

    fn on_received_completion(&mut self, index: u16, transaction_id: u64) {
        let Some(channel) = self.channels.get_mut(&index) else {
            return;
        };
        match channel.outstanding.settle(transaction_id, &mut self.credits) {
            Ok(held) => {
                let released = channel.endpoint.release(held);
                channel.check(released);
            }
            Err(fault) => {
                channel.endpoint.consume();
                self.faults.note(index, &fault);
            }
        }
    }

    fn on_rndis_packet(
        &mut self,
        index: u16,
        packet: &Packet<'_>,
        message: GuestMessage,
        kind: RndisKind,
        section: Option<SectionClaim>,
    ) -> Read {
        let Some(mut spans) = self.spans() else {
            return Read::Stop;
        };
        if let Err(fault) = self.resolve(packet, section, &mut spans) {
            self.keep_spans(spans);
            return self.refuse(index, packet, &fault, message);
        }
        match kind {
            RndisKind::Data => {
                let token = match self.token_for_frames(index, packet) {
                    Ok(token) => token,
                    Err(read) => {
                        self.keep_spans(spans);
                        return read;
                    }
                };
                self.batch.push_back(Work::Frames(Transmission {
                    channel: index,
                    token,
                    spans,
                    offset: 0,
                    messages: 0,
                    status: NvspStatus::SUCCESS,
                }));
                Read::Next
            }
            RndisKind::Control => {
                let mut request = vec![0; spans.len().min(REQUEST_BYTES_MAX)];
                let copied = spans.copy_to(&mut request);
                let fits = spans.len() <= REQUEST_BYTES_MAX;
                self.keep_spans(spans);
                if index != 0 || !packet.completion_requested || !fits || copied.is_err() {
                    let fault = "RNDIS control message on a sub-channel, without completion, or too long";
                    return self.refuse(index, packet, &fault, message);
                }
                let kept = request.clone();
                self.take(index, packet.transaction_id, slot::RNDIS, &kept, |token| {
                    Work::Rndis { token, request }
                })
            }
        }
    }

    fn token_for_frames(&mut self, index: u16, packet: &Packet<'_>) -> Result<Option<Token>, Read> {
        let Some(channel) = self.channels.get_mut(&index) else {
            return Err(Read::Stop);
        };
        if !packet.completion_requested {
            channel.endpoint.consume();
            return Ok(None);
        }
        match channel.endpoint.take(slot::FRAMES, packet.transaction_id, &[]) {
            Ok(token) => Ok(Some(token)),
            Err(_) => {
                channel.endpoint.put_back();
                Err(Read::Stop)
            }
        }
    }

    /// The guest memory that a SEND_RNDIS_PKT names: its section first, then its ranges.
    fn resolve(
        &self,
        packet: &Packet<'_>,
        section: Option<SectionClaim>,
        spans: &mut GuestSpans,
    ) -> Result<(), String> {
        if let Some(claim) = section {
            let (buffer, area) = self
                .send_buffer
                .as_ref()
                .ok_or("a section, but there is no send buffer")?;
            let place = buffer.place(claim).map_err(|fault| fault.to_string())?;
            area.append_spans(u64::from(place.offset), place.bytes as usize, spans)
                .map_err(|fault| fault.to_string())?;
        }
        if packet.kind == PacketKind::GPA_DIRECT {
            let ram = self.ram.as_ref().ok_or("no guest memory")?;
            let resolved = packet.gpa_direct().and_then(|claims| claims.resolve(ram, spans));
            resolved.map_err(|fault: GuestFault| fault.to_string())?;
        }
        Ok(())
    }

    /// Sends the frames of a packet and completes it, or queues it.
    fn transmit(&mut self, port: &Port, mut transmission: Transmission) {
        let behind = !self.queued.is_empty();
        if behind || !self.send_frames(&mut transmission) {
            if self.queued.len() >= QUEUED_PACKETS_MAX {
                self.counters.sent_overflow += 1;
                self.finish(transmission);
            } else {
                self.queued.push_back(transmission);
            }
            return;
        }
        port.journal().pass(Step::FramesSent);
        self.finish(transmission);
    }

    /// Goes on with what the backend did not take.
    pub(super) fn retry_queued(&mut self) {
        self.flush_backend();
        while let Some(mut transmission) = self.queued.pop_front() {
            if !self.send_frames(&mut transmission) {
                self.queued.push_front(transmission);
                break;
            }
            self.finish(transmission);
        }
    }

    fn flush_backend(&mut self) {
        let flushed = self.backend.as_mut().map(|backend| backend.flush());
        if let Some(Err(gone)) = flushed {
            self.backend_gone(&gone);
        }
    }

    /// Completes a packet, whatever has become of its frames.
    pub(super) fn finish(&mut self, transmission: Transmission) {
        let Transmission {
            channel,
            token,
            spans,
            status,
            ..
        } = transmission;
        self.keep_spans(spans);
        let Some(token) = token else { return };
        match self.channels.get_mut(&channel) {
            Some(channel) => {
                let answer = HostMessage::RndisPacketComplete { status }.emit();
                let completed = channel.endpoint.complete(token, &answer);
                channel.check(completed);
            }
            None => token.abandon(),
        }
    }

    /// Sends the frames of a packet from where it stands. False: the backend is full.
    fn send_frames(&mut self, transmission: &mut Transmission) -> bool {
        if !self.state.adapter.initialized || self.backend.is_none() {
            self.counters.sent_dropped += 1;
            return true;
        }
        while transmission.offset < transmission.spans.len() {
            match self.send_frame(transmission) {
                Ok(Some(message_bytes)) => {
                    transmission.offset += message_bytes;
                    transmission.messages += 1;
                }
                Ok(None) => return false,
                Err(Refused::Guest(fault)) => {
                    self.faults.note(transmission.channel, &fault);
                    transmission.status = NvspStatus::INVALID_RNDIS_PACKET;
                    break;
                }
                Err(Refused::Gone(gone)) => {
                    self.backend_gone(&gone);
                    break;
                }
            }
        }
        true
    }

    /// Sends one frame; the length of its message. `None`: the backend is full.
    fn send_frame(&mut self, transmission: &Transmission) -> Result<Option<usize>, Refused> {
        let Transmission {
            spans,
            offset,
            messages,
            ..
        } = transmission;
        if *messages >= PACKETS_PER_MESSAGE {
            return Err(Refused::Guest(RndisFault::TooManyMessages(
                PACKETS_PER_MESSAGE as usize,
            )));
        }
        let available = spans.len() - offset;
        let short = RndisFault::MessageTooShort {
            bytes: available,
            wanted: PACKET_HEADER_BYTES,
        };
        copy_window(spans, *offset, available, &mut self.window).ok_or(Refused::Guest(short))?;
        let packet = OutgoingPacket::parse(&self.window, available).map_err(Refused::Guest)?;
        let start = offset + packet.frame_offset;
        // The frame's own headers are usually in the window already; if not, it moves to the frame.
        let wanted = packet.frame_bytes.min(WINDOW_BYTES / 2);
        let headers = if self.window.len() >= packet.frame_offset + wanted {
            let end = self.window.len().min(packet.frame_offset + packet.frame_bytes);
            packet.frame_offset..end
        } else {
            copy_window(spans, start, packet.frame_bytes, &mut self.window).ok_or(Refused::Guest(short))?;
            0..self.window.len()
        };
        let prepared = match outgoing::prepare(
            &self.window[headers],
            packet.frame_bytes,
            &packet.requests,
            &mut self.head,
        ) {
            Ok(prepared) => prepared,
            Err(fault) => {
                self.faults.note(transmission.channel, &fault);
                self.counters.sent_dropped += 1;
                return Ok(Some(packet.message_bytes));
            }
        };
        let rest = spans
            .slice(start + prepared.replaces, packet.frame_bytes - prepared.replaces)
            .map_err(|_| Refused::Guest(short))?;
        let Some(backend) = &mut self.backend else {
            return Ok(Some(packet.message_bytes));
        };
        let frame = OutgoingFrame {
            vnet: &prepared.vnet,
            head: &self.head,
            rest: &rest,
        };
        match backend.send(&frame).map_err(Refused::Gone)? {
            Sent::Full => return Ok(None),
            Sent::Dropped => self.counters.sent_dropped += 1,
            Sent::Done => {
                self.counters.sent_frames += 1;
                self.counters.sent_bytes += packet.frame_bytes as u64;
            }
        }
        Ok(Some(packet.message_bytes))
    }
}

enum Refused {
    Guest(RndisFault),
    Gone(Gone),
}

/// Copies the first bytes at `offset` out of guest memory.
fn copy_window(spans: &GuestSpans, offset: usize, available: usize, window: &mut Vec<u8>) -> Option<()> {
    window.resize(available.min(WINDOW_BYTES), 0);
    spans.copy_to_at(offset, window).ok()
}
