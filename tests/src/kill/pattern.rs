//! Numbers from a seed, and blocks that say where they belong and how often that place was written.

#![forbid(unsafe_code)]

/// Bytes of a block, the unit in which places are written.
pub const BLOCK_BYTES: usize = 4096;

/// A generator that gives the same numbers for the same seed (splitmix64 by Vigna, public domain).
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// Another sequence for every pair.
    pub fn new(seed: u64, stream: u64) -> Self {
        Self(mix(seed) ^ mix(stream.wrapping_mul(0xA24B_AED4_963E_E407).wrapping_add(1)))
    }

    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mix(self.0)
    }

    /// A number below `limit`, which is not 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.number() % limit
    }
}

fn mix(mut word: u64) -> u64 {
    word = (word ^ (word >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    word ^ (word >> 31)
}

/// What `place` holds after its write number `sequence`, word for word.
fn words(place: u64, sequence: u64) -> impl Iterator<Item = u64> {
    let start = mix(place) ^ mix(sequence << 32);
    let rest = (2..BLOCK_BYTES as u64 / 8).map(move |index| start.wrapping_mul(2 * index + 1));
    [place, sequence].into_iter().chain(rest)
}

/// Fills a block with what `place` holds after its write number `sequence`; 0: never written, or unmapped.
pub fn fill(block: &mut [u8], place: u64, sequence: u64) {
    if sequence == 0 {
        return block.fill(0);
    }
    let (found, _) = block.as_chunks_mut();
    found
        .iter_mut()
        .zip(words(place, sequence))
        .for_each(|(found, word)| *found = word.to_le_bytes());
}

/// Whether a block is as [`fill`] makes it. Makes no second one: what this costs, the servers under test lack.
fn is_right(block: &[u8], place: u64, sequence: u64) -> bool {
    let (found, _) = block.as_chunks();
    let found = found.iter().map(|word| u64::from_le_bytes(*word));
    let wrong_bits = match sequence {
        0 => found.fold(0, |bits, word| bits | word),
        _ => found
            .zip(words(place, sequence))
            .fold(0, |bits, (found, word)| bits | (found ^ word)),
    };
    wrong_bits == 0
}

/// What is wrong with a block that should be as [`fill`] makes it.
pub fn check(block: &[u8], place: u64, sequence: u64) -> Result<(), String> {
    if is_right(block, place, sequence) {
        return Ok(());
    }
    let mut expected = vec![0; block.len()];
    fill(&mut expected, place, sequence);
    let word = |index: usize| {
        let bytes = block.get(index * 8..)?.first_chunk()?;
        Some(u64::from_le_bytes(*bytes))
    };
    let (found_place, found_sequence) = (word(0).unwrap_or(0), word(1).unwrap_or(0));
    fill(&mut expected, found_place, found_sequence);
    let whole = if block == expected {
        "all of"
    } else {
        "a mixture with"
    };
    let at = block
        .iter()
        .zip(&expected)
        .position(|(found, wanted)| found != wanted);
    Err(format!(
        "place {place} should hold write {sequence} and holds {whole} write {found_sequence} of place {found_place}, \
         first difference at {at:?}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_right_for_one_write_of_one_place_only() {
        let mut block = vec![0; BLOCK_BYTES];
        fill(&mut block, 7, 9);
        assert!(check(&block, 7, 9).is_ok());
        assert!(check(&block, 7, 8).is_err());
        assert!(check(&block, 6, 9).is_err());
        assert!(check(&block, 7, 0).is_err());
        block[BLOCK_BYTES - 1] ^= 1;
        assert!(check(&block, 7, 9).is_err_and(|why| why.contains("mixture")));
    }

    #[test]
    fn a_seed_gives_the_same_numbers_again() {
        let numbers = |seed, stream| {
            let mut random = Random::new(seed, stream);
            [random.number(), random.number(), random.below(10)]
        };
        assert_eq!(numbers(1, 0), numbers(1, 0));
        assert_ne!(numbers(1, 0), numbers(1, 1));
        assert_ne!(numbers(1, 0), numbers(2, 0));
    }
}
