//! From the backend into the guest's receive buffer.

use super::nic::Nic;
use crate::backend::IncomingFrame;
use crate::frame::headers::Headers;
use crate::frame::segment;
use crate::rndis::packet::{TO_GUEST_HEADER_BYTES_MAX, emit_header};
use vmbus::channel::Port;
use vmbus::journal::Step;

/// Limit: frames read from the backend in a round.
const ROUND_FRAMES: usize = 128;
/// A large segment becomes as many frames as fit 64 KiB at an MSS of 536 (RFC 9293 section 3.7.1): there must be room for
/// it before it is read.
const FRAMES_OF_ONE: usize = 123;
/// Limit: stale frames thrown away before the first that is wanted. More than any queue of a TAP holds.
const STALE_FRAMES_MAX: usize = 4096;

impl Nic {
    /// Reads frames as long as the guest has room for them. True if there may be more.
    pub(super) fn receive_frames(&mut self, port: &Port) -> bool {
        for channel in self.channels.values_mut() {
            channel.send_assembled();
        }
        if !self.wants_frames() {
            return false;
        }
        let Some(mut backend) = self.backend.take() else {
            return false;
        };
        let mut outcome = Ok(());
        if std::mem::take(&mut self.backlog_stale) {
            outcome = discard(backend.as_mut());
        }
        let mut frames = 0;
        while outcome.is_ok() && frames < ROUND_FRAMES && self.wants_frames() {
            match backend.receive() {
                Ok(Some(incoming)) => {
                    port.journal().pass(Step::FrameRead);
                    self.deliver(incoming);
                    frames += 1;
                }
                Ok(None) => self.backend_readable = false,
                Err(gone) => outcome = Err(gone),
            }
        }
        self.backend = Some(backend);
        if let Err(gone) = outcome {
            self.backend_gone(&gone);
        }
        for channel in self.channels.values_mut() {
            channel.send_assembled();
        }
        frames > 0
    }

    /// Whether a frame could be handed on if there was one.
    fn wants_frames(&self) -> bool {
        let room = FRAMES_OF_ONE.min(self.credits.count() / 4);
        self.backend_readable
            && self.receive_buffer.is_some()
            && self.awaited.is_empty()
            && self.state.adapter.initialized
            && !self.state.adapter.filter.is_closed()
            && self.credits.data_available() >= room.max(1)
            && self.channels.contains_key(&0)
            && self
                .channels
                .values()
                .all(|channel| !channel.stalled && channel.broken.is_none())
    }

    fn deliver(&mut self, incoming: IncomingFrame<'_>) {
        let IncomingFrame { vnet, frame } = incoming;
        let Some(destination) = frame.first_chunk::<6>() else {
            return;
        };
        if !self.state.adapter.filter.admits(*destination, self.traits.mac) {
            self.counters.received_filtered += 1;
            return;
        }
        let index = self.channel_for(frame);
        let mut pieces = match segment::pieces(frame, &vnet) {
            Ok(pieces) => pieces,
            Err(fault) => {
                self.counters.received_dropped += 1;
                self.faults.note(index, &fault);
                return;
            }
        };
        let mut head = std::mem::take(&mut self.head);
        while let Some(piece) = pieces.next(&mut head) {
            let bytes = head.len() + piece.rest.len();
            if !self.place(index, &head, &piece, bytes) {
                self.counters.received_dropped += 1;
            }
        }
        self.head = head;
    }

    /// Writes one frame into a sub-allocation and adds it to its channel's packet. False: it is lost.
    fn place(&mut self, index: u16, head: &[u8], piece: &segment::Piece<'_>, bytes: usize) -> bool {
        let Some((buffer, area)) = &self.receive_buffer else {
            return false;
        };
        if bytes + TO_GUEST_HEADER_BYTES_MAX > buffer.suballocation_bytes as usize {
            return false;
        }
        let Some(channel) = self.channels.get_mut(&index) else {
            return false;
        };
        let Some(suballocation) = self.credits.draw_for_data() else {
            return false;
        };
        let (header, header_bytes) = emit_header(bytes, piece.verified);
        let at = u64::from(buffer.offset_of(suballocation));
        let written = area
            .write(at, &header[..header_bytes])
            .and_then(|()| area.write(at + header_bytes as u64, head))
            .and_then(|()| area.write(at + (header_bytes + head.len()) as u64, piece.rest));
        if written.is_err() {
            self.credits.put_back(suballocation);
            return false;
        }
        self.counters.received_frames += 1;
        self.counters.received_bytes += bytes as u64;
        channel.add_frame(buffer, suballocation, (header_bytes + bytes) as u32);
        true
    }

    /// The channel that the guest wants this frame's flow on; the primary if that is not open.
    fn channel_for(&self, frame: &[u8]) -> u16 {
        let steering = &self.state.adapter.steering;
        if self.channels.len() < 2 || !steering.is_enabled() {
            return 0;
        }
        let Some(headers) = Headers::parse(frame) else {
            return 0;
        };
        let (flow, flow_bytes) = headers.flow(frame);
        let queue = steering.queue_for(&flow[..flow_bytes]);
        if self.channels.contains_key(&queue) {
            queue
        } else {
            0
        }
    }

    /// Throws away frames that were put together and not sent.
    pub(super) fn discard_assembled(&mut self) {
        for channel in self.channels.values_mut() {
            self.counters.received_dropped += channel.discard_assembled(&mut self.credits) as u64;
        }
    }
}

fn discard(backend: &mut dyn crate::backend::Backend) -> Result<(), crate::backend::Gone> {
    for _ in 0..STALE_FRAMES_MAX {
        if backend.receive()?.is_none() {
            break;
        }
    }
    Ok(())
}
