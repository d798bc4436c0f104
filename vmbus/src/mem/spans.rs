//! Checked pieces of one mapping: the result of what the guest claimed, and all that a server may touch for it.
#![forbid(unsafe_code)]

use super::{HostError, OutOfRange, SharedMap, fdio};
use std::os::fd::BorrowedFd;
use std::sync::Arc;

/// Limit: what one `readv(2)` takes (`UIO_MAXIOV`, Linux include/uapi/linux/uio.h). Longer lists can be sliced.
pub const MAX_PIECES: usize = 1024;

/// Limit: pieces kept without an allocation. A 4 KiB request has one, a 16 KiB request of scattered pages four.
const INLINE_PIECES: usize = 4;

/// One checked piece: it was mapped when it was made, and a map never shrinks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct GuestSpan {
    pub(super) offset: u64,
    pub(super) len: u32,
}

impl GuestSpan {
    /// Length in bytes.
    #[expect(
        clippy::len_without_is_empty,
        reason = "an empty span is of no interest to anyone"
    )]
    pub fn len(&self) -> u32 {
        self.len
    }
}

/// A list of checked pieces of one map, in the order of the data they hold.
///
/// Up to four pieces need no allocation, and [`GuestSpans::clear`] keeps the allocation of longer lists, so that a server
/// that re-uses its lists does not allocate per request. Neighbours in the file are merged into one piece.
#[derive(Debug, Clone)]
pub struct GuestSpans {
    map: Arc<SharedMap>,
    inline: [GuestSpan; INLINE_PIECES],
    inline_count: usize,
    /// All pieces, once there are more than fit inline; else empty.
    spilled: Vec<GuestSpan>,
    len: u64,
}

impl GuestSpans {
    /// An empty list over `map`.
    pub fn new(map: Arc<SharedMap>) -> Self {
        Self {
            map,
            inline: [GuestSpan::default(); INLINE_PIECES],
            inline_count: 0,
            spilled: Vec::new(),
            len: 0,
        }
    }

    /// One piece of `map`.
    pub fn from_map(map: Arc<SharedMap>, offset: u64, len: u32) -> Result<Self, OutOfRange> {
        let mut spans = Self::new(map);
        spans.push(offset, len)?;
        Ok(spans)
    }

    /// Bytes in all pieces.
    #[inline]
    pub fn len(&self) -> usize {
        // At most 2^16 pieces of at most 2^32 bytes; usize has 64 bits on every supported host.
        self.len as usize
    }

    /// Whether there is not a single byte.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Number of pieces. System calls and [`super::Uring`] take at most [`MAX_PIECES`].
    #[inline]
    pub fn piece_count(&self) -> usize {
        self.pieces().len()
    }

