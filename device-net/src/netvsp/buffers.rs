//! The send buffer: guest memory cut into sections of one size, each used by the guest for one packet at a time.

use super::wire::SectionClaim;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Bytes of one section. Hyper-V's own value; below 68 Linux gives up (netvsc.c `netvsc_init_buf`).
pub const SECTION_BYTES: u32 = 6144;

/// A send buffer that the guest gave us.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SendBuffer {
    pub gpadl: u32,
    pub section_count: u32,
}

/// Why a claim on a section is refused.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum SectionFault {
    #[error("section {index} of a send buffer with {count}")]
    NoSuchSection { index: u32, count: u32 },
    #[error("{bytes} bytes in a section of {SECTION_BYTES}")]
    SectionOverrun { bytes: u32 },
}

/// A checked place in the send buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SectionPlace {
    pub offset: u32,
    pub bytes: u32,
}

impl SendBuffer {
    /// `None` if not even one section fits.
    pub fn new(gpadl: u32, buffer_bytes: u32) -> Option<Self> {
        let section_count = buffer_bytes / SECTION_BYTES;
        (section_count > 0).then_some(Self { gpadl, section_count })
    }

    /// Whether a buffer of that length has these sections: a predecessor may have left any number.
    pub fn fits(&self, buffer_bytes: u64) -> bool {
        self.section_count > 0 && u64::from(self.section_count) * u64::from(SECTION_BYTES) <= buffer_bytes
    }

    /// Turns a guest's claim into a place that lies inside the buffer.
    pub fn place(&self, claim: SectionClaim) -> Result<SectionPlace, SectionFault> {
        if claim.index >= self.section_count {
            return Err(SectionFault::NoSuchSection {
                index: claim.index,
                count: self.section_count,
            });
        }
        if claim.used_bytes > SECTION_BYTES {
            return Err(SectionFault::SectionOverrun {
                bytes: claim.used_bytes,
            });
        }
        // index < count <= buffer_bytes / SECTION_BYTES, so the product is below buffer_bytes.
        Ok(SectionPlace {
            offset: claim.index * SECTION_BYTES,
            bytes: claim.used_bytes,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_megabyte_has_170_sections_and_the_last_ends_inside() {
        let buffer = SendBuffer::new(7, 1 << 20).expect("large enough");
        assert_eq!(buffer.section_count, 170);
        let place = buffer
            .place(SectionClaim {
                index: 169,
                used_bytes: 6144,
            })
            .expect("last section");
        assert!(place.offset + place.bytes <= 1 << 20);
        assert_eq!(
            buffer.place(SectionClaim {
                index: 170,
                used_bytes: 1
            }),
            Err(SectionFault::NoSuchSection {
                index: 170,
                count: 170
            })
        );
        assert_eq!(
            buffer.place(SectionClaim {
                index: 0,
                used_bytes: 6145
            }),
            Err(SectionFault::SectionOverrun { bytes: 6145 })
        );
    }

    #[test]
    fn a_buffer_below_one_section_is_refused() {
        assert_eq!(SendBuffer::new(1, 6143), None);
    }

    proptest! {
        #[test]
        fn every_accepted_claim_lies_inside(bytes in any::<u32>(), index in any::<u32>(), used_bytes in any::<u32>()) {
            if let Some(buffer) = SendBuffer::new(1, bytes)
                && let Ok(place) = buffer.place(SectionClaim { index, used_bytes }) {
                prop_assert!(u64::from(place.offset) + u64::from(place.bytes) <= u64::from(bytes));
            }
        }
    }
}
