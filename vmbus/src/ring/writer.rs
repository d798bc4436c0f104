//! The writing end of a ring.

use super::area::RingArea;
use super::memory::{Fence, RingMemory, full_fence};
use super::signal::{self, Signal};
use super::{ControlWord, RingFault, advance, check_index, free_bytes};
use crate::wire::{DESCRIPTOR_BYTES, OutPacket, TRAILER_BYTES};
use std::sync::atomic::Ordering;

/// Why a packet was not staged. Nothing has moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StageError {
    /// Not now: the reader must make room first.
    #[error("the ring is full")]
    Full,
    /// Never in this ring, or in any.
    #[error("a packet of {packet_bytes} bytes does not fit in a ring of {data_bytes}")]
    TooBig {
        /// Bytes of the packet without its trailer; `usize::MAX` if they cannot even be encoded.
        packet_bytes: usize,
        /// Size of the data area.
        data_bytes: u32,
    },
    /// The reader's index is impossible.
    #[error(transparent)]
    Fault(#[from] RingFault),
}

/// Writes packets for the other side to read. See the module's text for indexes and ordering.
#[derive(Debug)]
pub struct RingWriter {
    memory: RingMemory,
    committed: u32,
    staged: u32,
    /// The other side's read index as last read and checked. Space up to there is used without another look.
    read: u32,
}

impl RingWriter {
    /// A writer that goes on at `start_write_index`: 0 for a channel that was just opened, else what recovery found. Touches
    /// nothing shared.
    pub fn new(ring: RingArea, start_write_index: u32) -> Result<Self, RingFault> {
        Self::over(RingMemory::new(ring)?, start_write_index)
    }

    pub(super) fn over(memory: RingMemory, start_write_index: u32) -> Result<Self, RingFault> {
        let start = check_index(start_write_index, memory.data_bytes())?;
        // The one reader index that leaves no room, so that the first packet looks.
        let read = advance(start, super::ALIGNMENT, memory.data_bytes());
        Ok(Self {
            memory,
            committed: start,
            staged: start,
            read,
        })
    }

    #[cfg(all(test, not(loom)))]
    pub(super) fn memory(&self) -> &RingMemory {
        &self.memory
    }

    /// Stores the words that belong to the writer: its write index, and no wish for space. To be done at open and at
    /// takeover.
    pub fn claim_words(&mut self) {
        // Ordering: release as in `commit`.
        self.memory
            .store(ControlWord::WriteIndex, self.committed, Ordering::Release);
        self.memory
            .store(ControlWord::PendingSendBytes, 0, Ordering::Relaxed);
        full_fence(Fence::AfterSpaceWish);
    }

    /// Bytes free after everything staged, by a fresh look at the reader's index. A packet fits if this is *more* than
    /// [`RingWriter::needed_bytes`] of it.
    pub fn free_bytes(&mut self) -> Result<u32, RingFault> {
        self.refresh()?;
        Ok(self.free())
    }

    /// Bytes that a packet of this header and payload length takes from the ring: descriptor, padding and trailer included.
    pub fn needed_bytes(extra_header_bytes: usize, payload_bytes: usize) -> usize {
        (DESCRIPTOR_BYTES + TRAILER_BYTES)
            .saturating_add(extra_header_bytes)
            .saturating_add(payload_bytes.saturating_add(7) & !7)
    }

    #[inline]
    fn free(&self) -> u32 {
        free_bytes(self.read, self.staged, self.memory.data_bytes())
    }

    /// Reads the other side's read index once, and checks it.
    #[inline]
    fn refresh(&mut self) -> Result<(), RingFault> {
        // Ordering: acquire pairs with the release store in `RingReader::commit`: its copies are over before we
        // write there.
        let read = self.memory.load(ControlWord::ReadIndex, Ordering::Acquire);
        self.read = check_index(read, self.memory.data_bytes())?;
        Ok(())
    }