    /// Offsets in the map and lengths of the pieces.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (u64, u32)> + '_ {
        self.pieces().iter().map(|piece| (piece.offset, piece.len))
    }

    /// Whether every piece begins at a multiple of `alignment` in the map (and thus in memory, up to the page size)
    /// and has a multiple of it as its length: what `O_DIRECT` asks for. `alignment` is a power of two.
    pub fn is_aligned(&self, alignment: u32) -> bool {
        let mask = u64::from(alignment.wrapping_sub(1));
        self.pieces()
            .iter()
            .all(|piece| (piece.offset | u64::from(piece.len)) & mask == 0)
    }

    #[inline]
    pub(super) fn map(&self) -> &Arc<SharedMap> {
        &self.map
    }

    #[inline]
    pub(super) fn pieces(&self) -> &[GuestSpan] {
        if self.spilled.is_empty() {
            &self.inline[..self.inline_count]
        } else {
            &self.spilled
        }
    }

    /// Forgets all pieces, keeps the memory.
    pub fn clear(&mut self) {
        self.inline_count = 0;
        self.spilled.clear();
        self.len = 0;
    }

    /// Appends a piece that [`super::GuestRam::span`] has checked. It must come from the same RAM.
    pub fn append(&mut self, span: GuestSpan) -> Result<(), OutOfRange> {
        self.push(span.offset, span.len)
    }

    /// Checks and appends `len` bytes at `offset` of the map, merging with the last piece where they adjoin.
    #[inline]
    pub fn push(&mut self, offset: u64, len: u32) -> Result<(), OutOfRange> {
        let limit = self.map.len() as u64;
        let fault = OutOfRange {
            offset,
            len: u64::from(len),
            limit,
        };
        if offset.checked_add(u64::from(len)).is_none_or(|end| end > limit) {
            return Err(fault);
        }
        if len == 0 {
            return Ok(());
        }
        self.len = self.len.checked_add(u64::from(len)).ok_or(fault)?;
        if let Some(last) = self.last_mut()
            && last.offset + u64::from(last.len) == offset
            && let Some(merged) = last.len.checked_add(len)
        {
            last.len = merged;
            return Ok(());
        }
        let piece = GuestSpan { offset, len };
        if !self.spilled.is_empty() {
            self.spilled.push(piece);
        } else if self.inline_count < INLINE_PIECES {
            self.inline[self.inline_count] = piece;
            self.inline_count += 1;
        } else {
            self.spilled.extend_from_slice(&self.inline);
            self.spilled.push(piece);
        }
        Ok(())
    }

    #[inline]
    fn last_mut(&mut self) -> Option<&mut GuestSpan> {
        if self.spilled.is_empty() {
            self.inline[..self.inline_count].last_mut()
        } else {
            self.spilled.last_mut()
        }
    }

    /// The `len` bytes from `start` as a list of their own.
    pub fn slice(&self, start: usize, len: usize) -> Result<GuestSpans, OutOfRange> {
        let mut part = GuestSpans::new(self.map.clone());
        self.for_each_part(start, len, |offset, part_len| part.push(offset, part_len))?;
        Ok(part)
    }

    /// Calls `action` for each piece of the `len` bytes from `start`.
    fn for_each_part(
        &self,
        start: usize,
        len: usize,
        mut action: impl FnMut(u64, u32) -> Result<(), OutOfRange>,
    ) -> Result<(), OutOfRange> {
        let (mut skip, mut left) = (start as u64, len as u64);
        if skip.checked_add(left).is_none_or(|end| end > self.len) {
            return Err(OutOfRange {
                offset: skip,
                len: left,
                limit: self.len,
            });
        }
        for piece in self.pieces() {
            if left == 0 {
                break;
            }
            let piece_len = u64::from(piece.len);
            if skip >= piece_len {
                skip -= piece_len;
                continue;
            }
            // At most piece.len, hence within u32.
            let part = (piece_len - skip).min(left);
            action(piece.offset + skip, part as u32)?;
            left -= part;
            skip = 0;
        }
        Ok(())
    }

    /// Copies the first `out.len()` bytes out. Fails if there are fewer.
    pub fn copy_to(&self, out: &mut [u8]) -> Result<(), OutOfRange> {
        self.copy_to_at(0, out)
    }

    /// Copies the `out.len()` bytes from `start` out.
    pub fn copy_to_at(&self, start: usize, out: &mut [u8]) -> Result<(), OutOfRange> {
        let (map, mut done) = (&self.map, 0);
        let len = out.len();
        self.for_each_part(start, len, |offset, part| {
            let end = done + part as usize;
            map.read(offset, &mut out[done..end])?;
            done = end;
            Ok(())
        })
    }

    /// Copies `data` to the first bytes. Fails, before it writes anything, if there are fewer.
    pub fn copy_from(&self, data: &[u8]) -> Result<(), OutOfRange> {
        self.copy_from_at(0, data)
    }

    /// Copies `data` to the bytes from `start`.
    pub fn copy_from_at(&self, start: usize, data: &[u8]) -> Result<(), OutOfRange> {
        let (map, mut done) = (&self.map, 0);
        self.for_each_part(start, data.len(), |offset, part| {
            let end = done + part as usize;
            map.write(offset, &data[done..end])?;
            done = end;
            Ok(())
        })
    }

    /// Sets the `len` bytes from `start` to zero.
    pub fn zero(&self, start: usize, len: usize) -> Result<(), OutOfRange> {
        self.fill(start, len, 0)
    }

    /// Sets the `len` bytes from `start` to `value`.
    pub fn fill(&self, start: usize, len: usize, value: u8) -> Result<(), OutOfRange> {
        self.for_each_part(start, len, |offset, part| {
            self.map.fill(offset, part as usize, value)
        })
    }

    /// `readv(2)`: fills `prefix` (private memory) first, then the spans. Returns the bytes read, prefix included.
    /// One call, hence one packet of a TAP or a datagram socket. `EINVAL` above [`MAX_PIECES`].
    pub fn readv_from(&self, fd: BorrowedFd<'_>, prefix: &mut [u8]) -> Result<usize, HostError> {
        fdio::readv(fd, prefix, self)
    }

    /// `writev(2)`: `prefix` (private memory), then the spans. Returns the bytes written, prefix included.
    pub fn writev_to(&self, fd: BorrowedFd<'_>, prefix: &[u8]) -> Result<usize, HostError> {
        fdio::writev(fd, prefix, self)
    }

    /// `preadv(2)` at `file_offset`. Returns the bytes read; may be short.
    pub fn preadv_from(&self, fd: BorrowedFd<'_>, file_offset: u64) -> Result<usize, HostError> {
        fdio::preadv(fd, file_offset, self)
    }

    /// `pwritev(2)` at `file_offset`. Returns the bytes written; may be short.
    pub fn pwritev_to(&self, fd: BorrowedFd<'_>, file_offset: u64) -> Result<usize, HostError> {
        fdio::pwritev(fd, file_offset, self)
    }
}
