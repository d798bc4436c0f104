#![forbid(unsafe_code)]
//! GPADLs: lists of guest pages that the guest names by a handle.
//!
//! ```text
//!   header ──▶ Assembling ──last page──▶ Ready ──teardown──▶ Releasing ──server let go──▶ (none)
//!                  │                       │                     ▲
//!                  └──teardown──▶ (none)   └─ teardown while a channel's ring lies in it: Doomed ──close─┘
//! ```
//!
//! The handle is the guest's choice and the only key, since bodies carry nothing else. A handle is free again
//! only when the entry is gone, so that an acknowledgement of an old life is never taken for one of a new life.
//!
//! Pages are checked against the guest's RAM as they arrive; the server checks them again.

use std::collections::BTreeMap;

use vmbus::mem::{Gpn, PAGE_BYTES, RamLayout};
use vmbus::wire::GpadlHeader;

use super::action::{ChannelId, DeadlineId};
use super::offers::MAX_OPEN_CHANNELS;
use crate::spec;

/// Limit: GPADLs in all. An open channel has one for its rings to itself, and a network device two more for its buffers: so
/// this is room for as many channels as may be open (those of 16 network devices with 64 queues, or of 64 disks with 16), and
/// for the buffers of as many devices as a VM may have.
pub const MAX_GPADLS: usize = MAX_OPEN_CHANNELS + 2 * spec::MAX_DEVICES;

/// Limit: GPADLs of one device: no more than a server takes, which would break with us otherwise.
pub const MAX_GPADLS_PER_DEVICE: usize = vmbus::channel::MAX_GPADLS;

/// Limit: pages in all GPADLs together. 16 network devices with 64 channels of two 512 KiB rings and 17 MiB of buffers each
/// need 332 thousand.
///
/// This and [`MAX_GPADLS`] bound what a hostile guest can have its host keep for GPADLs, in all processes of the VM together:
/// 8 bytes for each page here (twice that for lists that are not complete, which grow by doubling) and 8 in the server of the
/// device, which makes 12 MiB at most, and some 100 bytes for each GPADL, which are no more than the lists of a few. What is
/// on its way to a server that does not read is bounded by the socket ([`vmbus::ipc::socket::MAX_QUEUED_BYTES`]).
pub const MAX_GPADL_PAGES: usize = 512 * 1024;

/// Limit: pages of one GPADL. The length of its range is a 16-bit number of bytes, 8 of which are no page.
pub const MAX_PAGES_PER_GPADL: usize = (u16::MAX as usize - 8) / 8;

const _: () = assert!(MAX_PAGES_PER_GPADL <= MAX_GPADL_PAGES);

/// Why a GPADL is refused. The guest's fault, all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GpadlFault {
    #[error("GPADL handle {0:#x} is zero or in use")]
    HandleInUse(u32),
    #[error("GPADL handle {0:#x} is not known")]
    HandleUnknown(u32),
    #[error("GPADL {0:#x} is complete or being torn down")]
    NotAssembling(u32),
    #[error("GPADL {gpadl:#x} has {ranges} ranges, and 1 is supported")]
    RangeCount { gpadl: u32, ranges: u16 },
    #[error(
        "GPADL {gpadl:#x}: a range of {byte_count} bytes at offset {byte_offset} does not fit its {range_bytes} bytes"
    )]
    RangeLength {
        gpadl: u32,
        byte_count: u32,
        byte_offset: u32,
        range_bytes: u16,
    },
    #[error("GPADL {gpadl:#x}: page {page:#x} is not guest RAM")]
    PageOutsideRam { gpadl: u32, page: u64 },
    #[error("too many GPADLs or pages in them")]
    TooMany,
    #[error("GPADL {0:#x}: its device has {MAX_GPADLS_PER_DEVICE} already")]
    TooManyOfDevice(u32),
    #[error("GPADL {gpadl:#x}: there is no channel {channel}")]
    NoSuchChannel { gpadl: u32, channel: ChannelId },
    #[error("GPADL {0:#x}: its header is too short for a range")]
    NoRange(u32),
}

/// What the header message says before its pages.
#[derive(Clone, Copy, Debug)]
pub struct GpadlClaim {
    pub channel: ChannelId,
    pub gpadl: u32,
    pub range_bytes: u16,
    pub range_count: u16,
    pub byte_count: u32,
    pub byte_offset: u32,
}

