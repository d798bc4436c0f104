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
    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
}

#[cfg(loom)]
pub(super) use modelled::full_fence;

#[cfg(not(loom))]
mod mapped {
    use crate::mem::PAGE_BYTES;
    use crate::ring::area::RingArea;
    use crate::ring::{ControlWord, RingFault};
    use std::sync::atomic::Ordering;

    /// A ring in mapped memory.
    pub(in crate::ring) struct RingMemory {
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
            Ok(Self {
                ring,
                #[cfg(test)]
                adversary: Adversary::default(),
            })
        }

        #[cfg(test)]
        pub(in crate::ring) fn set_adversary(&self, adversary: Box<dyn FnMut(&RingArea) + Send>) {
            *self.adversary.borrow_mut() = Some(adversary);
        }

        #[inline]
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
            self.ring.area.load_u32(word as u64, ordering).expect(CHECKED)
        }

        #[inline]
        pub(in crate::ring) fn store(&self, word: ControlWord, value: u32, ordering: Ordering) {
            self.before_access();
            self.ring
                .area
                .store_u32(word as u64, value, ordering)
                .expect(CHECKED);
        }

        /// Copies out from `index` on, around the end if need be. `out` is at most as long as the data area.
        #[inline]
        pub(in crate::ring) fn read(&self, index: u32, out: &mut [u8]) {
            self.before_access();
            let until_end = (self.ring.data_bytes - index) as usize;
            let at = PAGE_BYTES + u64::from(index);
            if out.len() <= until_end {
                self.ring.area.read(at, out).expect(CHECKED);
            } else {
                let (first, second) = out.split_at_mut(until_end);
                self.ring.area.read(at, first).expect(CHECKED);
                self.before_access();
                self.ring.area.read(PAGE_BYTES, second).expect(CHECKED);
            }
        }

        /// Copies in from `index` on, around the end if need be. `data` is at most as long as the data area.
        #[inline]
        pub(in crate::ring) fn write(&self, index: u32, data: &[u8]) {
            self.before_access();
            let until_end = (self.ring.data_bytes - index) as usize;
            let at = PAGE_BYTES + u64::from(index);
            if data.len() <= until_end {
                self.ring.area.write(at, data).expect(CHECKED);
            } else {
                let (first, second) = data.split_at(until_end);
                self.ring.area.write(at, first).expect(CHECKED);
                self.ring.area.write(PAGE_BYTES, second).expect(CHECKED);
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

        pub(in crate::ring) fn write(&self, index: u32, data: &[u8]) {
            for (offset, chunk) in data.chunks_exact(8).enumerate() {
                let word = (index as usize / 8 + offset) % self.data.len();
                let value = chunk.try_into().expect("eight bytes");
                self.data[word].store(u64::from_le_bytes(value), Ordering::Relaxed);
            }
        }
    }
}

#[cfg(loom)]
pub(super) use modelled::leave_out;
