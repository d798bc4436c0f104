//! What reader and writer see of a ring: control words, wrapping data, and the full fence.
//!
//! This is the one place that `--cfg loom` exchanges: there the words are loom's atomics, and the model checker tries
//! what the memory orderings allow.

#[cfg(not(loom))]
pub(super) use mapped::RingMemory;
#[cfg(loom)]
pub(super) use modelled::RingMemory;

/// Ordering: the full barrier of the table in `ring/mod.rs`. x86 needs it for store -> load only.
#[inline]
pub(super) fn full_fence() {
    #[cfg(not(loom))]
    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    #[cfg(loom)]
    loom::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
}

#[cfg(not(loom))]
mod mapped {
    use crate::mem::PAGE_BYTES;
    use crate::ring::area::RingArea;
    use crate::ring::{ControlWord, RingFault};
    use std::sync::atomic::Ordering;

    /// A ring in mapped memory.
    #[derive(Debug)]
    pub(in crate::ring) struct RingMemory {
        ring: RingArea,
    }

    /// `RingArea` has checked the size of the area, so that control words and in-range data cannot miss it.
    const CHECKED: &str = "a ring access lies in the ring's area";

    impl RingMemory {
        pub(in crate::ring) fn new(ring: RingArea) -> Result<Self, RingFault> {
            Ok(Self { ring })
        }

        #[inline]
        pub(in crate::ring) fn data_bytes(&self) -> u32 {
            self.ring.data_bytes
        }

        #[inline]
        pub(in crate::ring) fn load(&self, word: ControlWord, ordering: Ordering) -> u32 {
            self.ring.area.load_u32(word as u64, ordering).expect(CHECKED)
        }

        #[inline]
        pub(in crate::ring) fn store(&self, word: ControlWord, value: u32, ordering: Ordering) {
            self.ring
                .area
                .store_u32(word as u64, value, ordering)
                .expect(CHECKED);
        }

        /// Copies out from `index` on, around the end if need be. `out` is at most as long as the data area.
        #[inline]
        pub(in crate::ring) fn read(&self, index: u32, out: &mut [u8]) {
            let until_end = (self.ring.data_bytes - index) as usize;
            let at = PAGE_BYTES + u64::from(index);
            if out.len() <= until_end {
                self.ring.area.read(at, out).expect(CHECKED);
            } else {
                let (first, second) = out.split_at_mut(until_end);
                self.ring.area.read(at, first).expect(CHECKED);
                self.ring.area.read(PAGE_BYTES, second).expect(CHECKED);
            }
        }

        /// Copies in from `index` on, around the end if need be. `data` is at most as long as the data area.
        #[inline]
        pub(in crate::ring) fn write(&self, index: u32, data: &[u8]) {
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
