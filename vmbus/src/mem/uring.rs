//! io_uring on checked spans: the kernel reads and writes guest memory in place, and no buffer can go away under it.
//!
//! # Who owns what
//! Each operation in flight has a slot. The slot holds an `Arc` of the map and the iovec array from submission until
//! the operation's last completion; only then is it free again. So unmapping, dropping [`GuestSpans`] or forgetting about an
//! operation is always safe. Dropping the [`Uring`] cancels what can be cancelled and waits for the rest.
//!
//! Slots and iovec arrays are re-used: in steady state nothing is allocated. An operation on one contiguous piece uses
//! READ/WRITE instead of READV/WRITEV, which saves the kernel the import of an iovec.
//!
//! # What else a ring could do
//! An io_uring opens files and makes sockets for whoever may enter it, and no seccomp filter sees it. A program that locks
//! itself in makes its ring by [`Uring::restricted`]: the ring then refuses, with `EACCES` and until it is gone, every operation
//! that this module does not queue, and every change of the registered files (Linux 5.10).
//!
//! # Threads
//! One thread makes and uses a [`Uring`] (`!Send`): the kernel is told so where it can make use of it
//! (`IORING_SETUP_SINGLE_ISSUER | DEFER_TASKRUN`, Linux 6.1); older kernels get `COOP_TASKRUN` (5.19) or nothing.
//!
//! A restricted ring is a server's, and what a server's death costs is waited for by the guest. With `DEFER_TASKRUN` the
//! ends of requests that the process has not seen yet are left to a kernel worker, which lets go of their files ticks
//! later (8 ms in the middle at 250 Hz); with `COOP_TASKRUN` the dying thread does it itself (below 1 ms). So it gets that.

#[cfg(test)]
mod restriction_tests;

use super::spans::MAX_PIECES;
use super::{Access, GuestSpans, HostError, SharedMap, sealed_memfd};
use io_uring::register::Restriction;
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use nix::errno::Errno;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

/// What an operation works on.
#[derive(Debug, Clone, Copy)]
pub enum File<'fd> {
    /// An open descriptor. It must stay open until the next [`Uring::submit`]; the kernel holds the file from then on.
    Fd(BorrowedFd<'fd>),
    /// Index of a file given to [`Uring::register_files`]: saves the kernel a reference count per operation.
    Registered(u32),
}

impl<'fd> From<BorrowedFd<'fd>> for File<'fd> {
    fn from(fd: BorrowedFd<'fd>) -> Self {
        File::Fd(fd)
    }
}

/// Names one operation for [`Uring::cancel`]. Stale ones are recognized.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpId {
    slot: u32,
    generation: u32,
}

impl OpId {
    fn to_user_data(self) -> u64 {
        u64::from(self.generation) << 32 | u64::from(self.slot)
    }
}

/// The end of an operation, or one event of a multishot poll.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Completion {
    /// The caller's number, as given at submission.
    pub user_data: u64,
    /// Bytes, poll events or 0; a negative errno on failure. Reads and writes may be short.
    pub result: i32,
    /// More completions of this operation will follow (multishot poll). False: the operation is over.
    pub more: bool,
}

impl Completion {
    /// The result as a count or an errno.
    pub fn into_result(self) -> Result<u32, Errno> {
        u32::try_from(self.result).map_err(|_| Errno::from_raw(self.result.wrapping_neg()))
    }
}

/// Why an operation was not queued. None of these leaves anything behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum UringError {
    /// All slots are in flight: reap completions first.
    #[error("all io_uring slots are in flight")]
    Full,
    /// More than [`MAX_PIECES`] pieces: slice the spans.
    #[error("{0} pieces are more than one operation takes")]
    TooManyPieces(usize),
    /// The kernel refused.
    #[error(transparent)]
    Host(#[from] HostError),
}

/// Durability of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// In the page cache or the device's cache.
    Cached,
    /// Data is on stable storage before the completion comes (`RWF_DSYNC`): SCSI's FUA.
    Dsync,
}

