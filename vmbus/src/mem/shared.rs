//! One mapping of a sealed memfd. See the room's invariant in `mem/mod.rs`.

use super::{HostError, OutOfRange};
use nix::errno::Errno;
use std::arch::asm;
use std::ffi::CString;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// What a mapping may be used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Loads only; a store through this map is a mistake of ours and asserts.
    ReadOnly,
    /// Loads and stores.
    ReadWrite,
}

/// A shared mapping of the first `len` bytes of a memfd that can never shrink. Unmapped on drop.
///
/// All offsets are bytes from the start of the map. Reads and writes are plain byte copies (see `mem/mod.rs` for what
/// that promises); atomics need natural alignment and report a misaligned offset as [`OutOfRange`].
#[derive(Debug)]
pub struct SharedMap {
    base: NonNull<u8>,
    len: usize,
    access: Access,
}

// SAFETY: the mapping belongs to the value alone and is not tied to a thread; all access is by raw copies or atomics.
unsafe impl Send for SharedMap {}
// SAFETY: as above; concurrent access from several threads is no different from concurrent access by other processes,
// which every method is made for.
unsafe impl Sync for SharedMap {}

/// Keeps the compiler from assuming anything about shared memory across this point. Emits no instruction.
#[inline(always)]
fn forget_shared_contents() {
    // SAFETY: an empty instruction sequence; without `nomem` the compiler must assume that it reads and writes all
    // memory whose address has escaped, which is the purpose.
    unsafe { asm!("", options(nostack, preserves_flags)) };
}

/// A full barrier: all stores before it are seen by all processors before anything after it is loaded.
///
/// A locked operation on this thread's own stack, as Linux' `smp_mb()` (6.1 arch/x86/include/asm/barrier.h): the same promise
/// as `fence(SeqCst)` for the write-back memory that all maps are, and `mfence`, which that becomes, costs three times
/// as much because it orders more kinds of memory than there are here.
// The model checker has a fence of its own (ring/memory.rs).
#[cfg(not(loom))]
#[inline(always)]
pub(crate) fn full_fence() {
    // SAFETY: an "or" with zero leaves the word as it is, and the word lies on this thread's stack (in the red zone
    // of System V x86-64, which nothing writes asynchronously). Without `nomem` it is a compiler barrier, too.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        asm!("lock or dword ptr [rsp - 8], 0", options(nostack))
    };
    #[cfg(not(target_arch = "x86_64"))]
    std::sync::atomic::fence(Ordering::SeqCst);
}