/// One GPADL.
#[derive(Clone, Debug)]
pub struct Gpadl {
    pub channel: ChannelId,
    pub byte_count: u32,
    pub byte_offset: u32,
    /// Guest page numbers; all are RAM. Complete unless `Assembling`.
    pub pages: Vec<u64>,
    pub state: GpadlState,
}

/// See the drawing above.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GpadlState {
    /// The header came; so many pages are to come in all.
    Assembling { page_count: usize },
    /// The guest was told that it exists.
    Ready,
    /// The guest wants it back, but a channel's ring lies in it and the guest has not closed that channel.
    Doomed,
    /// The guest wants it back, and a server may still touch it.
    Releasing {
        /// `None`: only the end of the server is waited for.
        deadline: Option<DeadlineId>,
        /// Whether the guest waits for GPADL_TORNDOWN (it does not where it gave the whole channel back).
        answer: bool,
    },
}

/// How far a GPADL has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    Incomplete,
    Complete,
}

/// All GPADLs of a connection.
#[derive(Debug, Default)]
pub struct Gpadls {
    table: BTreeMap<u32, Gpadl>,
    /// Pages of all GPADLs, those that are still to come included.
    page_count: usize,
}

impl Gpadls {
    /// Begins a GPADL with its first pages.
    ///
    /// On an error nothing is kept.
    pub fn begin(
        &mut self,
        claim: GpadlClaim,
        pages: impl IntoIterator<Item = u64>,
        ram: &RamLayout,
    ) -> Result<Progress, GpadlFault> {
        let gpadl = claim.gpadl;
        if gpadl == 0 || self.table.contains_key(&gpadl) {
            return Err(GpadlFault::HandleInUse(gpadl));
        }
        if claim.range_count != 1 {
            return Err(GpadlFault::RangeCount {
                gpadl,
                ranges: claim.range_count,
            });
        }
        let page_count = claim.page_count()?;
        let page_total = self.page_count.saturating_add(page_count);
        if self.table.len() >= MAX_GPADLS || page_total > MAX_GPADL_PAGES {
            return Err(GpadlFault::TooMany);
        }
        self.page_count = page_total;
        self.table.insert(
            gpadl,
            Gpadl {
                channel: claim.channel,
                byte_count: claim.byte_count,
                byte_offset: claim.byte_offset,
                pages: Vec::new(),
                state: GpadlState::Assembling { page_count },
            },
        );
        self.extend(gpadl, pages, ram)
    }

    /// Adds the pages of a body message (or of the header). Pages beyond the announced number are padding.
    ///
    /// On [`GpadlFault::PageOutsideRam`] the GPADL is gone; the guest is to be told once.
    pub fn extend(
        &mut self,
        gpadl: u32,
        pages: impl IntoIterator<Item = u64>,
        ram: &RamLayout,
    ) -> Result<Progress, GpadlFault> {
        let entry = self
            .table
            .get_mut(&gpadl)
            .ok_or(GpadlFault::HandleUnknown(gpadl))?;
        let GpadlState::Assembling { page_count } = entry.state else {
            return Err(GpadlFault::NotAssembling(gpadl));
        };
        for page in pages {
            if entry.pages.len() >= page_count {
                break;
            }
            if !is_ram_page(ram, page) {
                self.remove(gpadl);
                return Err(GpadlFault::PageOutsideRam { gpadl, page });
            }
            entry.pages.push(page);
        }
        if entry.pages.len() < page_count {
            return Ok(Progress::Incomplete);
        }
        entry.pages.shrink_to_fit();
        entry.state = GpadlState::Ready;
        Ok(Progress::Complete)
    }

    pub fn get(&self, gpadl: u32) -> Option<&Gpadl> {
        self.table.get(&gpadl)
    }

    pub fn get_mut(&mut self, gpadl: u32) -> Option<&mut Gpadl> {
        self.table.get_mut(&gpadl)
    }

    /// Forgets a GPADL; its handle is free.
    pub fn remove(&mut self, gpadl: u32) -> Option<Gpadl> {
        let entry = self.table.remove(&gpadl)?;
        self.page_count = self.page_count.saturating_sub(entry.announced_pages());
        Some(entry)
    }

    /// In the order of their handles.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &Gpadl)> {
        self.table.iter().map(|(&handle, entry)| (handle, entry))
    }

    /// Handles of the GPADLs that were made for a channel.
    pub fn of_channel(&self, channel: ChannelId) -> Vec<u32> {
        self.iter()
            .filter(|(_, entry)| entry.channel == channel)
            .map(|(handle, _)| handle)
            .collect()
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        self.table.clear();
        self.page_count = 0;
    }

    pub fn count(&self) -> usize {
        self.table.len()
    }

    /// Pages of all GPADLs, those that are still to come included.
    pub fn page_count(&self) -> usize {
        self.page_count
    }
}

