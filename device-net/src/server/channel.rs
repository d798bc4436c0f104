//! One open channel of the NIC: its endpoint, the packets that its guest has not given back, and the one being put
//! together.

use super::saved::{emit_suballocations, slot};
use crate::netvsp::receive::{Credits, FRAMES_PER_PACKET_MAX, Outstanding, ReceiveBuffer};
use crate::netvsp::wire::{HostMessage, RECEIVE_BUFFER_ID, RndisKind};
use vmbus::channel::{Endpoint, HeldToken};
use vmbus::fault::{GuestFault, RingFault};
use vmbus::ring::StageError;
use vmbus::wire::{OutPacket, PacketKind, TransferRange, transfer_pages_header};

pub struct Channel {
    pub endpoint: Box<Endpoint>,
    pub outstanding: Outstanding<HeldToken>,
    /// Frames that are in the receive buffer and in no packet yet.
    assembled: Assembly,
    /// The assembled frames did not fit in the ring, or too many packets are held.
    pub stalled: bool,
    /// Why the channel is not served any more.
    pub broken: Option<String>,
    header: Vec<u8>,
}

#[derive(Default)]
struct Assembly {
    suballocations: Vec<u16>,
    ranges: Vec<TransferRange>,
}

impl Channel {
    pub fn new(endpoint: Box<Endpoint>) -> Self {
        Self {
            endpoint,
            outstanding: Outstanding::default(),
            assembled: Assembly::default(),
            stalled: false,
            broken: None,
            header: Vec::new(),
        }
    }

    /// Marks the channel broken if an operation of its endpoint failed.
    pub fn check<T>(&mut self, result: Result<T, GuestFault>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(fault) => {
                self.broken.get_or_insert_with(|| fault.to_string());
                None
            }
        }
    }

    /// Adds a frame that was written into a sub-allocation. Sends the packet when it is full.
    pub fn add_frame(&mut self, buffer: &ReceiveBuffer, suballocation: u16, message_bytes: u32) {
        self.assembled.suballocations.push(suballocation);
        self.assembled.ranges.push(TransferRange {
            byte_count: message_bytes,
            byte_offset: buffer.offset_of(suballocation),
        });
        if self.assembled.ranges.len() >= FRAMES_PER_PACKET_MAX {
            self.send_assembled();
        }
    }

    /// Stages what was assembled, if there is room.
    pub fn send_assembled(&mut self) {
        self.stalled = false;
        if self.assembled.ranges.is_empty() || self.broken.is_some() {
            return;
        }
        let mut assembled = std::mem::take(&mut self.assembled);
        match self.send(RndisKind::Data, &assembled.ranges, &assembled.suballocations) {
            Some(Ok((transaction_id, held))) => {
                self.outstanding
                    .hold(transaction_id, &assembled.suballocations, held);
                assembled.ranges.clear();
                assembled.suballocations.clear();
                self.assembled = assembled;
            }
            Some(Err(())) => {
                self.stalled = true;
                self.assembled = assembled;
            }
            None => self.assembled = assembled,
        }
    }

    /// Stages one control message that was written into a sub-allocation. False: no room now.
    pub fn send_control(&mut self, buffer: &ReceiveBuffer, suballocation: u16, message_bytes: u32) -> bool {
        let range = TransferRange {
            byte_count: message_bytes,
            byte_offset: buffer.offset_of(suballocation),
        };
        match self.send(RndisKind::Control, &[range], &[suballocation]) {
            Some(Ok((transaction_id, held))) => {
                self.outstanding.hold(transaction_id, &[suballocation], held);
                true
            }
            Some(Err(())) | None => false,
        }
    }

    /// Stages a packet of ours. `Some(Err)`: no room; `None`: the channel is broken.
    fn send(
        &mut self,
        kind: RndisKind,
        ranges: &[TransferRange],
        suballocations: &[u16],
    ) -> Option<Result<(u64, HeldToken), ()>> {
        let Some(transaction_id) = self.outstanding.next_transaction_id() else {
            return Some(Err(()));
        };
        transfer_pages_header(RECEIVE_BUFFER_ID, ranges, &mut self.header);
        let packet = OutPacket {
            kind: PacketKind::TRANSFER_PAGES,
            transaction_id,
            completion_requested: true,
            extra_header: &self.header,
            payload: &[&HostMessage::RndisPacket { kind }.emit()],
        };
        match self
            .endpoint
            .send_held(&packet, slot::RECEIVED, &[&emit_suballocations(suballocations)])
        {
            Ok(held) => Some(Ok((transaction_id, held))),
            Err(StageError::Full) => Some(Err(())),
            Err(StageError::Fault(fault)) => {
                self.check::<()>(Err(fault.into()));
                None
            }
            // The guest has made a ring that is too small for the protocol it speaks.
            Err(StageError::TooBig { data_bytes, .. }) => {
                let fault = RingFault::RingSize {
                    area_bytes: u64::from(data_bytes),
                    downstream_page_offset: 0,
                };
                self.check::<()>(Err(fault.into()));
                None
            }
        }
    }

    /// Throws away what was assembled and not sent.
    pub fn discard_assembled(&mut self, credits: &mut Credits) -> usize {
        self.assembled.ranges.clear();
        self.stalled = false;
        let count = self.assembled.suballocations.len();
        for suballocation in self.assembled.suballocations.drain(..) {
            credits.put_back(suballocation);
        }
        count
    }
}
