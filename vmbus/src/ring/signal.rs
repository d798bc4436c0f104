//! When to ring the bell: pure decisions on words that were read after the full fence.

use super::free_bytes;

/// Whether the other side must be woken: by the interrupt (host to guest) or by HvSignalEvent (guest to host).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use = "a signal that is not sent hangs the other side"]
pub enum Signal {
    /// The other side may be asleep and waits for just this.
    Needed,
    /// It will look by itself.
    NotNeeded,
}

impl Signal {
    /// Whether it must be sent.
    #[inline]
    pub fn is_needed(self) -> bool {
        self == Signal::Needed
    }

    #[inline]
    fn when(needed: bool) -> Self {
        if needed { Signal::Needed } else { Signal::NotNeeded }
    }
}

/// After a writer's commit: the reader sleeps only if it has read everything there was before (Linux 6.1
/// drivers/hv/ring_buffer.c `hv_signal_on_write`), and does not want to be woken while it masks.
#[inline]
pub(super) fn after_write(old_write: u32, reader_read_index: u32, interrupt_mask: u32) -> Signal {
    Signal::when(interrupt_mask == 0 && reader_read_index == old_write)
}

/// After a reader's commit from `old_read` to `new_read`: the writer sleeps only if it has said how many bytes it needs, and did
/// not have them before.
///
/// Linux waits for *more* than `pending` (`hv_pkt_iter_close_immediate`), other writers for *at least* as much. Both
/// are served: the edge value counts as too little before and as enough now.
#[inline]
pub(super) fn after_read(old_read: u32, new_read: u32, write: u32, pending: u32, data_bytes: u32) -> Signal {
    let before = free_bytes(old_read, write, data_bytes);
    let now = free_bytes(new_read, write, data_bytes);
    // Lengths are multiples of 8; a request that is not asks for nothing that the lower multiple does not have.
    Signal::when(pending != 0 && before <= pending && now >= pending & !7)
}