impl SharedMap {
    /// Maps the first `len` bytes of `fd`.
    ///
    /// Refused (`EPERM`) unless the file carries `F_SEAL_SHRINK`, and (`EOVERFLOW`) if it is shorter than `len`: a file that
    /// another process can truncate would turn our loads into SIGBUS. `len` is remembered and never asked again.
    pub fn map(fd: BorrowedFd<'_>, len: usize, access: Access) -> Result<Self, HostError> {
        if len == 0 {
            return Err(HostError::new("map no bytes of shared memory", Errno::EINVAL));
        }
        // SAFETY: F_GET_SEALS takes no pointer; the descriptor is valid while borrowed.
        let seals = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GET_SEALS) };
        if seals < 0 {
            return Err(HostError::last("read the seals of shared memory"));
        }
        if seals & libc::F_SEAL_SHRINK == 0 {
            return Err(HostError::new(
                "map shared memory that is not sealed against shrinking",
                Errno::EPERM,
            ));
        }
        let stat = nix::sys::stat::fstat(fd)
            .map_err(|errno| HostError::new("read the size of shared memory", errno))?;
        // Not racing with truncation: the seal was there before the size was read, and seals cannot be removed.
        if u64::try_from(stat.st_size).unwrap_or(0) < len as u64 {
            return Err(HostError::new(
                "map more bytes than the shared memory has",
                Errno::EOVERFLOW,
            ));
        }
        let protection = match access {
            Access::ReadOnly => libc::PROT_READ,
            Access::ReadWrite => libc::PROT_READ | libc::PROT_WRITE,
        };
        let base = super::huge::map_shared(fd, len, protection)?;
        Ok(Self { base, len, access })
    }

    /// Makes a sealed memfd of `len` bytes and maps it: memory for our own use with the same interface as guest
    /// memory (bounce buffers, tests).
    pub fn anonymous(name: &str, len: usize) -> Result<Self, HostError> {
        use std::os::fd::AsFd;
        let fd = sealed_memfd(name, len as u64)?;
        Self::map(fd.as_fd(), len, Access::ReadWrite)
    }

    /// Bytes mapped.
    #[inline]
    #[expect(clippy::len_without_is_empty, reason = "a map of no bytes cannot be made")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Where the mapping lies in this process. For `ioctl`s of other rooms that want a host virtual address; this
    /// crate never turns it back into a pointer.
    pub fn host_address(&self) -> usize {
        self.base.as_ptr() as usize
    }

    /// The address of `len` bytes at `offset`, or an error if they are not all mapped.
    #[inline(always)]
    fn address(&self, offset: u64, len: usize) -> Result<*mut u8, OutOfRange> {
        // `len` of the map fits in isize (mmap), so once the comparison holds nothing below can overflow.
        match offset.checked_add(len as u64) {
            // SAFETY: offset <= self.len, hence the result points into the mapping or one past its end.
            Some(end) if end <= self.len as u64 => Ok(unsafe { self.base.as_ptr().add(offset as usize) }),
            _ => Err(OutOfRange {
                offset,
                len: len as u64,
                limit: self.len as u64,
            }),
        }
    }

    /// The address of `len` bytes for the iovec of a system call that reads from, or writes to, this map.
    #[inline]
    pub(super) fn io_address(
        &self,
        offset: u64,
        len: u32,
        writes: bool,
    ) -> Result<*mut libc::c_void, OutOfRange> {
        if writes {
            self.assert_writable();
        }
        Ok(self.address(offset, len as usize)?.cast())
    }

    #[inline]
    fn assert_writable(&self) {
        assert!(self.access == Access::ReadWrite, "store through a read-only map");
        #[cfg(test)]
        super::crash_point::before_store();
    }

    /// Copies `out.len()` bytes at `offset` into private memory.
    #[inline(always)]
    pub fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), OutOfRange> {
        let from = self.address(offset, out.len())?;
        forget_shared_contents();
        // SAFETY: `from` has out.len() mapped bytes (checked by `address`); `out` is private memory, so the two cannot
        // overlap. Concurrent writers can only tear the bytes; see the room's invariant.
        unsafe { std::ptr::copy_nonoverlapping(from.cast_const(), out.as_mut_ptr(), out.len()) };
        forget_shared_contents();
        Ok(())
    }

    /// Copies `data` from private memory to `offset`.
    #[inline(always)]
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<(), OutOfRange> {
        self.assert_writable();
        let to = self.address(offset, data.len())?;
        forget_shared_contents();
        // SAFETY: as in `read`, with the directions exchanged; the mapping is writable (asserted).
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), to, data.len()) };
        forget_shared_contents();
        Ok(())
    }

    /// Checks once that `len` bytes at `offset` are mapped, and writes them piece by piece: for small pieces, of which a check
    /// each would cost more than the copy.
    #[inline(always)]
    pub(crate) fn write_pieces(&self, offset: u64, len: usize) -> Result<PieceWriter<'_>, OutOfRange> {
        self.assert_writable();
        let at = self.address(offset, len)?;
        forget_shared_contents();
        Ok(PieceWriter {
            at,
            left: len,
            map: PhantomData,
        })
    }

    /// Sets `len` bytes at `offset` to `value`.
    pub fn fill(&self, offset: u64, len: usize, value: u8) -> Result<(), OutOfRange> {
        self.assert_writable();
        let to = self.address(offset, len)?;
        forget_shared_contents();
        // SAFETY: `to` has `len` mapped, writable bytes.
        unsafe { std::ptr::write_bytes(to, value, len) };
        forget_shared_contents();
        Ok(())
    }

    /// Copies `len` bytes at `from_offset` to `to_offset` of `to`, which may be the same map; overlap is allowed.
    pub fn copy_to_map(
        &self,
        from_offset: u64,
        to: &SharedMap,
        to_offset: u64,
        len: usize,
    ) -> Result<(), OutOfRange> {
        to.assert_writable();
        let source = self.address(from_offset, len)?;
        let target = to.address(to_offset, len)?;
        forget_shared_contents();
        // SAFETY: both addresses have `len` mapped bytes; `copy` allows overlap.
        unsafe { std::ptr::copy(source.cast_const(), target, len) };
        forget_shared_contents();
        Ok(())
    }

    /// Runs one atomic operation on the 32-bit word at `offset`.
    #[inline]
    fn with_u32<T>(&self, offset: u64, operation: impl FnOnce(&AtomicU32) -> T) -> Result<T, OutOfRange> {
        let address = self.address(offset, 4)?;
        if !offset.is_multiple_of(4) {
            return Err(OutOfRange {
                offset,
                len: 4,
                limit: self.len as u64,
            });
        }
        // SAFETY: mapped for four bytes, aligned (the map begins on a page), lives as long as `self`. Other processes use
        // the word only as hardware words of the same size, or tear it at their own cost.
        Ok(operation(unsafe { AtomicU32::from_ptr(address.cast()) }))
    }

    /// Runs one atomic operation on the 64-bit word at `offset`.
    #[inline]
    fn with_u64<T>(&self, offset: u64, operation: impl FnOnce(&AtomicU64) -> T) -> Result<T, OutOfRange> {
        let address = self.address(offset, 8)?;
        if !offset.is_multiple_of(8) {
            return Err(OutOfRange {
                offset,
                len: 8,
                limit: self.len as u64,
            });
        }
        // SAFETY: as in `with_u32`, for eight bytes.
        Ok(operation(unsafe { AtomicU64::from_ptr(address.cast()) }))
    }

    /// Loads the little-endian word at `offset`. `ordering` must be one for loads.
    #[inline]
    pub fn load_u32(&self, offset: u64, ordering: Ordering) -> Result<u32, OutOfRange> {
        self.with_u32(offset, |word| u32::from_le(word.load(ordering)))
    }

    /// Stores the little-endian word at `offset`. `ordering` must be one for stores.
    #[inline]
    pub fn store_u32(&self, offset: u64, value: u32, ordering: Ordering) -> Result<(), OutOfRange> {
        self.assert_writable();
        self.with_u32(offset, |word| word.store(value.to_le(), ordering))
    }

    /// Stores `value` and returns what was there.
    pub fn swap_u32(&self, offset: u64, value: u32, ordering: Ordering) -> Result<u32, OutOfRange> {
        self.assert_writable();
        self.with_u32(offset, |word| u32::from_le(word.swap(value.to_le(), ordering)))
    }

    /// Replaces `current` by `new`. `Ok(Err(found))` if another value was there.
    pub fn compare_exchange_u32(
        &self,
        offset: u64,
        current: u32,
        new: u32,
        ordering: Ordering,
    ) -> Result<Result<u32, u32>, OutOfRange> {
        self.assert_writable();
        self.with_u32(offset, |word| {
            word.compare_exchange(current.to_le(), new.to_le(), ordering, Ordering::Relaxed)
                .map(u32::from_le)
                .map_err(u32::from_le)
        })
    }

    /// Sets `bits` and returns the word as it was before.
    #[inline]
    pub fn fetch_or_u32(&self, offset: u64, bits: u32, ordering: Ordering) -> Result<u32, OutOfRange> {
        self.assert_writable();
        self.with_u32(offset, |word| u32::from_le(word.fetch_or(bits.to_le(), ordering)))
    }

    /// Keeps only `bits` and returns the word as it was before.
    pub fn fetch_and_u32(&self, offset: u64, bits: u32, ordering: Ordering) -> Result<u32, OutOfRange> {
        self.assert_writable();
        self.with_u32(offset, |word| {
            u32::from_le(word.fetch_and(bits.to_le(), ordering))
        })
    }

    /// Loads the little-endian 64-bit word at `offset`.
    #[inline]
    pub fn load_u64(&self, offset: u64, ordering: Ordering) -> Result<u64, OutOfRange> {
        self.with_u64(offset, |word| u64::from_le(word.load(ordering)))
    }

    /// Stores the little-endian 64-bit word at `offset`.
    #[inline]
    pub fn store_u64(&self, offset: u64, value: u64, ordering: Ordering) -> Result<(), OutOfRange> {
        self.assert_writable();
        self.with_u64(offset, |word| word.store(value.to_le(), ordering))
    }

    /// Sets `bits` and returns the word as it was before.
    pub fn fetch_or_u64(&self, offset: u64, bits: u64, ordering: Ordering) -> Result<u64, OutOfRange> {
        self.assert_writable();
        self.with_u64(offset, |word| u64::from_le(word.fetch_or(bits.to_le(), ordering)))
    }

    /// Stores `value` and returns what was there.
    pub fn swap_u64(&self, offset: u64, value: u64, ordering: Ordering) -> Result<u64, OutOfRange> {
        self.assert_writable();
        self.with_u64(offset, |word| u64::from_le(word.swap(value.to_le(), ordering)))
    }
}

