//! Frames out and in.

use super::driver::Driver;
use super::wrong;
use crate::netvsp::wire::{GuestMessage, HostMessage, RECEIVE_BUFFER_ID, RndisKind, SectionClaim};
use crate::rndis::packet::{FrameRequests, emit_guest_header, parse_to_guest};
use crate::rndis::wire::number;
use std::time::Instant;
use vmbus::mem::{Gpa, PAGE_BYTES};
use vmbus::vsc::VscError;
use vmbus::wire::{Packet, PacketKind};

/// How a frame lies in the guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// All in a section of the send buffer.
    Section,
    /// All in pages named in the packet.
    Pages,
    /// RNDIS header in a section, frame in pages.
    Partial,
}

/// A frame that came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReceivedFrame {
    pub channel: usize,
    pub bytes: Vec<u8>,
    /// The checksum information, or 0.
    pub checksum: u32,
}

/// What a packet on its way out occupies.
#[derive(Debug, Default)]
pub struct Outgoing {
    section: Option<u32>,
    pages: Vec<Gpa>,
}

/// What is missing when a packet is completed that is not under way: it was completed before, or never sent.
pub(super) const UNASKED: &str = "packet for a completion";

/// RNDIS messages in one packet begin at multiples of this (INITIALIZE_COMPLETE).
const ALIGNMENT: usize = 8;

impl Driver {
    /// Sends one frame and kicks the server as the ring's rules say.
    pub fn send(&mut self, channel: usize, frame: &[u8], form: Form) -> Result<u64, VscError> {
        self.send_with(channel, frame, form, &FrameRequests::default())
    }

    /// The same with per-packet information.
    pub fn send_with(
        &mut self,
        channel: usize,
        frame: &[u8],
        form: Form,
        requests: &FrameRequests,
    ) -> Result<u64, VscError> {
        let id = match form {
            Form::Section => self
                .stage_batch(channel, &[frame], requests)?
                .ok_or(wrong("free section"))?,
            Form::Pages | Form::Partial => self.stage_pages(channel, frame, form, requests)?,
        };
        self.flush(channel)?;
        Ok(id)
    }

    /// Stages one packet with several frames back to back in a section. `None`: no section is free.
    pub fn stage_batch(
        &mut self,
        channel: usize,
        frames: &[&[u8]],
        requests: &FrameRequests,
    ) -> Result<Option<u64>, VscError> {
        let Some(section) = self.free_sections.pop() else {
            return Ok(None);
        };
        let mut bytes = Vec::new();
        for (index, frame) in frames.iter().enumerate() {
            let mut header = emit_guest_header(frame.len(), requests);
            let message_bytes = header.len() + frame.len();
            // Padding is part of the message; the last is not padded.
            if index + 1 < frames.len() {
                let padded = message_bytes.next_multiple_of(ALIGNMENT);
                header[4..8].copy_from_slice(&(padded as u32).to_le_bytes());
                bytes.extend_from_slice(&header);
                bytes.extend_from_slice(frame);
                bytes.resize(bytes.len() + padded - message_bytes, 0);
            } else {
                bytes.extend_from_slice(&header);
                bytes.extend_from_slice(frame);
            }
        }
        if bytes.len() > self.section_bytes as usize {
            return Err(wrong("room for these frames in a section"));
        }
        let at = Gpa(self.send_area.0 + u64::from(section) * u64::from(self.section_bytes));
        self.ram.write(at, &bytes)?;
        let claim = SectionClaim {
            index: section,
            used_bytes: bytes.len() as u32,
        };
        let message = GuestMessage::RndisPacket {
            kind: RndisKind::Data,
            section: Some(claim),
        };
        let ring = &mut self.channels[channel];
        let id = ring.new_transaction_id();
        ring.send_in_band(id, true, &[&message.emit()])?;
        self.outstanding[channel].insert(
            id,
            Outgoing {
                section: Some(section),
                pages: Vec::new(),
            },
        );
        Ok(Some(id))
    }

    /// Sends any bytes in a section as if they were RNDIS messages.
    pub fn send_raw(&mut self, channel: usize, bytes: &[u8]) -> Result<u64, VscError> {
        let section = self.free_sections.pop().ok_or(wrong("free section"))?;
        let at = Gpa(self.send_area.0 + u64::from(section) * u64::from(self.section_bytes));
        self.ram.write(at, bytes)?;
        let claim = SectionClaim {
            index: section,
            used_bytes: bytes.len() as u32,
        };
        let message = GuestMessage::RndisPacket {
            kind: RndisKind::Data,
            section: Some(claim),
        };
        let ring = &mut self.channels[channel];
        let id = ring.new_transaction_id();
        ring.send_in_band(id, true, &[&message.emit()])?;
        ring.flush()?;
        self.outstanding[channel].insert(
            id,
            Outgoing {
                section: Some(section),
                pages: Vec::new(),
            },
        );
        Ok(id)
    }

