//! Rounds in which both sides poll: a plain ring of bytes, and the two ends of a VMBus ring.

#![forbid(unsafe_code)]

use super::{DATA_BYTES, LARGE_BYTES, SMALL_BYTES};
use anyhow::{Result, ensure};
use std::hint::{black_box, spin_loop};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use vmbus::mem::{Access, PagedArea, SharedMap};
use vmbus::ring::{PacketBuf, RingArea, RingReader, RingWriter, StageError};
use vmbus::wire::OutPacket;

const PAGE: u64 = 4096;
/// Between two looks of a side that pauses: some hundred nanoseconds.
const PAUSES: u32 = 16;

/// The shared area: words to agree by, each in a cache line of its own, then the VMBus ring, then the plain ring.
const ROUND_WORD: u64 = 0;
const DONE_WORD: u64 = 128;
const HEAD_WORD: u64 = 256;
const TAIL_WORD: u64 = 384;
const RING_START: u64 = PAGE;
const PLAIN_START: u64 = RING_START + PAGE + DATA_BYTES;
pub(super) const AREA_BYTES: u64 = PLAIN_START + DATA_BYTES;

/// What both processes map.
pub(super) struct Shared {
    map: Arc<SharedMap>,
}

impl Shared {
    pub(super) fn map(memory: BorrowedFd<'_>) -> Result<Shared> {
        let map = Arc::new(SharedMap::map(memory, AREA_BYTES as usize, Access::ReadWrite)?);
        // So that no round pays for page faults.
        for page in 0..AREA_BYTES / PAGE {
            map.fetch_or_u32(page * PAGE, 0, Ordering::Relaxed)?;
        }
        Ok(Shared { map })
    }

    /// The round that was begun last.
    pub(super) fn round(&self) -> Result<u32> {
        Ok(self.map.load_u32(ROUND_WORD, Ordering::Acquire)?)
    }

    /// Everything that a round needs is empty, and the other side may begin.
    pub(super) fn begin(&self, word: u32) -> Result<()> {
        self.ring()?.initialize();
        self.map.store_u32(HEAD_WORD, 0, Ordering::Relaxed)?;
        self.map.store_u32(TAIL_WORD, 0, Ordering::Relaxed)?;
        Ok(self.map.store_u32(ROUND_WORD, word, Ordering::Release)?)
    }

    pub(super) fn say_done(&self, word: u32) -> Result<()> {
        Ok(self.map.store_u32(DONE_WORD, word, Ordering::Release)?)
    }

    /// The round that the other side finished last.
    pub(super) fn done(&self) -> Result<u32> {
        Ok(self.map.load_u32(DONE_WORD, Ordering::Acquire)?)
    }

    fn ring(&self) -> Result<RingArea> {
        let area = PagedArea::contiguous(self.map.clone(), RING_START, PAGE + DATA_BYTES)?;
        Ok(RingArea::new(area)?)
    }

    pub(super) fn write_ring(&self, count: u64, bytes: usize) -> Result<()> {
        let mut writer = RingWriter::new(self.ring()?, 0)?;
        let payload = vec![0x5A_u8; bytes];
        for number in 0..count {
            let parts = [&payload[..]];
            let packet = OutPacket::in_band(number, false, &parts);
            loop {
                match writer.stage(&packet) {
                    Ok(()) => break,
                    Err(StageError::Full) => spin_loop(),
                    Err(error) => return Err(error.into()),
                }
            }
            // The reader polls, so that it needs no signal.
            let _ = writer.commit()?;
        }
        Ok(())
    }

    pub(super) fn read_ring(&self, count: u64) -> Result<()> {
        let mut reader = RingReader::new(self.ring()?, 0)?;
        let mut buffer = PacketBuf::new();
        reader.mask_interrupts();
        let mut expected = 0;
        while expected < count {
            match reader.next(&mut buffer)? {
                Some(packet) => {
                    ensure!(packet.transaction_id == expected, "packet {expected} is missing");
                    expected += 1;
                    // Space goes back early enough that the writer never runs dry: each eighth of the ring. (So it needs
                    // not go back when the ring is empty.)
                    if used(reader.committed_index(), reader.staged_index()) > DATA_BYTES / 8 {
                        // The writer polls, too.
                        let _ = reader.commit();
                    }
                }
                None => spin_loop(),
            }
        }
        // The round is over.
        let _ = reader.commit();
        Ok(())
    }

    pub(super) fn write_plain(&self, count: u64, bytes: usize, paced: bool) -> Result<()> {
        match bytes {
            SMALL_BYTES => self.write_messages::<SMALL_BYTES>(count, paced),
            _ => self.write_messages::<LARGE_BYTES>(count, paced),
        }
    }

    pub(super) fn read_plain(&self, count: u64, bytes: usize, paced: bool) -> Result<()> {
        match bytes {
            SMALL_BYTES => self.read_messages::<SMALL_BYTES>(count, paced),
            _ => self.read_messages::<LARGE_BYTES>(count, paced),
        }
    }

    fn write_messages<const BYTES: usize>(&self, count: u64, paced: bool) -> Result<()> {
        let message = [0x5A_u8; BYTES];
        let (mut head, mut tail) = (0_u64, 0_u64);
        for _ in 0..count {
            while head - tail + BYTES as u64 > DATA_BYTES {
                tail = widen(tail, self.map.load_u32(TAIL_WORD, Ordering::Acquire)?);
                rest(paced);
            }
            self.map.write(PLAIN_START + head % DATA_BYTES, &message)?;
            head += BYTES as u64;
            self.map.store_u32(HEAD_WORD, head as u32, Ordering::Release)?;
        }
        Ok(())
    }

    fn read_messages<const BYTES: usize>(&self, count: u64, paced: bool) -> Result<()> {
        let mut message = [0_u8; BYTES];
        let (mut head, mut tail) = (0_u64, 0_u64);
        while tail < count * BYTES as u64 {
            if head == tail {
                head = widen(head, self.map.load_u32(HEAD_WORD, Ordering::Acquire)?);
                if head == tail {
                    rest(paced);
                }
                continue;
            }
            self.map.read(PLAIN_START + tail % DATA_BYTES, &mut message)?;
            black_box(&message);
            tail += BYTES as u64;
            self.map.store_u32(TAIL_WORD, tail as u32, Ordering::Release)?;
        }
        Ok(())
    }
}

/// Before the next look at an index that has not moved. Each look takes the index's cache line away from the side that writes it.
fn rest(paced: bool) {
    for _ in 0..if paced { PAUSES } else { 1 } {
        spin_loop();
    }
}

/// A counter that was shared by its low half: the next value at or after `known` that ends so.
fn widen(known: u64, low: u32) -> u64 {
    known + u64::from(low.wrapping_sub(known as u32))
}

fn used(from: u32, to: u32) -> u64 {
    (u64::from(to) + DATA_BYTES - u64::from(from)) % DATA_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shared_half_counter_is_widened_across_its_wrap() {
        assert_eq!(widen(0xFFFF_FF00, 0x100), 0x1_0000_0100);
        assert_eq!(widen(5, 5), 5);
    }
}
