#![forbid(unsafe_code)]
//! Locks on a disk: which VM has it, and whether the I/O of a dead server on it is over.
//!
//! # The locks
//! Both are byte-range locks (`fcntl(2)`), on bytes far behind any data; they hinder nobody who does not ask.
//! - *Owner*, one byte for all: held by the supervisor on a description of its own for as long as its VM lives, whatever
//!   happens to servers. Alone to write, together with others to read.
//! - *Lease*, one byte for each device of each VM: held by the server that does I/O, on a description that was opened for
//!   this generation and that nobody else keeps. The byte is the number of the device's journal.
//!
//! The owner's is a lock of the *open file description* (Linux 3.15, F_OFD_SETLK). Such a lock goes when its description goes
//! (Linux 6.1 fs/locks.c `locks_remove_file`, called from `__fput`), whichever process took it, and not before. A lease is
//! one of those, or one of the *process* (F_SETLK): see [`Holder`].
//!
//! A disk that is only read has no lease: other VMs may read it, too, and a lease on a description that cannot write is a
//! lock that any of their servers could have on any byte and never give back. No tenant may keep another one's disk waiting.
//!
//! # What a lease proves
//! When a lease is free, no request of its holder is in flight, neither one that writes to the disk nor one that reads
//! into guest memory.
//!
//! [`Holder::Description`]: a description lives as long as one of these refers to it:
//! - a table of descriptors. It belongs to the process and to the kernel's workers for its io_uring, which are threads of
//!   it; the last of them to end closes it.
//! - a request of an io_uring, from its start until its completion, if it names the file by descriptor and not by an
//!   index of registered files (Linux 6.1 io_uring/io_uring.c `io_file_get_normal`, `io_put_file`). A request that waits for a worker
//!   may have no reference yet; then only the table above could still give it one. Linked and drained requests, which get
//!   theirs later still, are not made by [`crate::mem::Uring`].
//! - a system call of a thread that reads or writes.
//! - a message under way that carries the descriptor. The supervisor sends one, and the server has it before it serves.
//!
//! [`Holder::Process`]: the lock goes when the table of descriptors is closed (fs/open.c `filp_close`,
//! `locks_remove_posix`), whatever requests still refer to the description. No thread of the process does anything for a
//! request then. So this is enough where nobody else does, and that is cached I/O: bytes go between the page cache and
//! guest memory in a system call or a worker of the io_uring, and so do flushes and holes, which wait for what they have
//! given to the block layer. A read that waits for a page of the cache has nobody who would copy it any more; the kernel
//! gives it up. The workers must be threads of the process ([`crate::mem::Uring::workers_are_threads`], Linux 5.12).
//!
//! The description would prove the same there, but later: a request whose end the dying process does not see any
//! more is let go of by a worker of the kernel, and its file by another, each in its next tick or the one after (io_uring/
//! io_uring.c `io_fallback_tw`, fs/file_table.c `delayed_fput`: 5 to 12 ms at 250 Hz). The guest waits for that.
//!
//! Of what [`proves_end`] does not know, it is not certain that locks are the kernel's own, or that a request's end is that
//! of the I/O: such disks are fenced by the end of the whole io_uring (`device-block/src/backend/fence.rs`), which takes
//! tens of milliseconds more.
//!
//! Not covered, here or there: data that the kernel has taken but not written yet (page cache; the successor sees it
//! there, as everybody does), and requests that a device keeps after it has told the kernel that they are over.

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use rustix::fs::fstatfs;
use std::os::fd::BorrowedFd;

/// Behind any data: Linux limits files to less on every file system that [`proves_end`] knows.
const OWNER_BYTE: i64 = 1 << 62;
const FIRST_LEASE: i64 = OWNER_BYTE + 1;
const LEASES: i64 = i64::MAX - FIRST_LEASE;

/// Bytes that are locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    start: i64,
    len: i64,
}

impl Place {
    const OWNER: Self = Self {
        start: OWNER_BYTE,
        len: 1,
    };
    const ALL_LEASES: Self = Self {
        start: FIRST_LEASE,
        len: LEASES,
    };

    /// The lease of the device with this journal. Memfds that exist at the same time have different numbers; if two had the
    /// same one, a successor would wait too long, never too short.
    pub fn lease(journal: BorrowedFd<'_>) -> Result<Self, Errno> {
        let number = nix::sys::stat::fstat(journal)?.st_ino % LEASES.unsigned_abs();
        Ok(Self {
            start: FIRST_LEASE.saturating_add_unsigned(number),
            len: 1,
        })
    }

