//! The Internet checksum (RFC 1071).

/// A running sum. Pieces of odd length may only come last.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sum(u64);

impl Sum {
    /// Adds bytes as big-endian 16-bit words; an odd last byte counts as the high half of a word.
    pub fn add_bytes(self, bytes: &[u8]) -> Self {
        // Summing in native order gives the byte-swapped sum (RFC 1071 section 2 (B)); `finish` swaps back. Eight bytes
        // at a time as two 32-bit halves: 2^32 additions would be needed to overflow the accumulator.
        let (chunks, rest) = bytes.as_chunks::<8>();
        let mut sum = self.0;
        for chunk in chunks {
            let word = u64::from_le_bytes(*chunk);
            sum += (word & 0xFFFF_FFFF) + (word >> 32);
        }
        let mut last = [0u8; 8];
        last[..rest.len()].copy_from_slice(rest);
        let word = u64::from_le_bytes(last);
        Self(fold(sum + (word & 0xFFFF_FFFF) + (word >> 32)))
    }

    /// Adds one word.
    pub fn add_word(self, word: u16) -> Self {
        Self(self.0 + u64::from(word.swap_bytes()))
    }

    /// The checksum as it stands in a header.
    pub fn finish(self) -> u16 {
        !self.value()
    }

    /// The folded sum, not complemented: what stands in a TCP or UDP header whose checksum is left to others.
    pub fn value(self) -> u16 {
        (fold(fold(self.0)) as u16).swap_bytes()
    }
}

/// Adds the halves so that the sum fits 16 bits and a carry.
fn fold(sum: u64) -> u64 {
    let sum = (sum & 0xFFFF_FFFF) + (sum >> 32);
    let sum = (sum & 0xFFFF) + (sum >> 16);
    (sum & 0xFFFF) + (sum >> 16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn oracle(bytes: &[u8]) -> u16 {
        let mut sum = 0u32;
        for pair in bytes.chunks(2) {
            sum += u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |&low| u32::from(low));
            sum = (sum & 0xFFFF) + (sum >> 16);
        }
        !(sum as u16)
    }

    #[test]
    fn the_example_of_rfc_1071_comes_out() {
        assert_eq!(
            Sum::default()
                .add_bytes(&[0, 1, 0xF2, 3, 0xF4, 0xF5, 0xF6, 0xF7])
                .value(),
            0xDDF2
        );
    }

    proptest! {
        #[test]
        fn any_bytes_agree_with_the_plain_definition(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
            prop_assert_eq!(Sum::default().add_bytes(&bytes).finish(), oracle(&bytes));
        }

        #[test]
        fn pieces_add_up(first in prop::collection::vec(any::<u16>(), 0..100), second in prop::collection::vec(any::<u8>(), 0..99), word in any::<u16>()) {
            let first: Vec<u8> = first.iter().flat_map(|word| word.to_be_bytes()).collect();
            let mut all = first.clone();
            all.extend_from_slice(&word.to_be_bytes());
            all.extend_from_slice(&second);
            let pieces = Sum::default().add_bytes(&first).add_word(word).add_bytes(&second);
            prop_assert_eq!(pieces.finish(), oracle(&all));
        }
    }
}
