//! A device's own protocol state, saved at each transition.
//!
//! Two copies are written in turns; the newer one that is whole counts. Each is
//! ```text
//!   0  u64 generation (0: empty)     8  u32 open epoch     12  u32 length     16  u32 CRC-32 of all the rest
//!   20 u32 zero                      24 payload: the device's own serde type, encoded by ipc::codec
//! ```
//! The generation is stored last, and set to 0 first, so that a copy cut short does not count; the checksum
//! guards against whatever else a dying server may have done. States are small and transitions rare: unlike the
//! request path, this one can afford it.
//!
//! The state belongs to one opening of the device's primary channel. For another opening there is none.
//!
//! The device's type should be an enum with one variant for each version of the state, so that an older or newer
//! server can tell.
#![forbid(unsafe_code)]

use std::sync::atomic::Ordering;

use serde::{Serialize, de::DeserializeOwned};

use super::layout::{SAVED_STATE, SAVED_STATE_BYTES};
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

impl Journal {
    /// Saves the device's state in the opening `open_epoch` of its primary channel.
    ///
    /// After this returns, a successor finds this state; if the server dies within it, this one or the last one.
    pub fn save_state<T: Serialize>(&self, open_epoch: u32, state: &T) -> Result<(), SaveError> {
        if !ENABLED {
            return Ok(());
        }
        let payload = codec::encode(state)?;
        let length = payload.len() as u64;
        if length > SAVED_STATE_BYTES - HEADER_BYTES {
            return Err(SaveError::TooLong { bytes: payload.len() });
        }
        let (last, last_copy) = self
            .newest()
            .map_or((0, 1), |(generation, copy, ..)| (generation, copy));
        let copy = 1 - last_copy;
        let base = copy_base(copy);
        // Not counted any more from here on.
        self.map
            .store_u64(base + GENERATION, 0, Ordering::Release)
            .expect(IN_RANGE);
        // A state is below 64 KiB.
        let sizes = u64::from(open_epoch) | length << 32;
        self.map
            .store_u64(base + EPOCH, sizes, Ordering::Release)
            .expect(IN_RANGE);
        self.map.write(base + HEADER_BYTES, &payload).expect(IN_RANGE);
        let generation = last.checked_add(1).unwrap_or(1);
        let checksum = checksum(generation, sizes, &payload);
        self.map
            .store_u64(base + CHECKSUM, u64::from(checksum), Ordering::Release)
            .expect(IN_RANGE);
        self.map
            .store_u64(base + GENERATION, generation, Ordering::Release)
            .expect(IN_RANGE);
        Ok(())
    }

    /// The state that was saved last, if it was saved in this opening of the primary channel.
    pub fn load_state<T: DeserializeOwned>(&self, open_epoch: u32) -> Result<Option<T>, codec::DecodeError> {
        match self.newest() {
            Some((_, _, epoch, payload)) if epoch == open_epoch => codec::decode(&payload).map(Some),
            _ => Ok(None),
        }
    }

    /// Generation, copy, epoch and payload of the newest whole copy.
    fn newest(&self) -> Option<(u64, u64, u32, Vec<u8>)> {
        (0..2)
            .filter_map(|copy| self.read_copy(copy))
            .max_by_key(|(generation, ..)| *generation)
    }

    fn read_copy(&self, copy: u64) -> Option<(u64, u64, u32, Vec<u8>)> {
        let base = copy_base(copy);
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
        // The low half of `sizes` is the epoch.
        (load(CHECKSUM) == u64::from(checksum(generation, sizes, &payload))).then_some((
            generation,
            copy,
            sizes as u32,
            payload,
        ))
    }
}

fn copy_base(copy: u64) -> u64 {
    SAVED_STATE + copy * SAVED_STATE_BYTES
}

fn checksum(generation: u64, sizes: u64, payload: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&generation.to_le_bytes());
    hasher.update(&sizes.to_le_bytes());
    hasher.update(payload);
    hasher.finalize()
}
