//! A disk in a regular file or on a block device, by io_uring.
//!
//! The kernel moves data between the file and the guest's pages directly: nothing is copied here. With `O_DIRECT`
//! it does so without the host's page cache, if the file system can and if its alignment is not greater than a
//! logical block; then every offset and length that a guest can ask for is aligned. Only a guest's memory can be
//! misaligned (tools that send commands of their own); such a request goes by way of an aligned buffer.
//!
//! Direct and cached I/O are never mixed on one disk: a cached write of a part of a page could bring back old
//! bytes beside a direct write to the same page.
//!
//! | SCSI | here |
//! | --- | --- |
//! | READ, WRITE | READV, WRITEV on the spans |
//! | WRITE with FUA | WRITEV with RWF_DSYNC |
//! | SYNCHRONIZE CACHE | FSYNC with the datasync flag |
//! | UNMAP | FALLOCATE with FALLOC_FL_PUNCH_HOLE; on a block device the kernel makes zeroes by discarding, or says EOPNOTSUPP |

use super::job::Op;
use super::{Backend, Begun, Geometry};
use crate::scsi::disk::{BLOCK_BYTES, Extent};
use crate::storvsp::session::MAX_TRANSFER_BYTES;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use rustix::fs::{AtFlags, StatxFlags, statx};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use vmbus::lease;
use vmbus::mem::{Durability, File, GuestSpans, OpId, OutOfRange, SharedMap, Uring, UringError};

/// Limit: misaligned requests in flight. They come from tools, one at a time.
const BOUNCE_BUFFERS: usize = 2;

/// Alignment of memory for direct I/O that all kernels and devices took before they could be asked (the length of a
/// sector).
const USUAL_MEMORY_ALIGNMENT: u32 = 512;

/// Why a disk cannot be used. One sentence for the operator each.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The kernel refused.
    #[error("cannot {0}: {1}")]
    Host(&'static str, std::io::Error),
    /// Not a file that a disk can be in.
    #[error("it is neither a regular file nor a block device")]
    NotADisk,
    /// Not even one block.
    #[error("it holds {0} bytes, and a disk needs at least {BLOCK_BYTES}")]
    TooSmall(u64),
    /// The configuration wants more than there is.
    #[error("it holds {present} bytes, and {wanted} are configured")]
    ShorterThanConfigured {
        /// Bytes in the file.
        present: u64,
        /// Bytes in the configuration.
        wanted: u64,
    },
    /// A memory disk could be cut off under us.
    #[error("it is not sealed against shrinking")]
    NotSealed,
}

/// How a disk is opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wishes {
    /// Bypass the host's page cache where that is possible.
    pub direct: bool,
    /// Use only so many bytes.
    pub bytes: Option<u64>,
}

/// A disk in a file.
pub struct FileBackend {
    file: OwnedFd,
    /// Index in the io_uring's table, once it is there.
    registered: Option<u32>,
    proves_end: bool,
    geometry: Geometry,
    is_block_device: bool,
    logical_bytes: u32,
    direct: Option<Direct>,
}

const REFUSES_DIRECT: &str = "the disk's file system refuses direct I/O; using the page cache";

/// State of direct I/O.
struct Direct {
    memory_alignment: u32,
    /// The kernel has said that it works. Some file systems accept the flag and refuse the I/O.
    is_certain: bool,
    buffers: Arc<SharedMap>,
    /// Which operation uses each buffer.
    used_by: [Option<u64>; BOUNCE_BUFFERS],
}

impl FileBackend {
    /// Takes an open file or block device. To be called before the process locks itself in.
    pub fn open(file: OwnedFd, wishes: Wishes) -> Result<Self, OpenError> {
        let stat = nix::sys::stat::fstat(file.as_fd())
            .map_err(|errno| OpenError::Host("ask for the file's type", errno.into()))?;
        let is_block_device = match stat.st_mode & libc::S_IFMT {
            libc::S_IFREG => false,
            libc::S_IFBLK => true,
            _ => return Err(OpenError::NotADisk),
        };
        let size_bytes = usable_bytes(file.as_fd(), wishes.bytes)?;
        let (logical_bytes, physical_bytes) = block_lengths(file.as_fd(), is_block_device, stat.st_blksize)?;
        let direct = if wishes.direct {
            Direct::enable(file.as_fd(), logical_bytes)?
        } else {
            None
        };
        let granularity = physical_bytes.max(if is_block_device { logical_bytes } else { 4096 });
        let proves_end = lease::proves_end(file.as_fd());
        Ok(Self {
            file,
            registered: None,
            proves_end,
            geometry: Geometry {
                size_bytes,
                physical_block_bytes: physical_bytes,
                unmap_granularity_bytes: Some(granularity),
            },
            is_block_device,
            logical_bytes,
            direct,
        })
    }

