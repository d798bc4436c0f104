//! Guest RAM: one sealed memfd, mapped once for KVM, with pages of ours shown over it.
//!
//! The file is mapped as one piece, aligned to 2 MiB like the file's own huge pages, so that KVM can map guest
//! memory by 2 MiB wherever the host gives huge pages for shared memory. An overlay replaces one 4 KiB page of the
//! mapping by a page of another memfd (`MAP_FIXED`); the replacement is atomic for running vCPUs, which fault and
//! see the new page. Taking it away maps the RAM file's own page again.
//!
//! Device servers map the same file themselves and do not see overlays: rings and data are never in one.
//!
//! Our own reads of guest memory (a hypercall's input, a crash text) go through `vm-memory` over this mapping, and
//! so see what the guest sees.

use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr;

use nix::fcntl::{FallocateFlags, fallocate};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};
use vmbus::mem::{RamLayout, sealed_memfd};

use super::KvmError;

const PAGE_BYTES: usize = 4096;
/// Size and alignment of a huge page on x86-64.
const HUGE_BYTES: usize = 2 << 20;
/// Source: Linux include/uapi/asm-generic/mman-common.h.
const MADV_POPULATE_WRITE: i32 = 23;
const MADV_COLLAPSE: i32 = 25;

/// What the host gives for shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HugePages {
    /// A fault brings in a huge page where it can (`shmem_enabled` is not `never`).
    OnFault,
    /// Only on request (`MADV_COLLAPSE`, Linux 6.1).
    OnRequest,
    /// Not at all.
    None,
}

/// Guest RAM and its mapping.
#[derive(Debug)]
pub struct GuestMapping {
    fd: OwnedFd,
    layout: RamLayout,
    /// Where file offset 0 is mapped. A number, not a pointer: nothing is read or written through it here.
    base: usize,
    len: usize,
    /// The address range that holds the mapping and its alignment slack.
    reservation: (usize, usize),
    memory: GuestMemoryMmap,
}

impl GuestMapping {
    /// Makes RAM of this layout, all zero.
    pub fn new(layout: RamLayout) -> Result<Self, KvmError> {
        let total = layout.total_bytes();
        let fd = sealed_memfd("guest-ram", total).map_err(|error| {
            KvmError::new(
                "make the memory file of guest RAM",
                io::Error::other(error.to_string()),
            )
        })?;
        let len = usize::try_from(total).expect("guest RAM is addressed by 64 bits");
        let reserved = len + HUGE_BYTES;
        // SAFETY: no address is given, so no mapping is replaced; the range is not accessible.
        let start = unsafe {
            map(
                0,
                reserved,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                None,
            )
        };
        let start = start.map_err(|error| KvmError::new("reserve addresses for guest RAM", error))?;
        let base = start.next_multiple_of(HUGE_BYTES);
        // Built before anything can fail, so that its drop gives the range back.
        let mut mapping = Self {
            fd,
            layout,
            base,
            len,
            reservation: (start, reserved),
            memory: GuestMemoryMmap::new(),
        };
        mapping
            .map_ram(0, len)
            .map_err(|error| KvmError::new("map guest RAM", error))?;
        mapping.memory = mapping.describe()?;
        Ok(mapping)
    }

    /// Guest memory for reading and writing by guest-physical address.
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// Where RAM lies.
    pub fn layout(&self) -> &RamLayout {
        &self.layout
    }