#[derive(Debug, Default)]
struct Slot {
    /// Counts uses, so that an old [`OpId`] does not name a new operation.
    generation: u32,
    in_flight: bool,
    user_data: u64,
    /// Keeps the memory of the iovecs mapped while the kernel may write there.
    map: Option<Arc<SharedMap>>,
    iovecs: Vec<libc::iovec>,
}

/// `user_data` of cancel requests, whose own completions are of no interest. No slot has this number.
const CANCEL: u64 = u64::MAX;

/// All that is queued here, and how: a registered file is named by a flag of the entry. No operation of registration is
/// among them, so the files stay what they are.
fn restrictions() -> [Restriction; 10] {
    [
        Restriction::sqe_op(opcode::Nop::CODE),
        Restriction::sqe_op(opcode::Read::CODE),
        Restriction::sqe_op(opcode::Readv::CODE),
        Restriction::sqe_op(opcode::Write::CODE),
        Restriction::sqe_op(opcode::Writev::CODE),
        Restriction::sqe_op(opcode::Fsync::CODE),
        Restriction::sqe_op(opcode::Fallocate::CODE),
        Restriction::sqe_op(opcode::PollAdd::CODE),
        Restriction::sqe_op(opcode::AsyncCancel::CODE),
        Restriction::sqe_flags_allowed(squeue::Flags::FIXED_FILE.bits()),
    ]
}

fn clamp(capacity: u32) -> u32 {
    capacity.clamp(1, 4096)
}

/// An io_uring whose operations own their buffers. See the module's text.
pub struct Uring {
    ring: IoUring,
    slots: Vec<Slot>,
    free: Vec<u32>,
    in_flight: usize,
    is_restricted: bool,
    /// Eight bytes for each slot: where reads of eventfds go.
    counters: Arc<SharedMap>,
    not_send: PhantomData<*mut ()>,
}

impl Uring {
    /// A ring for at most `capacity` operations in flight (rounded up to a power of two by the kernel, at most 4096).
    pub fn new(capacity: u32) -> Result<Self, HostError> {
        let ring = Self::build(clamp(capacity), false)?;
        Self::on(ring, clamp(capacity))
    }