/// A stretch of a map that is being written from its start. See [`SharedMap::write_pieces`].
pub(crate) struct PieceWriter<'map> {
    /// Points to `left` mapped, writable bytes.
    at: *mut u8,
    left: usize,
    map: PhantomData<&'map SharedMap>,
}

impl PieceWriter<'_> {
    /// Writes `piece` behind what was written. To write more than was asked for is a mistake of ours.
    #[inline(always)]
    pub(crate) fn put(&mut self, piece: &[u8]) {
        assert!(piece.len() <= self.left, "more pieces than were announced");
        #[cfg(test)]
        super::crash_point::before_store();
        // SAFETY: `at` has `left` mapped, writable bytes (checked by `write_pieces`, kept below), and the map lives
        // longer than `self`; `piece` is private memory, so the two cannot overlap.
        unsafe { std::ptr::copy_nonoverlapping(piece.as_ptr(), self.at, piece.len()) };
        // SAFETY: within the same mapping, or one past its end.
        self.at = unsafe { self.at.add(piece.len()) };
        self.left -= piece.len();
    }
}

impl Drop for PieceWriter<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        forget_shared_contents();
    }
}

impl Drop for SharedMap {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping made in `map`; no pointer into it outlives `self` (io_uring operations hold an
        // Arc of it until they complete).
        let result = unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
        assert!(result == 0, "munmap of an own mapping failed");
    }
}

