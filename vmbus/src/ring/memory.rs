//! What reader and writer see of a ring: control words, wrapping data, and the full fence.
//!
//! This is the one place that `--cfg loom` exchanges: there the words are loom's atomics, and the model checker tries
//! what the memory orderings allow.

#[cfg(not(loom))]
pub(super) use mapped::RingMemory;
#[cfg(loom)]
pub(super) use modelled::RingMemory;

/// The four places where a store must be seen before what follows is loaded. Each is one line of the table in
/// `ring/mod.rs`. They have names so that the model can leave one out and show that it is needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fence {
    /// Writer: `write_index` before `interrupt_mask` and `read_index`.
    AfterPublish,
    /// Reader: `interrupt_mask` before `write_index`.
    BeforeSleep,
    /// Reader: `read_index` before `pending_send_bytes`.
    AfterGivingSpace,
    /// Writer: `pending_send_bytes` before `read_index`.
    AfterSpaceWish,
}

/// A full barrier.
#[inline]
#[cfg(not(loom))]
pub(super) fn full_fence(_place: Fence) {
    crate::mem::full_fence();
}

#[cfg(loom)]
pub(super) use modelled::full_fence;

#[cfg(not(loom))]
mod mapped {
    use crate::mem::{PAGE_BYTES, PieceWriter, SharedMap};
    use crate::ring::area::RingArea;
    use crate::ring::{ControlWord, RingFault, advance};
    use std::sync::Arc;
    use std::sync::atomic::Ordering;

    /// A ring in mapped memory. Where its parts lie is looked up once: a packet that lies in one piece costs one
    /// bounds check and one copy for each of its parts.
    pub(in crate::ring) struct RingMemory {
        map: Arc<SharedMap>,
        /// Offset in the map of the control page.
        words: u64,
        /// Offset in the map of the data area, if that lies there in one piece.
        data: Option<u64>,
        ring: RingArea,
        #[cfg(test)]
        adversary: Adversary,
    }

    /// Called before each access to shared memory: the other side, at the worst moment.
    #[cfg(test)]
    type Adversary = std::cell::RefCell<Option<Box<dyn FnMut(&RingArea) + Send>>>;

    impl std::fmt::Debug for RingMemory {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            self.ring.fmt(f)
        }
    }

    /// `RingArea` has checked the size of the area, so that control words and in-range data cannot miss it.
    const CHECKED: &str = "a ring access lies in the ring's area";

    impl RingMemory {
        pub(in crate::ring) fn new(ring: RingArea) -> Result<Self, RingFault> {
            let fault = RingFault::RingSize {
                area_bytes: ring.area.len(),
                downstream_page_offset: 0,
            };
            // Not in one piece only if the area does not begin on a page: no ring of a guest.
            let (map, words) = ring.area.in_one_piece(0, PAGE_BYTES).ok_or(fault)?;
            let data = ring.area.in_one_piece(PAGE_BYTES, u64::from(ring.data_bytes));
            Ok(Self {
                map: map.clone(),
                words,
                data: data.map(|(_, offset)| offset),
                #[cfg(test)]
                adversary: Adversary::default(),
                ring,
            })
        }

        #[cfg(test)]
        pub(in crate::ring) fn set_adversary(&self, adversary: Box<dyn FnMut(&RingArea) + Send>) {
            *self.adversary.borrow_mut() = Some(adversary);
        }

        #[inline(always)]
        fn before_access(&self) {
            #[cfg(test)]
            if let Some(adversary) = self.adversary.borrow_mut().as_mut() {
                adversary(&self.ring);
            }
        }

        #[inline]
        pub(in crate::ring) fn data_bytes(&self) -> u32 {
            self.ring.data_bytes
        }

        #[inline]
        pub(in crate::ring) fn load(&self, word: ControlWord, ordering: Ordering) -> u32 {
            self.before_access();
            self.map
                .load_u32(self.words + word as u64, ordering)
                .expect(CHECKED)
        }

        #[inline]
        pub(in crate::ring) fn store(&self, word: ControlWord, value: u32, ordering: Ordering) {
            self.before_access();
            self.map
                .store_u32(self.words + word as u64, value, ordering)
                .expect(CHECKED);
        }

        /// Offset in the map of `len` bytes at `index`, unless they wrap or the data area is scattered.
        #[inline(always)]
        fn straight(&self, index: u32, len: usize) -> Option<u64> {
            match self.data {
                Some(data) if len <= (self.ring.data_bytes - index) as usize => Some(data + u64::from(index)),
                _ => None,
            }
        }

        /// Copies out from `index` on, around the end if need be. `out` is at most as long as the data area.
        #[inline(always)]
        pub(in crate::ring) fn read(&self, index: u32, out: &mut [u8]) {
            self.before_access();
            match self.straight(index, out.len()) {
                Some(offset) => self.map.read(offset, out).expect(CHECKED),
                None => self.read_around(index, out),
            }
        }

        #[inline(never)]
        fn read_around(&self, index: u32, out: &mut [u8]) {
            let until_end = out.len().min((self.ring.data_bytes - index) as usize);
            let (first, second) = out.split_at_mut(until_end);
            self.ring
                .area
                .read(PAGE_BYTES + u64::from(index), first)
                .expect(CHECKED);
            self.before_access();
            self.ring.area.read(PAGE_BYTES, second).expect(CHECKED);
        }

        /// Where `len` bytes shall be written from `index` on, part by part. `len` is below the data size.
        #[inline(always)]
        pub(in crate::ring) fn place(&self, index: u32, len: usize) -> Place<'_> {
            self.before_access();
            match self.straight(index, len) {
                Some(offset) => Place::Straight(self.map.write_pieces(offset, len).expect(CHECKED)),
                None => Place::Around { memory: self, index },
            }
        }

        #[inline(never)]
        fn write_around(&self, index: u32, data: &[u8]) {
            let until_end = data.len().min((self.ring.data_bytes - index) as usize);
            let (first, second) = data.split_at(until_end);
            self.ring
                .area
                .write(PAGE_BYTES + u64::from(index), first)
                .expect(CHECKED);
            self.ring.area.write(PAGE_BYTES, second).expect(CHECKED);
        }
    }

    /// A packet being written.
    pub(in crate::ring) enum Place<'ring> {
        /// In one piece of the map.
        Straight(PieceWriter<'ring>),
        /// Around the end, or over scattered pages.
        Around { memory: &'ring RingMemory, index: u32 },
    }

    impl Place<'_> {
        /// Writes the next part.
        #[inline(always)]
        pub(in crate::ring) fn put(&mut self, part: &[u8]) {
            match self {
                Place::Straight(pieces) => pieces.put(part),
                Place::Around { memory, index } => {
                    memory.write_around(*index, part);
                    *index = advance(*index, part.len() as u32, memory.ring.data_bytes);
                }
            }
        }
    }
}

