//! A disk in a memfd: gone with the VM, but not with this process, because the supervisor holds the memfd, too.
//!
//! Each operation is one system call on the memfd, done at once: there is nothing to wait for, and pages that are
//! read or written this way are not counted as this process's memory, as those of a mapping would be.

use super::file::{OpenError, usable_bytes};
use super::job::Op;
use super::{Backend, Begun, Geometry};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use rustix::fs::{FallocateFlags, fallocate};
use std::os::fd::{AsFd, OwnedFd};
use vmbus::mem::{GuestSpans, HostError, Uring};

/// A disk in a memfd.
pub struct MemoryBackend {
    file: OwnedFd,
    geometry: Geometry,
}

impl MemoryBackend {
    /// Takes a memfd that is sealed against shrinking.
    pub fn open(file: OwnedFd, wanted_bytes: Option<u64>) -> Result<Self, OpenError> {
        let seals = fcntl(file.as_fd(), FcntlArg::F_GET_SEALS).map_err(|_| OpenError::NotSealed)?;
        if !SealFlag::from_bits_retain(seals).contains(SealFlag::F_SEAL_SHRINK) {
            return Err(OpenError::NotSealed);
        }
        let size_bytes = usable_bytes(file.as_fd(), wanted_bytes)?;
        let geometry = Geometry {
            size_bytes,
            physical_block_bytes: 4096,
            unmap_granularity_bytes: Some(4096),
        };
        Ok(Self { file, geometry })
    }
}

impl Backend for MemoryBackend {
    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn begin(&mut self, _io: &mut Uring, op: Op, data: Option<&GuestSpans>, _number: u64) -> Begun {
        let part = |start, len| data.and_then(|data| data.slice(start, len).ok());
        let result = match op {
            Op::Read {
                offset_bytes,
                start,
                len,
            } => match part(start, len) {
                Some(part) => moved(part.preadv_from(self.file.as_fd(), offset_bytes)),
                None => -libc::EFAULT,
            },
            Op::Write {
                offset_bytes,
                start,
                len,
                ..
            } => match part(start, len) {
                Some(part) => moved(part.pwritev_to(self.file.as_fd(), offset_bytes)),
                None => -libc::EFAULT,
            },
            // Nothing is more durable than it is.
            Op::Sync => 0,
            Op::Punch(extent) => {
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                match fallocate(&self.file, flags, extent.offset_bytes, extent.len_bytes) {
                    Ok(()) => 0,
                    Err(errno) => -errno.raw_os_error(),
                }
            }
        };
        Begun::Over(result)
    }

    fn end(&mut self, _op: Op, _data: Option<&GuestSpans>, _number: u64, result: i32) -> i32 {
        result
    }
}

/// A kernel never moves more than 2 GiB at once.
fn moved(result: Result<usize, HostError>) -> i32 {
    match result {
        Ok(bytes) => i32::try_from(bytes).unwrap_or(i32::MAX),
        Err(error) => -(error.errno as i32),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scsi::disk::Extent;
    use std::sync::Arc;
    use vmbus::mem::{SharedMap, sealed_memfd};

    #[test]
    fn what_is_written_is_read_and_what_is_punched_is_zero() {
        let mut disk = MemoryBackend::open(sealed_memfd("disk", 64 << 10).unwrap(), None).unwrap();
        assert_eq!(disk.geometry().size_bytes, 64 << 10);
        let mut io = Uring::new(2).unwrap();
        let map = Arc::new(SharedMap::anonymous("guest", 8192).unwrap());
        let data = GuestSpans::from_map(map, 100, 4096).unwrap();
        data.copy_from(&[7; 4096]).unwrap();
        let write = Op::Write {
            offset_bytes: 4096,
            start: 0,
            len: 4096,
            durable: true,
        };
        assert_eq!(disk.begin(&mut io, write, Some(&data), 0), Begun::Over(4096));
        data.copy_from(&[0; 4096]).unwrap();
        let read = Op::Read {
            offset_bytes: 4096,
            start: 512,
            len: 1024,
        };
        assert_eq!(disk.begin(&mut io, read, Some(&data), 0), Begun::Over(1024));
        let mut bytes = [0u8; 4096];
        data.copy_to(&mut bytes).unwrap();
        assert_eq!((bytes[511], bytes[512], bytes[1535], bytes[1536]), (0, 7, 7, 0));
        let punch = Op::Punch(Extent {
            offset_bytes: 4096,
            len_bytes: 4096,
        });
        assert_eq!(disk.begin(&mut io, punch, None, 0), Begun::Over(0));
        let read = Op::Read {
            offset_bytes: 4096,
            start: 0,
            len: 4096,
        };
        assert_eq!(disk.begin(&mut io, read, Some(&data), 0), Begun::Over(4096));
        data.copy_to(&mut bytes).unwrap();
        assert_eq!(bytes, [0; 4096]);
    }

    #[test]
    fn a_memfd_that_could_be_cut_off_is_refused() {
        let loose =
            nix::sys::memfd::memfd_create(c"loose", nix::sys::memfd::MFdFlags::MFD_ALLOW_SEALING).unwrap();
        nix::unistd::ftruncate(&loose, 4096).unwrap();
        assert!(matches!(
            MemoryBackend::open(loose, None),
            Err(OpenError::NotSealed)
        ));
    }
}