    /// Stages one frame in pages, or its header in a section and the rest in pages.
    pub fn stage_pages(
        &mut self,
        channel: usize,
        frame: &[u8],
        form: Form,
        requests: &FrameRequests,
    ) -> Result<u64, VscError> {
        let header = emit_guest_header(frame.len(), requests);
        let mut outgoing = Outgoing::default();
        let mut ranges = Vec::new();
        let mut section = None;
        if form == Form::Partial {
            let index = self.free_sections.pop().ok_or(wrong("free section"))?;
            let at = Gpa(self.send_area.0 + u64::from(index) * u64::from(self.section_bytes));
            self.ram.write(at, &header)?;
            section = Some(SectionClaim {
                index,
                used_bytes: header.len() as u32,
            });
            outgoing.section = Some(index);
        } else {
            // As from the head of a socket buffer: somewhere in a page, and not to its end.
            let page = self.free_pages.pop().ok_or(wrong("free page"))?;
            let at = Gpa(page.0 + 100);
            self.ram.write(at, &header)?;
            ranges.push((at, header.len() as u32));
            outgoing.pages.push(page);
        }
        for part in frame.chunks(PAGE_BYTES as usize) {
            let page = self.free_pages.pop().ok_or(wrong("free page"))?;
            self.ram.write(page, part)?;
            ranges.push((page, part.len() as u32));
            outgoing.pages.push(page);
        }
        let message = GuestMessage::RndisPacket {
            kind: RndisKind::Data,
            section,
        };
        let ring = &mut self.channels[channel];
        let id = ring.new_transaction_id();
        ring.send_gpa_direct(id, &ranges, &[&message.emit()])?;
        self.outstanding[channel].insert(id, outgoing);
        Ok(id)
    }

    /// Makes staged packets visible, and kicks if need be.
    pub fn flush(&mut self, channel: usize) -> Result<(), VscError> {
        self.channels[channel].flush()
    }

    /// Packets sent and not completed.
    pub fn outstanding(&self) -> usize {
        self.outstanding.iter().map(|channel| channel.len()).sum()
    }

    /// Whether that packet is sent and not completed.
    pub fn is_outstanding(&self, channel: usize, transaction_id: u64) -> bool {
        self.outstanding[channel].contains_key(&transaction_id)
    }

    /// Sub-allocations that are with us.
    pub fn held(&self) -> usize {
        self.held.len()
    }

    /// Waits until everything sent is completed.
    pub fn wait_sent(&mut self, deadline: Instant) -> Result<(), VscError> {
        for channel in 0..self.channels.len() {
            while !self.outstanding[channel].is_empty() {
                self.poll(channel, deadline)?;
            }
        }
        Ok(())
    }

    /// Waits until `count` frames have come on that channel or others, and takes them.
    pub fn receive(
        &mut self,
        channel: usize,
        count: usize,
        deadline: Instant,
    ) -> Result<Vec<ReceivedFrame>, VscError> {
        while self.frames.len() < count {
            self.poll(channel, deadline)?;
        }
        Ok(self.frames.drain(..count).collect())
    }

    /// Gives back packets that were kept.
    pub fn return_all(&mut self) -> Result<(), VscError> {
        for (channel, transaction_id) in std::mem::take(&mut self.unreturned) {
            self.complete(channel, transaction_id)?;
        }
        (0..self.channels.len()).try_for_each(|channel| self.flush(channel))
    }

    /// The frames of a packet that was kept, as they lie in the receive buffer now.
    pub fn reread(&self, channel: usize, transaction_id: u64) -> Result<Vec<Vec<u8>>, VscError> {
        let ranges = self.held_by_packet.get(&(channel, transaction_id));
        let ranges = ranges.ok_or(wrong("packet that is kept"))?;
        let mut frames = Vec::with_capacity(ranges.len());
        for &(offset, bytes) in ranges {
            let mut message = vec![0; bytes as usize];
            self.receive_area.read(u64::from(offset), &mut message)?;
            let (place, _) = parse_to_guest(&message).ok_or(wrong("well-formed RNDIS packet"))?;
            frames.push(message[place].to_vec());
        }
        Ok(frames)
    }

    /// Gives back one packet that was kept and is not in [`Driver::unreturned`] any more. Flush afterwards.
    pub fn give_back_packet(&mut self, channel: usize, transaction_id: u64) -> Result<(), VscError> {
        self.complete(channel, transaction_id)
    }

    fn complete(&mut self, channel: usize, transaction_id: u64) -> Result<(), VscError> {
        for (offset, _) in self
            .held_by_packet
            .remove(&(channel, transaction_id))
            .unwrap_or_default()
        {
            self.held.remove(&offset);
        }
        let answer = GuestMessage::RndisPacketComplete { status: 1 };
        self.channels[channel].complete(transaction_id, &[&answer.emit()])?;
        Ok(())
    }