    /// Writes a packet and its trailer behind everything staged. The other side does not see it before [`RingWriter::commit`].
    pub fn stage(&mut self, packet: &OutPacket<'_>) -> Result<(), StageError> {
        let size = self.memory.data_bytes();
        let too_big = |packet_bytes| StageError::TooBig {
            packet_bytes,
            data_bytes: size,
        };
        let ([first, second], lengths) = packet.encoded().ok_or(too_big(usize::MAX))?;
        let packet_bytes = lengths.packet_bytes();
        let needed = packet_bytes + TRAILER_BYTES as u32;
        if needed >= size {
            return Err(too_big(packet_bytes as usize));
        }
        if self.free() <= needed {
            self.refresh()?;
            if self.free() <= needed {
                return Err(StageError::Full);
            }
        }
        // The parts are `needed` bytes together.
        let mut place = self.memory.place(self.staged, needed as usize);
        place.put(&first.to_le_bytes());
        place.put(&second.to_le_bytes());
        if !packet.extra_header.is_empty() {
            place.put(packet.extra_header);
        }
        for part in packet.payload {
            place.put(part);
        }
        if lengths.padding_bytes != 0 {
            place.put(&[0; 7][..lengths.padding_bytes]);
        }
        // A zero word, then where this packet began.
        place.put(&(u64::from(self.staged) << 32).to_le_bytes());
        self.staged = advance(self.staged, needed, size);
        Ok(())
    }

    /// Where the next packet will be written: the write index that a commit now would publish.
    pub fn staged_index(&self) -> u32 {
        self.staged
    }

    /// What the other side has been told.
    pub fn committed_index(&self) -> u32 {
        self.committed
    }

    /// Forgets what was staged since the last commit.
    pub fn revert(&mut self) {
        self.staged = self.committed;
    }

    /// Publishes everything staged.
    ///
    /// [`Signal::Needed`]: the reader may be asleep. After a fault the packets are published all the same; the reader
    /// has made its own index impossible, and the channel is not usable any more.
    pub fn commit(&mut self) -> Result<Signal, RingFault> {
        let old_write = self.committed;
        if self.staged == old_write {
            return Ok(Signal::NotNeeded);
        }
        self.committed = self.staged;
        // Ordering: release, so that the packets are there before the index says so; pairs with the acquire load in
        // `RingReader::look`.
        self.memory
            .store(ControlWord::WriteIndex, self.committed, Ordering::Release);
        // Ordering: the writer's half of the wake-up protocol; the other half is `RingReader::unmask_and_check`.
        full_fence(Fence::AfterPublish);
        let interrupt_mask = self.memory.load(ControlWord::InterruptMask, Ordering::Relaxed);
        if interrupt_mask != 0 {
            return Ok(Signal::NotNeeded);
        }
        self.refresh()?;
        Ok(signal::after_write(old_write, self.read, interrupt_mask))
    }

    /// Tells the reader how many bytes we wait for, or with 0 that we do not wait. Look once more afterwards
    /// ([`RingWriter::free_bytes`]), because a reader that had made the room before it could see the wish will not signal.
    pub fn set_pending_send_bytes(&mut self, bytes: u32) {
        // Ordering: the fence between this store and the load of the next `refresh` is the writer's half of the
        // flow-control protocol; the other half is `RingReader::commit`.
        self.memory
            .store(ControlWord::PendingSendBytes, bytes, Ordering::Release);
        full_fence(Fence::AfterSpaceWish);
    }

    /// Waits for room for `needed` bytes (see [`RingWriter::needed_bytes`]) in the right order: says so, then looks
    /// again. `true`: the room is there already, and the wish is withdrawn. `false`: a signal will come.
    pub fn request_space(&mut self, needed: u32) -> Result<bool, RingFault> {
        self.set_pending_send_bytes(needed);
        if self.free_bytes()? <= needed {
            return Ok(false);
        }
        self.set_pending_send_bytes(0);
        Ok(true)
    }
}
