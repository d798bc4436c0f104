//! Which server can go on from which other one's journal.
//!
//! # The window
//! A server of version N goes on from what version N - 1 has left, and one of version N - 1 from what N has left: so
//! that a new build can be put in place and taken back while the VM runs. Older pairs may work as well.
//!
//! Bytes of the base and of each addition never change once they were released. Version N writes the base, in the
//! form of version 1, and one addition for each later version that had something to add; it reads those it knows and
//! leaves out those it does not know. An addition that is missing has its default, which must describe what servers do
//! that do not know of it. So a field that only an addition has is lost if an older server has served in between.
//!
//! Where that cannot be right, a version says so: it raises [`SavedState::OLDEST_READER`], and servers below it
//! refuse. Where even a base must change, `OLDEST_READABLE` is raised, too. Builds from before there were tails (version
//! 1, layout 1) know no such word; to keep them out, raise the layout in the journal's first word.
//!
//! A promise made to the guest may be a value and not a form: [`SavedState::read`] refuses a state with a promise
//! that this build cannot keep.
//!
//! # The journal's first page
//! | word | what | in a journal of layout 1 |
//! | --- | --- | --- |
//! | 0x00 | "BHJ" and the oldest layout whose servers understand this journal | the same |
//! | 0x08 | the layout of the server that serves | 0 |
//! | 0x10 | [`SavedState::DEVICE`] | 0 |
//! | 0x18 | version of its state; in the high half, the oldest version that understands it | 0 |
//!
//! They are stored when a server begins to serve ([`super::Journal::claim`]), and looked at *before* it is ready
//! ([`super::Journal::check`]), while its predecessor still serves: a swap to a server that does not fit fails there
//! and the predecessor goes on; after a crash the device is held.
#![forbid(unsafe_code)]

use super::parts::Parts;
use crate::ipc::codec::{DecodeError, EncodeError};

/// The layout of the journal that this build writes.
pub(super) const LAYOUT: u64 = 2;
/// The oldest layout that it goes on from.
pub(super) const OLDEST_READABLE_LAYOUT: u64 = 1;
/// The oldest layout whose servers go on from what this build writes. Layout 2 has only added words that were 0.
pub(super) const OLDEST_READER_LAYOUT: u32 = 1;

/// A device's protocol state, as it is left to a successor.
pub trait SavedState: Sized {
    /// The device's protocol. A journal of another one is refused.
    const DEVICE: [u8; 8];
    /// Of what [`Self::emit`] makes.
    const VERSION: u32;
    /// The oldest version whose servers understand that.
    const OLDEST_READER: u32;
    /// The oldest version that [`Self::parse`] understands.
    const OLDEST_READABLE: u32;

    /// The state as bytes.
    fn emit(&self) -> Result<Parts, EncodeError>;

    /// The state of what a predecessor has left, which may be any bytes.
    fn parse(parts: &Parts) -> Result<Self, StateFault>;

    /// [`Self::parse`], if the versions fit.
    fn read(parts: &Parts) -> Result<Self, StateFault> {
        check_versions::<Self>(parts.version, parts.oldest_reader)?;
        Self::parse(parts)
    }
}

/// Why this server cannot go on from a predecessor's state.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StateFault {
    /// From the other side of the window.
    #[error(
        "the predecessor's state is of version {version}, for servers of version {oldest_reader} and above; this one is of \
         version {known}: use a newer build"
    )]
    TooNew {
        version: u32,
        oldest_reader: u32,
        known: u32,
    },
    /// The same.
    #[error(
        "the predecessor's state is of version {version}, and this server reads version {oldest} and above: go by way of \
         a build in between"
    )]
    TooOld { version: u32, oldest: u32 },
    /// Not what any server of ours writes.
    #[error("the predecessor's state makes no sense: {0}")]
    Decode(#[from] DecodeError),
    /// The guest was promised what this build cannot do.
    #[error(
        "the predecessor has promised the guest {what} of {promised}, and this build can do {limit}: use a newer build"
    )]
    Promise {
        what: &'static str,
        promised: u64,
        limit: u64,
    },
    /// The journal is another device's.
    #[error("the journal belongs to a device of type \"{found}\", and this server is for \"{own}\"")]
    OtherDevice { found: String, own: String },
}

/// Whether a server of `S` goes on from such a state.
pub(super) fn check_versions<S: SavedState>(version: u32, oldest_reader: u32) -> Result<(), StateFault> {
    if oldest_reader > S::VERSION {
        return Err(StateFault::TooNew {
            version,
            oldest_reader,
            known: S::VERSION,
        });
    }
    if version < S::OLDEST_READABLE {
        return Err(StateFault::TooOld {
            version,
            oldest: S::OLDEST_READABLE,
        });
    }
    Ok(())
}

/// [`SavedState::DEVICE`] as text.
pub(super) fn device_name(device: [u8; 8]) -> String {
    device
        .iter()
        .take_while(|&&byte| byte != 0)
        .flat_map(|&byte| std::ascii::escape_default(byte))
        .map(char::from)
        .collect()
}