    /// Handles what has come; waits if nothing has.
    pub fn poll(&mut self, channel: usize, deadline: Instant) -> Result<(), VscError> {
        self.channels[channel].mask();
        if self.poll_once(channel)? == 0 && !self.channels[channel].wait(deadline)? {
            return Err(VscError::Deadline("a packet of the NIC"));
        }
        Ok(())
    }

    /// Handles what has come and does not wait. How many packets that was.
    pub fn poll_once(&mut self, channel: usize) -> Result<usize, VscError> {
        let mut packet_buf = std::mem::take(&mut self.packet_buf);
        let mut count = 0;
        let result = loop {
            match self.channels[channel].receive(&mut packet_buf) {
                Ok(None) => break Ok(count),
                Ok(Some(packet)) => {
                    count += 1;
                    if let Err(error) = self.on_packet(channel, &packet) {
                        break Err(error);
                    }
                }
                Err(error) => break Err(error),
            }
        };
        self.packet_buf = packet_buf;
        self.channels[channel].give_back()?;
        self.channels[channel].flush()?;
        result
    }

    fn on_packet(&mut self, channel: usize, packet: &Packet<'_>) -> Result<(), VscError> {
        match packet.kind {
            PacketKind::COMPLETION => {
                let outgoing = self.outstanding[channel].remove(&packet.transaction_id);
                let Outgoing { section, pages } = outgoing.ok_or(wrong(UNASKED))?;
                self.free_sections.extend(section);
                self.free_pages.extend(pages);
                match HostMessage::parse(packet.payload) {
                    Some(HostMessage::RndisPacketComplete { status }) => self.completed.push(status.0),
                    _ => return Err(wrong("completion of frames that Linux understands")),
                }
                Ok(())
            }
            PacketKind::TRANSFER_PAGES => self.on_received(channel, packet),
            _ => Err(wrong("packet of a kind that a NIC sends")),
        }
    }

    fn on_received(&mut self, channel: usize, packet: &Packet<'_>) -> Result<(), VscError> {
        let Some(HostMessage::RndisPacket { kind }) = HostMessage::parse(packet.payload) else {
            return Err(wrong("SEND_RNDIS_PKT in a transfer-page packet"));
        };
        let pages = packet
            .transfer_pages()
            .map_err(|_| wrong("well-formed transfer-page packet"))?;
        let is_ours = pages.page_set_id == RECEIVE_BUFFER_ID;
        if !is_ours || !packet.completion_requested || packet.transaction_id == 0 {
            return Err(wrong("transfer-page packet that Linux accepts"));
        }
        let mut offsets = Vec::new();
        for range in pages.ranges() {
            let limit = self.suballocation_bytes * self.suballocation_count;
            let is_inside = range.byte_offset % self.suballocation_bytes == 0
                && range.byte_count <= self.suballocation_bytes
                && range.byte_offset < limit;
            if !is_inside || !self.held.insert(range.byte_offset) {
                return Err(wrong("sub-allocation that is free"));
            }
            offsets.push((range.byte_offset, range.byte_count));
            let mut message = vec![0; range.byte_count as usize];
            self.receive_area
                .read(u64::from(range.byte_offset), &mut message)?;
            self.on_message(channel, kind, message)?;
        }
        if self
            .held_by_packet
            .insert((channel, packet.transaction_id), offsets)
            .is_some()
        {
            return Err(wrong("transaction id that is not in use"));
        }
        if self.give_back || kind == RndisKind::Control {
            self.complete(channel, packet.transaction_id)
        } else {
            self.unreturned.push((channel, packet.transaction_id));
            Ok(())
        }
    }

    fn on_message(&mut self, channel: usize, kind: RndisKind, message: Vec<u8>) -> Result<(), VscError> {
        match kind {
            RndisKind::Data => {
                let (place, checksum) = parse_to_guest(&message).ok_or(wrong("well-formed RNDIS packet"))?;
                self.frames.push_back(ReceivedFrame {
                    channel,
                    bytes: message[place].to_vec(),
                    checksum,
                });
            }
            RndisKind::Control if channel != 0 => return Err(wrong("control message on the primary")),
            RndisKind::Control => match message.first_chunk() {
                Some(first) if u32::from_le_bytes(*first) == number::INDICATE_STATUS => {
                    let status = message.get(8..12).and_then(|bytes| bytes.first_chunk());
                    let status = status.ok_or(wrong("whole status indication"))?;
                    self.indications.push(u32::from_le_bytes(*status));
                }
                _ => self.responses.push_back(message),
            },
        }
        Ok(())
    }
}