    /// The same, with `files` registered as by [`Self::register_files`], for a program that is going to lock itself in: the ring
    /// takes the operations of this module and nothing else. Where the kernel has no such thing, the ring is as from
    /// [`Self::new`], and [`Self::is_restricted`] says so.
    pub fn restricted(capacity: u32, files: &[BorrowedFd<'_>]) -> Result<Self, HostError> {
        let capacity = clamp(capacity);
        let ring = match Self::build(capacity, true) {
            Err(error) if error.errno == Errno::EINVAL => {
                let mut uring = Self::new(capacity)?;
                uring.register_some(files)?;
                return Ok(uring);
            }
            result => result?,
        };
        let mut uring = Self::on(ring, capacity)?;
        uring.register_some(files)?;
        let submitter = uring.ring.submitter();
        uring.is_restricted = submitter.register_restrictions(&mut restrictions()).is_ok();
        submitter
            .register_enable_rings()
            .map_err(|error| HostError::from_io("enable an io_uring", &error))?;
        Ok(uring)
    }

    /// Whether what the kernel does for the ring aside is done by threads of this process (Linux 5.12), which end before it
    /// does. Before that it had workers of its own.
    pub fn workers_are_threads(&self) -> bool {
        self.ring.params().is_feature_native_workers()
    }

    /// Whether the kernel refuses whatever this module does not queue.
    pub fn is_restricted(&self) -> bool {
        self.is_restricted
    }

    /// The kernel takes an empty table for a mistake.
    fn register_some(&mut self, files: &[BorrowedFd<'_>]) -> Result<(), HostError> {
        if files.is_empty() {
            return Ok(());
        }
        self.register_files(files)
    }

    fn on(ring: IoUring, capacity: u32) -> Result<Self, HostError> {
        let counters_len = capacity as usize * 8;
        let counters = sealed_memfd("uring-counters", counters_len as u64)?;
        let counters = Arc::new(SharedMap::map(counters.as_fd(), counters_len, Access::ReadWrite)?);
        Ok(Self {
            ring,
            slots: (0..capacity).map(|_| Slot::default()).collect(),
            free: (0..capacity).rev().collect(),
            in_flight: 0,
            is_restricted: false,
            counters,
            not_send: PhantomData,
        })
    }

    /// Asks for the cheapest mode first, and takes what the kernel has. A `disabled` ring can be restricted, then enabled.
    fn build(capacity: u32, disabled: bool) -> Result<IoUring, HostError> {
        let deferred: fn(&mut io_uring::Builder) = |builder| {
            builder
                .setup_single_issuer()
                .setup_defer_taskrun()
                .setup_taskrun_flag()
                .setup_submit_all();
        };
        let cooperative: fn(&mut io_uring::Builder) = |builder| {
            builder
                .setup_coop_taskrun()
                .setup_taskrun_flag()
                .setup_submit_all();
        };
        // See the module's text for why servers do without the cheapest one.
        let attempts: &[fn(&mut io_uring::Builder)] = match disabled {
            true => &[cooperative, |_| {}],
            false => &[deferred, cooperative, |_| {}],
        };
        let mut error = HostError::new("make an io_uring", Errno::EINVAL);
        for attempt in attempts {
            let mut builder = IoUring::builder();
            // Four times the slots: a multishot poll may complete several times between two looks.
            builder.dontfork().setup_cqsize(capacity.saturating_mul(4));
            attempt(&mut builder);
            if disabled {
                builder.setup_r_disabled();
            }
            match builder.build(capacity) {
                Ok(ring) => return Ok(ring),
                Err(found) => error = HostError::from_io("make an io_uring", &found),
            }
            if error.errno != Errno::EINVAL {
                break;
            }
        }
        Err(error)
    }

    /// Operations in flight, queued ones included.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Free slots: how many operations can be queued now.
    pub fn free_slots(&self) -> usize {
        self.free.len()
    }

    /// Registers files once; operations may name them by index in the order given.
    ///
    /// The kernel's table holds each file until the last operation of this ring is over, even after the process is dead:
    /// whoever can see when the file is released (a lease, a lock) knows then that no I/O of ours is left.
    pub fn register_files(&mut self, files: &[BorrowedFd<'_>]) -> Result<(), HostError> {
        let raw: Vec<_> = files.iter().map(AsRawFd::as_raw_fd).collect();
        self.ring
            .submitter()
            .register_files(&raw)
            .map_err(|error| HostError::from_io("register files with io_uring", &error))
    }

    /// Queues a read at `file_offset` of the file into the spans (`u64::MAX` or 0 for pipes and sockets, as in `preadv2(2)`).
    pub fn read(
        &mut self,
        file: File<'_>,
        spans: &GuestSpans,
        file_offset: u64,
        user_data: u64,
    ) -> Result<OpId, UringError> {
        let (op, iovecs) = self.prepare(spans, user_data, true)?;
        let entry = match (file, iovecs) {
            (File::Fd(fd), [one]) => {
                opcode::Read::new(types::Fd(fd.as_raw_fd()), one.iov_base.cast(), one.iov_len as u32)
                    .offset(file_offset)
                    .build()
            }
            (File::Registered(index), [one]) => {
                opcode::Read::new(types::Fixed(index), one.iov_base.cast(), one.iov_len as u32)
                    .offset(file_offset)
                    .build()
            }
            (File::Fd(fd), many) => {
                opcode::Readv::new(types::Fd(fd.as_raw_fd()), many.as_ptr(), many.len() as u32)
                    .offset(file_offset)
                    .build()
            }
            (File::Registered(index), many) => {
                opcode::Readv::new(types::Fixed(index), many.as_ptr(), many.len() as u32)
                    .offset(file_offset)
                    .build()
            }
        };
        self.push(op, entry)
    }

    /// Queues a write of the spans at `file_offset` of the file.
    pub fn write(
        &mut self,
        file: File<'_>,
        spans: &GuestSpans,
        file_offset: u64,
        durability: Durability,
        user_data: u64,
    ) -> Result<OpId, UringError> {
        let flags = match durability {
            Durability::Cached => 0,
            Durability::Dsync => libc::RWF_DSYNC,
        };
        let (op, iovecs) = self.prepare(spans, user_data, false)?;
        let entry = match (file, iovecs) {
            (File::Fd(fd), [one]) => {
                opcode::Write::new(types::Fd(fd.as_raw_fd()), one.iov_base.cast(), one.iov_len as u32)
                    .offset(file_offset)
                    .rw_flags(flags)
                    .build()
            }
            (File::Registered(index), [one]) => {
                opcode::Write::new(types::Fixed(index), one.iov_base.cast(), one.iov_len as u32)
                    .offset(file_offset)
                    .rw_flags(flags)
                    .build()
            }
            (File::Fd(fd), many) => {
                opcode::Writev::new(types::Fd(fd.as_raw_fd()), many.as_ptr(), many.len() as u32)
                    .offset(file_offset)
                    .rw_flags(flags)
                    .build()
            }
            (File::Registered(index), many) => {
                opcode::Writev::new(types::Fixed(index), many.as_ptr(), many.len() as u32)
                    .offset(file_offset)
                    .rw_flags(flags)
                    .build()
            }
        };
        self.push(op, entry)
    }

    /// Queues `fdatasync(2)` (`data_only`) or `fsync(2)`. Not ordered against writes in flight: wait for those first.
    pub fn fsync(&mut self, file: File<'_>, data_only: bool, user_data: u64) -> Result<OpId, UringError> {
        let flags = if data_only {
            types::FsyncFlags::DATASYNC
        } else {
            types::FsyncFlags::empty()
        };
        let op = self.take_slot(user_data, None)?;
        let entry = match file {
            File::Fd(fd) => opcode::Fsync::new(types::Fd(fd.as_raw_fd())).flags(flags).build(),
            File::Registered(index) => opcode::Fsync::new(types::Fixed(index)).flags(flags).build(),
        };
        self.push(op, entry)
    }

    /// Queues `fallocate(2)` with `mode` (for example `FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE`).
    pub fn fallocate(
        &mut self,
        file: File<'_>,
        mode: i32,
        file_offset: u64,
        len: u64,
        user_data: u64,
    ) -> Result<OpId, UringError> {
        let op = self.take_slot(user_data, None)?;
        let entry = match file {
            File::Fd(fd) => opcode::Fallocate::new(types::Fd(fd.as_raw_fd()), len)
                .offset(file_offset)
                .mode(mode)
                .build(),
            File::Registered(index) => opcode::Fallocate::new(types::Fixed(index), len)
                .offset(file_offset)
                .mode(mode)
                .build(),
        };
        self.push(op, entry)
    }

    /// Queues a poll for `events` (`libc::POLLIN` and so on); the completion's result has the events that came.
    ///
    /// A multishot poll stays armed while its completions say `more`. It reports wake-ups, not levels: drain the
    /// descriptor after each completion, and look once after arming.
    pub fn poll_add(
        &mut self,
        file: File<'_>,
        events: i16,
        multishot: bool,
        user_data: u64,
    ) -> Result<OpId, UringError> {
        let events = u32::from(events.cast_unsigned());
        let op = self.take_slot(user_data, None)?;
        let entry = match file {
            File::Fd(fd) => opcode::PollAdd::new(types::Fd(fd.as_raw_fd()), events)
                .multi(multishot)
                .build(),
            File::Registered(index) => opcode::PollAdd::new(types::Fixed(index), events)
                .multi(multishot)
                .build(),
        };
        self.push(op, entry)
    }

    /// Queues a read of an eventfd: completes with result 8 once its count was non-zero, and has reset it. The count
    /// itself is not reported; a kick means "look", however many there were.
    pub fn read_eventfd(&mut self, file: File<'_>, user_data: u64) -> Result<OpId, UringError> {
        let op = self.take_slot(user_data, Some(self.counters.clone()))?;
        let address = self
            .counters
            .io_address(u64::from(op.slot) * 8, 8, true)
            .expect("the counters have eight bytes for each slot")
            .cast();
        let entry = match file {
            File::Fd(fd) => opcode::Read::new(types::Fd(fd.as_raw_fd()), address, 8)
                .offset(u64::MAX)
                .build(),
            File::Registered(index) => opcode::Read::new(types::Fixed(index), address, 8)
                .offset(u64::MAX)
                .build(),
        };
        self.push(op, entry)
    }

    /// Queues an operation that does nothing but complete.
    pub fn nop(&mut self, user_data: u64) -> Result<OpId, UringError> {
        let op = self.take_slot(user_data, None)?;
        self.push(op, opcode::Nop::new().build())
    }

    /// Queues the cancellation of an operation, which then completes with `ECANCELED`, or as it would have anyway. An
    /// operation that is over is left alone.
    pub fn cancel(&mut self, op: OpId) -> Result<(), UringError> {
        match self.slots.get(op.slot as usize) {
            Some(slot) if slot.in_flight && slot.generation == op.generation => {}
            _ => return Ok(()),
        }
        self.push_entry(
            opcode::AsyncCancel::new(op.to_user_data())
                .build()
                .user_data(CANCEL),
        )
    }

    /// Takes a free slot for an operation on `map`.
    fn take_slot(&mut self, user_data: u64, map: Option<Arc<SharedMap>>) -> Result<OpId, UringError> {
        let index = self.free.pop().ok_or(UringError::Full)?;
        let slot = &mut self.slots[index as usize];
        slot.generation = slot.generation.wrapping_add(1);
        slot.in_flight = true;
        slot.user_data = user_data;
        slot.map = map;
        self.in_flight += 1;
        Ok(OpId {
            slot: index,
            generation: slot.generation,
        })
    }

    fn release_slot(&mut self, index: u32) {
        let slot = &mut self.slots[index as usize];
        slot.in_flight = false;
        slot.map = None;
        self.free.push(index);
        self.in_flight -= 1;
    }

    /// Takes a slot and fills its iovecs from the spans. `writes_memory`: the kernel will write to the spans.
    fn prepare(
        &mut self,
        spans: &GuestSpans,
        user_data: u64,
        writes_memory: bool,
    ) -> Result<(OpId, &[libc::iovec]), UringError> {
        if spans.piece_count() > MAX_PIECES {
            return Err(UringError::TooManyPieces(spans.piece_count()));
        }
        let op = self.take_slot(user_data, Some(spans.map().clone()))?;
        let slot = &mut self.slots[op.slot as usize];
        slot.iovecs.clear();
        for (offset, len) in spans.iter() {
            let base = spans
                .map()
                .io_address(offset, len, writes_memory)
                .expect("a span lies in its own map");
            slot.iovecs.push(libc::iovec {
                iov_base: base,
                iov_len: len as usize,
            });
        }
        Ok((op, &self.slots[op.slot as usize].iovecs))
    }

    /// Queues the entry of a prepared slot; gives the slot back if that fails.
    fn push(&mut self, op: OpId, entry: squeue::Entry) -> Result<OpId, UringError> {
        match self.push_entry(entry.user_data(op.to_user_data())) {
            Ok(()) => Ok(op),
            Err(error) => {
                self.release_slot(op.slot);
                Err(error)
            }
        }
    }

    fn push_entry(&mut self, entry: squeue::Entry) -> Result<(), UringError> {
        for _ in 0..2 {
            // SAFETY: every pointer in the entry is an address in a map, or an iovec array, that the operation's slot
            // owns until its last completion was reaped (`reap`, `drop`); entries without pointers are trivially fine.
            if unsafe { self.ring.submission().push(&entry) }.is_ok() {
                return Ok(());
            }
            self.submit()?;
        }
        Err(UringError::Full)
    }

    /// Gives queued operations to the kernel without waiting.
    pub fn submit(&mut self) -> Result<(), HostError> {
        self.enter(0, None).map(|_| ())
    }

    /// Gives queued operations to the kernel and waits until `want` completions can be reaped, at most `timeout`.
    /// Returns early, without an error, on a signal and when the time is over. Skips the system call if there is nothing to submit
    /// and enough to reap.
    pub fn submit_and_wait(&mut self, want: usize, timeout: Option<Duration>) -> Result<(), HostError> {
        let ready = self.ring.completion().len();
        if ready >= want && self.ring.submission().is_empty() {
            return Ok(());
        }
        self.enter(want, timeout)
    }

    fn enter(&mut self, want: usize, timeout: Option<Duration>) -> Result<(), HostError> {
        let submitter = self.ring.submitter();
        let result = match timeout {
            Some(timeout) if want > 0 => {
                let timespec = types::Timespec::from(timeout);
                submitter.submit_with_args(want, &types::SubmitArgs::new().timespec(&timespec))
            }
            _ => submitter.submit_and_wait(want),
        };
        match result {
            Ok(_) => Ok(()),
            // ETIME: the time is over. EINTR: a signal. EBUSY: completions must be reaped first. EAGAIN: the kernel is
            // short of memory for requests and asks to come again. In each case what was not taken stays queued.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN)
                ) =>
            {
                Ok(())
            }
            Err(error) => Err(HostError::from_io("enter io_uring", &error)),
        }
    }

    /// The next completion, if one is ready. No system call.
    pub fn next_completion(&mut self) -> Option<Completion> {
        loop {
            let entry = self.ring.completion().next()?;
            if let Some(completion) = self.reap(&entry) {
                return Some(completion);
            }
        }
    }

    /// Finds the slot of a completion and frees it if it was the last one.
    fn reap(&mut self, entry: &cqueue::Entry) -> Option<Completion> {
        if entry.user_data() == CANCEL {
            return None;
        }
        let index = entry.user_data() as u32;
        let slot = self.slots.get(index as usize)?;
        assert!(slot.in_flight, "completion of an operation that is over");
        let user_data = slot.user_data;
        let more = cqueue::more(entry.flags());
        if !more {
            self.release_slot(index);
        }
        Some(Completion {
            user_data,
            result: entry.result(),
            more,
        })
    }
}

impl std::fmt::Debug for Uring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Uring")
            .field("slots", &self.slots.len())
            .field("in_flight", &self.in_flight)
            .finish()
    }
}

impl Drop for Uring {
    /// Cancels what is in flight and waits for it. Reads and writes of regular files cannot be cancelled once they have
    /// begun; they end when the disk answers.
    fn drop(&mut self) {
        let result = self.cancel_all();
        if result.is_err() {
            // The kernel may still write to these maps: better leaked than re-used.
            for slot in self.slots.iter_mut().filter(|slot| slot.in_flight) {
                std::mem::forget(slot.map.take());
                std::mem::forget(std::mem::take(&mut slot.iovecs));
            }
        }
    }
}

impl Uring {
    fn cancel_all(&mut self) -> Result<(), UringError> {
        let ops: Vec<_> = (0..self.slots.len() as u32)
            .map(|slot| OpId {
                slot,
                generation: self.slots[slot as usize].generation,
            })
            .collect();
        for op in ops {
            self.cancel(op)?;
            while self.next_completion().is_some() {}
        }
        while self.in_flight > 0 {
            self.submit_and_wait(1, None)?;
            while self.next_completion().is_some() {}
        }
        Ok(())
    }
}