    /// Whether the host's page cache is bypassed.
    pub fn is_direct(&self) -> bool {
        self.direct.is_some()
    }

    /// The open file.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Whether the file's lease tells when I/O is over ([`lease::proves_end`]). It does so only if the file is not
    /// registered.
    pub fn proves_end(&self) -> bool {
        self.proves_end
    }

    /// The file has this index in the io_uring's table of registered files.
    pub fn set_registered(&mut self, index: u32) {
        self.registered = Some(index);
    }

    fn begin_transfer(&mut self, io: &mut Uring, op: Op, data: &GuestSpans, number: u64) -> Begun {
        let (Op::Read { start, len, .. } | Op::Write { start, len, .. }) = op else {
            return Begun::Over(-libc::EINVAL);
        };
        // The whole request at once is the common case; then nothing is copied, not even the list.
        let whole = start == 0 && len == data.len();
        let part = if whole { None } else { data.slice(start, len).ok() };
        let spans = match (&part, whole) {
            (Some(part), _) => part,
            (None, true) => data,
            (None, false) => return Begun::Over(-libc::EFAULT),
        };
        match &mut self.direct {
            Some(direct) if !spans.is_aligned(direct.memory_alignment) => {
                let buffer = match direct.take(op, spans, number) {
                    Ok(Some(buffer)) => buffer,
                    Ok(None) => return Begun::NoRoom,
                    Err(errno) => return Begun::Over(-errno),
                };
                let begun = self.submit(io, op, &buffer, number);
                if begun != Begun::InFlight
                    && let Some(direct) = &mut self.direct
                {
                    direct.give_back(number);
                }
                begun
            }
            _ => self.submit(io, op, spans, number),
        }
    }

    fn submit(&self, io: &mut Uring, op: Op, spans: &GuestSpans, number: u64) -> Begun {
        match op {
            Op::Read { offset_bytes, .. } => queued(io.read(self.handle(), spans, offset_bytes, number)),
            Op::Write {
                offset_bytes,
                durable,
                ..
            } => {
                let durability = if durable {
                    Durability::Dsync
                } else {
                    Durability::Cached
                };
                queued(io.write(self.handle(), spans, offset_bytes, durability, number))
            }
            Op::Sync | Op::Punch(_) => Begun::Over(-libc::EINVAL),
        }
    }

    fn handle(&self) -> File<'_> {
        match self.registered {
            Some(index) => File::Registered(index),
            None => File::Fd(self.file.as_fd()),
        }
    }

    /// A block device deallocates whole blocks of its own; what sticks out stays as it is.
    fn whole_blocks(&self, extent: Extent) -> Option<Extent> {
        if !self.is_block_device {
            return Some(extent);
        }
        let block = u64::from(self.logical_bytes);
        let start = extent.offset_bytes.checked_next_multiple_of(block)?;
        let end = extent.offset_bytes.checked_add(extent.len_bytes)?;
        let len_bytes = (end - end % block).checked_sub(start)?;
        (len_bytes > 0).then_some(Extent {
            offset_bytes: start,
            len_bytes,
        })
    }
}

impl Backend for FileBackend {
    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn serve(&mut self) {
        if let Some(direct) = &self.direct
            && !direct.is_certain
            && !direct.works(self.file.as_fd())
        {
            self.direct = None;
            match set_direct(self.file.as_fd(), false) {
                Ok(()) => tracing::info!("{REFUSES_DIRECT}"),
                // Then the guest's requests fail, and it hears of it.
                Err(error) => tracing::warn!(%error, "{REFUSES_DIRECT}, which cannot be switched on"),
            }
        }
    }

