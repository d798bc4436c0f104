//! Where a ring lies.

use super::{ControlWord, FEATURE_PENDING_SEND, RingFault};
use crate::fault::GuestFault;
use crate::mem::{PAGE_BYTES, PagedArea};
use std::sync::atomic::Ordering;

/// Limit: 2^22 indexes of 8 bytes are what a journal's word can hold. A GPADL has at most 8190 pages (its range bytes
/// are a u16), so that no ring of a guest reaches it.
const MAX_DATA_BYTES: u64 = 32 << 20;

/// One ring: a control page, and a data area of whole pages.
#[derive(Debug, Clone)]
pub struct RingArea {
    pub(super) area: PagedArea,
    pub(super) data_bytes: u32,
}

impl RingArea {
    /// A ring over an area of at least two pages, the first of which is the control page.
    pub fn new(area: PagedArea) -> Result<Self, RingFault> {
        let fault = RingFault::RingSize {
            area_bytes: area.len(),
            downstream_page_offset: 0,
        };
        let data_bytes = area.len().checked_sub(PAGE_BYTES).ok_or(fault)?;
        if data_bytes == 0 || data_bytes % PAGE_BYTES != 0 || data_bytes > MAX_DATA_BYTES {
            return Err(fault);
        }
        // At most 32 MiB.
        Ok(Self {
            area,
            data_bytes: data_bytes as u32,
        })
    }

    /// Size of the data area in bytes.
    pub fn data_bytes(&self) -> u32 {
        self.data_bytes
    }

    /// What a guest does before it opens a channel: both indexes zero, feature bit set. The rest is as it was.
    pub fn initialize(&self) {
        self.store(ControlWord::WriteIndex, 0);
        self.store(ControlWord::ReadIndex, 0);
        self.store(ControlWord::FeatureBits, FEATURE_PENDING_SEND);
    }

    /// The shared write index as it stands, unchecked by anyone: for recovery, which compares it with a journal.
    pub fn shared_write_index(&self) -> u32 {
        self.load(ControlWord::WriteIndex)
    }

    /// The shared read index as it stands, unchecked by anyone.
    pub fn shared_read_index(&self) -> u32 {
        self.load(ControlWord::ReadIndex)
    }

    fn load(&self, word: ControlWord) -> u32 {
        // Ordering: recovery happens before the rings are used; acquire pairs with the release stores of the
        // predecessor (reader.rs, writer.rs).
        self.area
            .load_u32(word as u64, Ordering::Acquire)
            .expect("a ring area has a control page")
    }

    fn store(&self, word: ControlWord, value: u32) {
        // Ordering: before the channel is open; the message that opens it orders these stores.
        self.area
            .store_u32(word as u64, value, Ordering::Release)
            .expect("a ring area has a control page");
    }
}

/// Cuts a channel's GPADL into its rings: pages before `downstream_page_offset` are the ring to the host, the rest the
/// ring to the guest. Each needs a control page and at least one data page.
pub fn split_channel(
    area: &PagedArea,
    downstream_page_offset: u32,
) -> Result<(RingArea, RingArea), GuestFault> {
    let fault = RingFault::RingSize {
        area_bytes: area.len(),
        downstream_page_offset,
    };
    let cut = u64::from(downstream_page_offset) * PAGE_BYTES;
    let rest = area.len().checked_sub(cut).ok_or(fault)?;
    let to_host = RingArea::new(area.slice(0, cut)?).map_err(|_| fault)?;
    let to_guest = RingArea::new(area.slice(cut, rest)?).map_err(|_| fault)?;
    Ok((to_host, to_guest))
}