#[cfg(loom)]
mod modelled {
    use super::Fence;
    use crate::ring::area::RingArea;
    use crate::ring::{ControlWord, RingFault};
    use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
    use std::sync::Arc;
    use std::sync::Mutex;

    /// A ring in the model checker's memory. Clones are the same ring.
    #[derive(Debug, Clone)]
    pub(in crate::ring) struct RingMemory {
        words: Arc<[AtomicU32; 4]>,
        data: Arc<Vec<AtomicU64>>,
    }

    /// The fence that the current model leaves out. A plain mutex: no part of what is modelled.
    static LEFT_OUT: Mutex<Option<Fence>> = Mutex::new(None);

    pub(in crate::ring) fn leave_out(fence: Option<Fence>) {
        *LEFT_OUT.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = fence;
    }

    pub(in crate::ring) fn full_fence(place: Fence) {
        let left_out = *LEFT_OUT.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if left_out != Some(place) {
            fence(Ordering::SeqCst);
        }
    }

    impl RingMemory {
        /// A mapped ring cannot be modelled.
        pub(in crate::ring) fn new(_ring: RingArea) -> Result<Self, RingFault> {
            panic!("built for the model checker, which runs the tests of ring/loom.rs only");
        }

        pub(in crate::ring) fn of(data_bytes: u32) -> Self {
            Self {
                words: Arc::new(std::array::from_fn(|_| AtomicU32::new(0))),
                data: Arc::new((0..data_bytes / 8).map(|_| AtomicU64::new(0)).collect()),
            }
        }

        pub(in crate::ring) fn data_bytes(&self) -> u32 {
            self.data.len() as u32 * 8
        }

        pub(in crate::ring) fn load(&self, word: ControlWord, ordering: Ordering) -> u32 {
            self.words[word as usize / 4].load(ordering)
        }

        pub(in crate::ring) fn store(&self, word: ControlWord, value: u32, ordering: Ordering) {
            self.words[word as usize / 4].store(value, ordering);
        }

        /// Ordering: relaxed, so that only the protocol's own acquire and release make the data visible.
        pub(in crate::ring) fn read(&self, index: u32, out: &mut [u8]) {
            for (offset, chunk) in out.chunks_exact_mut(8).enumerate() {
                let word = (index as usize / 8 + offset) % self.data.len();
                chunk.copy_from_slice(&self.data[word].load(Ordering::Relaxed).to_le_bytes());
            }
        }

        pub(in crate::ring) fn place(&self, index: u32, _len: usize) -> Place<'_> {
            Place {
                memory: self,
                word: index as usize / 8,
            }
        }
    }

    /// A packet being written: multiples of eight bytes.
    pub(in crate::ring) struct Place<'ring> {
        memory: &'ring RingMemory,
        word: usize,
    }

    impl Place<'_> {
        pub(in crate::ring) fn put(&mut self, part: &[u8]) {
            for chunk in part.chunks_exact(8) {
                let value = chunk.try_into().expect("eight bytes");
                let data = &self.memory.data;
                data[self.word % data.len()].store(u64::from_le_bytes(value), Ordering::Relaxed);
                self.word += 1;
            }
        }
    }
}

#[cfg(loom)]
pub(super) use modelled::leave_out;
