//! A GPADL's pages seen as one byte area.
#![forbid(unsafe_code)]

use super::{GuestSpans, OutOfRange, PAGE_BYTES, SharedMap};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Scattered pages of one map, in the guest's order, seen as one area. Offsets are bytes from the area's start.
///
/// Pages that follow each other in the file (the usual case: drivers allocate rings in one piece) are found out once, and
/// then every access is a single bounds check and copy. Cheap to clone and to [`PagedArea::slice`].
#[derive(Debug, Clone)]
pub struct PagedArea {
    map: Arc<SharedMap>,
    place: Place,
    len: u64,
}

#[derive(Debug, Clone)]
enum Place {
    /// The whole area from this offset of the map.
    Contiguous(u64),
    /// Page by page; the area begins `start` bytes into the list.
    Scattered { pages: Arc<[u64]>, start: u64 },
}

impl PagedArea {
    /// An area of `len` bytes over the pages at these offsets of `map`, which begins `start` bytes into the first of them.
    ///
    /// Fails if a page is not aligned or not wholly inside the map, or if the pages do not hold `start + len` bytes.
    pub fn new(map: Arc<SharedMap>, pages: Vec<u64>, start: u64, len: u64) -> Result<Self, OutOfRange> {
        let limit = map.len() as u64;
        let mut contiguous = true;
        for (index, &offset) in pages.iter().enumerate() {
            if offset % PAGE_BYTES != 0 || offset.checked_add(PAGE_BYTES).is_none_or(|end| end > limit) {
                return Err(OutOfRange {
                    offset,
                    len: PAGE_BYTES,
                    limit,
                });
            }
            contiguous &= index == 0 || pages[index - 1] + PAGE_BYTES == offset;
        }
        let page_bytes = pages.len() as u64 * PAGE_BYTES;
        if start.checked_add(len).is_none_or(|end| end > page_bytes) {
            return Err(OutOfRange {
                offset: start,
                len,
                limit: page_bytes,
            });
        }
        let place = match pages.first() {
            Some(first) if contiguous => Place::Contiguous(first + start),
            Some(_) => Place::Scattered {
                pages: pages.into(),
                start,
            },
            None => Place::Contiguous(0),
        };
        Ok(Self { map, place, len })
    }

    /// The `len` bytes from `offset` of `map`, which need not be page aligned.
    pub fn contiguous(map: Arc<SharedMap>, offset: u64, len: u64) -> Result<Self, OutOfRange> {
        let limit = map.len() as u64;
        if offset.checked_add(len).is_none_or(|end| end > limit) {
            return Err(OutOfRange { offset, len, limit });
        }
        Ok(Self {
            map,
            place: Place::Contiguous(offset),
            len,
        })
    }

    /// Length in bytes.
    #[inline]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether the area has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The `len` bytes from `offset` as an area of their own.
    pub fn slice(&self, offset: u64, len: u64) -> Result<PagedArea, OutOfRange> {
        self.check(offset, len)?;
        let place = match &self.place {
            Place::Contiguous(base) => Place::Contiguous(base + offset),
            Place::Scattered { pages, start } => Place::Scattered {
                pages: pages.clone(),
                start: start + offset,
            },
        };
        Ok(PagedArea {
            map: self.map.clone(),
            place,
            len,
        })
    }

    #[inline]
    fn check(&self, offset: u64, len: u64) -> Result<(), OutOfRange> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len => Ok(()),
            _ => Err(OutOfRange {
                offset,
                len,
                limit: self.len,
            }),
        }
    }

    /// Offset in the map of the byte at `offset`, and how many bytes follow it there in one piece (at least one).
    #[inline]
    fn place_of(&self, offset: u64) -> Result<(u64, u64), OutOfRange> {
        self.check(offset, 1)?;
        match &self.place {
            Place::Contiguous(base) => Ok((base + offset, self.len - offset)),
            Place::Scattered { pages, start } => {
                let at = start + offset;
                let page = pages[(at / PAGE_BYTES) as usize];
                Ok((page + at % PAGE_BYTES, PAGE_BYTES - at % PAGE_BYTES))
            }
        }
    }

    /// The map, and where in it the `len` bytes at `offset` lie; `None` unless they lie there in one piece. For users who
    /// look often and want to look up once.
    pub(crate) fn in_one_piece(&self, offset: u64, len: u64) -> Option<(&Arc<SharedMap>, u64)> {
        self.check(offset, len).ok()?;
        let (place, mut known) = self.place_of(offset).ok()?;
        while known < len {
            let (next, more) = self.place_of(offset + known).ok()?;
            if next != place + known {
                return None;
            }
            known += more;
        }
        Some((&self.map, place))
    }

    /// Calls `action(offset in the map, range of the access)` for each piece of `len` bytes at `offset`.
    #[inline]
    fn for_each_piece(
        &self,
        offset: u64,
        len: usize,
        mut action: impl FnMut(u64, std::ops::Range<usize>) -> Result<(), OutOfRange>,
    ) -> Result<(), OutOfRange> {
        self.check(offset, len as u64)?;
        if let Place::Contiguous(base) = self.place {
            return action(base + offset, 0..len);
        }
        let mut done = 0;
        while done < len {
            let (place, in_one_piece) = self.place_of(offset + done as u64)?;
            let part = (len - done).min(in_one_piece as usize);
            action(place, done..done + part)?;
            done += part;
        }
        Ok(())
    }

    /// Copies out.
    #[inline]
    pub fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), OutOfRange> {
        let len = out.len();
        self.for_each_piece(offset, len, |place, range| self.map.read(place, &mut out[range]))
    }

    /// Copies in.
    #[inline]
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<(), OutOfRange> {
        self.for_each_piece(offset, data.len(), |place, range| {
            self.map.write(place, &data[range])
        })
    }

    /// Loads the aligned little-endian word at `offset`.
    #[inline]
    pub fn load_u32(&self, offset: u64, ordering: Ordering) -> Result<u32, OutOfRange> {
        self.map.load_u32(self.word(offset)?, ordering)
    }

    /// Stores the aligned little-endian word at `offset`.
    #[inline]
    pub fn store_u32(&self, offset: u64, value: u32, ordering: Ordering) -> Result<(), OutOfRange> {
        self.map.store_u32(self.word(offset)?, value, ordering)
    }

    /// Where the word at `offset` lies; an aligned word never crosses a page, and the map checks the alignment.
    #[inline]
    fn word(&self, offset: u64) -> Result<u64, OutOfRange> {
        self.check(offset, 4)?;
        Ok(self.place_of(offset)?.0)
    }

    /// The `len` bytes at `offset` as spans, for I/O without a copy.
    pub fn spans(&self, offset: u64, len: usize) -> Result<GuestSpans, OutOfRange> {
        let mut spans = GuestSpans::new(self.map.clone());
        self.append_spans(offset, len, &mut spans)?;
        Ok(spans)
    }

    /// Appends the `len` bytes at `offset` to spans of the same map.
    pub fn append_spans(&self, offset: u64, len: usize, spans: &mut GuestSpans) -> Result<(), OutOfRange> {
        assert!(Arc::ptr_eq(spans.map(), &self.map), "spans of another map");
        self.for_each_piece(offset, len, |place, range| {
            let part = u32::try_from(range.len()).map_err(|_| OutOfRange {
                offset,
                len: len as u64,
                limit: u64::from(u32::MAX),
            })?;
            spans.push(place, part)
        })
    }
}