    fn lock(self, kind: i32) -> libc::flock {
        libc::flock {
            l_type: kind as i16,
            l_whence: libc::SEEK_SET as i16,
            l_start: self.start,
            l_len: self.len,
            // What the kernel wants here for locks of descriptions.
            l_pid: 0,
        }
    }
}

/// Whose lock a lease is, and so what ends it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holder {
    /// The end of the last request on the description. For direct I/O, which devices go on with after the process.
    Description,
    /// The end of the last thread of the process. For cached I/O, and no other.
    ///
    /// A process that closes any descriptor of the disk loses the lock, too: not before its end, therefore.
    Process,
}

/// Shared on a description that cannot write, else for one alone.
fn kind(disk: BorrowedFd<'_>) -> Result<i32, Errno> {
    let flags = OFlag::from_bits_retain(fcntl(disk, FcntlArg::F_GETFL)?);
    Ok(match flags & OFlag::O_ACCMODE {
        OFlag::O_RDONLY => libc::F_RDLCK,
        _ => libc::F_WRLCK,
    })
}

/// Makes the VM of this description the disk's owner: the only one, or one of several if the description can only read.
/// `false`: another VM is, or a server of one that has just ended is not done.
pub fn own(disk: BorrowedFd<'_>) -> Result<bool, Errno> {
    let kind = kind(disk)?;
    Ok(try_lock(disk, Place::OWNER, Holder::Description)? && !is_locked(disk, Place::ALL_LEASES, kind)?)
}

/// Takes a lock without waiting. `false`: somebody else has it. Taking it again is no mistake.
pub fn try_lock(disk: BorrowedFd<'_>, place: Place, holder: Holder) -> Result<bool, Errno> {
    match set(disk, &place.lock(kind(disk)?), holder) {
        Ok(()) => Ok(true),
        // POSIX allows both.
        Err(Errno::EAGAIN | Errno::EACCES) => Ok(false),
        Err(errno) => Err(errno),
    }
}

/// Gives a lock back. Without one it does nothing.
pub fn unlock(disk: BorrowedFd<'_>, place: Place, holder: Holder) -> Result<(), Errno> {
    set(disk, &place.lock(libc::F_UNLCK), holder)
}

fn set(disk: BorrowedFd<'_>, lock: &libc::flock, holder: Holder) -> Result<(), Errno> {
    let argument = match holder {
        Holder::Description => FcntlArg::F_OFD_SETLK(lock),
        Holder::Process => FcntlArg::F_SETLK(lock),
    };
    fcntl(disk, argument).map(|_| ())
}

/// Whether another description has a lock in `place` beside which one of this kind cannot be. Takes nothing.
fn is_locked(disk: BorrowedFd<'_>, place: Place, kind: i32) -> Result<bool, Errno> {
    let mut lock = place.lock(kind);
    fcntl(disk, FcntlArg::F_OFD_GETLK(&mut lock))?;
    Ok(i32::from(lock.l_type) != libc::F_UNLCK)
}

/// Whether nobody holds the lease any more, not even to read: no I/O of the server that had it is in flight.
pub fn is_free(disk: BorrowedFd<'_>, lease: Place) -> Result<bool, Errno> {
    is_locked(disk, lease, libc::F_WRLCK).map(|locked| !locked)
}