impl Gpadl {
    fn announced_pages(&self) -> usize {
        match self.state {
            GpadlState::Assembling { page_count } => page_count,
            GpadlState::Ready | GpadlState::Doomed | GpadlState::Releasing { .. } => self.pages.len(),
        }
    }

    /// Whether pages are still to come; no server knows of it then.
    pub fn is_incomplete(&self) -> bool {
        matches!(self.state, GpadlState::Assembling { .. })
    }

    /// Whether a server that attaches is to be told of it.
    pub fn is_live(&self) -> bool {
        match self.state {
            GpadlState::Ready | GpadlState::Doomed => true,
            GpadlState::Assembling { .. } | GpadlState::Releasing { .. } => false,
        }
    }
}

impl GpadlClaim {
    /// The claim of a header message, and the page numbers that came with it.
    pub fn parse<'a>(header: &GpadlHeader<'a>) -> Result<(Self, impl Iterator<Item = u64> + 'a), GpadlFault> {
        // Linux 6.1 include/linux/hyperv.h struct gpa_range: u32 byte_count, u32 byte_offset, u64 pfn_array[].
        let no_range = GpadlFault::NoRange(header.gpadl.0);
        let (byte_count, rest) = header.ranges.split_first_chunk().ok_or(no_range)?;
        let (byte_offset, pages) = rest.split_first_chunk().ok_or(no_range)?;
        let claim = Self {
            channel: header.channel,
            gpadl: header.gpadl.0,
            range_bytes: header.range_bytes,
            range_count: header.range_count,
            byte_count: u32::from_le_bytes(*byte_count),
            byte_offset: u32::from_le_bytes(*byte_offset),
        };
        Ok((
            claim,
            pages.as_chunks().0.iter().map(|page| u64::from_le_bytes(*page)),
        ))
    }

    /// How many pages the range covers, if the message's own numbers agree with each other.
    fn page_count(&self) -> Result<usize, GpadlFault> {
        let fault = GpadlFault::RangeLength {
            gpadl: self.gpadl,
            byte_count: self.byte_count,
            byte_offset: self.byte_offset,
            range_bytes: self.range_bytes,
        };
        if self.byte_count == 0 || u64::from(self.byte_offset) >= PAGE_BYTES {
            return Err(fault);
        }
        let bytes = u64::from(self.byte_count) + u64::from(self.byte_offset);
        let pages = bytes.div_ceil(PAGE_BYTES);
        // A range is 8 bytes of length and offset, and 8 bytes for each page.
        if 8 + 8 * pages > u64::from(self.range_bytes) {
            return Err(fault);
        }
        usize::try_from(pages).map_err(|_| fault)
    }
}

