//! Lists of guest memory ranges: the claims in GPA-direct packets and in GPADLs.
//!
//! ```text
//! range 0: u32 byte_count, u32 byte_offset, u64 PFN[ceil((byte_offset + byte_count) / 4096)]
//! range 1: ...
//! ```
//!
//! A claim is just numbers until [`GpaDirect::resolve`] has found every byte in guest RAM.

use super::GuestFault;
use super::packet::{GPA_DIRECT_FIXED_BYTES, Packet, PacketKind, le_u32, le_u64};
use crate::mem::{Gpa, Gpn, GuestRam, GuestSpans, PAGE_BYTES};

/// One claimed range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GpaRange<'a> {
    /// Length in bytes; may be 0.
    pub byte_count: u32,
    /// Where the range begins, counted from the start of the first page. May be more than a page.
    pub byte_offset: u32,
    /// The page numbers, eight bytes each.
    pfns: &'a [u8],
}

impl GpaRange<'_> {
    /// The pages, in order. As many as `byte_offset + byte_count` reach into.
    pub fn pages(&self) -> impl ExactSizeIterator<Item = Gpn> + '_ {
        self.pfns.chunks_exact(8).map(|pfn| Gpn(le_u64(pfn)))
    }

    /// Number of pages.
    pub fn page_count(&self) -> usize {
        self.pfns.len() / 8
    }

    /// Finds every byte in guest RAM and appends it. On an error `spans` may have part of the range.
    pub fn resolve(&self, ram: &GuestRam, spans: &mut GuestSpans) -> Result<(), GuestFault> {
        let mut left = u64::from(self.byte_count);
        // Quirk(Hyper-V clients): byte_offset may reach beyond the first page; whole pages before it are skipped.
        let mut offset = u64::from(self.byte_offset);
        let skipped = (offset / PAGE_BYTES) as usize;
        offset %= PAGE_BYTES;
        for page in self.pages().skip(skipped) {
            if left == 0 {
                break;
            }
            let part = (PAGE_BYTES - offset).min(left);
            let not_ram = GuestFault::NotRam {
                gpa: page.0.saturating_mul(PAGE_BYTES),
                len: part,
            };
            let gpa = page
                .gpa()
                .and_then(|gpa| gpa.checked_add(offset))
                .ok_or(not_ram)?;
            // At most PAGE_BYTES.
            let span = ram.span(gpa, part as u32).map_err(|_| not_ram)?;
            spans.append(span)?;
            left -= part;
            offset = 0;
        }
        match left {
            0 => Ok(()),
            // Cannot happen for a range that `RangeList` has cut, which has all its pages.
            _ => Err(GuestFault::RangeOutside {
                offset: 0,
                len: u64::from(self.byte_count),
                limit: 0,
            }),
        }
    }
}

/// A list of ranges whose every length was checked against the bytes present.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RangeList<'a> {
    count: u32,
    bytes: &'a [u8],
}

impl<'a> RangeList<'a> {
    /// Checks that `count` ranges lie in `bytes`. More bytes than the ranges use are accepted.
    ///
    /// Quirk(Linux storvsc before 6.1): the header is sized for the largest request, beyond the last PFN.
    pub fn parse(count: u32, bytes: &'a [u8]) -> Result<Self, GuestFault> {
        let fault = GuestFault::RangeListTooShort {
            range_count: count,
            len: bytes.len(),
        };
        let mut rest = bytes;
        // Each round takes at least eight bytes, so that the bytes present bound the loop, not the count.
        for _ in 0..count {
            (_, rest) = split_range(rest).ok_or(fault)?;
        }
        Ok(Self {
            count,
            bytes: &bytes[..bytes.len() - rest.len()],
        })
    }

    /// Number of ranges.
    pub fn len(&self) -> usize {
        self.count as usize
    }

    /// Whether there is no range.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The ranges in order.
    pub fn iter(&self) -> impl Iterator<Item = GpaRange<'a>> + use<'a> {
        let mut rest = self.bytes;
        std::iter::from_fn(move || {
            let (range, after) = split_range(rest)?;
            rest = after;
            Some(range)
        })
    }

    /// Bytes in all ranges. Each page number present adds at most 4096, hence no overflow.
    pub fn total_bytes(&self) -> u64 {
        self.iter().map(|range| u64::from(range.byte_count)).sum()
    }
}

/// Cuts one range off the front. `None` if it is not all there.
fn split_range(bytes: &[u8]) -> Option<(GpaRange<'_>, &[u8])> {
    let (head, rest) = bytes.split_at_checked(8)?;
    let (byte_count, byte_offset) = (le_u32(&head[..4]), le_u32(&head[4..]));
    let reach = u64::from(byte_count) + u64::from(byte_offset);
    let pfn_bytes = usize::try_from(reach.div_ceil(PAGE_BYTES).checked_mul(8)?).ok()?;
    let (pfns, rest) = rest.split_at_checked(pfn_bytes)?;
    Some((
        GpaRange {
            byte_count,
            byte_offset,
            pfns,
        },
        rest,
    ))
}

/// The ranges of a GPA-direct packet (type 9).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GpaDirect<'a> {
    /// The claims.
    pub ranges: RangeList<'a>,
}

impl<'a> GpaDirect<'a> {
    /// Takes the ranges out of a packet of that kind.
    pub(super) fn parse(packet: &Packet<'a>) -> Result<Self, GuestFault> {
        if packet.kind != PacketKind::GPA_DIRECT {
            return Err(GuestFault::PacketType {
                packet_type: packet.kind.0,
            });
        }
        let header = packet.extra_header();
        let Some((fixed, ranges)) = header.split_at_checked(GPA_DIRECT_FIXED_BYTES) else {
            return Err(packet.header_too_short(GPA_DIRECT_FIXED_BYTES));
        };
        Ok(Self {
            ranges: RangeList::parse(le_u32(&fixed[4..]), ranges)?,
        })
    }

    /// Bytes in all ranges.
    pub fn total_bytes(&self) -> u64 {
        self.ranges.total_bytes()
    }

    /// Finds every byte of all ranges in guest RAM and appends it to `spans`, in order. On an error `spans` may have
    /// part of them.
    pub fn resolve(&self, ram: &GuestRam, spans: &mut GuestSpans) -> Result<(), GuestFault> {
        self.ranges.iter().try_for_each(|range| range.resolve(ram, spans))
    }
}

/// Builds the type-specific header of a GPA-direct packet: one entry per range, `(address, bytes)`. For the guest's side.
/// A range must lie in consecutive guest pages; each is given its own page list.
pub fn gpa_direct_header(ranges: &[(Gpa, u32)]) -> Vec<u8> {
    let mut header = vec![0; 4];
    header.extend((ranges.len() as u32).to_le_bytes());
    for (gpa, byte_count) in ranges {
        let byte_offset = gpa.page_offset();
        header.extend(byte_count.to_le_bytes());
        header.extend((byte_offset as u32).to_le_bytes());
        let pages = (byte_offset + u64::from(*byte_count)).div_ceil(PAGE_BYTES);
        for page in 0..pages {
            header.extend(gpa.gpn().0.wrapping_add(page).to_le_bytes());
        }
    }
    header
}
