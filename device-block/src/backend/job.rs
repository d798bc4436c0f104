//! One request to the medium as a state machine: what to ask the kernel for next, and what its answer means.
//!
//! The kernel may do less than it was asked for (a short read or write), may give a request back (`EAGAIN`,
//! `EINTR`, `ECANCELED`), or may refuse. A job goes on until all is done or nothing more can be done; the number of
//! steps is bounded whatever the kernel answers.

use crate::scsi::disk::{BLOCK_BYTES, Extent};
use crate::scsi::sense::{Attempt, MediumFault};

/// Limit: how often in a row the kernel may give the same piece of work back without progress. In practice it
/// happens once, when a worker thread could not be made; a loop of it must not hold the guest for ever.
const MAX_TRIES: u8 = 8;

/// What is wanted of the medium.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Work {
    /// Fill the guest's pages from the extent.
    Read(Extent),
    /// Write the guest's pages to the extent.
    Write {
        /// Where to.
        extent: Extent,
        /// On stable storage before it is done.
        durable: bool,
    },
    /// Put everything that was written and completed on stable storage.
    Flush,
    /// Deallocate; the extents read as zeroes afterwards, or stay as they are if the medium cannot.
    Unmap(Vec<Extent>),
}

/// One operation of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Read `len` bytes at `offset_bytes` to the guest's data from byte `start` on.
    Read {
        /// Offset in the medium.
        offset_bytes: u64,
        /// Offset in the request's data.
        start: usize,
        /// Bytes.
        len: usize,
    },
    /// Write the same way.
    Write {
        /// Offset in the medium.
        offset_bytes: u64,
        /// Offset in the request's data.
        start: usize,
        /// Bytes.
        len: usize,
        /// On stable storage before it is done.
        durable: bool,
    },
    /// `fdatasync(2)`.
    Sync,
    /// Deallocate.
    Punch(Extent),
}

/// How a job ended: bytes moved, or what was tried and why it failed.
pub type Ended = Result<u64, (Attempt, MediumFault)>;

/// A request to the medium and how far it has come.
#[derive(Debug)]
pub struct Job {
    work: Work,
    /// Bytes moved, or extents deallocated.
    done: u64,
    tries: u8,
}

impl Job {
    /// A job that has not begun.
    pub fn new(work: Work) -> Self {
        Self {
            work,
            done: 0,
            tries: 0,
        }
    }

    /// What to ask for now; `None` if there is nothing left to do (an UNMAP of nothing).
    pub fn next_op(&self) -> Option<Op> {
        match &self.work {
            Work::Read(extent) => {
                let (offset_bytes, start, len) = self.rest(extent)?;
                Some(Op::Read {
                    offset_bytes,
                    start,
                    len,
                })
            }
            Work::Write { extent, durable } => {
                let (offset_bytes, start, len) = self.rest(extent)?;
                Some(Op::Write {
                    offset_bytes,
                    start,
                    len,
                    durable: *durable,
                })
            }
            Work::Flush if self.done == 0 => Some(Op::Sync),
            Work::Flush => None,
            Work::Unmap(extents) => usize::try_from(self.done)
                .ok()
                .and_then(|done| extents.get(done))
                .map(|extent| Op::Punch(*extent)),
        }
    }

    /// The kernel has answered the last [`Job::next_op`]: bytes, 0, or a negative errno. `None`: go on with
    /// [`Job::next_op`].
    pub fn on_result(&mut self, result: i32) -> Option<Ended> {
        match u32::try_from(result) {
            Ok(bytes) => self.on_progress(bytes),
            Err(_) => self.on_errno(result.checked_neg().unwrap_or(libc::EIO)),
        }
    }

    fn on_progress(&mut self, bytes: u32) -> Option<Ended> {
        let wanted = match &self.work {
            Work::Flush => return Some(Ok(0)),
            Work::Unmap(_) => {
                self.done += 1;
                self.tries = 0;
                return self.next_op().is_none().then_some(Ok(0));
            }
            Work::Read(extent) | Work::Write { extent, .. } => extent.len_bytes - self.done,
        };
        // More than was asked for is no answer of a kernel that works.
        if u64::from(bytes) > wanted {
            return Some(Err((self.attempt(), MediumFault::Errno(libc::EIO))));
        }
        // A part of a block is thrown away and moved again: operations begin at blocks, as O_DIRECT wants it.
        let blocks = u64::from(bytes - bytes % BLOCK_BYTES);
        if blocks == wanted {
            return Some(Ok(self.done + blocks));
        }
        if blocks > 0 {
            self.done += blocks;
            self.tries = 0;
            return None;
        }
        match &self.work {
            // Less than a block at a place that was in range when the disk was opened: the file ends here.
            Work::Read(_) => Some(Err((Attempt::Read, MediumFault::ShortFile))),
            _ => self.try_again(),
        }
    }

    fn on_errno(&mut self, errno: i32) -> Option<Ended> {
        match (errno, &self.work) {
            (libc::EINTR | libc::EAGAIN | libc::ECANCELED, _) => self.try_again(),
            // SBC-3 4.7.3.4: a device server may leave blocks mapped. Advisory where the medium cannot.
            (libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY, Work::Unmap(_)) => self.on_progress(0),
            _ => Some(Err((self.attempt(), MediumFault::Errno(errno)))),
        }
    }

    fn try_again(&mut self) -> Option<Ended> {
        self.tries += 1;
        (self.tries >= MAX_TRIES).then_some(Err((self.attempt(), MediumFault::GivenBack)))
    }

