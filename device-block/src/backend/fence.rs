//! Proof that the I/O of a dead predecessor is over.
//!
//! Two things must not happen after a successor has begun to replay: a write of the predecessor reaching the disk
//! (it could undo a newer one), and a read of the predecessor landing in guest pages (the guest may use them for
//! something else once the successor has answered). Reaping the process proves neither: requests of an io_uring at a slow
//! device go on after it.
//!
//! What proves both are locks that the kernel gives up by itself, when it has closed the file that they are on:
//!
//! | lock | goes when |
//! | --- | --- |
//! | `fcntl` on each disk, in whose description each generation is alone ([`vmbus::lease`]) | the process has closed it, and, of direct I/O, no request on it is in flight |
//! | `flock` on the journal, opened anew here | the process has closed it and, if a disk's file system is not known to prove anything, its io_uring was torn down |
//!
//! That last case: such disks are registered with the io_uring, and so is the journal. The kernel lets go of registered
//! files in `io_ring_ctx_free` (Linux 6.1 io_uring/io_uring.c), which `io_ring_exit_work` calls only after every request has
//! dropped its reference on the ring, that is after its completion. It takes some tens of milliseconds, nearly all of
//! it spent waiting for all processors (RCU). So the other disks are not registered: with them, too, the guest would wait
//! for that.
//!
//! So whoever has all the locks knows that the predecessor is gone *and* that none of its requests is in flight.
//!
//! A server that is told to stop waits for the end of its requests and then unlocks by itself, so that its successor
//! need not wait for the end of its process.
//!
//! Other VMs are kept away from a disk by the supervisor.

use nix::errno::Errno;
use rustix::fs::{FlockOperation, Mode, OFlags, flock, open};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use vmbus::lease::{self, Holder, Place};

/// Why there is no lock.
#[derive(Debug, thiserror::Error)]
pub enum FenceError {
    /// The journal cannot be opened anew.
    #[error("cannot open the journal anew: {0}")]
    Reopen(Errno),
    /// A disk's descriptor cannot be duplicated.
    #[error("cannot duplicate a disk's descriptor: {0}")]
    Duplicate(std::io::Error),
    /// The kernel refused the lock.
    #[error("cannot lock {what}: {errno}")]
    Lock {
        /// What was to be locked.
        what: &'static str,
        /// The kernel's answer.
        errno: Errno,
    },
}

/// The right to do I/O for a device. Given up by the kernel when all I/O of this process is over.
#[derive(Debug)]
pub struct Fence {
    journal: OwnedFd,
    place: Place,
    /// Those that prove the end of their I/O themselves.
    disks: Vec<(OwnedFd, Holder)>,
}

impl Fence {
    /// Opens the journal anew. To be called before the process locks itself in: it opens a path.
    pub fn new(journal: BorrowedFd<'_>) -> Result<Self, FenceError> {
        let path = format!("/proc/self/fd/{}", journal.as_raw_fd());
        let journal = open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
            .map_err(|errno| FenceError::Reopen(Errno::from_raw(errno.raw_os_error())))?;
        let place = Place::lease(journal.as_fd()).map_err(FenceError::Reopen)?;
        Ok(Self {
            journal,
            place,
            disks: Vec::new(),
        })
    }

    /// One of those of which [`lease::proves_end`] says so. To be called before [`Self::try_take`].
    pub fn add(&mut self, disk: BorrowedFd<'_>, holder: Holder) -> Result<(), FenceError> {
        // A duplicate: description and process, whose lock it will be, stay the same.
        let disk = disk.try_clone_to_owned().map_err(FenceError::Duplicate)?;
        self.disks.push((disk, holder));
        Ok(())
    }

    /// What has to be registered with the io_uring before the first request, if a disk is.
    pub fn journal(&self) -> BorrowedFd<'_> {
        self.journal.as_fd()
    }

    /// Takes what it can without waiting. `true`: everything; the predecessor's process and its I/O are gone.
    pub fn try_take(&self) -> Result<bool, FenceError> {
        let mut all = flock_journal(self.journal(), FlockOperation::NonBlockingLockExclusive)?;
        for (disk, holder) in &self.disks {
            all &= lease::try_lock(disk.as_fd(), self.place, *holder).map_err(disk_error)?;
        }
        Ok(all)
    }

    /// Gives the right up while the process still lives: it does no I/O any more, and none is in flight.
    pub fn release(&self) -> Result<(), FenceError> {
        for (disk, holder) in &self.disks {
            lease::unlock(disk.as_fd(), self.place, *holder).map_err(disk_error)?;
        }
        flock_journal(self.journal(), FlockOperation::Unlock).map(|_| ())
    }
}

