//! Journals with anything in them, as a hostile or a half-dead predecessor would leave them.
#![forbid(unsafe_code)]

use std::os::fd::BorrowedFd;

use nix::sys::uio::{pread, pwrite};

use crate::journal::used_parts;

/// Values that counters, lengths and indexes go wrong at.
const WORDS: [u64; 12] = [
    0,
    1,
    4,
    8,
    0x7FFF_FFFF,
    0xFFFF_FFF8,
    0xFFFF_FFFF,
    1 << 32,
    (1 << 62) - 1,
    1 << 62,
    1 << 63,
    u64::MAX,
];

/// Numbers from a seed: xorshift.
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    /// Another sequence for every seed.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// A number below `limit`; 0 if there is none.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.checked_rem(limit).unwrap_or(0)
    }
}

/// Makes up to six changes to what is used of a journal by `channels` channels with `slots` slots each: a word at the edge of
/// what counters can be, a flipped bit, any word, or a whole part of anything.
pub fn spoil(journal: BorrowedFd<'_>, channels: u16, slots: u16, random: &mut Random) -> nix::Result<()> {
    let parts = used_parts(channels, slots);
    for _ in 0..=random.below(6) {
        let Some(&(begin, len)) = parts.get(random.below(parts.len() as u64) as usize) else {
            return Ok(());
        };
        let at = begin + random.below(len / 8) * 8;
        let mut word = [0; 8];
        pread(journal, &mut word, at as i64)?;
        match random.below(4) {
            0 => word = WORDS[random.below(WORDS.len() as u64) as usize].to_le_bytes(),
            1 => word[random.below(8) as usize] ^= 1 << random.below(8),
            2 => word = random.below(u64::MAX).to_le_bytes(),
            _ => {
                let bytes: Vec<u8> = (0..len).map(|_| random.below(256) as u8).collect();
                pwrite(journal, &bytes, begin as i64)?;
                continue;
            }
        }
        pwrite(journal, &word, at as i64)?;
    }
    Ok(())
}
