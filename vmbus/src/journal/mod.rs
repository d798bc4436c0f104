//! What a device server has to leave behind so that a successor can go on where it died.
//!
//! A journal is one sealed memfd for each device, made by the supervisor ([`required_len`], all zero), mapped by
//! the server that serves the device at the moment and by nobody else. It holds, for each channel, which requests
//! were taken out of the ring and not answered yet; and once, the device's own protocol state.
//!
//! ```text
//!   0      header page      magic and layout version
//!   4096   saved state      two copies, 64 KiB each                     saved_state.rs
//!   135168 channel 0        header page, slot words, slot payloads      layout.rs, channel.rs
//!          channel 1 …      one for each sub-channel index
//! ```
//! The file is sparse. A channel that is not open touches nothing, an idle one two or three pages: the lowest
//! free slot is always used first.
//!
//! # Commit points
//!
//! A server may die between any two stores. The successor sees exactly the stores that were done, in program
//! order: a process that is killed does not take its finished stores back, and does not finish others. So the order
//! of stores is all there is to it; nothing is flushed, and nothing needs a checksum on this path.
//!
//! | what becomes true | by one aligned store to | before it | after it |
//! | --- | --- | --- | --- |
//! | the requests staged so far are taken | `taken_seq` | their slots; `take_index` (the ring's read index to be) | the ring's read index |
//! | the packets staged so far are published | the ring's write index | `publish_seq` in their slots; the record {seq, old index, new index} | `published_seq` |
//!
//! A *request* slot is live (the guest waits for its answer) iff its `take_seq` is committed and its
//! `publish_seq` is not. A *held* slot (a packet of ours that the guest owes an answer to, as netvsp's received
//! frames) is the mirror image: live iff its `publish_seq` is committed and its `take_seq`, that of the guest's
//! answer, is not. 0 is never committed. A free slot is one where neither reading makes it live.
//!
//! `take_index` and the record exist twice and are used in turns, selected by the lowest bit of the sequence
//! number, so that the values of the last commit stay whole while the next ones are written.
//!
//! # Recovery
//!
//! [`recover`] is a pure function of a copy of the journal and of the ring's write index. The record of sequence
//! `published_seq + 1`, if there is one, was in progress: the ring's index equals its new index (then it is
//! committed) or its old one (then it is not). The ring is the guest's memory; any other value means that the guest
//! has scribbled over it, and the channel is given up. Our read index is never read back from the ring.
//!
//! What a predecessor left is validated like a guest's bytes: it may have been taken over before it died.
//!
//! # Who writes
//! One thread of one server for each channel; the supervisor only creates the file. The next server does not start
//! before the last one was reaped.
//!
//! # Not checked here
//! That a predecessor's I/O is over before a request is replayed: the device's backend does. That replaying a
//! request is harmless: the device's protocol does.
#![forbid(unsafe_code)]

mod channel;
mod layout;
mod recover;
mod saved_state;
mod slot;
#[cfg(test)]
mod tests;

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::mem::{Access, HostError, SharedMap};

pub(crate) use channel::ChannelJournal;
pub use layout::{MAX_CHANNELS, MAX_HELD, MAX_PAYLOAD_BYTES, SAVED_STATE_BYTES, SLOT_COUNT, required_len};
pub use recover::RecoverFault;
pub(crate) use recover::RingView;
pub use saved_state::SaveError;

/// Whether anything is written. Building with the environment variable `BULKHEAD_BENCH_NO_JOURNAL` set compiles the
/// stores out, so that a benchmark can tell what they cost. Such a server cannot be replaced.
pub const ENABLED: bool = option_env!("BULKHEAD_BENCH_NO_JOURNAL").is_none();

/// First word of the file once a server has used it: "BHJ" and the layout's version.
const MAGIC: u64 = u64::from_le_bytes(*b"BHJ\0\x01\0\0\0");

/// Why a journal cannot be used at all.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JournalError {
    /// The descriptor is too short, not sealed, or cannot be mapped.
    #[error("the journal cannot be mapped: {0}")]
    Map(#[from] HostError),
    /// A server of another version wrote it.
    #[error("the journal has layout {found:#x}, this server knows {MAGIC:#x}")]
    Layout { found: u64 },
}

/// A device's journal, mapped. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Journal {
    map: Arc<SharedMap>,
}

/// Why access to the map cannot fail: all offsets are constants below [`required_len`], which is mapped.
const IN_RANGE: &str = "journal offsets lie in the mapped journal";

impl Journal {
    /// Maps the journal that the supervisor handed over.
    pub fn map(fd: BorrowedFd<'_>) -> Result<Self, JournalError> {
        let length = usize::try_from(required_len()).expect("64-bit hosts only");
        let map = SharedMap::map(fd, length, Access::ReadWrite)?;
        let found = map.load_u64(0, Ordering::Acquire).expect(IN_RANGE);
        match found {
            0 => map.store_u64(0, MAGIC, Ordering::Release).expect(IN_RANGE),
            MAGIC => {}
            found => return Err(JournalError::Layout { found }),
        }
        Ok(Self { map: Arc::new(map) })
    }
}
