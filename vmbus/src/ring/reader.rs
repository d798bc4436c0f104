//! The reading end of a ring.

use super::area::RingArea;
use super::memory::{Fence, RingMemory, full_fence};
use super::signal::{self, Signal};
use super::{ControlWord, RingFault, advance, check_index, used_bytes};
use crate::wire::{DESCRIPTOR_BYTES, Packet, PacketDescriptor, TRAILER_BYTES};
use std::sync::atomic::Ordering;
use zerocopy::FromBytes;

/// Private memory for one packet without its descriptor, re-used for the next. Grows to the longest packet seen; the
/// ring's size bounds that.
#[derive(Debug, Default)]
pub struct PacketBuf {
    bytes: Vec<u8>,
}

impl PacketBuf {
    /// An empty buffer; the first packet allocates.
    pub fn new() -> Self {
        Self::default()
    }

    /// Room for `len` bytes, old contents included.
    #[inline]
    fn reserve(&mut self, len: usize) -> &mut [u8] {
        if self.bytes.len() < len {
            self.bytes.resize(len.next_power_of_two().max(512), 0);
        }
        &mut self.bytes[..len]
    }
}

/// Reads the packets that the other side writes. See the module's text for indexes and ordering.
#[derive(Debug)]
pub struct RingReader {
    memory: RingMemory,
    committed: u32,
    staged: u32,
    /// The other side's write index as last read and checked. Packets up to there are read without another look.
    write: u32,
}

impl RingReader {
    /// A reader that goes on at `start_read_index`: 0 for a channel that was just opened, else what the journal says. Touches
    /// nothing shared.
    pub fn new(ring: RingArea, start_read_index: u32) -> Result<Self, RingFault> {
        Self::over(RingMemory::new(ring)?, start_read_index)
    }

    pub(super) fn over(memory: RingMemory, start_read_index: u32) -> Result<Self, RingFault> {
        let start = check_index(start_read_index, memory.data_bytes())?;
        Ok(Self {
            memory,
            committed: start,
            staged: start,
            write: start,
        })
    }

    #[cfg(all(test, not(loom)))]
    pub(super) fn memory(&self) -> &RingMemory {
        &self.memory
    }

    /// Stores the words that belong to the reader: its read index, and an interrupt mask of 0. To be done at open and at
    /// takeover: a dead predecessor may have left the mask set, and then nobody would ever signal. Look at the ring
    /// afterwards, whether or not a kick came.
    pub fn claim_words(&mut self) {
        // Ordering: release as in `commit`; the fence as in `unmask_and_check`, the look is up to the caller.
        self.memory
            .store(ControlWord::ReadIndex, self.committed, Ordering::Release);
        self.memory
            .store(ControlWord::InterruptMask, 0, Ordering::Relaxed);
        full_fence(Fence::BeforeSleep);
        self.write = self.staged;
    }

