//! Long mappings begin where a huge page may, so that the kernel can map the file's huge pages as such.
//!
//! Guest RAM is made of huge pages where the host has them to give. A mapping that is not aligned like them is made of
//! 4 KiB entries all the same: as many faults for a server that has just begun and whose guest waits, and as many
//! entries to be cleared away when it dies, which the guest waits for, too.
//!
//! Quirk(Linux 6.18 mm/shmem.c `shmem_get_unmapped_area`): the kernel aligns by itself only if `shmem_enabled` is not `never`;
//! huge pages can be had by request then, too.

use super::{HostError, PAGE_BYTES, SharedMap};
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::{self, NonNull};

/// Size and alignment of a huge page on x86-64.
pub(super) const HUGE_BYTES: usize = 2 << 20;

/// Linux include/uapi/asm-generic/mman-common.h; since Linux 5.14 and 6.1. Not in every libc's headers.
const MADV_POPULATE_READ: i32 = 22;
const MADV_POPULATE_WRITE: i32 = 23;
const MADV_COLLAPSE: i32 = 25;

/// Maps the first `len` bytes of a file, shared.
pub(super) fn map_shared(fd: BorrowedFd<'_>, len: usize, protection: i32) -> Result<NonNull<u8>, HostError> {
    if len < HUGE_BYTES {
        // SAFETY: a fresh mapping at an address of the kernel's choice; it aliases nothing that Rust knows.
        let mapped = unsafe {
            libc::mmap(
                ptr::null_mut(),
                len,
                protection,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                0,
            )
        };
        return address(mapped, "map shared memory");
    }
    let failed = |errno| HostError::new("reserve addresses for shared memory", errno);
    let pages = len
        .checked_next_multiple_of(PAGE_BYTES as usize)
        .ok_or(failed(Errno::ENOMEM))?;
    let reserved = pages.checked_add(HUGE_BYTES).ok_or(failed(Errno::ENOMEM))?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: as above; the range is not accessible.
    let start = unsafe { libc::mmap(ptr::null_mut(), reserved, libc::PROT_NONE, flags, -1, 0) };
    let start = address(start, "reserve addresses for shared memory")?;
    let head = start.addr().get().next_multiple_of(HUGE_BYTES) - start.addr().get();
    // SAFETY: `head` is below HUGE_BYTES, so `head + pages` is at most `reserved`: the address lies in the reservation.
    let base = unsafe { start.byte_add(head) }.as_ptr().cast();
    let flags = libc::MAP_SHARED | libc::MAP_FIXED;
    // SAFETY: only pages of the reservation are replaced (see `base`), and those are ours and unused.
    let mapped = unsafe { libc::mmap(base, len, protection, flags, fd.as_raw_fd(), 0) };
    let mapped = address(mapped, "map shared memory");
    let unused = match mapped {
        Ok(_) => [(0, head), (head + pages, reserved - head - pages)],
        Err(_) => [(0, reserved), (0, 0)],
    };
    for (from, len) in unused.into_iter().filter(|(_, len)| *len > 0) {
        // SAFETY: a part of the reservation that the mapping has not replaced, and that nobody uses.
        unsafe { libc::munmap(start.as_ptr().byte_add(from).cast(), len) };
    }
    mapped
}

fn address(mapped: *mut libc::c_void, attempted: &'static str) -> Result<NonNull<u8>, HostError> {
    if mapped == libc::MAP_FAILED {
        return Err(HostError::last(attempted));
    }
    NonNull::new(mapped.cast()).ok_or(HostError::new(attempted, Errno::EFAULT))
}

impl SharedMap {
    /// Makes huge pages of all that is mapped, which becomes resident, as far as the host has them to give on request.
    /// For whoever plays a guest whose RAM `bulkhead-vcpu` would have made so.
    pub fn collapse(&self) {
        let len = self.len() / HUGE_BYTES * HUGE_BYTES;
        for offset in (0..len).step_by(HUGE_BYTES) {
            // Quirk(Linux 6.18 madvise_collapse): a range without any page is refused with EINVAL.
            self.advise(offset, PAGE_BYTES as usize, MADV_POPULATE_WRITE);
        }
        self.advise(0, len, MADV_COLLAPSE);
    }

