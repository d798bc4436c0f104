//! The two rings of a channel, seen from either end.
//!
//! A ring is one control page and a data area in guest memory. One side writes packets, the other reads them; the
//! code does not care which of the two is the guest. [`RingReader`] and [`RingWriter`] keep their own index
//! privately and never read it back: the shared copy is for the other side, who may overwrite it at will.
//!
//! # Who writes what
//! | word of the control page | offset | written by | read by us |
//! | --- | --- | --- | --- |
//! | `write_index` | 0x00 | writer | reader: once per look, checked |
//! | `read_index` | 0x04 | reader | writer: once per look, checked |
//! | `interrupt_mask` | 0x08 | reader | writer, after each commit |
//! | `pending_send_bytes` | 0x0C | writer | reader, after each commit |
//! | `feature_bits` | 0x40 | the guest before it opens | never |
//!
//! Indexes are byte offsets in the data area, multiples of 8 below its size. `read == write` means empty, so a ring is
//! never filled to the last byte: a packet fits if more bytes are free than it and its trailer need. Packets wrap anywhere.
//!
//! # Staged and committed
//! ```text
//!   reader:  committed ---- staged .......... write_index      [committed, staged): copied out, not yet given back
//!   writer:  committed ---- staged .......... read_index       [committed, staged): written, not yet published
//! ```
//! `next` and `stage` move the staged index only. `commit` stores it for the other side to see, once for as many
//! packets as the caller likes, and says whether the other side must be woken. What was staged can be reverted until then.
//!
//! # Ordering
//! | who | between | how |
//! | --- | --- | --- |
//! | writer | data -> `write_index` | release store |
//! | reader | `write_index` -> data | acquire load |
//! | reader | data -> `read_index` | release store |
//! | writer | `read_index` -> data | acquire load |
//! | writer | `write_index` store -> `interrupt_mask`, `read_index` loads | full fence |
//! | reader | `interrupt_mask` = 0 store -> `write_index` load | full fence |
//! | reader | `read_index` store -> `pending_send_bytes` load | full fence |
//! | writer | `pending_send_bytes` store -> `read_index` load | full fence |
//!
//! The fences stand at commits and before sleeping, not at each packet. Both sides of a sleep store first, fence, then look:
//! at least one of them sees the other. When in doubt, signal: a lost signal is a hang, an extra one costs a microsecond.
//!
//! # What is not checked here
//! What packets say, beyond the lengths in their descriptor (`wire::Packet`); whether a packet may be answered
//! (`channel`); that the trailer names the packet's start (nobody reads it).

#![forbid(unsafe_code)]

mod area;
#[cfg(all(test, not(loom)))]
mod hostile;
#[cfg(all(test, loom))]
mod loom;
mod memory;
#[cfg(all(test, not(loom)))]
mod model;
mod reader;
mod signal;
mod writer;

pub use crate::fault::RingFault;
pub use area::{RingArea, split_channel};
pub use reader::{PacketBuf, RingReader};
pub use signal::Signal;
pub use writer::{RingWriter, StageError};

/// Byte offsets in the control page: `struct hv_ring_buffer`, Linux 6.1 include/linux/hyperv.h.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
enum ControlWord {
    WriteIndex = 0x00,
    ReadIndex = 0x04,
    InterruptMask = 0x08,
    PendingSendBytes = 0x0C,
    FeatureBits = 0x40,
}

/// Indexes, packets and trailers are multiples of this.
const ALIGNMENT: u32 = 8;

/// Bit 0 of the feature bits: `pending_send_bytes` is used (`feat_pending_send_sz`, Linux 6.1 include/linux/hyperv.h).
const FEATURE_PENDING_SEND: u32 = 1;

/// Checks an index that the other side wrote, or that a journal remembers.
#[inline]
fn check_index(index: u32, data_bytes: u32) -> Result<u32, RingFault> {
    if index < data_bytes && index.is_multiple_of(ALIGNMENT) {
        Ok(index)
    } else {
        Err(RingFault::IndexOutsideRing { index, data_bytes })
    }
}

/// Bytes that can be read. Both indexes are checked.
#[inline]
fn used_bytes(read: u32, write: u32, data_bytes: u32) -> u32 {
    if write >= read {
        write - read
    } else {
        data_bytes - (read - write)
    }
}

/// Bytes that are not used; one unit of them must stay free. Both indexes are checked.
#[inline]
fn free_bytes(read: u32, write: u32, data_bytes: u32) -> u32 {
    data_bytes - used_bytes(read, write, data_bytes)
}

/// An index moved on by `bytes`, which is at most the data size.
#[inline]
fn advance(index: u32, bytes: u32, data_bytes: u32) -> u32 {
    // Both are at most 32 MiB (area.rs): the sum does not wrap.
    let sum = index.wrapping_add(bytes);
    if sum >= data_bytes { sum - data_bytes } else { sum }
}