    /// Copies the next packet into `buf` and stages past it. `None`: nothing there.
    ///
    /// The packet is a private copy; whatever the other side does to the ring from now on, it stays the same. After a
    /// fault nothing has moved, and the channel is not usable any more.
    pub fn next<'b>(&mut self, buf: &'b mut PacketBuf) -> Result<Option<Packet<'b>>, RingFault> {
        if self.staged == self.write {
            self.look()?;
        }
        let available = used_bytes(self.staged, self.write, self.memory.data_bytes());
        if available == 0 {
            return Ok(None);
        }
        if available < (DESCRIPTOR_BYTES + TRAILER_BYTES) as u32 {
            return Err(RingFault::PacketBeyondWriteIndex {
                packet_bytes: DESCRIPTOR_BYTES as u32,
                available_bytes: available,
            });
        }
        // The descriptor is not read a second time: the checked copy is what the packet is made of.
        let mut head = [0; DESCRIPTOR_BYTES];
        self.memory.read(self.staged, &mut head);
        let descriptor = PacketDescriptor::read_from_bytes(&head).expect("sixteen bytes");
        let packet_bytes = check_descriptor(&descriptor, available)?;
        let size = self.memory.data_bytes();
        let rest = buf.reserve(packet_bytes as usize - DESCRIPTOR_BYTES);
        self.memory
            .read(advance(self.staged, DESCRIPTOR_BYTES as u32, size), rest);
        self.staged = advance(self.staged, packet_bytes + TRAILER_BYTES as u32, size);
        Ok(Some(
            Packet::from_parts(&descriptor, rest).expect("the descriptor was checked"),
        ))
    }

    /// Reads the other side's write index once, and checks it.
    #[inline]
    fn look(&mut self) -> Result<(), RingFault> {
        // Ordering: acquire pairs with the release store in `RingWriter::commit`; the data reads come after it.
        let write = self.memory.load(ControlWord::WriteIndex, Ordering::Acquire);
        self.write = check_index(write, self.memory.data_bytes())?;
        Ok(())
    }

    /// Whether there is something to read, by a fresh look. No promise that the writer signals what comes later: see
    /// [`RingReader::unmask_and_check`].
    pub fn has_more(&mut self) -> Result<bool, RingFault> {
        self.look()?;
        Ok(self.write != self.staged)
    }

    /// Where the next packet will be read.
    pub fn staged_index(&self) -> u32 {
        self.staged
    }

    /// What the other side has been told.
    pub fn committed_index(&self) -> u32 {
        self.committed
    }

    /// Puts packets back: `index` is a former [`RingReader::staged_index`] since the last commit.
    pub fn revert_to(&mut self, index: u32) {
        let size = self.memory.data_bytes();
        assert!(
            index < size
                && index.is_multiple_of(super::ALIGNMENT)
                && used_bytes(self.committed, index, size) <= used_bytes(self.committed, self.staged, size),
            "index {index:#x} was not staged since the last commit"
        );
        self.staged = index;
    }

    /// Gives the space of everything staged back to the writer.
    ///
    /// [`Signal::Needed`]: the writer waits for just this space.
    pub fn commit(&mut self) -> Signal {
        let old_read = self.committed;
        if self.staged == old_read {
            return Signal::NotNeeded;
        }
        self.committed = self.staged;
        // Ordering: release, so that our copies out of the data are over; pairs with the acquire load in
        // `RingWriter::refresh`.
        self.memory
            .store(ControlWord::ReadIndex, self.committed, Ordering::Release);
        full_fence(Fence::AfterGivingSpace);
        // Ordering: acquire, so that the write index below is at least as new as the wish.
        let pending = self.memory.load(ControlWord::PendingSendBytes, Ordering::Acquire);
        if pending == 0 {
            return Signal::NotNeeded;
        }
        let size = self.memory.data_bytes();
        match check_index(self.memory.load(ControlWord::WriteIndex, Ordering::Acquire), size) {
            Ok(write) => signal::after_read(old_read, self.committed, write, pending, size),
            // The next look reports it; until then, when in doubt, signal.
            Err(_) => Signal::Needed,
        }
    }

    /// Asks the writer not to signal while we poll. It may signal all the same.
    pub fn mask_interrupts(&mut self) {
        self.memory
            .store(ControlWord::InterruptMask, 1, Ordering::Relaxed);
        // Ordering: no fence. A late mask costs a signal, no more.
    }

    /// To be called before sleeping: asks for signals and looks once more. `true`: there is something to read, do not sleep.
    ///
    /// Everything staged must be committed (or reverted): the writer signals only when the read index has caught up. With
    /// packets put back, the answer is `true`; a caller that cannot take them now waits for something else.
    pub fn unmask_and_check(&mut self) -> Result<bool, RingFault> {
        assert!(
            self.staged == self.committed,
            "sleeping with packets read but not committed"
        );
        // Ordering: the fence between this store and the load in `look` is the reader's half of the wake-up protocol.
        self.memory
            .store(ControlWord::InterruptMask, 0, Ordering::Relaxed);
        full_fence(Fence::BeforeSleep);
        self.has_more()
    }
}

/// Checks the lengths in a descriptor; returns the packet's length in bytes.
#[inline]
fn check_descriptor(descriptor: &PacketDescriptor, available: u32) -> Result<u32, RingFault> {
    let (offset8, length8) = (descriptor.offset8.get(), descriptor.length8.get());
    if usize::from(offset8) * 8 < DESCRIPTOR_BYTES || offset8 > length8 {
        return Err(RingFault::PacketHeaderLength { offset8, length8 });
    }
    let packet_bytes = u32::from(length8) * 8;
    if packet_bytes + TRAILER_BYTES as u32 > available {
        return Err(RingFault::PacketBeyondWriteIndex {
            packet_bytes,
            available_bytes: available,
        });
    }
    Ok(packet_bytes)
}