    fn begin(&mut self, io: &mut Uring, op: Op, data: Option<&GuestSpans>, number: u64) -> Begun {
        match (op, data) {
            (Op::Read { .. } | Op::Write { .. }, Some(data)) => self.begin_transfer(io, op, data, number),
            // A transfer without data is refused before it comes here.
            (Op::Read { .. } | Op::Write { .. }, None) => Begun::Over(-libc::EFAULT),
            (Op::Sync, _) => queued(io.fsync(self.handle(), true, number)),
            (Op::Punch(extent), _) => match self.whole_blocks(extent) {
                Some(extent) => queued(io.fallocate(
                    self.handle(),
                    libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
                    extent.offset_bytes,
                    extent.len_bytes,
                    number,
                )),
                None => Begun::Over(0),
            },
        }
    }

    fn end(&mut self, op: Op, data: Option<&GuestSpans>, number: u64, result: i32) -> i32 {
        match &mut self.direct {
            Some(direct) => direct.on_end(op, data, number, result),
            None => result,
        }
    }
}

impl Direct {
    /// Sets `O_DIRECT`, if the file can do it for every request that a guest may send.
    fn enable(file: BorrowedFd<'_>, logical_bytes: u32) -> Result<Option<Self>, OpenError> {
        let told = alignments(file);
        let (memory_alignment, offset_alignment) = told.unwrap_or((USUAL_MEMORY_ALIGNMENT, logical_bytes));
        if offset_alignment == 0 || offset_alignment > BLOCK_BYTES || !memory_alignment.is_power_of_two() {
            tracing::info!(
                offset_alignment,
                "the disk's file cannot do direct I/O of single blocks; using the page cache"
            );
            return Ok(None);
        }
        let buffers = SharedMap::anonymous("bounce", BOUNCE_BUFFERS * MAX_TRANSFER_BYTES as usize)
            .map_err(|error| OpenError::Host("make buffers for direct I/O", error.into()))?;
        if set_direct(file, true).is_err() {
            tracing::info!("{REFUSES_DIRECT}");
            return Ok(None);
        }
        Ok(Some(Self {
            memory_alignment,
            is_certain: told.is_some(),
            buffers: Arc::new(buffers),
            used_by: [None; BOUNCE_BUFFERS],
        }))
    }

    /// Reads a block.
    fn works(&self, file: BorrowedFd<'_>) -> bool {
        GuestSpans::from_map(self.buffers.clone(), 0, BLOCK_BYTES)
            .is_ok_and(|block| block.preadv_from(file, 0).is_ok())
    }

    /// Takes a buffer for an operation on misaligned memory, and fills it if it is a write. `None`: all are in use.
    fn take(&mut self, op: Op, spans: &GuestSpans, number: u64) -> Result<Option<GuestSpans>, i32> {
        let Some(index) = self.used_by.iter().position(Option::is_none) else {
            return Ok(None);
        };
        let fault = |_| libc::EFAULT;
        let len = u32::try_from(spans.len()).map_err(|_| libc::EINVAL)?;
        if len > MAX_TRANSFER_BYTES {
            return Err(libc::EINVAL);
        }
        let base = index as u64 * u64::from(MAX_TRANSFER_BYTES);
        let buffer = GuestSpans::from_map(self.buffers.clone(), base, len).map_err(fault)?;
        if matches!(op, Op::Write { .. }) {
            copy(spans, 0, &buffer, 0, spans.len()).map_err(fault)?;
        }
        self.used_by[index] = Some(number);
        Ok(Some(buffer))
    }

    fn give_back(&mut self, number: u64) -> Option<usize> {
        let index = self.used_by.iter().position(|user| *user == Some(number))?;
        self.used_by[index] = None;
        Some(index)
    }

    /// Gives the buffer of an operation back, if it had one, and what was read to the guest.
    fn on_end(&mut self, op: Op, data: Option<&GuestSpans>, number: u64, result: i32) -> i32 {
        let Some(index) = self.give_back(number) else {
            return result;
        };
        let (Op::Read { start, .. }, Ok(len @ 1..), Some(data)) = (op, usize::try_from(result), data) else {
            return result;
        };
        let base = index as u64 * u64::from(MAX_TRANSFER_BYTES);
        let copied = GuestSpans::from_map(self.buffers.clone(), base, MAX_TRANSFER_BYTES)
            .and_then(|buffer| copy(&buffer, 0, data, start, len));
        match copied {
            Ok(()) => result,
            Err(_) => -libc::EFAULT,
        }
    }
}

