//! Guest RAM as a device server or the vCPU process sees it.
#![forbid(unsafe_code)]

use super::{
    Gpa, Gpn, GuestSpan, GuestSpans, LayoutFault, OutOfRange, PAGE_BYTES, PagedArea, RamLayout, SharedMap,
};
use crate::fault::GuestFault;
use std::sync::Arc;

/// All of guest RAM: the mapping and the layout. Cheap to clone.
#[derive(Debug, Clone)]
pub struct GuestRam {
    map: Arc<SharedMap>,
    layout: Arc<RamLayout>,
}

impl GuestRam {
    /// Puts a mapping and a layout together; the layout is validated against the mapping's length.
    pub fn new(map: Arc<SharedMap>, layout: RamLayout) -> Result<Self, LayoutFault> {
        layout.validate(map.len() as u64)?;
        Ok(Self {
            map,
            layout: Arc::new(layout),
        })
    }

    /// The layout.
    pub fn layout(&self) -> &RamLayout {
        &self.layout
    }

    /// The mapping, whose offsets are file offsets of the layout.
    pub fn map(&self) -> &Arc<SharedMap> {
        &self.map
    }

    /// Checks a claim: `len` bytes at `gpa` must be RAM, in one region.
    #[inline]
    pub fn span(&self, gpa: Gpa, len: u32) -> Result<GuestSpan, OutOfRange> {
        let offset = self.offset(gpa, u64::from(len))?;
        Ok(GuestSpan { offset, len })
    }

    /// Copies guest memory out.
    pub fn read(&self, gpa: Gpa, out: &mut [u8]) -> Result<(), OutOfRange> {
        self.map.read(self.offset(gpa, out.len() as u64)?, out)
    }

    /// Copies into guest memory.
    pub fn write(&self, gpa: Gpa, data: &[u8]) -> Result<(), OutOfRange> {
        self.map.write(self.offset(gpa, data.len() as u64)?, data)
    }

    /// An empty list of spans in this RAM, to be filled and re-used.
    pub fn spans(&self) -> GuestSpans {
        GuestSpans::new(self.map.clone())
    }

    /// The pages of a GPADL as one area of `byte_count` bytes that begins `byte_offset` bytes into the first page.
    pub fn paged_area(
        &self,
        pages: &[Gpn],
        byte_offset: u32,
        byte_count: u32,
    ) -> Result<PagedArea, GuestFault> {
        let mut offsets = Vec::with_capacity(pages.len());
        for page in pages {
            let not_ram = GuestFault::NotRam {
                gpa: page.0.saturating_mul(PAGE_BYTES),
                len: PAGE_BYTES,
            };
            let gpa = page.gpa().ok_or(not_ram)?;
            offsets.push(self.layout.offset_of(gpa, PAGE_BYTES).ok_or(not_ram)?);
        }
        Ok(PagedArea::new(
            self.map.clone(),
            offsets,
            u64::from(byte_offset),
            u64::from(byte_count),
        )?)
    }

    #[inline]
    fn offset(&self, gpa: Gpa, len: u64) -> Result<u64, OutOfRange> {
        self.layout.offset_of(gpa, len).ok_or(OutOfRange {
            offset: gpa.0,
            len,
            limit: self.layout.total_bytes(),
        })
    }
}
