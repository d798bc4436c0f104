//! Synchronous vectored I/O straight into and out of a mapping.
//!
//! The kernel does the copying, so no reference to shared bytes arises here either; an iovec is an address and a length
//! that `SharedMap::io_address` has checked, and the map outlives the call because the spans hold it.

use super::spans::MAX_PIECES;
use super::{GuestSpans, HostError};
use nix::errno::Errno;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Limit: iovecs kept on the stack; longer lists allocate.
const STACK_PIECES: usize = 64;

/// Calls `action` with the iovecs of `prefix` (left out if empty) and of all pieces.
fn with_iovecs<T>(
    attempted: &'static str,
    prefix: (*mut u8, usize),
    spans: &GuestSpans,
    writes_memory: bool,
    action: impl FnOnce(&[libc::iovec]) -> T,
) -> Result<T, HostError> {
    let empty = libc::iovec {
        iov_base: std::ptr::null_mut(),
        iov_len: 0,
    };
    let prefix_count = usize::from(prefix.1 != 0);
    let count = spans.piece_count() + prefix_count;
    if count > MAX_PIECES {
        return Err(HostError::new(attempted, Errno::EINVAL));
    }
    let mut on_stack = [empty; STACK_PIECES];
    let mut on_heap = Vec::new();
    let iovecs = if count <= STACK_PIECES {
        &mut on_stack[..count]
    } else {
        on_heap.resize(count, empty);
        &mut on_heap[..]
    };
    if prefix_count == 1 {
        iovecs[0] = libc::iovec {
            iov_base: prefix.0.cast(),
            iov_len: prefix.1,
        };
    }
    for (iovec, (offset, len)) in iovecs[prefix_count..].iter_mut().zip(spans.iter()) {
        let base = spans
            .map()
            .io_address(offset, len, writes_memory)
            .map_err(|_| HostError::new(attempted, Errno::EFAULT))?;
        *iovec = libc::iovec {
            iov_base: base,
            iov_len: len as usize,
        };
    }
    Ok(action(iovecs))
}

/// Turns a system call's result into bytes; repeats it on EINTR.
fn count(attempted: &'static str, mut call: impl FnMut() -> isize) -> Result<usize, HostError> {
    loop {
        match usize::try_from(call()) {
            Ok(bytes) => return Ok(bytes),
            Err(_) if Errno::last() == Errno::EINTR => {}
            Err(_) => return Err(HostError::last(attempted)),
        }
    }
}

fn offset(attempted: &'static str, file_offset: u64) -> Result<libc::off_t, HostError> {
    libc::off_t::try_from(file_offset).map_err(|_| HostError::new(attempted, Errno::EINVAL))
}

pub(super) fn readv(fd: BorrowedFd<'_>, prefix: &mut [u8], spans: &GuestSpans) -> Result<usize, HostError> {
    let what = "read into guest memory";
    with_iovecs(what, (prefix.as_mut_ptr(), prefix.len()), spans, true, |iovecs| {
        // SAFETY: the iovecs name `prefix`, mutably borrowed, and checked pieces of a writable map that `spans` keeps
        // mapped; at most MAX_PIECES of them.
        count(what, || unsafe {
            libc::readv(fd.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as libc::c_int)
        })
    })?
}

pub(super) fn writev(fd: BorrowedFd<'_>, prefix: &[u8], spans: &GuestSpans) -> Result<usize, HostError> {
    let what = "write from guest memory";
    with_iovecs(
        what,
        (prefix.as_ptr().cast_mut(), prefix.len()),
        spans,
        false,
        |iovecs| {
            // SAFETY: as in `readv`; writev only reads from the iovecs' memory.
            count(what, || unsafe {
                libc::writev(fd.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as libc::c_int)
            })
        },
    )?
}

pub(super) fn preadv(fd: BorrowedFd<'_>, file_offset: u64, spans: &GuestSpans) -> Result<usize, HostError> {
    let what = "read a file into guest memory";
    let file_offset = offset(what, file_offset)?;
    with_iovecs(what, (std::ptr::null_mut(), 0), spans, true, |iovecs| {
        count(what, || {
            // SAFETY: as in `readv`.
            unsafe {
                libc::preadv(
                    fd.as_raw_fd(),
                    iovecs.as_ptr(),
                    iovecs.len() as libc::c_int,
                    file_offset,
                )
            }
        })
    })?
}

pub(super) fn pwritev(fd: BorrowedFd<'_>, file_offset: u64, spans: &GuestSpans) -> Result<usize, HostError> {
    let what = "write guest memory to a file";
    let file_offset = offset(what, file_offset)?;
    with_iovecs(what, (std::ptr::null_mut(), 0), spans, false, |iovecs| {
        count(what, || {
            // SAFETY: as in `writev`.
            unsafe {
                libc::pwritev(
                    fd.as_raw_fd(),
                    iovecs.as_ptr(),
                    iovecs.len() as libc::c_int,
                    file_offset,
                )
            }
        })
    })?
}