fn queued(result: Result<OpId, UringError>) -> Begun {
    match result {
        Ok(_) => Begun::InFlight,
        Err(UringError::Full) => Begun::NoRoom,
        Err(UringError::TooManyPieces(_)) => Begun::Over(-libc::EINVAL),
        Err(UringError::Host(error)) => Begun::Over(-(error.errno as i32)),
    }
}

/// Copies between two lists, by way of private memory: both may be written by others meanwhile.
fn copy(
    from: &GuestSpans,
    from_start: usize,
    to: &GuestSpans,
    to_start: usize,
    len: usize,
) -> Result<(), OutOfRange> {
    let mut page = [0u8; 4096];
    let mut done = 0;
    while done < len {
        let part = page.len().min(len - done);
        let bytes = &mut page[..part];
        from.copy_to_at(from_start + done, bytes)?;
        to.copy_from_at(to_start + done, bytes)?;
        done += part;
    }
    Ok(())
}

/// Bytes of the file that a guest may use: whole blocks only.
pub(super) fn usable_bytes(file: BorrowedFd<'_>, wanted: Option<u64>) -> Result<u64, OpenError> {
    // The end is the size for block devices, too.
    let present = rustix::fs::seek(file, rustix::fs::SeekFrom::End(0))
        .map_err(|errno| OpenError::Host("find the end of the file", errno.into()))?;
    let bytes = match wanted {
        Some(wanted) if wanted > present => {
            return Err(OpenError::ShorterThanConfigured { present, wanted });
        }
        Some(wanted) => wanted,
        None => present,
    };
    let usable = bytes - bytes % u64::from(BLOCK_BYTES);
    if usable == 0 {
        return Err(OpenError::TooSmall(bytes));
    }
    if usable != bytes {
        tracing::warn!(
            bytes,
            usable,
            "the disk's length is not a multiple of {BLOCK_BYTES}; the rest is not used"
        );
    }
    Ok(usable)
}

/// Logical and physical block length.
fn block_lengths(
    file: BorrowedFd<'_>,
    is_block_device: bool,
    preferred: libc::blksize_t,
) -> Result<(u32, u32), OpenError> {
    let ask =
        |what, answer: rustix::io::Result<u32>| answer.map_err(|errno| OpenError::Host(what, errno.into()));
    let (logical, physical) = if is_block_device {
        (
            ask(
                "ask for the device's logical block length",
                rustix::fs::ioctl_blksszget(file),
            )?,
            ask(
                "ask for the device's physical block length",
                rustix::fs::ioctl_blkpbszget(file),
            )?,
        )
    } else {
        // A file system writes less than its block by reading the rest first.
        (BLOCK_BYTES, u32::try_from(preferred).unwrap_or(4096))
    };
    // What a host tells us beyond what READ CAPACITY (16) can say or guests can use is cut.
    let physical = if physical.is_power_of_two() {
        physical.clamp(BLOCK_BYTES, 4096)
    } else {
        BLOCK_BYTES
    };
    let logical = if logical.is_power_of_two() {
        logical.max(BLOCK_BYTES)
    } else {
        BLOCK_BYTES
    };
    Ok((logical, physical))
}

/// Alignment of memory and of offsets for direct I/O, if the kernel knows (Linux 6.1 `STATX_DIOALIGN`). Zeroes: not
/// possible.
fn alignments(file: BorrowedFd<'_>) -> Option<(u32, u32)> {
    let stat = statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok()?;
    let known = stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0;
    known.then_some((stat.stx_dio_mem_align, stat.stx_dio_offset_align))
}

fn set_direct(file: BorrowedFd<'_>, direct: bool) -> nix::Result<()> {
    let mut flags = OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL)?);
    flags.set(OFlag::O_DIRECT, direct);
    fcntl(file, FcntlArg::F_SETFL(flags)).map(|_| ())
}
