//! Proof that the I/O of a dead predecessor is over.
//!
//! Two things must not happen after a successor has begun to replay: a write of the predecessor reaching the disk
//! (it could undo a newer one), and a read of the predecessor landing in guest pages (the guest may use them for
//! something else once the successor has answered). Reaping the process proves neither: an io_uring is torn down by
//! a kernel worker after its process is gone, and requests at a slow device go on until then.
//!
//! What proves both is a reference count of the kernel. Each server opens the journal memfd anew (an open file
//! description of its own), takes `flock(2)` LOCK_EX on it, and registers it with its io_uring. The lock goes
//! when the description goes (Linux 6.1 fs/locks.c `locks_remove_flock`, called from `__fput`), and the description goes
//! when the last of these has let go of it:
//! - the process's descriptor: at exit;
//! - the io_uring's table of registered files: in `io_ring_ctx_free` (Linux 6.1 io_uring/io_uring.c), which
//!   `io_ring_exit_work` calls only after every request has dropped its reference on the ring, that is after its
//!   completion.
//!
//! So whoever gets the lock knows that the predecessor is gone *and* that no request of its ring is in flight. The
//! lock does not depend on whether the supervisor hands the same descriptions to each generation, covers reads
//! and writes of all disks of the device, and needs no rights on the disks' files.
//!
//! A server that is told to stop waits for the end of its requests and then unlocks by itself, so that its successor
//! need not wait for the end of its process.
//!
//! Not covered: data that the kernel has taken but not written yet (page cache). The successor sees it there, as
//! everybody does. Nor requests that a *device* keeps after the kernel was told that they are over.
//!
//! Disks are locked, too, against two VMs on one image: exclusively, or shared if read-only. That lock belongs to
//! the description that the supervisor opened and says nothing about a predecessor.

use nix::errno::Errno;
use rustix::fs::{FlockOperation, Mode, OFlags, flock, open};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// Why there is no lock.
#[derive(Debug, thiserror::Error)]
pub enum FenceError {
    /// The journal cannot be opened anew.
    #[error("cannot open the journal anew: {0}")]
    Reopen(Errno),
    /// The kernel refused the lock.
    #[error("cannot lock {what}: {errno}")]
    Lock {
        /// What was to be locked.
        what: &'static str,
        /// The kernel's answer.
        errno: Errno,
    },
    /// Somebody else serves this disk.
    #[error("another program holds it locked: is another VM using it?")]
    DiskInUse,
}

/// The right to do I/O for a device. Given up by the kernel when this process and its io_uring are gone.
#[derive(Debug)]
pub struct Lease {
    journal: OwnedFd,
}

impl Lease {
    /// Opens the journal anew. To be called before the process locks itself in: it opens a path.
    pub fn open(journal: BorrowedFd<'_>) -> Result<Self, FenceError> {
        let path = format!("/proc/self/fd/{}", journal.as_raw_fd());
        let journal = open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
            .map_err(|errno| FenceError::Reopen(Errno::from_raw(errno.raw_os_error())))?;
        Ok(Self { journal })
    }

    /// What has to be registered with the io_uring before the first request.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.journal.as_fd()
    }

    /// Waits until the predecessor's process and its I/O are gone. At once if there is none.
    ///
    /// The wait is not interrupted by messages: it ends by itself once the predecessor is dead, and the
    /// supervisor starts a successor only then, or kills it.
    pub fn wait(&self) -> Result<(), FenceError> {
        lock("the journal", self.file(), FlockOperation::LockExclusive).map(|_| ())
    }

    /// Whether the lock was to be had without waiting.
    pub fn try_take(&self) -> Result<bool, FenceError> {
        lock(
            "the journal",
            self.file(),
            FlockOperation::NonBlockingLockExclusive,
        )
    }

    /// Gives the right up while the process still lives: it does no I/O any more, and none is in flight.
    pub fn release(&self) -> Result<(), FenceError> {
        lock("the journal", self.file(), FlockOperation::Unlock).map(|_| ())
    }
}

/// Gives up what [`lock_disk`] took.
pub fn unlock_disk(disk: BorrowedFd<'_>) -> Result<(), FenceError> {
    lock("the disk", disk, FlockOperation::Unlock).map(|_| ())
}

/// Locks a disk against other VMs. `wait`: until its holder lets go; else it is an error if there is one.
pub fn lock_disk(disk: BorrowedFd<'_>, read_only: bool, wait: bool) -> Result<(), FenceError> {
    let operation = match (read_only, wait) {
        (false, true) => FlockOperation::LockExclusive,
        (false, false) => FlockOperation::NonBlockingLockExclusive,
        (true, true) => FlockOperation::LockShared,
        (true, false) => FlockOperation::NonBlockingLockShared,
    };
    match lock("the disk", disk, operation)? {
        true => Ok(()),
        false => Err(FenceError::DiskInUse),
    }
}

fn lock(what: &'static str, file: BorrowedFd<'_>, operation: FlockOperation) -> Result<bool, FenceError> {
    loop {
        match flock(file, operation) {
            Ok(()) => return Ok(true),
            Err(rustix::io::Errno::WOULDBLOCK) => return Ok(false),
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => {
                return Err(FenceError::Lock {
                    what,
                    errno: Errno::from_raw(errno.raw_os_error()),
                });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmbus::mem::{File, Uring, sealed_memfd};

    #[test]
    fn the_lease_is_held_by_one_at_a_time_whatever_descriptor_they_were_given() {
        let journal = sealed_memfd("journal", 4096).unwrap();
        let first = Lease::open(journal.as_fd()).unwrap();
        let second = Lease::open(journal.as_fd()).unwrap();
        assert!(first.try_take().unwrap());
        assert!(!second.try_take().unwrap());
        drop(first);
        assert!(second.try_take().unwrap());
    }

    #[test]
    fn the_lease_outlives_its_descriptor_while_an_io_uring_has_it() {
        let journal = sealed_memfd("journal", 4096).unwrap();
        let dying = Lease::open(journal.as_fd()).unwrap();
        assert!(dying.try_take().unwrap());
        let mut io = Uring::new(4).unwrap();
        io.register_files(&[dying.file()]).unwrap();
        // Something that is in flight for ever: a poll of a pipe that nobody writes to.
        let (reader, _writer) = nix::unistd::pipe().unwrap();
        io.poll_add(File::Fd(reader.as_fd()), libc::POLLIN, false, 1)
            .unwrap();
        io.submit().unwrap();
        drop(dying);
        let successor = Lease::open(journal.as_fd()).unwrap();
        assert!(!successor.try_take().unwrap(), "the ring still holds the lease");
        drop(io);
        // The kernel frees the ring in the background; the successor waits for exactly that.
        successor.wait().unwrap();
    }

    #[test]
    fn two_vms_may_share_a_disk_only_to_read() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open_anew = || {
            OwnedFd::from(
                std::fs::OpenOptions::new()
                    .read(true)
                    .write(true)
                    .open(file.path())
                    .unwrap(),
            )
        };
        let (a, b, c) = (open_anew(), open_anew(), open_anew());
        lock_disk(a.as_fd(), true, false).unwrap();
        lock_disk(b.as_fd(), true, false).unwrap();
        assert!(matches!(
            lock_disk(c.as_fd(), false, false),
            Err(FenceError::DiskInUse)
        ));
    }
}