fn disk_error(errno: Errno) -> FenceError {
    FenceError::Lock {
        what: "a disk",
        errno,
    }
}

fn flock_journal(file: BorrowedFd<'_>, operation: FlockOperation) -> Result<bool, FenceError> {
    loop {
        match flock(file, operation) {
            Ok(()) => return Ok(true),
            Err(rustix::io::Errno::WOULDBLOCK) => return Ok(false),
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => {
                return Err(FenceError::Lock {
                    what: "the journal",
                    errno: Errno::from_raw(errno.raw_os_error()),
                });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};
    use vmbus::mem::{File, Uring, sealed_memfd};

    fn reopened(file: &tempfile::NamedTempFile) -> OwnedFd {
        let mut options = std::fs::OpenOptions::new();
        let file = options.read(true).write(true).open(file.path());
        file.expect("the file opens").into()
    }

    fn fence(journal: &OwnedFd, disk: &OwnedFd) -> Fence {
        let mut fence = Fence::new(journal.as_fd()).expect("the journal opens anew");
        fence
            .add(disk.as_fd(), Holder::Description)
            .expect("the disk can be asked");
        fence
    }

    #[test]
    fn one_server_at_a_time_has_the_right_whatever_descriptor_of_the_journal_it_was_given() {
        let journal = sealed_memfd("journal", 4096).expect("a memfd");
        let first = Fence::new(journal.as_fd()).expect("the journal opens anew");
        let second = Fence::new(journal.as_fd()).expect("the journal opens anew");
        assert!(first.try_take().expect("the kernel answers"));
        assert!(!second.try_take().expect("the kernel answers"));
        drop(first);
        assert!(second.try_take().expect("the kernel answers"));
    }

    #[test]
    fn a_disk_that_is_still_held_keeps_the_successor_waiting_though_the_journal_is_free() {
        let journal = sealed_memfd("journal", 4096).expect("a memfd");
        let file = tempfile::NamedTempFile::new().expect("a file");
        let (old, new) = (reopened(&file), reopened(&file));
        let dying = fence(&journal, &old);
        assert!(dying.try_take().expect("the kernel answers"));
        let successor = fence(&journal, &new);
        drop(dying);
        // `old` stands for a request in flight: it refers to the description.
        assert!(!successor.try_take().expect("the kernel answers"));
        drop(old);
        assert!(successor.try_take().expect("the kernel answers"));
    }

    #[test]
    fn a_server_that_stops_gives_everything_up() {
        for holder in [Holder::Description, Holder::Process] {
            let journal = sealed_memfd("journal", 4096).expect("a memfd");
            let file = tempfile::NamedTempFile::new().expect("a file");
            let (old, new) = (reopened(&file), reopened(&file));
            let mut stopping = Fence::new(journal.as_fd()).expect("the journal opens anew");
            stopping.add(old.as_fd(), holder).expect("the disk can be asked");
            let successor = fence(&journal, &new);
            assert!(stopping.try_take().expect("the kernel answers"));
            assert!(!successor.try_take().expect("the kernel answers"));
            stopping.release().expect("given up");
            assert!(successor.try_take().expect("the kernel answers"));
        }
    }

    #[test]
    fn the_journals_lock_outlives_its_descriptor_while_an_io_uring_has_it() {
        let journal = sealed_memfd("journal", 4096).expect("a memfd");
        let dying = Fence::new(journal.as_fd()).expect("the journal opens anew");
        assert!(dying.try_take().expect("the kernel answers"));
        let mut io = Uring::new(4).expect("a ring");
        io.register_files(&[dying.journal()]).expect("registered");
        // Something that is in flight for ever: a poll of a pipe that nobody writes to.
        let (reader, _writer) = nix::unistd::pipe().expect("a pipe");
        io.poll_add(File::Fd(reader.as_fd()), libc::POLLIN, false, 1)
            .expect("there is room");
        io.submit().expect("submitted");
        drop(dying);
        let successor = Fence::new(journal.as_fd()).expect("the journal opens anew");
        assert!(
            !successor.try_take().expect("the kernel answers"),
            "the ring still holds the lease"
        );
        drop(io);
        // The kernel frees the ring in the background, and there is no event for it.
        let deadline = Instant::now() + Duration::from_secs(30);
        while !successor.try_take().expect("the kernel answers") {
            assert!(
                Instant::now() < deadline,
                "the ring is gone, and the lease is held"
            );
            std::thread::yield_now();
        }
    }
}