    /// The RAM file, to be handed to device servers.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Guest-physical address, length and host address of each memory slot.
    pub(super) fn slots(&self) -> impl Iterator<Item = (u64, u64, u64)> + '_ {
        self.layout
            .regions
            .iter()
            .map(|region| (region.gpa, region.len, self.base as u64 + region.file_offset))
    }

    /// Shows page number `page` of `file` at a guest page number. The page must be RAM.
    pub fn show(&self, gpn: u64, file: BorrowedFd<'_>, page: u64) -> io::Result<()> {
        let offset = self.page_offset(gpn)?;
        // SAFETY: `page_offset` checked that the page lies within our mapping, which nobody has references into.
        unsafe {
            map(
                self.base + offset,
                PAGE_BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_FIXED,
                Some((file, page * PAGE_BYTES as u64)),
            )
        }?;
        Ok(())
    }

    /// Shows RAM again at a guest page number.
    pub fn restore(&self, gpn: u64) -> io::Result<()> {
        self.map_ram(self.page_offset(gpn)?, PAGE_BYTES)
    }

    /// Gives all of RAM back to the host: it reads as zero afterwards. No vCPU runs.
    pub fn wipe(&self) -> io::Result<()> {
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(self.fd.as_fd(), flags, 0, self.len as libc::off_t)?;
        Ok(())
    }

    /// Asks for huge pages, and says how they are to be had.
    pub fn advise_huge_pages(&self) -> HugePages {
        if self.advise(0, self.len, libc::MADV_HUGEPAGE).is_err() {
            return HugePages::None;
        }
        // Faulting in one page shows what a fault brings: another page of the same 2 MiB is there, or not.
        if self.len < HUGE_BYTES || self.advise(0, PAGE_BYTES, MADV_POPULATE_WRITE).is_err() {
            return HugePages::None;
        }
        if self.is_resident(HUGE_BYTES - PAGE_BYTES) {
            return HugePages::OnFault;
        }
        match self.advise(0, HUGE_BYTES, MADV_COLLAPSE) {
            Ok(()) => HugePages::OnRequest,
            Err(_) => HugePages::None,
        }
    }

    /// Makes huge pages of the first `len` bytes of RAM, which become resident, as far as the host has them to give.
    /// Returns how many bytes it took the trouble of. Cheapest before anything is written there.
    pub fn collapse(&self, len: usize) -> usize {
        let len = len.min(self.len) / HUGE_BYTES * HUGE_BYTES;
        for offset in (0..len).step_by(HUGE_BYTES) {
            // Quirk(Linux 6.18 madvise_collapse): a range without any page is refused with EINVAL.
            if self.advise(offset, PAGE_BYTES, MADV_POPULATE_WRITE).is_err() {
                return offset;
            }
        }
        // One call for all: each one waits for every CPU to empty its list of new pages. What it could not collapse
        // stays as it is.
        self.advise(0, len, MADV_COLLAPSE).ok();
        len
    }

    /// Faults all of RAM in.
    pub fn populate(&self) -> io::Result<()> {
        self.advise(0, self.len, MADV_POPULATE_WRITE)
    }

    /// Length of RAM in bytes.
    pub fn total_bytes(&self) -> usize {
        self.len
    }

    fn page_offset(&self, gpn: u64) -> io::Result<usize> {
        let gpa = gpn.checked_mul(PAGE_BYTES as u64);
        let offset = gpa.and_then(|gpa| self.layout.offset_of(vmbus::mem::Gpa(gpa), PAGE_BYTES as u64));
        offset
            .map(|offset| offset as usize)
            .ok_or(io::ErrorKind::InvalidInput.into())
    }

    /// Maps part of the RAM file at its place.
    fn map_ram(&self, offset: usize, len: usize) -> io::Result<()> {
        assert!(offset + len <= self.len, "callers pass ranges of the file");
        // SAFETY: the range lies within our reservation, which nobody has references into.
        unsafe {
            map(
                self.base + offset,
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_NORESERVE,
                Some((self.fd.as_fd(), offset as u64)),
            )
        }?;
        // A page that was an overlay has lost its advice with its mapping.
        if len == PAGE_BYTES {
            self.advise(offset, len, libc::MADV_HUGEPAGE).ok();
        }
        Ok(())
    }

    fn describe(&self) -> Result<GuestMemoryMmap, KvmError> {
        let failed = |error: String| KvmError::new("describe guest RAM", io::Error::other(error));
        let mut regions = Vec::new();
        for region in &self.layout.regions {
            let address = (self.base as u64 + region.file_offset) as *mut u8;
            let builder = MmapRegionBuilder::new(region.len as usize)
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(libc::MAP_SHARED);
            // SAFETY: the range is mapped for as long as `self` lives, and `memory` is only lent out.
            let builder = unsafe { builder.with_raw_mmap_pointer(address) };
            let mapped = builder.build().map_err(|error| failed(error.to_string()))?;
            let region = GuestRegionMmap::new(mapped, GuestAddress(region.gpa));
            regions.push(region.ok_or_else(|| failed("a region overflows".to_owned()))?);
        }
        GuestMemoryMmap::from_regions(regions).map_err(|error| failed(error.to_string()))
    }

    fn is_resident(&self, offset: usize) -> bool {
        let mut residency = 0u8;
        // SAFETY: one page of our mapping is asked about, and the kernel writes one byte about it.
        let result = unsafe {
            libc::mincore(
                (self.base + offset) as *mut libc::c_void,
                PAGE_BYTES,
                &mut residency,
            )
        };
        result == 0 && residency & 1 != 0
    }

    fn advise(&self, offset: usize, len: usize, advice: i32) -> io::Result<()> {
        if offset.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: the range lies within our mapping, and none of the advices used here changes what it contains.
        let result = unsafe { libc::madvise((self.base + offset) as *mut libc::c_void, len, advice) };
        if result == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }
}