    /// Faults in what the file has already, so that whoever goes on from there does not do it page by page. Of what the file
    /// does not have, nothing becomes resident. `fd` is the file that is mapped; its position changes.
    pub fn fault_in(&self, fd: BorrowedFd<'_>) {
        let end = self.len() as libc::off_t;
        let mut from = 0;
        // No more data (`ENXIO`), or a file that does not say where it has some.
        while let Ok(data) = lseek(fd, from, Whence::SeekData)
            && data < end
        {
            let hole = lseek(fd, data, Whence::SeekHole).unwrap_or(end).min(end);
            if hole <= data {
                return;
            }
            self.advise(data as usize, (hole - data) as usize, MADV_POPULATE_READ);
            from = hole;
        }
    }

    /// Pages for which this process has an entry in its tables (/proc/self/pagemap, bit 63).
    #[cfg(test)]
    fn resident_entries(&self) -> usize {
        use std::os::unix::fs::FileExt;
        let table = std::fs::File::open("/proc/self/pagemap").expect("procfs");
        let mut entries = vec![0; self.len() / PAGE_BYTES as usize * 8];
        let first = self.host_address() as u64 / PAGE_BYTES * 8;
        table
            .read_exact_at(&mut entries, first)
            .expect("an entry for each page");
        entries
            .chunks_exact(8)
            .filter(|entry| entry[7] & 0x80 != 0)
            .count()
    }

    /// Whatever comes of it changes nothing but speed.
    fn advise(&self, offset: usize, len: usize, advice: i32) {
        // SAFETY: callers give ranges of the mapping, and none of the advices changes what those contain.
        unsafe { libc::madvise((self.host_address() + offset) as *mut libc::c_void, len, advice) };
    }
}

#[cfg(test)]
mod tests {
    use crate::mem::{Access, SharedMap, sealed_memfd};
    use std::os::fd::{AsFd, OwnedFd};

    fn blocks(fd: &OwnedFd) -> i64 {
        nix::sys::stat::fstat(fd).expect("a memfd").st_blocks
    }

    #[test]
    fn long_mappings_begin_where_a_huge_page_may_and_show_the_whole_file() {
        for len in [4096, (2 << 20) - 4096, 2 << 20, (2 << 20) + 4096, (6 << 20) + 1] {
            let fd = sealed_memfd("long", 8 << 20).expect("a memfd");
            let map = SharedMap::map(fd.as_fd(), len, Access::ReadWrite).expect("mapped");
            assert!(len < super::HUGE_BYTES || map.host_address().is_multiple_of(super::HUGE_BYTES));
            map.write(0, &[1]).expect("in range");
            map.write(len as u64 - 1, &[2]).expect("in range");
            let again = SharedMap::map(fd.as_fd(), 8 << 20, Access::ReadOnly).expect("mapped");
            for (offset, value) in [(0, 1), (len as u64 - 1, 2)] {
                let mut byte = [0];
                again.read(offset, &mut byte).expect("in range");
                assert_eq!(byte, [value]);
            }
        }
    }

    #[test]
    fn what_the_file_does_not_have_is_not_made_resident() {
        let fd = sealed_memfd("sparse", 8 << 20).expect("a memfd");
        let map = SharedMap::map(fd.as_fd(), 6 << 20, Access::ReadWrite).expect("mapped");
        for offset in [0, 3 << 20, (6 << 20) - 4096, 7 << 20] {
            let all = SharedMap::map(fd.as_fd(), 8 << 20, Access::ReadWrite).expect("mapped");
            all.write(offset, &[1]).expect("in range");
        }
        let before = blocks(&fd);
        let present = || map.resident_entries();
        assert_eq!(present(), 0, "nothing was touched through this mapping");
        map.fault_in(fd.as_fd());
        assert_eq!(blocks(&fd), before);
        assert_eq!(present(), 3, "what lies within the mapping");
    }
}