    fn attempt(&self) -> Attempt {
        match self.work {
            Work::Read(_) => Attempt::Read,
            Work::Write { .. } | Work::Flush => Attempt::Write,
            Work::Unmap(_) => Attempt::Unmap,
        }
    }

    /// What is left of a transfer: offset in the medium, offset in the data, bytes.
    fn rest(&self, extent: &Extent) -> Option<(u64, usize, usize)> {
        let offset_bytes = extent.offset_bytes.checked_add(self.done)?;
        let start = usize::try_from(self.done).ok()?;
        let len = usize::try_from(extent.len_bytes.checked_sub(self.done)?).ok()?;
        (len > 0).then_some((offset_bytes, start, len))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const EXTENT: Extent = Extent {
        offset_bytes: 8192,
        len_bytes: 4096,
    };

    fn read() -> Job {
        Job::new(Work::Read(EXTENT))
    }

    fn write() -> Job {
        Job::new(Work::Write {
            extent: EXTENT,
            durable: true,
        })
    }

    #[test]
    fn a_short_read_goes_on_where_it_stopped() {
        let mut job = read();
        assert_eq!(
            job.next_op(),
            Some(Op::Read {
                offset_bytes: 8192,
                start: 0,
                len: 4096
            })
        );
        assert_eq!(job.on_result(1024), None);
        assert_eq!(
            job.next_op(),
            Some(Op::Read {
                offset_bytes: 9216,
                start: 1024,
                len: 3072
            })
        );
        assert_eq!(job.on_result(3072), Some(Ok(4096)));
    }

    #[test]
    fn a_part_of_a_block_is_moved_again() {
        let mut job = write();
        assert_eq!(job.on_result(700), None);
        assert_eq!(
            job.next_op(),
            Some(Op::Write {
                offset_bytes: 8704,
                start: 512,
                len: 3584,
                durable: true
            })
        );
    }

    #[test]
    fn a_file_that_ends_early_is_a_short_file() {
        for last in [0, 188] {
            let mut job = read();
            assert_eq!(job.on_result(2048), None);
            assert_eq!(
                job.on_result(last),
                Some(Err((Attempt::Read, MediumFault::ShortFile)))
            );
        }
    }

    #[test]
    fn errors_end_a_job_with_the_errno() {
        assert_eq!(
            write().on_result(-libc::ENOSPC),
            Some(Err((Attempt::Write, MediumFault::Errno(libc::ENOSPC))))
        );
        assert_eq!(
            Job::new(Work::Flush).on_result(-libc::EIO),
            Some(Err((Attempt::Write, MediumFault::Errno(libc::EIO))))
        );
    }

    #[test]
    fn what_is_given_back_is_tried_again_a_few_times() {
        let mut job = read();
        let op = job.next_op();
        for _ in 1..MAX_TRIES {
            assert_eq!(job.on_result(-libc::EAGAIN), None);
            assert_eq!(job.next_op(), op);
        }
        assert_eq!(
            job.on_result(-libc::ECANCELED),
            Some(Err((Attempt::Read, MediumFault::GivenBack)))
        );
        let mut idle = write();
        for _ in 1..MAX_TRIES {
            assert_eq!(idle.on_result(0), None);
        }
        assert_eq!(
            idle.on_result(0),
            Some(Err((Attempt::Write, MediumFault::GivenBack)))
        );
    }

    #[test]
    fn unmap_goes_through_its_extents_and_is_advisory() {
        let mut job = Job::new(Work::Unmap(vec![EXTENT, EXTENT]));
        assert_eq!(job.next_op(), Some(Op::Punch(EXTENT)));
        assert_eq!(job.on_result(0), None);
        assert_eq!(job.on_result(-libc::EOPNOTSUPP), Some(Ok(0)));
        assert_eq!(Job::new(Work::Unmap(vec![])).next_op(), None);
        assert_eq!(
            Job::new(Work::Unmap(vec![EXTENT])).on_result(-libc::EIO),
            Some(Err((Attempt::Unmap, MediumFault::Errno(libc::EIO))))
        );
    }

    proptest! {
        /// Whatever the kernel answers, a job ends, and says that it moved all only if it did.
        #[test]
        fn every_job_ends(
            which in 0usize..4,
            answers in proptest::collection::vec(
                prop_oneof![
                    0i32..=4096, any::<i32>(), Just(-libc::EAGAIN), Just(-libc::EINTR), Just(0), Just(512)
                ],
                200,
            ),
        ) {
            let work = match which {
                0 => Work::Read(EXTENT),
                1 => Work::Write { extent: EXTENT, durable: false },
                2 => Work::Flush,
                _ => Work::Unmap(vec![EXTENT; 3]),
            };
            let mut job = Job::new(work);
            let mut moved = 0u64;
            let mut ended = None;
            for answer in answers {
                let Some(op) = job.next_op() else { break };
                let len = match op {
                    Op::Read { offset_bytes, start, len } | Op::Write { offset_bytes, start, len, .. } => {
                        prop_assert_eq!(start as u64, moved);
                        prop_assert_eq!(offset_bytes, EXTENT.offset_bytes + moved);
                        prop_assert_eq!(start + len, 4096);
                        len
                    }
                    Op::Sync | Op::Punch(_) => 0,
                };
                ended = job.on_result(answer);
                if ended.is_some() {
                    if let Some(Ok(bytes)) = ended
                        && which < 2
                    {
                        prop_assert_eq!(bytes, 4096);
                        prop_assert_eq!(answer as usize, len);
                    }
                    break;
                }
                if len > 0 && answer > 0 {
                    moved += (answer - answer % 512) as u64;
                }
            }
            prop_assert!(ended.is_some());
        }
    }
}