impl Drop for GuestMapping {
    fn drop(&mut self) {
        let (start, len) = self.reservation;
        // SAFETY: the range is ours since `new`; every `Vm` borrowed or shared `self`, so none is left.
        unsafe { libc::munmap(start as *mut libc::c_void, len) };
    }
}

/// mmap(2). An `at` of 0 lets the kernel choose.
///
/// # Safety
/// With `MAP_FIXED`, whatever is mapped in the range is replaced: it must be ours, without references into it.
unsafe fn map(
    at: usize,
    len: usize,
    protection: i32,
    flags: i32,
    file: Option<(BorrowedFd<'_>, u64)>,
) -> io::Result<usize> {
    let len = NonZeroUsize::new(len).ok_or(io::ErrorKind::InvalidInput)?;
    let (fd, offset) = file.map_or((-1, 0), |(fd, offset)| (fd.as_raw_fd(), offset));
    let at = ptr::with_exposed_provenance_mut(at);
    // SAFETY: the caller's promise.
    let address = unsafe { libc::mmap(at, len.get(), protection, flags, fd, offset as libc::off_t) };
    if address == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(address.expose_provenance())
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    fn read(mapping: &GuestMapping, gpa: u64) -> u64 {
        mapping.memory().read_obj(GuestAddress(gpa)).expect("in RAM")
    }

    fn write(mapping: &GuestMapping, gpa: u64, value: u64) {
        mapping
            .memory()
            .write_obj(value, GuestAddress(gpa))
            .expect("in RAM");
    }

    #[test]
    fn an_overlay_hides_ram_and_gives_it_back_untouched() {
        let mapping = GuestMapping::new(RamLayout::for_size(16 << 20)).expect("maps");
        let pages = sealed_memfd("pages", 2 * 4096).expect("memfd");
        write(&mapping, 0x5000, 1);
        mapping.show(5, pages.as_fd(), 1).expect("shown");
        assert_eq!(read(&mapping, 0x5000), 0);
        write(&mapping, 0x5000, 2);
        mapping.restore(5).expect("restored");
        assert_eq!(read(&mapping, 0x5000), 1);
        mapping.show(6, pages.as_fd(), 1).expect("shown elsewhere");
        assert_eq!(read(&mapping, 0x6000), 2, "the page keeps its content");
        assert_eq!(read(&mapping, 0x4ff8), 0, "neighbours are RAM");
    }

    #[test]
    fn only_ram_pages_can_be_covered() {
        let mapping = GuestMapping::new(RamLayout::for_size(16 << 20)).expect("maps");
        let pages = sealed_memfd("pages", 4096).expect("memfd");
        for gpn in [(16 << 20) / 4096, 0xFEE00, u64::MAX, u64::MAX / 4096] {
            assert!(mapping.show(gpn, pages.as_fd(), 0).is_err());
            assert!(mapping.restore(gpn).is_err());
        }
    }

    #[test]
    fn wiping_zeroes_all_of_ram() {
        let mapping = GuestMapping::new(RamLayout::for_size(16 << 20)).expect("maps");
        write(&mapping, 0, 1);
        write(&mapping, (16 << 20) - 8, 1);
        mapping.wipe().expect("wiped");
        assert_eq!((read(&mapping, 0), read(&mapping, (16 << 20) - 8)), (0, 0));
    }

    #[test]
    fn huge_pages_are_aligned_in_the_mapping_as_in_the_file() {
        let mapping = GuestMapping::new(RamLayout::for_size(16 << 20)).expect("maps");
        assert_eq!(mapping.base % HUGE_BYTES, 0);
        let huge = mapping.advise_huge_pages();
        if huge == HugePages::OnRequest {
            assert_eq!(mapping.collapse(5 << 20), 4 << 20, "whole huge pages");
            assert!(mapping.is_resident((4 << 20) - PAGE_BYTES));
            assert!(!mapping.is_resident(4 << 20));
            assert_eq!(mapping.collapse(usize::MAX), 16 << 20);
        }
        println!("huge pages for shared memory here: {huge:?}");
    }
}
