//! What a slot says, and which slots are free.
#![forbid(unsafe_code)]

use super::layout::{MAX_PAYLOAD_BYTES, SLOT_COUNT};

/// Which of a slot's two sequence numbers makes it live, and which one ends it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// A request of the guest: begins with the take, ends with the publication of its answer.
    Request,
    /// A packet of ours: begins with its publication, ends with the take of the guest's answer.
    Held,
}

/// The first word of a slot, packed: kind in bits 0..8, role in 8..16, payload length in 32..64.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SlotHead {
    /// The device's own classification.
    pub kind: u8,
    pub role: Role,
    /// Bytes of payload, at most [`MAX_PAYLOAD_BYTES`].
    pub payload_bytes: u32,
}

impl SlotHead {
    pub(super) fn pack(self) -> u64 {
        let role = match self.role {
            Role::Request => 0,
            Role::Held => 1,
        };
        u64::from(self.kind) | role << 8 | u64::from(self.payload_bytes) << 32
    }

    /// `None`: no server of ours wrote this word.
    pub(super) fn unpack(word: u64) -> Option<Self> {
        let role = match word >> 8 & 0xff_ffff {
            0 => Role::Request,
            1 => Role::Held,
            _ => return None,
        };
        // Bits 32..64, which fit.
        let payload_bytes = (word >> 32) as u32;
        if payload_bytes as usize > MAX_PAYLOAD_BYTES {
            return None;
        }
        Some(Self {
            kind: (word & 0xff) as u8,
            role,
            payload_bytes,
        })
    }
}

/// The words of a slot, copied out of the journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct SlotWords {
    pub head: u64,
    pub take_seq: u64,
    pub publish_seq: u64,
    pub transaction_id: u64,
}

impl SlotWords {
    /// Whether the slot is live, given the committed sequence numbers.
    pub(super) fn is_live(&self, role: Role, taken_seq: u64, published_seq: u64) -> bool {
        let taken = self.take_seq != 0 && self.take_seq <= taken_seq;
        let published = self.publish_seq != 0 && self.publish_seq <= published_seq;
        match role {
            Role::Request => taken && !published,
            Role::Held => published && !taken,
        }
    }
}

const WORDS: usize = SLOT_COUNT as usize / 64;

/// The free slots of a channel. Gives out the lowest, so that few pages are ever touched.
#[derive(Debug, Clone)]
pub(crate) struct FreeSlots {
    /// Bit set: free.
    free: [u64; WORDS],
    /// Bit set: that word has a free slot.
    words: u32,
    count: u16,
}

const _: () = assert!(WORDS <= 32 && (SLOT_COUNT as usize).is_multiple_of(64));

impl FreeSlots {
    /// All are free.
    pub(super) fn all() -> Self {
        Self {
            free: [u64::MAX; WORDS],
            words: (1 << WORDS) - 1,
            count: SLOT_COUNT,
        }
    }

    pub(crate) fn count(&self) -> u16 {
        self.count
    }

    /// Takes the lowest free slot.
    pub(super) fn take_lowest(&mut self) -> Option<u16> {
        if self.words == 0 {
            return None;
        }
        let word = self.words.trailing_zeros() as usize;
        let bit = self.free[word].trailing_zeros();
        // Both are below 64.
        let slot = word as u16 * 64 + bit as u16;
        self.remove(slot);
        Some(slot)
    }

    /// Takes a certain one, which must be free.
    pub(super) fn remove(&mut self, slot: u16) {
        let (word, bit) = (usize::from(slot / 64), 1 << (slot % 64));
        assert!(self.free[word] & bit != 0, "slot {slot} is in use");
        self.free[word] &= !bit;
        if self.free[word] == 0 {
            self.words &= !(1 << word);
        }
        self.count -= 1;
    }

    /// Gives one back.
    pub(super) fn insert(&mut self, slot: u16) {
        let (word, bit) = (usize::from(slot / 64), 1 << (slot % 64));
        assert!(self.free[word] & bit == 0, "slot {slot} is free already");
        self.free[word] |= bit;
        self.words |= 1 << word;
        self.count += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_free_slot_is_used_first() {
        let mut free = FreeSlots::all();
        let taken: Vec<u16> = (0..130).filter_map(|_| free.take_lowest()).collect();
        assert_eq!(taken, (0..130).collect::<Vec<u16>>());
        free.insert(64);
        free.insert(3);
        assert_eq!(
            (free.take_lowest(), free.take_lowest(), free.take_lowest()),
            (Some(3), Some(64), Some(130))
        );
    }

    #[test]
    fn there_is_no_slot_beyond_the_last() {
        let mut free = FreeSlots::all();
        for _ in 0..SLOT_COUNT {
            assert!(free.take_lowest().is_some());
        }
        assert_eq!((free.take_lowest(), free.count()), (None, 0));
    }

    #[test]
    fn a_head_survives_packing_and_foreign_words_are_refused() {
        for role in [Role::Request, Role::Held] {
            let head = SlotHead {
                kind: 0xa5,
                role,
                payload_bytes: MAX_PAYLOAD_BYTES as u32,
            };
            assert_eq!(SlotHead::unpack(head.pack()), Some(head));
        }
        assert_eq!(SlotHead::unpack(2 << 8), None);
        assert_eq!(SlotHead::unpack((MAX_PAYLOAD_BYTES as u64 + 1) << 32), None);
    }
}