/// Linux include/uapi/linux/memfd.h; since Linux 6.3. Not in every libc's headers.
const MFD_NOEXEC_SEAL: libc::c_uint = 0x0008;

/// Makes a memfd of `len` bytes that can neither shrink nor grow nor be unsealed, and that is not executable where
/// the kernel knows how (`MFD_NOEXEC_SEAL`, Linux 6.3). Close-on-exec. `name` shows in `/proc/PID/maps`.
pub fn sealed_memfd(name: &str, len: u64) -> Result<OwnedFd, HostError> {
    let name = CString::new(name).map_err(|_| HostError::new("name a memfd", Errno::EINVAL))?;
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: the name is a NUL-terminated string that outlives the call.
    let mut raw = unsafe { libc::memfd_create(name.as_ptr(), flags | MFD_NOEXEC_SEAL) };
    if raw < 0 && Errno::last() == Errno::EINVAL {
        // SAFETY: as above. Kernels before 6.3 refuse the flag.
        raw = unsafe { libc::memfd_create(name.as_ptr(), flags) };
    }
    if raw < 0 {
        return Err(HostError::last("create a memfd"));
    }
    // SAFETY: a descriptor that the kernel has just handed to us alone.
    let fd = unsafe { OwnedFd::from_raw_fd(raw) };
    let len = libc::off_t::try_from(len).map_err(|_| HostError::new("size a memfd", Errno::EFBIG))?;
    nix::unistd::ftruncate(&fd, len).map_err(|errno| HostError::new("size a memfd", errno))?;
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: F_ADD_SEALS takes an integer; the descriptor is ours.
    if unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, seals) } != 0 {
        return Err(HostError::last("seal a memfd"));
    }
    Ok(fd)
}
