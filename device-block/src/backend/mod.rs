//! Where a disk's bytes are kept.
//!
//! ```text
//!   Work ──▶ engine.rs: slots, one Job each ──▶ Op ──▶ Backend::begin ──▶ io_uring, or done at once
//!                  ▲                                                        │
//!                  └──── Ended (bytes moved, or a fault) ◀── Job::on_result ◀── Backend::end
//! ```
//!
//! - [`job`] is the pure part: short transfers, requests given back, the end of a file.
//! - [`engine`] holds what is in flight.
//! - [`file`] keeps a disk in a regular file or on a block device, by io_uring on guest pages in place.
//! - [`memory`] keeps a disk in a memfd.
//! - [`fence`] proves that a dead predecessor's I/O is over.
//!
//! A write is answered when the kernel has it: nothing that was acknowledged lives in this process only, so a
//! crash of this process loses nothing. What a *host* crash may lose is what the guest has not flushed, as with
//! any disk that has a write cache.
//!
//! Not checked here: bounds and write protection (`crate::scsi::disk`).

pub mod engine;
#[cfg(test)]
pub(crate) mod faulty;
pub mod fence;
pub mod file;
pub mod job;
pub mod memory;

use job::Op;
use vmbus::mem::{GuestSpans, Uring};

/// What a medium is like, found out when it was opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes that guests may use; a multiple of the logical block length.
    pub size_bytes: u64,
    /// Smallest piece that the medium writes without reading first. Power of two, at least 512.
    pub physical_block_bytes: u32,
    /// Smallest piece that deallocation frees; `None` if the medium cannot deallocate.
    pub unmap_granularity_bytes: Option<u32>,
}

/// What became of an operation that was begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begun {
    /// The io_uring will complete it under the given number.
    InFlight,
    /// It is over, with this result: bytes, 0, or a negative errno.
    Over(i32),
    /// Something that it needs is in use by other operations: begin again when one of them is over.
    NoRoom,
}

/// A medium.
pub trait Backend {
    /// What it is like.
    fn geometry(&self) -> &Geometry;

    /// From now on it may be read and written: no predecessor does. Called once, before the first operation.
    fn serve(&mut self) {}

    /// Begins an operation. `data` is the whole request's data; the operation says which part it is about.
    fn begin(&mut self, io: &mut Uring, op: Op, data: Option<&GuestSpans>, number: u64) -> Begun;

    /// The operation with this number is over. Returns the result to go on with.
    fn end(&mut self, op: Op, data: Option<&GuestSpans>, number: u64, result: i32) -> i32;
}
