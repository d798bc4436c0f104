//! A device's own protocol state, saved at each transition.
//!
//! Two copies are written in turns; the newer one that is whole counts. Each is
//! ```text
//!   0  u64 generation (0: empty)     8  u32 open epoch     12  u32 length     16  u32 CRC-32 of all the rest
//!   20 u32 zero                      24 base: what version 1 of the device's state was, encoded by ipc::codec
//!   then, at the next multiple of 8, what later versions have added (parts.rs)
//! ```
//! The generation is stored last, and set to 0 first, so that a copy cut short does not count; the checksums
//! guard against whatever else a dying server may have done. States are small and transitions rare: unlike the
//! request path, this one can afford it.
//!
//! The state belongs to one opening of the device's primary channel. For another opening there is none.
//!
//! Which versions can follow each other is said in [`super::versions`].
#![forbid(unsafe_code)]

use std::sync::atomic::Ordering;

use super::layout::{SAVED_STATE, SAVED_STATE_BYTES};
use super::parts::{Parts, Tail};
use super::steps::Step;
use super::versions::{SavedState, StateFault};
use super::{ENABLED, IN_RANGE, Journal};
use crate::ipc::codec;

const GENERATION: u64 = 0;
const EPOCH: u64 = 8;
const CHECKSUM: u64 = 16;
const HEADER_BYTES: u64 = 24;

/// Why a state could not be saved. Both are mistakes of the device's author.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SaveError {
    /// Not encodable.
    #[error("saved state: {0}")]
    Encode(#[from] codec::EncodeError),
    /// Longer than a copy.
    #[error("saved state of {bytes} bytes; {} are the most", SAVED_STATE_BYTES - HEADER_BYTES)]
    TooLong { bytes: usize },
}

/// A whole copy.
struct WholeCopy {
    generation: u64,
    /// 0 or 1.
    index: u64,
    epoch: u32,
    parts: Parts,
}

impl Journal {
    /// Saves the device's state in the opening `open_epoch` of its primary channel.
    ///
    /// After this returns, a successor finds this state; if the server dies within it, this one or the last one.
    pub fn save_state<S: SavedState>(&self, open_epoch: u32, state: &S) -> Result<(), SaveError> {
        if !ENABLED {
            return Ok(());
        }
        let parts = state.emit()?;
        let (last, last_copy) = self.newest().map_or((0, 1), |copy| (copy.generation, copy.index));
        let generation = last.checked_add(1).unwrap_or(1);
        let tail = parts.emit_tail(generation, S::VERSION, S::OLDEST_READER);
        let payload = parts.base_bytes();
        let bytes = payload.len().next_multiple_of(8) + tail.len();
        if bytes as u64 > SAVED_STATE_BYTES - HEADER_BYTES {
            return Err(SaveError::TooLong { bytes });
        }
        let base = copy_base(1 - last_copy);
        // Not counted any more from here on.
        self.map
            .store_u64(base + GENERATION, 0, Ordering::Release)
            .expect(IN_RANGE);
        self.pass(Step::StateInvalidated);
        // A state is below 64 KiB.
        let sizes = u64::from(open_epoch) | (payload.len() as u64) << 32;
        self.map
            .store_u64(base + EPOCH, sizes, Ordering::Release)
            .expect(IN_RANGE);
        self.map.write(base + HEADER_BYTES, payload).expect(IN_RANGE);
        self.map
            .write(base + tail_offset(payload.len()), &tail)
            .expect(IN_RANGE);
        let checksum = checksum(generation, sizes, payload);
        self.map
            .store_u64(base + CHECKSUM, u64::from(checksum), Ordering::Release)
            .expect(IN_RANGE);
        self.pass(Step::StateWritten);
        self.map
            .store_u64(base + GENERATION, generation, Ordering::Release)
            .expect(IN_RANGE);
        self.pass(Step::StateSaved);
        Ok(())
    }

    /// The state that was saved last, if it was saved in this opening of the primary channel.
    pub fn load_state<S: SavedState>(&self, open_epoch: u32) -> Result<Option<S>, StateFault> {
        match self.newest() {
            Some(copy) if copy.epoch == open_epoch => S::read(&copy.parts).map(Some),
            _ => Ok(None),
        }
    }

    /// Whether this server could go on from what was saved last, whatever opening it belongs to.
    pub(super) fn check_state<S: SavedState>(&self) -> Result<(), StateFault> {
        match self.newest() {
            Some(copy) => S::read(&copy.parts).map(|_| ()),
            None => Ok(()),
        }
    }

    /// The newest whole copy.
    fn newest(&self) -> Option<WholeCopy> {
        (0..2)
            .filter_map(|index| self.read_copy(index))
            .max_by_key(|copy| copy.generation)
    }

    fn read_copy(&self, index: u64) -> Option<WholeCopy> {
        let base = copy_base(index);
        let load = |offset: u64| {
            self.map
                .load_u64(base + offset, Ordering::Acquire)
                .expect(IN_RANGE)
        };
        let (generation, sizes) = (load(GENERATION), load(EPOCH));
        let length = sizes >> 32;
        if generation == 0 || length > SAVED_STATE_BYTES - HEADER_BYTES {
            return None;
        }
        let mut payload = vec![0; length as usize];
        self.map.read(base + HEADER_BYTES, &mut payload).expect(IN_RANGE);
        if load(CHECKSUM) != u64::from(checksum(generation, sizes, &payload)) {
            return None;
        }
        let tail_offset = tail_offset(payload.len());
        let mut tail = vec![0; SAVED_STATE_BYTES.saturating_sub(tail_offset) as usize];
        self.map.read(base + tail_offset, &mut tail).expect(IN_RANGE);
        let parts = match Tail::parse(&tail, generation) {
            Tail::None => Parts::version_1(payload),
            Tail::Whole(tail) => tail.with_base(payload),
            // Of this very save, and spoilt.
            Tail::Damaged => return None,
        };
        Some(WholeCopy {
            generation,
            index,
            // The low half of `sizes`.
            epoch: sizes as u32,
            parts,
        })
    }
}

fn copy_base(copy: u64) -> u64 {
    SAVED_STATE + copy * SAVED_STATE_BYTES
}

/// Where the tail begins, counted from the copy.
fn tail_offset(base_bytes: usize) -> u64 {
    (HEADER_BYTES + base_bytes as u64).next_multiple_of(8)
}

fn checksum(generation: u64, sizes: u64, payload: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&generation.to_le_bytes());
    hasher.update(&sizes.to_le_bytes());
    hasher.update(payload);
    hasher.finalize()
}