fn is_ram_page(ram: &RamLayout, page: u64) -> bool {
    Gpn(page)
        .gpa()
        .is_some_and(|gpa| ram.offset_of(gpa, PAGE_BYTES).is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ram() -> RamLayout {
        RamLayout::for_size(64 << 20)
    }

    fn claim(gpadl: u32, pages: u32) -> GpadlClaim {
        GpadlClaim {
            channel: ChannelId(1),
            gpadl,
            range_bytes: u16::try_from(8 + 8 * pages).unwrap_or(u16::MAX),
            range_count: 1,
            byte_count: pages * 4096,
            byte_offset: 0,
        }
    }

    #[test]
    fn a_list_that_fits_the_header_is_complete_at_once() {
        let mut gpadls = Gpadls::default();
        assert_eq!(
            gpadls.begin(claim(7, 3), [1, 2, 3], &ram()),
            Ok(Progress::Complete)
        );
        assert_eq!(gpadls.get(7).map(|g| g.pages.clone()), Some(vec![1, 2, 3]));
    }

    #[test]
    fn bodies_of_two_lists_may_interleave() {
        let mut gpadls = Gpadls::default();
        assert_eq!(
            gpadls.begin(claim(7, 4), [1, 2], &ram()),
            Ok(Progress::Incomplete)
        );
        assert_eq!(gpadls.begin(claim(8, 3), [10], &ram()), Ok(Progress::Incomplete));
        assert_eq!(gpadls.extend(7, [3], &ram()), Ok(Progress::Incomplete));
        assert_eq!(gpadls.extend(8, [11, 12], &ram()), Ok(Progress::Complete));
        assert_eq!(gpadls.extend(7, [4], &ram()), Ok(Progress::Complete));
        assert_eq!(gpadls.get(7).map(|g| g.pages.clone()), Some(vec![1, 2, 3, 4]));
        assert_eq!(gpadls.get(8).map(|g| g.pages.clone()), Some(vec![10, 11, 12]));
        assert_eq!(gpadls.page_count(), 7);
    }

    #[test]
    fn pages_beyond_the_announced_number_are_padding() {
        let mut gpadls = Gpadls::default();
        assert_eq!(
            gpadls.begin(claim(7, 2), [1, 2, u64::MAX], &ram()),
            Ok(Progress::Complete)
        );
        assert_eq!(gpadls.extend(7, [3], &ram()), Err(GpadlFault::NotAssembling(7)));
    }

    #[test]
    fn a_page_outside_ram_ends_the_list_and_frees_its_handle() {
        let mut gpadls = Gpadls::default();
        for page in [16384, u64::MAX / 4096, u64::MAX, 1 << 60] {
            assert_eq!(
                gpadls.begin(claim(7, 2), [1, page], &ram()),
                Err(GpadlFault::PageOutsideRam { gpadl: 7, page })
            );
            assert_eq!((gpadls.count(), gpadls.page_count()), (0, 0));
        }
    }

    #[test]
    fn numbers_that_contradict_each_other_are_refused() {
        let mut gpadls = Gpadls::default();
        let good = claim(7, 2);
        let bad = [
            GpadlClaim {
                byte_count: 0,
                ..good
            },
            GpadlClaim {
                byte_count: 8193,
                ..good
            },
            GpadlClaim {
                byte_offset: 1,
                ..good
            },
            GpadlClaim {
                byte_offset: 4096,
                byte_count: 1,
                ..good
            },
            GpadlClaim {
                byte_count: u32::MAX,
                byte_offset: 4095,
                ..good
            },
            GpadlClaim {
                range_bytes: 0,
                ..good
            },
            GpadlClaim {
                range_bytes: 23,
                ..good
            },
        ];
        for claim in bad {
            let refused = gpadls.begin(claim, [1, 2], &ram());
            assert!(
                matches!(refused, Err(GpadlFault::RangeLength { .. })),
                "{claim:?} {refused:?}"
            );
        }
        let ranges = GpadlClaim {
            range_count: 2,
            ..good
        };
        assert_eq!(
            gpadls.begin(ranges, [1], &ram()),
            Err(GpadlFault::RangeCount { gpadl: 7, ranges: 2 })
        );
        assert_eq!(
            gpadls.begin(claim(0, 1), [1], &ram()),
            Err(GpadlFault::HandleInUse(0))
        );
        assert_eq!(gpadls.count(), 0);
    }

    #[test]
    fn a_handle_is_not_taken_twice() {
        let mut gpadls = Gpadls::default();
        assert_eq!(gpadls.begin(claim(7, 2), [1], &ram()), Ok(Progress::Incomplete));
        assert_eq!(
            gpadls.begin(claim(7, 1), [1], &ram()),
            Err(GpadlFault::HandleInUse(7))
        );
        assert_eq!(gpadls.extend(9, [1], &ram()), Err(GpadlFault::HandleUnknown(9)));
    }

    #[test]
    fn incomplete_lists_are_bounded_in_number_and_pages() {
        let mut gpadls = Gpadls::default();
        let mut taken = 0;
        for handle in 1..=5000 {
            match gpadls.begin(claim(handle, 1), [], &ram()) {
                Ok(_) => taken += 1,
                Err(fault) => assert_eq!(fault, GpadlFault::TooMany),
            }
        }
        assert_eq!(taken, MAX_GPADLS);
        gpadls.clear();
        for handle in 1..=5000 {
            if gpadls.begin(claim(handle, 8190), [], &ram()).is_err() {
                break;
            }
        }
        assert!(gpadls.page_count() <= MAX_GPADL_PAGES);
        assert_eq!(gpadls.count(), MAX_GPADL_PAGES / 8190);
    }

    #[test]
    fn removing_gives_the_pages_back_to_the_limit() {
        let mut gpadls = Gpadls::default();
        assert_eq!(gpadls.begin(claim(7, 100), [1], &ram()), Ok(Progress::Incomplete));
        assert_eq!(gpadls.begin(claim(8, 2), [1, 2], &ram()), Ok(Progress::Complete));
        gpadls.remove(7);
        assert_eq!(gpadls.page_count(), 2);
        gpadls.remove(8);
        assert_eq!(gpadls.page_count(), 0);
    }
}
