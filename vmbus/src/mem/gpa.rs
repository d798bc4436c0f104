//! Guest-physical addresses and where they lie in the guest RAM file.
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

/// Bytes of a page, as the GPADL, GPA-direct and SynIC formats count them (TLFS 1.2; always 4 KiB, whatever page size
/// the guest uses itself).
pub const PAGE_BYTES: u64 = 4096;

/// A guest-physical address in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Gpa(pub u64);

impl Gpa {
    /// This address plus `bytes`; `None` on overflow.
    #[inline]
    pub fn checked_add(self, bytes: u64) -> Option<Gpa> {
        self.0.checked_add(bytes).map(Gpa)
    }

    /// The page that contains this address.
    #[inline]
    pub fn gpn(self) -> Gpn {
        Gpn(self.0 / PAGE_BYTES)
    }

    /// Offset within the page, 0..4096.
    #[inline]
    pub fn page_offset(self) -> u64 {
        self.0 % PAGE_BYTES
    }
}

/// A guest page number: a guest-physical address in units of 4 KiB. Called PFN in the wire formats.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Gpn(pub u64);

impl Gpn {
    /// The page's first address; `None` if it does not fit in 64 bits.
    #[inline]
    pub fn gpa(self) -> Option<Gpa> {
        self.0.checked_mul(PAGE_BYTES).map(Gpa)
    }
}

/// One stretch of guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RamRegion {
    /// First guest-physical address, page aligned.
    pub gpa: u64,
    /// Length in bytes, a multiple of the page size, not 0.
    pub len: u64,
    /// Where the region begins in the RAM memfd, page aligned.
    pub file_offset: u64,
}

/// Where guest RAM lies in guest-physical memory and in the RAM memfd: regions sorted by `gpa`, not overlapping.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RamLayout {
    /// The regions. From a peer they are a claim until [`RamLayout::validate`] has passed.
    pub regions: Vec<RamRegion>,
}

/// Why a layout is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LayoutFault {
    /// No region, or more than 64.
    #[error("guest RAM has {0} regions, not 1 to 64")]
    RegionCount(usize),
    /// A region is empty or not made of whole pages.
    #[error("RAM region {0} is empty or not made of whole pages")]
    NotWholePages(usize),
    /// A region's end overflows, or it begins before its predecessor's end.
    #[error("RAM region {0} overflows, overlaps or is out of order")]
    OutOfOrder(usize),
    /// A region reaches beyond the RAM file.
    #[error("RAM region {0} reaches beyond the RAM file")]
    BeyondFile(usize),
}

/// Limit: one region below and one above the 32-bit hole is all that x86 needs; the rest is room for NUMA and hot-add.
const MAX_REGIONS: usize = 64;

/// End of low RAM. The addresses from here to 4 GiB belong to the local APIC, the I/O APIC and MMIO.
const LOW_RAM_END: u64 = 3 << 30;
/// Where RAM continues.
const HIGH_RAM_START: u64 = 4 << 30;

impl RamLayout {
    /// The layout of a PC with `bytes` of RAM: up to 3 GiB from address 0, the rest from 4 GiB. `bytes` is a multiple of the
    /// page size and not 0; the caller has checked it.
    pub fn for_size(bytes: u64) -> Self {
        assert!(
            bytes != 0 && bytes.is_multiple_of(PAGE_BYTES),
            "RAM size {bytes} is not a number of whole pages"
        );
        let low = bytes.min(LOW_RAM_END);
        let mut regions = vec![RamRegion {
            gpa: 0,
            len: low,
            file_offset: 0,
        }];
        if bytes > low {
            regions.push(RamRegion {
                gpa: HIGH_RAM_START,
                len: bytes - low,
                file_offset: low,
            });
        }
        Self { regions }
    }

    /// Where `len` bytes at `gpa` lie in the RAM file; `None` unless all of them lie in one region.
    #[inline]
    pub fn offset_of(&self, gpa: Gpa, len: u64) -> Option<u64> {
        for region in &self.regions {
            if let Some(within) = gpa.0.checked_sub(region.gpa)
                && within < region.len
            {
                return if len <= region.len - within {
                    region.file_offset.checked_add(within)
                } else {
                    None
                };
            }
        }
        None
    }

    /// RAM in all, in bytes. Saturates on a layout that was not validated.
    pub fn total_bytes(&self) -> u64 {
        self.regions
            .iter()
            .fold(0, |sum, region| sum.saturating_add(region.len))
    }

    /// Checks a layout that came from elsewhere against the length of the RAM file in bytes.
    pub fn validate(&self, file_len: u64) -> Result<(), LayoutFault> {
        if self.regions.is_empty() || self.regions.len() > MAX_REGIONS {
            return Err(LayoutFault::RegionCount(self.regions.len()));
        }
        let mut previous_end = 0;
        for (index, region) in self.regions.iter().enumerate() {
            if region.len == 0
                || [region.gpa, region.len, region.file_offset]
                    .iter()
                    .any(|v| v % PAGE_BYTES != 0)
            {
                return Err(LayoutFault::NotWholePages(index));
            }
            let end = region
                .gpa
                .checked_add(region.len)
                .ok_or(LayoutFault::OutOfOrder(index))?;
            if region.gpa < previous_end {
                return Err(LayoutFault::OutOfOrder(index));
            }
            previous_end = end;
            match region.file_offset.checked_add(region.len) {
                Some(file_end) if file_end <= file_len => {}
                _ => return Err(LayoutFault::BeyondFile(index)),
            }
        }
        Ok(())
    }
}
