//! What a device server has to leave behind so that a successor can go on where it died.
//!
//! A journal is one sealed memfd for each device, made by the supervisor ([`required_len`], all zero), mapped by
//! the server that serves the device at the moment and by nobody else. It holds, for each channel, which requests
//! were taken out of the ring and not answered yet; and once, the device's own protocol state.
//!
//! ```text
//!   0      header page      who can go on from it                       versions.rs
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
//! `model/` explores this completely over small rings: every order of guest, server and death, before every store.
//! Each store after which a successor finds something else is a named step, at which tests let servers die (`steps.rs`).
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
#[cfg(test)]
mod model;
mod parts;
mod recover;
mod saved_state;
mod slot;
pub mod steps;
#[cfg(test)]
pub(crate) mod test_state;
#[cfg(test)]
mod tests;
mod versions;
#[cfg(test)]
mod versions_tests;

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::mem::{Access, HostError, SharedMap};
use versions::{LAYOUT, OLDEST_READABLE_LAYOUT, OLDEST_READER_LAYOUT, check_versions, device_name};

pub(crate) use channel::ChannelJournal;
pub(crate) use layout::used_parts;
pub use layout::{MAX_CHANNELS, MAX_HELD, MAX_PAYLOAD_BYTES, SAVED_STATE_BYTES, SLOT_COUNT, required_len};
pub use parts::Parts;
pub use recover::RecoverFault;
pub(crate) use recover::RingView;
pub use saved_state::SaveError;
pub use steps::Step;
pub use versions::{SavedState, StateFault};

/// Whether anything is written. Building with the environment variable `BULKHEAD_BENCH_NO_JOURNAL` set compiles the
/// stores out, so that a benchmark can tell what they cost. Such a server cannot be replaced, and does not start without
/// the argument [`WITHOUT_JOURNAL`], which a supervisor never gives.
pub const ENABLED: bool = option_env!("BULKHEAD_BENCH_NO_JOURNAL").is_none();

/// By this argument whoever starts a program says that he knows that its journal was compiled out.
pub const WITHOUT_JOURNAL: &str = "--i-know-that-this-build-has-no-journal";

/// "BHJ" in the lower half of the first word.
const MAGIC: u64 = u32::from_le_bytes(*b"BHJ\0") as u64;

// Words of the first page; see `versions.rs`.
const FIRST: u64 = 0x00;
const SERVED_LAYOUT: u64 = 0x08;
const DEVICE: u64 = 0x10;
const STATE_VERSIONS: u64 = 0x18;

/// Why a journal cannot be used at all.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JournalError {
    /// The descriptor is too short, not sealed, or cannot be mapped.
    #[error("the journal cannot be mapped: {0}")]
    Map(#[from] HostError),
    /// Its first word is none of ours.
    #[error("this is not a journal: it begins with {0:#x}")]
    NotAJournal(u64),
    /// A server of another version wrote it.
    #[error(
        "the journal has layout {found}; this server knows {OLDEST_READABLE_LAYOUT} to {LAYOUT}: use the build that wrote it, \
         or one in between"
    )]
    Layout { found: u64 },
    /// The state in it is not for this server.
    #[error(transparent)]
    State(#[from] StateFault),
    /// This server would write nothing into it.
    #[error(
        "this program was built for a benchmark, without a journal, and would lose its guest's requests if it died: use a \
         build without BULKHEAD_BENCH_NO_JOURNAL"
    )]
    CompiledOut,
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
        if !ENABLED {
            if std::env::args().all(|argument| argument != WITHOUT_JOURNAL) {
                return Err(JournalError::CompiledOut);
            }
            tracing::error!("THIS BUILD HAS NO JOURNAL: for a benchmark only, it cannot be replaced");
        }
        let length = usize::try_from(required_len()).expect("64-bit hosts only");
        let map = SharedMap::map(fd, length, Access::ReadWrite)?;
        // The guest waits while a successor recovers.
        map.fault_in(fd);
        let own = MAGIC | u64::from(OLDEST_READER_LAYOUT) << 32;
        // Ordering: what is in the journal was written by a process that is gone, or is looked at only to be refused.
        match map.load_u64(FIRST, Ordering::Acquire).expect(IN_RANGE) {
            0 => map.store_u64(FIRST, own, Ordering::Release).expect(IN_RANGE),
            found if found & u64::from(u32::MAX) != MAGIC => return Err(JournalError::NotAJournal(found)),
            found if found >> 32 > LAYOUT => return Err(JournalError::Layout { found: found >> 32 }),
            _ => {}
        }
        Ok(Self { map: Arc::new(map) })
    }

    /// Whether a server with the state `S` can go on from what is there. To be asked before it says that it is ready:
    /// the predecessor may still be serving, and nothing is changed.
    pub fn check<S: SavedState>(&self) -> Result<(), JournalError> {
        let layout = self.word(SERVED_LAYOUT).max(1);
        // Layouts above ours have said in the first word that we understand them.
        if layout < OLDEST_READABLE_LAYOUT {
            return Err(JournalError::Layout { found: layout });
        }
        let device = self.word(DEVICE).to_le_bytes();
        if device != [0; 8] && device != S::DEVICE {
            let (found, own) = (device_name(device), device_name(S::DEVICE));
            return Err(StateFault::OtherDevice { found, own }.into());
        }
        let versions = self.word(STATE_VERSIONS);
        if versions != 0 {
            // Two halves.
            check_versions::<S>(versions as u32, (versions >> 32) as u32)?;
        }
        Ok(self.check_state::<S>()?)
    }

    /// Notes that a server with the state `S` serves from now on. The predecessor must be gone.
    pub fn claim<S: SavedState>(&self) {
        if !ENABLED {
            return;
        }
        let versions = u64::from(S::VERSION) | u64::from(S::OLDEST_READER) << 32;
        for (word, value) in [
            (SERVED_LAYOUT, LAYOUT),
            (DEVICE, u64::from_le_bytes(S::DEVICE)),
            (STATE_VERSIONS, versions),
        ] {
            // Ordering: any; each word stands for itself.
            self.map
                .store_u64(word, value, Ordering::Release)
                .expect(IN_RANGE);
        }
    }

    fn word(&self, offset: u64) -> u64 {
        self.map.load_u64(offset, Ordering::Acquire).expect(IN_RANGE)
    }
}