/// Whether a free lease of this disk proves that I/O is over: if it can be written, and is a block device or on a file system
/// of this host that leaves locks to the kernel and holds a request until the block layer, or the copy to the page
/// cache, is done with it.
pub fn proves_end(disk: BorrowedFd<'_>) -> bool {
    if kind(disk) != Ok(libc::F_WRLCK) {
        return false;
    }
    // linux/magic.h. Btrfs, ext2 to ext4, F2FS, overlayfs (its requests hold the file above and the one below), tmpfs, XFS.
    const LOCAL: [u32; 6] = [
        0x9123_683E,
        0x0000_EF53,
        0xF2F5_2010,
        0x794C_7630,
        0x0102_1994,
        0x5846_5342,
    ];
    let Ok(stat) = nix::sys::stat::fstat(disk) else {
        return false;
    };
    match stat.st_mode & libc::S_IFMT {
        libc::S_IFBLK => true,
        // The kernel's type for it differs between architectures; magic numbers have 32 bits.
        libc::S_IFREG => fstatfs(disk).is_ok_and(|system| LOCAL.contains(&(system.f_type as u32))),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mem::sealed_memfd;
    use std::os::fd::{AsFd, OwnedFd};
    use std::path::Path;

    fn open(path: &Path, write: bool) -> OwnedFd {
        let mut options = std::fs::OpenOptions::new();
        options
            .read(true)
            .write(write)
            .open(path)
            .expect("the file opens")
            .into()
    }

    fn disk() -> tempfile::NamedTempFile {
        let disk = tempfile::NamedTempFile::new().expect("a temporary file");
        disk.as_file().set_len(1 << 20).expect("its length can be set");
        disk
    }

    fn lease() -> Place {
        let journal = sealed_memfd("journal", 4096).expect("a memfd");
        Place::lease(journal.as_fd()).expect("a place")
    }

    #[test]
    fn a_disk_that_is_written_has_one_owner() {
        let disk = disk();
        let [first, second, reader] = [true, true, false].map(|write| open(disk.path(), write));
        assert_eq!(own(first.as_fd()), Ok(true));
        assert_eq!(own(second.as_fd()), Ok(false));
        assert_eq!(own(reader.as_fd()), Ok(false));
        drop(first);
        assert_eq!(own(second.as_fd()), Ok(true));
    }

    #[test]
    fn readers_share_a_disk_and_keep_writers_out() {
        let disk = disk();
        let [first, second, writer] = [false, false, true].map(|write| open(disk.path(), write));
        assert_eq!(own(first.as_fd()), Ok(true));
        assert_eq!(own(second.as_fd()), Ok(true));
        assert_eq!(own(writer.as_fd()), Ok(false));
    }

    #[test]
    fn a_lease_that_outlives_its_vm_keeps_others_from_owning_the_disk() {
        let disk = disk();
        let [server, owner, reader] = [true, true, false].map(|write| open(disk.path(), write));
        let place = lease();
        assert_eq!(try_lock(server.as_fd(), place, Holder::Description), Ok(true));
        assert_eq!(own(owner.as_fd()), Ok(false));
        assert_eq!(own(reader.as_fd()), Ok(false));
        unlock(server.as_fd(), place, Holder::Description).expect("given back");
        drop(owner);
        assert_eq!(own(reader.as_fd()), Ok(true));
    }

    #[test]
    fn successors_compete_for_a_lease_and_devices_do_not() {
        let disk = disk();
        let [old, new, other, owner] = [false; 4].map(|write| open(disk.path(), write));
        let (journal, another) = (
            sealed_memfd("journal", 4096).expect("a memfd"),
            sealed_memfd("another", 4096).expect("a memfd"),
        );
        let place = Place::lease(journal.as_fd()).expect("a place");
        assert_eq!(try_lock(old.as_fd(), place, Holder::Description), Ok(true));
        assert_eq!(
            is_free(owner.as_fd(), place),
            Ok(false),
            "a reader's lease is seen"
        );
        let others = Place::lease(another.as_fd()).expect("a place");
        assert_ne!(place, others);
        assert_eq!(try_lock(other.as_fd(), others, Holder::Description), Ok(true));
        drop(old);
        assert_eq!(is_free(owner.as_fd(), place), Ok(true));
        assert_eq!(try_lock(new.as_fd(), place, Holder::Description), Ok(true));
    }

    #[test]
    fn a_process_has_no_lease_once_it_has_closed_the_disk_whatever_refers_to_the_description() {
        let disk = disk();
        let [server, successor, owner] = [true; 3].map(|write| open(disk.path(), write));
        let in_flight = server.try_clone().expect("a duplicate");
        let place = lease();
        assert_eq!(try_lock(server.as_fd(), place, Holder::Process), Ok(true));
        let later = |holder| try_lock(successor.as_fd(), place, holder);
        assert_eq!(later(Holder::Description), Ok(false));
        assert_eq!(is_free(owner.as_fd(), place), Ok(false));
        assert_eq!(own(owner.as_fd()), Ok(false));
        drop(server);
        assert_eq!(later(Holder::Description), Ok(true));
        drop(in_flight);
    }

    #[test]
    fn a_process_gives_its_lease_back() {
        let disk = disk();
        let [server, owner] = [true; 2].map(|write| open(disk.path(), write));
        let place = lease();
        assert_eq!(try_lock(server.as_fd(), place, Holder::Process), Ok(true));
        unlock(server.as_fd(), place, Holder::Process).expect("given back");
        assert_eq!(is_free(owner.as_fd(), place), Ok(true));
    }

    #[test]
    fn a_disk_that_others_may_read_proves_nothing() {
        let disk = disk();
        assert!(proves_end(open(disk.path(), true).as_fd()));
        assert!(!proves_end(open(disk.path(), false).as_fd()));
    }

    #[test]
    fn file_systems_of_other_hosts_and_of_programs_prove_nothing() {
        assert!(proves_end(sealed_memfd("tmpfs", 4096).expect("a memfd").as_fd()));
        // Both can be written: it is not that which they lack.
        for path in ["/proc/self/comm", "/dev/null"] {
            assert!(!proves_end(open(Path::new(path), true).as_fd()), "{path}");
        }
    }
}
